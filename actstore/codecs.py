"""Owns bytes <-> encoded bytes: raw, Blosc LZ4, and plane-split zstd in a standard Blosc frame.

Every encoding decodes with stock numcodecs. Which codec a block has, and where it stands, is the
log's and the archive's business.

The plane-split encoder writes a Blosc-1 frame with shuffle whose single block is the whole buffer:
each byte plane is one zstd frame made with parameters that leave only the entropy coder at work,
since the planes of activations hold no matches worth a search. It is denser and faster than any
stock setting on them, and every Blosc decoder reads it.
"""

from __future__ import annotations

# numcodecs imports it when it first encodes, which may be in a thread: that would wait for ever
# where a signal's handler has raised in the midst of an import of the main thread's
import multiprocessing.synchronize  # noqa: F401
import struct
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np
import zstandard
from numcodecs import blosc
from numpy.typing import NDArray

from actstore.errors import ConfigError, FormatError

__all__ = [
    "CODECS",
    "FRAME_BYTES",
    "NAMES",
    "check_config",
    "check_name",
    "compressor",
    "constants",
    "decode",
    "decode_into",
    "decompressor",
    "encode",
    "is_noise",
    "plane_split",
    "plane_split_into",
    "scratch",
    "take_plane",
]

Bytes = NDArray[np.uint8]

#: Codec id in a log -> the numcodecs configuration that decodes it (None: raw).
CODECS: Final[dict[int, dict[str, Any] | None]] = {
    0: None,
    1: {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 2, "blocksize": 0},
    2: {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1, "blocksize": 0},
}
#: Name in the API -> codec id.
NAMES: Final[dict[str, int]] = {"none": 0, "lz4": 1, "zstd": 2}

_FRAME = struct.Struct(
    "<BBBBIII"
)  # version, versionlz, flags, typesize, nbytes, blocksize, cbytes
_LENGTH = struct.Struct("<i")
_VERSION, _VERSION_ZSTD = 2, 1
_SHUFFLE, _MEMCPY, _ZSTD = 0x01, 0x02, 4 << 5
_LEAST_PLANE = 128  # a Blosc decoder takes planes apart from this many elements a block on
_MOST_PLANES = 16
_SAMPLE = 4096  # elements
_SAMPLED = 1 << 17  # elements from which on it is asked whether a plane is noise
#: How much more memory than the data the plane-split encoder works in.
FRAME_BYTES: Final = _FRAME.size + 4 + 4 * _MOST_PLANES
_UNSIGNED = {2: "<u2", 4: "<u4", 8: "<u8"}
#: Leave only the entropy coder of zstd at work.
_ENTROPY_ONLY: Final[dict[str, Any]] = {
    "window_log": 17,
    "hash_log": 6,
    "chain_log": 6,
    "search_log": 1,
    "min_match": 7,
    "target_length": 0,
    "strategy": zstandard.STRATEGY_FAST,
    "write_checksum": False,
    "write_content_size": True,
}
#: Look for long matches besides, of which few are false ones: one position in 16 is remembered.
_REPEATS: Final[dict[str, Any]] = {
    "window_log": 20,
    "enable_ldm": True,
    "ldm_min_match": 12,
    "ldm_hash_rate_log": 4,
    "ldm_hash_log": 14,
    "ldm_bucket_size_log": 1,
}
_local = threading.local()


def check_name(name: object) -> str:
    """Give the codec name back if it is one.

    Raises
    ------
    ConfigError
        It isn't.
    """
    if not isinstance(name, str) or name not in NAMES:
        wanted = ", ".join(repr(known) for known in NAMES)
        msg = f"compression_algorithm must be one of {wanted}; got {name!r}"
        raise ConfigError(msg)
    return name


def check_config(config: Mapping[str, Any] | None) -> None:
    """Refuse a codec configuration from a file that is not on the allow-list.

    Raises
    ------
    FormatError
        The codec is none that a reader may run.
    """
    if config is None or config.get("id") == "blosc":
        return
    msg = f"codec configuration {dict(config)!r} is not allowed; wanted null or id 'blosc'"
    raise FormatError(msg)


def encode(
    codec: int, data: Bytes, itemsize: int, out: Bytes | None = None
) -> tuple[int, Bytes | bytes]:
    """Encode a buffer of elements.

    Parameters
    ----------
    codec : int
        The codec id to try.
    data : numpy.ndarray
        uint8 [n], contiguous.
    itemsize : int
        Bytes of one element.
    out : numpy.ndarray, optional
        uint8 [n + `FRAME_BYTES` or more]: memory for what is encoded, instead of fresh memory.

    Returns
    -------
    codec : int
        The codec id that was used: 0 where encoding doesn't shrink the data.
    encoded : bytes-like
        The encoded bytes; ``data`` itself where nothing was encoded.
    """
    if codec == 0 or data.nbytes == 0:
        return 0, data
    if codec == 1:
        encoded = blosc.compress(data, b"lz4", 5, blosc.BITSHUFFLE, 0, itemsize)
        if out is not None:  # what Blosc took is let go at once, and taken again
            out[: len(encoded)] = np.frombuffer(encoded, np.uint8)
            encoded = out[: len(encoded)]
    elif out is None:
        encoded = plane_split(data, itemsize)
    else:
        encoded = out[: plane_split_into(out, data, itemsize)]
    return (codec, encoded) if len(encoded) < data.nbytes else (0, data)


def decode(
    config: Mapping[str, Any] | None, encoded: bytes | memoryview, raw_length: int
) -> Bytes:
    """Decode a block.

    Parameters
    ----------
    config : mapping or None
        The numcodecs configuration of its codec.
    encoded : bytes-like
        The encoded bytes.
    raw_length : int
        The number of bytes that must come out, already checked against the reader's limit.

    Returns
    -------
    numpy.ndarray
        uint8 [raw_length], read-only where it shares the memory of ``encoded``.

    Raises
    ------
    FormatError
        The bytes don't decode to ``raw_length`` bytes.
    """
    if config is None:
        if len(encoded) != raw_length:
            msg = f"a raw block of {raw_length} bytes has {len(encoded)}"
            raise FormatError(msg)
        return np.frombuffer(encoded, np.uint8)
    _check_frame(config, encoded, raw_length)  # before memory is taken
    out = np.empty(raw_length, np.uint8)
    _decompress(encoded, out)
    return out


def decode_into(config: Mapping[str, Any] | None, encoded: bytes | memoryview, out: Bytes) -> None:
    """Decode a block as `decode` does, into memory of just its size."""
    if config is None:
        if len(encoded) != out.nbytes:
            msg = f"a raw block of {out.nbytes} bytes has {len(encoded)}"
            raise FormatError(msg)
        out[:] = np.frombuffer(encoded, np.uint8)
        return
    _check_frame(config, encoded, out.nbytes)
    _decompress(encoded, out)


def _decompress(encoded: bytes | memoryview, out: Bytes) -> None:
    try:
        blosc.decompress(encoded, out)
    except RuntimeError as error:
        msg = f"a Blosc frame of {len(encoded)} bytes does not decode: {error}"
        raise FormatError(msg) from error


def _check_frame(config: Mapping[str, Any], encoded: bytes | memoryview, raw_length: int) -> None:
    """Compare what a Blosc frame says of itself with what the record says."""
    check_config(config)
    if len(encoded) < _FRAME.size:
        msg = f"a Blosc frame has at least {_FRAME.size} bytes; found {len(encoded)}"
        raise FormatError(msg)
    *_, nbytes, _blocksize, cbytes = _FRAME.unpack_from(encoded)
    if nbytes != raw_length or cbytes != len(encoded):
        msg = (
            f"a Blosc frame says {cbytes} encoded bytes of {nbytes}; "
            f"the record holds {len(encoded)} of {raw_length}"
        )
        raise FormatError(msg)


def plane_split(data: Bytes, itemsize: int) -> bytes:
    """Encode elements as a Blosc-1 frame of byte planes, each one zstd frame.

    Parameters
    ----------
    data : numpy.ndarray
        uint8 [n], contiguous, n < 2**31 - 16.
    itemsize : int
        Bytes of one element.

    Returns
    -------
    bytes
        The frame, at most n + 16 bytes.
    """
    out = np.empty(data.nbytes + FRAME_BYTES, np.uint8)
    return out[: plane_split_into(out, data, itemsize)].tobytes()


def plane_split_into(out: Bytes, data: Bytes, itemsize: int, *, repeats: bool = False) -> int:
    """Encode as `plane_split` does, into memory of n + `FRAME_BYTES`; give the frame's length.

    ``repeats`` also looks for what was there before, at a quarter of the speed: what an early
    layer gives for the same token is alike, and everything else gains next to nothing.
    """
    nbytes = data.nbytes
    whole = itemsize <= _MOST_PLANES and nbytes % itemsize == 0
    if not whole or nbytes < itemsize * _LEAST_PLANE:
        typesize = min(itemsize, 255)
        frame = blosc.compress(data, b"zstd", 1, blosc.SHUFFLE, nbytes, typesize)
        out[: len(frame)] = np.frombuffer(frame, np.uint8)
        return len(frame)
    view, length, end = memoryview(out), nbytes // itemsize, _FRAME.size + 4
    _LENGTH.pack_into(view, _FRAME.size, end)
    known = constants(data, itemsize)
    for place in range(itemsize):
        start = end + 4
        if place in known:
            frame = _constant_plane(known[place], length)
            end = start + len(frame)
            view[start:end] = frame
        else:
            end = start + _plane_into(out[start : start + length], data, itemsize, place, repeats)
        _LENGTH.pack_into(view, start - 4, end - start)
    flags = _SHUFFLE | _ZSTD
    if end > nbytes + _FRAME.size:
        end, flags = nbytes + _FRAME.size, _MEMCPY | _ZSTD
        out[_FRAME.size : end] = data
    _FRAME.pack_into(view, 0, _VERSION, _VERSION_ZSTD, flags, itemsize, nbytes, nbytes, end)
    return end


def constants(data: Bytes, itemsize: int) -> dict[int, int]:
    """Find the byte planes of one value, and give it: bfloat16 as float32 has two of zeros."""
    if itemsize not in _UNSIGNED:
        return {}
    words = data.view(_UNSIGNED[itemsize])
    head = words[:_LEAST_PLANE]  # mostly tells that there is none
    found = _equal_bytes(np.bitwise_and.reduce(head), np.bitwise_or.reduce(head), itemsize)
    if found:
        every = np.bitwise_and.reduce(words) if any(found.values()) else 0
        found = _equal_bytes(every, np.bitwise_or.reduce(words), itemsize)
    return found


def _equal_bytes(one: Any, other: Any, itemsize: int) -> dict[int, int]:
    """Give the bytes that two integers have in common, by their place."""
    mine, its = (int(number).to_bytes(itemsize, "little") for number in (one, other))
    return {place: mine[place] for place in range(itemsize) if mine[place] == its[place]}


@lru_cache
def _constant_plane(value: int, length: int) -> bytes:
    """Encode a byte plane of one value."""
    return compressor().compress(bytes([value]) * length)


def _plane_into(out: Bytes, data: Bytes, itemsize: int, place: int, repeats: bool) -> int:
    """Put a byte plane into memory of its size, compressed where it shrinks; give its length."""
    length = out.nbytes
    plane = scratch("plane", length)
    if not repeats and is_noise(data, itemsize, place):
        take_plane(out, data, itemsize, place)
        return length
    take_plane(plane, data, itemsize, place)
    source = compressor(repeats=repeats).stream_reader(memoryview(plane), size=length)
    found = source.readinto(memoryview(out))
    if found == length:  # no room was left: it doesn't shrink
        out[:] = plane
    return found


def is_noise(data: Bytes, itemsize: int, place: int) -> bool:
    """Whether samples of a byte plane don't shrink: mantissas, whose compression costs time.

    Of a short plane they would cost more than it: that is asked of none.
    """
    count = data.nbytes // itemsize
    if count < _SAMPLED:
        return False
    sample = scratch("sample", 3 * _SAMPLE)
    for index, start in enumerate((0, count // 2, count - _SAMPLE)):
        piece = data[start * itemsize : (start + _SAMPLE) * itemsize]
        take_plane(sample[index * _SAMPLE : (index + 1) * _SAMPLE], piece, itemsize, place)
    return len(compressor().compress(memoryview(sample))) > 0.99 * sample.nbytes


def take_plane(out: Bytes, data: Bytes, itemsize: int, place: int) -> None:
    """Copy a byte plane of elements.

    Integers that begin at the plane's byte, narrowed to bytes, are it: where there are such
    integers that is three times as fast as by strides. The last would end behind the data.
    """
    if itemsize not in _UNSIGNED:
        np.copyto(out, data[place::itemsize])
        return
    words = data[place : place + data.nbytes - itemsize].view(_UNSIGNED[itemsize])
    np.copyto(out[:-1], words, casting="unsafe")
    out[-1] = data[place - itemsize]


def scratch(name: str, nbytes: int) -> Bytes:
    """Give memory of that name, uint8 [nbytes], that this thread uses again."""
    found: Bytes | None = getattr(_local, name, None)
    if found is None or found.nbytes < nbytes:
        found = np.empty(nbytes, np.uint8)
        setattr(_local, name, found)
    return found[:nbytes]


def compressor(*, repeats: bool = False) -> zstandard.ZstdCompressor:
    """Give this thread's compressor: one can't be shared by threads at work."""
    name = "repeats" if repeats else "entropy"
    if not hasattr(_local, name):
        parameters = _ENTROPY_ONLY | (_REPEATS if repeats else {})
        chosen = zstandard.ZstdCompressionParameters(**parameters)
        setattr(_local, name, zstandard.ZstdCompressor(compression_params=chosen))
    return getattr(_local, name)  # type: ignore[no-any-return]


def decompressor() -> zstandard.ZstdDecompressor:
    """Give this thread's decompressor."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    return _local.decompressor  # type: ignore[no-any-return]
