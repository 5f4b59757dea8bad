"""Owns the bytes of a shard: inner chunks encoded by us, their index, the file that they become.

They are what the Zarr v3 ``sharding_indexed`` codec with inner codecs ``bytes``, ``blosc`` and
``crc32c`` says, nothing else, so that every implementation reads them; each chunk has a checksum
of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import crc32c as castagnoli
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from actstore import codecs, files

__all__ = [
    "EMPTY",
    "MismatchError",
    "check_shard",
    "codec_metadata",
    "encode_shard",
    "memory_of",
    "write_shard",
]

EMPTY: Final = (1 << 64) - 1
_CRC: Final = struct.Struct("<I")
_SHUFFLES: Final = {"zstd": "shuffle", "lz4": "bitshuffle"}
_LEVELS: Final = {"zstd": 1, "lz4": 5}
#: Chunks that are in memory besides: read, padded, encoded, decoded, and a block of the log.
_BESIDE: Final = 8


class MismatchError(Exception):
    """What was encoded or written is not what it was made of."""


def memory_of(chunks: int, chunk_bytes: int) -> int:
    """Give the bytes that making a shard takes, at most."""
    return (chunks + _BESIDE) * chunk_bytes


def codec_metadata(
    chunks: tuple[int, ...], dtype: np.dtype, compression: str
) -> list[dict[str, Any]]:
    """Give the ``codecs`` of an array whose shards `encode_shard` makes.

    Parameters
    ----------
    chunks : tuple of int
        The shape of an inner chunk.
    dtype : numpy.dtype
        Of the array.
    compression : {"zstd", "lz4", "none"}
        Of its chunks.
    """
    nbytes = int(np.prod(chunks)) * dtype.itemsize
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner: list[dict[str, Any]] = [little if dtype.itemsize > 1 else {"name": "bytes"}]
    if compression != "none":
        configuration = {
            "cname": compression,
            "clevel": _LEVELS[compression],
            "shuffle": _SHUFFLES[compression],
            "typesize": dtype.itemsize,
            "blocksize": nbytes if compression == "zstd" else 0,
        }
        inner.append({"name": "blosc", "configuration": configuration})
    inner.append({"name": "crc32c"})
    return [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": list(chunks),
                "codecs": inner,
                "index_codecs": [little, {"name": "crc32c"}],
                "index_location": "end",
            },
        }
    ]


def encode_shard(
    chunks: Iterable[tuple[int, NDArray[Any]]],
    chunk_rows: int,
    count: int,
    fill: Any,
    compression: str,
) -> list[Any]:
    """Encode the rows of one layer as a shard; decode and compare each chunk.

    Parameters
    ----------
    chunks : iterable of (int, numpy.ndarray)
        The number of each inner chunk that is written, ascending, and its rows: [n, *row_shape],
        n at most ``chunk_rows``. The others are empty.
    chunk_rows : int
        Rows of an inner chunk.
    count : int
        The number of inner chunks of the shard.
    fill : scalar
        The fill value, for the rows behind the last.
    compression : {"zstd", "lz4", "none"}
        Of the chunks.

    Returns
    -------
    list of bytes-like
        The chunks and the index.

    Raises
    ------
    MismatchError
        Stock Blosc decodes a chunk to something else.
    """
    buffers: list[Any] = []
    index = np.full((count, 2), EMPTY, "<u8")
    offset = 0
    for number, rows in chunks:
        chunk = rows
        if len(chunk) < chunk_rows:
            chunk = np.full((chunk_rows, *rows.shape[1:]), fill, rows.dtype)
            chunk[: len(rows)] = rows
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        encoded = _encode_chunk(data, chunk.dtype.itemsize, compression)
        _compare(encoded, data, compression)
        crc = _CRC.pack(castagnoli.crc32c(encoded))
        index[number] = offset, len(encoded) + len(crc)
        offset += len(encoded) + len(crc)
        buffers += [encoded, crc]
    table = index.tobytes()
    return [*buffers, table, _CRC.pack(castagnoli.crc32c(table))]


def _encode_chunk(data: NDArray[np.uint8], itemsize: int, compression: str) -> Any:
    if compression == "none":
        return data.tobytes()
    if compression == "lz4":
        level = _LEVELS["lz4"]
        return blosc.compress(data, b"lz4", level, blosc.BITSHUFFLE, 0, itemsize)
    return codecs.plane_split(data, itemsize)


def _compare(encoded: Any, data: NDArray[np.uint8], compression: str) -> None:
    """Decode a chunk by a decoder that is not ours."""
    if compression == "none":
        return
    found = np.empty_like(data)
    try:
        blosc.decompress(encoded, found)
    except RuntimeError as error:
        raise MismatchError(str(error)) from error
    if not np.array_equal(found, data):
        msg = f"a chunk of {data.nbytes} bytes decodes to others"
        raise MismatchError(msg)


def write_shard(path: Path, buffers: list[Any]) -> int:
    """Write a shard's file, durably, in a folder that no one reads yet; give its bytes.

    Raises
    ------
    MismatchError
        Other bytes are read back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_new(path, buffers)
    with path.open("rb") as file:
        same = all(file.read(len(part)) == part for part in buffers) and not file.read(1)
    if not same:
        msg = f"{path} reads back other bytes than were written"
        raise MismatchError(msg)
    return sum(map(len, buffers))


def check_shard(path: Path, present: NDArray[np.bool_]) -> Iterator[tuple[int, str]]:
    """Check the index of a shard's file, and every chunk; one chunk is in memory at a time.

    Parameters
    ----------
    path : Path
        The shard.
    present : numpy.ndarray
        bool: for each inner chunk whether it must be there.

    Yields
    ------
    (int, str)
        The number of a damaged chunk, or -1 for the whole shard, and what is wrong.

    Raises
    ------
    FileNotFoundError
        The file is gone.
    """
    size = 16 * present.size + _CRC.size
    with path.open("rb") as file:
        end = path.stat().st_size - size
        if end < 0:
            yield -1, f"it has {end + size} bytes; its index alone has {size}"
            return
        file.seek(end)
        tail = file.read(size)
        if castagnoli.crc32c(tail[:-4]) != _CRC.unpack(tail[-4:])[0]:
            yield -1, "its index doesn't match its checksum"
            return
        places = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2).tolist()
        for number, (offset, length) in enumerate(places):
            if offset == length == EMPTY:
                if present[number]:
                    yield number, "it is not there, though its rows are"
            elif offset + length > end or length < _CRC.size:
                yield number, "the index points outside of the shard"
            else:
                file.seek(offset)
                chunk = file.read(length)
                if castagnoli.crc32c(chunk[:-4]) != _CRC.unpack(chunk[-4:])[0]:
                    yield number, "its bytes don't match their checksum"
