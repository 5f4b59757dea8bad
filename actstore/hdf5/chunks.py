"""Owns the bytes of an HDF5 chunk: what the filters shuffle, deflate or Zstd, and fletcher32 make.

We run them and not HDF5, whose filters work in one thread and whose deflate searches mantissas for
repeats that they don't have. Every HDF5 decodes what is made here: a chunk is one zlib stream (or
one Zstandard frame) of the elements' byte planes, one after the other, and its checksum. Each
plane is a part of the stream by itself: one of a single value is a run, one that is noise is
stored, and of every other the entropy is coded and repeats are not looked for, as in ``codecs``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numpy as np
import zstandard
from numpy.typing import NDArray

from actstore import codecs
from actstore.errors import ConfigError

__all__ = ["COMPRESSIONS", "ChunkError", "check_compression", "decode", "encode", "fletcher32"]

Bytes = NDArray[np.uint8]

#: Name in the API -> id of the HDF5 filter that decompresses; None: there is none.
COMPRESSIONS: Final[dict[str, int | None]] = {"gzip": 1, "zstd": 32015, "none": None}
#: What a chunk may have more than its elements.
SLACK: Final = 1 << 16

_ZLIB_HEADER: Final = b"\x78\x01"  # deflate, 32 KiB window, fastest
_SUM: Final = struct.Struct("<I")
_WORDS: Final = 4096  # of a row of the table that the checksum adds up
_PIECE: Final = _WORDS << 9  # whose sums have 32 bits, and their weighted sums 63


class ChunkError(Exception):
    """A chunk's bytes don't decode to its elements."""


def check_compression(name: object) -> str:
    """Give a compression's name back if it is one; raise a `ConfigError` if not."""
    if not isinstance(name, str) or name not in COMPRESSIONS:
        msg = f"compression must be one of {', '.join(map(repr, COMPRESSIONS))}; got {name!r}"
        raise ConfigError(msg)
    return name


def encode(data: Bytes, itemsize: int, compression: str, *, repeats: bool = False) -> bytes:
    """Encode a chunk.

    Parameters
    ----------
    data : numpy.ndarray
        uint8 [n], contiguous: whole elements, little-endian.
    itemsize : int
        Bytes of one.
    compression : {"gzip", "zstd", "none"}
        What compresses them.
    repeats : bool
        Whether to look for rows that were there before.

    Returns
    -------
    bytes
        What HDF5 has for the chunk: to be written as it is.
    """
    if compression == "none":
        body: bytes = data.tobytes()
    elif compression == "gzip":
        body = _deflate(data, itemsize, repeats)
    else:
        body = _zstd(data, itemsize, repeats)
    return body + _SUM.pack(fletcher32(body))


def decode(encoded: bytes | memoryview, out: Bytes, itemsize: int, compression: str) -> None:
    """Decode a chunk into memory of just its size; no more than that is taken for it.

    Raises
    ------
    ChunkError
        It isn't what `encode` makes of so many bytes, or its checksum doesn't match.
    """
    body = memoryview(encoded)[: -_SUM.size]
    if len(encoded) < _SUM.size or _SUM.pack(fletcher32(body)) != encoded[-_SUM.size :]:
        msg = "its bytes don't match their checksum"
        raise ChunkError(msg)
    if compression == "none":
        if len(body) != out.nbytes:
            msg = f"it has {len(body)} bytes, not {out.nbytes}"
            raise ChunkError(msg)
        out[:] = np.frombuffer(body, np.uint8)
        return
    found = (_inflate if compression == "gzip" else _unzstd)(body, out.nbytes)
    if len(found) != out.nbytes:
        msg = f"it decompresses to {len(found)} bytes, not {out.nbytes}"
        raise ChunkError(msg)
    _join_planes(np.frombuffer(found, np.uint8), out, itemsize)


def same(encoded: bytes, data: Bytes, itemsize: int, compression: str) -> bool:
    """Whether a chunk decodes, by zlib's or Zstandard's own decoder, to what it was made of."""
    out = codecs.scratch("decoded", data.nbytes)
    try:
        decode(encoded, out, itemsize, compression)
    except ChunkError:
        return False
    return np.array_equal(out, data)


# -- checksum -----------------------------------------------------------------------------------


def fletcher32(data: bytes | memoryview) -> int:
    """Give the checksum of HDF5's filter of this name: two sums, modulo 65535, of 16-bit words.

    The words are big-endian. Their order doesn't matter but at the end: swapping the bytes of a
    number is multiplying it by 256, modulo 65535.
    """
    one = two = 0
    for start in range(0, len(data) // 2, _PIECE):
        words = np.frombuffer(data, "<u2", min(_PIECE, len(data) // 2 - start), 2 * start)
        here, weighted = _sums(words)
        one, two = one + here, two + len(words) * one + weighted
    one, two = 256 * one, 256 * two
    if len(data) % 2:
        one += data[-1] << 8
        two += one
    return _folded(two) << 16 | _folded(one)


def _sums(words: NDArray[np.uint16]) -> tuple[int, int]:
    """Give the sum of words, and that of each times how many there are from it on.

    In a table of words the latter are the sums of rows and columns, weighted.
    """
    count = len(words)
    rows = count // _WORDS
    table = words[: rows * _WORDS].reshape(rows, _WORDS).astype(np.uint32)
    rest = words[rows * _WORDS :].astype(np.int64)
    across = table.sum(1, dtype=np.uint32).astype(np.int64)
    down = table.sum(0, dtype=np.uint32).astype(np.int64)
    weighted = across @ (count - _WORDS * np.arange(rows)) - down @ np.arange(_WORDS)
    weighted += rest @ np.arange(len(rest), 0, -1)
    return int(across.sum() + rest.sum()), int(weighted)


def _folded(number: int) -> int:
    """Give a sum modulo 65535 as HDF5 has it: 0 only of nothing but zeros."""
    return (number - 1) % 0xFFFF + 1 if number else 0


# -- planes -------------------------------------------------------------------------------------


def _planes(data: Bytes, itemsize: int) -> Bytes:
    """Give the byte planes of elements, one after the other."""
    if itemsize == 1:
        return data
    found = codecs.scratch("planes", data.nbytes)
    length = data.nbytes // itemsize
    for place in range(itemsize):
        codecs.take_plane(found[place * length : (place + 1) * length], data, itemsize, place)
    return found


def _join_planes(planes: Bytes, out: Bytes, itemsize: int) -> None:
    if itemsize == 1:
        out[:] = planes
        return
    kind = {2: "<u2", 4: "<u4", 8: "<u8"}.get(itemsize)
    apart = planes.reshape(itemsize, -1)
    if kind is None:
        out.reshape(-1, itemsize)[...] = apart.T
        return
    words = out.view(kind)  # by shifts, which is faster than by strides
    np.copyto(words, apart[-1])
    for plane in apart[-2::-1]:
        words <<= 8
        words |= plane


# -- compression --------------------------------------------------------------------------------


def _deflate(data: Bytes, itemsize: int, repeats: bool) -> bytes:
    planes = _planes(data, itemsize)
    length = data.nbytes // itemsize
    constants = codecs.constants(data, itemsize)
    parts = [_ZLIB_HEADER]
    for place in range(itemsize):
        last = place == itemsize - 1
        if place in constants:
            parts.append(_constant(constants[place], length, last))
            continue
        level, strategy = 1, zlib.Z_DEFAULT_STRATEGY if repeats else zlib.Z_HUFFMAN_ONLY
        if not repeats and codecs.is_noise(data, itemsize, place):
            level = 0
        made = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
        parts.append(made.compress(planes[place * length : (place + 1) * length]))
        parts.append(made.flush(zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH))
    parts.append(zlib.adler32(planes).to_bytes(4, "big"))
    return b"".join(parts)


def _zstd(data: Bytes, itemsize: int, repeats: bool) -> bytes:
    """Compress planes as one frame, whose blocks end where they do: each has its own table."""
    planes, length = memoryview(_planes(data, itemsize)), data.nbytes // itemsize
    made = codecs.compressor(repeats=repeats).compressobj(size=data.nbytes)
    parts = []
    for place in range(itemsize):
        parts.append(made.compress(planes[place * length : (place + 1) * length]))
        if place < itemsize - 1:
            parts.append(made.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join([*parts, made.flush()])


@lru_cache
def _constant(value: int, length: int, last: bool) -> bytes:
    """Deflate a plane of one value."""
    made = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    data = made.compress(bytes([value]) * length)
    return data + made.flush(zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH)


def _inflater() -> tuple[Callable[[], Any], Any]:
    """Give the fastest inflate that is there, and its error; isal's takes a quarter as long."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.decompressobj, zlib.error
    return isal_zlib.decompressobj, isal_zlib.error


_decompressobj, _zlib_error = _inflater()


def _inflate(body: memoryview, nbytes: int) -> bytes:
    """Inflate a stream that must have so many bytes, and of one that has more, not much more."""
    made = _decompressobj()
    try:
        found: bytes = made.decompress(body, nbytes)
        if not made.eof:  # the end of the stream, behind its last byte
            found += made.decompress(made.unconsumed_tail, 1)
    except _zlib_error as error:
        raise ChunkError(str(error)) from error
    if not made.eof or made.unused_data:
        msg = f"it is no zlib stream of {nbytes} bytes"
        raise ChunkError(msg)
    return found


def _unzstd(body: memoryview, nbytes: int) -> bytes:
    try:
        if zstandard.frame_content_size(body) != nbytes:  # before memory is taken
            msg = f"it is no Zstandard frame of {nbytes} bytes"
            raise ChunkError(msg)
        return codecs.decompressor().decompress(body)
    except zstandard.ZstdError as error:
        raise ChunkError(str(error)) from error
