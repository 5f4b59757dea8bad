"""Owns the bytes of a shard: inner chunks encoded by us, their index, the file that they become.

They are what the Zarr v3 ``sharding_indexed`` codec with inner codecs ``bytes``, ``blosc`` and
``crc32c`` says, nothing else, so that every implementation reads them; each chunk has a checksum
of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import crc32c as castagnoli
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from actstore import codecs, files
from actstore.errors import ConfigError

__all__ = [
    "EMPTY",
    "PROFILES",
    "Profile",
    "check_profile",
    "check_shard",
    "codec_metadata",
    "encode_shard",
    "room",
    "write_shard",
]

Bytes = NDArray[np.uint8]

EMPTY: Final = (1 << 64) - 1
_INDEX_BYTES: Final = 16  # of a chunk: its place and its length
_CRC: Final = struct.Struct("<I")
_LOOKED_AT, _BEGIN = 256, 16  # rows of a shard, and elements of a row, to see whether they repeat


@dataclass(frozen=True, slots=True)
class Profile:
    """How chunks are encoded.

    Attributes
    ----------
    cname : {"", "lz4", "zstd"}
        The compressor in their Blosc frames; none: they are raw.
    clevel : int
        What its level is said to be.
    shuffle : str
        What is done to the bytes before, as the codec ``blosc`` calls it.
    repeats : bool
        Whether repeats are looked for in all shards, and not only where the first rows say that
        rows repeat, as those of an embedding do.
    """

    cname: str = ""
    clevel: int = 0
    shuffle: str = "noshuffle"
    repeats: bool = False


#: Name in the API and in an archive -> how chunks are encoded; all are lossless.
PROFILES: Final[dict[str, Profile]] = {
    "fast": Profile("lz4", 5, "bitshuffle"),
    "balanced": Profile("zstd", 1, "shuffle"),
    "dense": Profile("zstd", 1, "shuffle", repeats=True),
    "none": Profile(),
}


def check_profile(name: object) -> str:
    """Give a profile's name back if it is one.

    Raises
    ------
    ConfigError
        It isn't.
    """
    if not isinstance(name, str) or name not in PROFILES:
        msg = f"profile must be one of {', '.join(map(repr, PROFILES))}; got {name!r}"
        raise ConfigError(msg)
    return name


def codec_metadata(chunks: tuple[int, ...], dtype: np.dtype, profile: str) -> list[dict[str, Any]]:
    """Give the ``codecs`` of an array whose shards `encode_shard` makes.

    Parameters
    ----------
    chunks : tuple of int
        The shape of an inner chunk.
    dtype : numpy.dtype
        Of the array.
    profile : str
        Of its chunks: one of `PROFILES`.
    """
    nbytes, mine = int(np.prod(chunks)) * dtype.itemsize, PROFILES[profile]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner: list[dict[str, Any]] = [little if dtype.itemsize > 1 else {"name": "bytes"}]
    if mine.cname:
        configuration = {
            "cname": mine.cname,
            "clevel": mine.clevel,
            "shuffle": mine.shuffle,
            "typesize": dtype.itemsize,
            "blocksize": nbytes if mine.cname == "zstd" else 0,
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


def room(rows: NDArray[Any], chunk_rows: int, present: NDArray[np.bool_]) -> int:
    """Give how much memory `encode_shard` needs."""
    row_bytes = int(np.prod(rows.shape[1:], dtype=np.int64)) * rows.dtype.itemsize
    chunk = chunk_rows * row_bytes + codecs.FRAME_BYTES + _CRC.size
    return chunk * int(present.sum()) + _INDEX_BYTES * present.size + _CRC.size


def encode_shard(
    rows: NDArray[Any],
    chunk_rows: int,
    present: NDArray[np.bool_],
    fill: Any,
    profile: str,
    out: Bytes | None = None,
) -> Bytes:
    """Encode the rows of one layer as a shard.

    Parameters
    ----------
    rows : numpy.ndarray
        [n, *row_shape], n at most ``chunk_rows`` × the number of chunks.
    chunk_rows : int
        Rows of an inner chunk.
    present : numpy.ndarray
        bool: for each inner chunk of the shard whether it is written; the others are empty.
    fill : scalar
        The fill value, for the rows behind the last.
    profile : str
        Of the chunks: one of `PROFILES`.
    out : numpy.ndarray, optional
        uint8 [`room` or more]: memory for the shard, instead of fresh memory.

    Returns
    -------
    numpy.ndarray
        uint8: the chunks and the index, a part of ``out``.
    """
    if out is None:
        out = np.empty(room(rows, chunk_rows, present), np.uint8)
    mine = PROFILES[profile]
    if not mine.repeats and _rows_repeat(rows):
        mine = replace(mine, repeats=True)
    index = np.full((present.size, 2), EMPTY, "<u8")
    end = 0
    for number in np.flatnonzero(present).tolist():
        chunk = rows[number * chunk_rows : (number + 1) * chunk_rows]
        if len(chunk) < chunk_rows:
            padded = np.full((chunk_rows, *rows.shape[1:]), fill, rows.dtype)
            padded[: len(chunk)] = chunk
            chunk = padded
        start, end = end, end + _encode_chunk(out[end:], np.ascontiguousarray(chunk), mine)
        end = _seal(out, start, end)
        index[number] = start, end - start
    table = index.reshape(-1).view(np.uint8)
    start, end = end, end + table.nbytes
    out[start:end] = table
    return out[: _seal(out, start, end)]


def _rows_repeat(rows: NDArray[Any]) -> bool:
    """Whether an eighth of the first rows were there before, by how they begin."""
    if rows.ndim == 1 or not rows.size:
        return False
    begins = rows[:_LOOKED_AT].reshape(min(len(rows), _LOOKED_AT), -1)[:, :_BEGIN]
    return len({one.tobytes() for one in begins}) < 7 / 8 * len(begins)


def _encode_chunk(out: Bytes, chunk: NDArray[Any], mine: Profile) -> int:
    """Encode a chunk into memory; give its length."""
    data, itemsize = chunk.reshape(-1).view(np.uint8), chunk.dtype.itemsize
    if mine.cname == "zstd":
        return codecs.plane_split_into(out, data, itemsize, repeats=mine.repeats)
    encoded: Any = data
    if mine.cname == "lz4":
        encoded = np.frombuffer(
            blosc.compress(data, b"lz4", mine.clevel, blosc.BITSHUFFLE, 0, itemsize), np.uint8
        )
    out[: len(encoded)] = encoded
    return len(encoded)


def _seal(out: Bytes, start: int, end: int) -> int:
    """Put a checksum behind what stands there; give where it ends."""
    _CRC.pack_into(out, end, castagnoli.crc32c(out[start:end]))
    return end + _CRC.size


def write_shard(path: Path, shard: Bytes) -> int:
    """Write a shard's file, durably, in a folder that no one reads yet; give its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_new(path, [shard])
    return shard.nbytes


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
    size = _INDEX_BYTES * present.size + _CRC.size
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
