"""Owns bytes <-> encoded bytes: raw, Blosc LZ4, and plane-split zstd in a standard Blosc frame.

Every encoding decodes with stock numcodecs. Which codec a block has, and where it stands, is the
log's and the archive's business.

The plane-split encoder writes a Blosc-1 frame with shuffle whose single block is the whole buffer:
each byte plane is one zstd frame made with parameters that leave only the entropy coder at work,
since the planes of activations hold no matches worth a search. It is denser and faster than any
stock setting on them, and every Blosc decoder reads it.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import zstandard
from numcodecs import blosc
from numpy.typing import NDArray

from actstore.errors import ConfigError, FormatError

__all__ = ["CODECS", "NAMES", "check_config", "check_name", "decode", "encode", "plane_split"]

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
_VERSION, _VERSION_ZSTD = 2, 1
_SHUFFLE, _MEMCPY, _ZSTD = 0x01, 0x02, 4 << 5
_LEAST_PLANE = 128  # a Blosc decoder takes planes apart from this many elements a block on
_MOST_PLANES = 16
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
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


def encode(codec: int, data: Bytes, itemsize: int) -> tuple[int, Bytes | bytes]:
    """Encode a buffer of elements.

    Parameters
    ----------
    codec : int
        The codec id to try.
    data : numpy.ndarray
        uint8 [n], contiguous.
    itemsize : int
        Bytes of one element.

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
    else:
        encoded = plane_split(data, itemsize)
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
    check_config(config)
    _check_frame(encoded, raw_length)
    out = np.empty(raw_length, np.uint8)
    try:
        blosc.decompress(encoded, out)
    except RuntimeError as error:
        msg = f"a Blosc frame of {len(encoded)} bytes does not decode: {error}"
        raise FormatError(msg) from error
    return out


def _check_frame(encoded: bytes | memoryview, raw_length: int) -> None:
    """Compare what a Blosc frame says of itself with what the record says."""
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
    nbytes = data.nbytes
    whole = itemsize <= _MOST_PLANES and nbytes % itemsize == 0
    if not whole or nbytes < itemsize * _LEAST_PLANE:
        return bytes(blosc.compress(data, b"zstd", 1, blosc.SHUFFLE, nbytes, min(itemsize, 255)))
    parts: list[Any] = [b"", struct.pack("<i", _FRAME.size + 4)]
    compressor = _compressor()
    for plane in _planes(data, itemsize):
        packed: Any = compressor.compress(memoryview(plane))
        if len(packed) >= len(plane):
            packed = plane
        parts += [struct.pack("<i", len(packed)), packed]
    total = _FRAME.size + sum(map(len, parts))
    flags = _SHUFFLE | _ZSTD
    if total > nbytes + _FRAME.size:
        total, flags, parts = nbytes + _FRAME.size, _MEMCPY | _ZSTD, [b"", data]
    parts[0] = _FRAME.pack(_VERSION, _VERSION_ZSTD, flags, itemsize, nbytes, nbytes, total)
    return b"".join(parts)


def _planes(data: Bytes, itemsize: int) -> list[Bytes]:
    """Split elements into byte planes; by shifts where there is such an integer, it is faster."""
    if itemsize == 1:
        return [data]
    if itemsize in _UNSIGNED:
        words = data.view(_UNSIGNED[itemsize])
        return [(words >> (8 * i)).astype(np.uint8) for i in range(itemsize)]
    return list(np.ascontiguousarray(data.reshape(-1, itemsize).T))


def _compressor() -> zstandard.ZstdCompressor:
    """Give this thread's compressor: one can't be shared by threads at work."""
    if not hasattr(_local, "compressor"):
        entropy_only = zstandard.ZstdCompressionParameters(
            window_log=17,
            hash_log=6,
            chain_log=6,
            search_log=1,
            min_match=7,
            target_length=0,
            strategy=zstandard.STRATEGY_FAST,
            write_checksum=False,
            write_content_size=True,
        )
        _local.compressor = zstandard.ZstdCompressor(compression_params=entropy_only)
    return _local.compressor  # type: ignore[no-any-return]
