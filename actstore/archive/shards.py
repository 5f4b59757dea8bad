"""Owns the bytes of a shard: inner chunks encoded by us, their index, the file that they become.

They are what the Zarr v3 ``sharding_indexed`` codec with inner codecs ``bytes``, ``blosc`` and
``crc32c`` says, nothing else, so that every implementation reads them; each chunk has a checksum
of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import crc32c as castagnoli
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from actstore import codecs, files
from actstore.archive.zipped import Place, ZipPath
from actstore.buckets import RemotePath
from actstore.errors import ConfigError

__all__ = [
    "EMPTY",
    "PROFILES",
    "MismatchError",
    "Profile",
    "applied",
    "check_profile",
    "check_shard",
    "codec_metadata",
    "encode_chunk",
    "encode_shard",
    "index_bytes",
    "is_sealed",
    "memory_of",
    "room",
    "shard_path",
    "write_shard",
]

Bytes = NDArray[np.uint8]
PlaceT = TypeVar("PlaceT", Path, ZipPath, RemotePath, Place)

EMPTY: Final = (1 << 64) - 1
_INDEX_BYTES: Final = 16  # of a chunk: its place and its length
_CRC: Final = struct.Struct("<I")
_LOOKED_AT, _BEGIN = 256, 16  # rows of a shard, and elements of a row, to see whether they repeat
_PIECE: Final = 1 << 20
#: Chunks that are in memory besides: read, padded, encoded, decoded, and a block of the log.
_BESIDE: Final = 8


class MismatchError(Exception):
    """What was encoded or written is not what it was made of."""


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


def memory_of(chunks: int, chunk_bytes: int) -> int:
    """Give the bytes that making a shard takes, at most."""
    return (chunks + _BESIDE) * chunk_bytes


def room(chunk_bytes: int, written: int, count: int) -> int:
    """Give how much memory `encode_shard` needs.

    Parameters
    ----------
    chunk_bytes : int
        Of an inner chunk.
    written, count : int
        How many of them are written, and how many there are.
    """
    chunk = chunk_bytes + codecs.FRAME_BYTES + _CRC.size
    return chunk * written + index_bytes(count)


def encode_shard(
    chunks: Iterable[tuple[int, NDArray[Any]]],
    chunk_rows: int,
    count: int,
    fill: Any,
    profile: str,
    out: Bytes,
) -> Bytes:
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
    profile : str
        Of the chunks: one of `PROFILES`.
    out : numpy.ndarray
        uint8 [`room` or more]: memory for the shard.

    Returns
    -------
    numpy.ndarray
        uint8: the chunks and the index, a part of ``out``.

    Raises
    ------
    MismatchError
        Stock Blosc decodes a chunk to something else.
    """
    index, mine = np.full((count, 2), EMPTY, "<u8"), PROFILES[profile]
    end = 0
    for number, rows in chunks:
        if end == 0:
            mine = applied(profile, rows)
        chunk = rows
        if len(chunk) < chunk_rows:
            chunk = np.full((chunk_rows, *rows.shape[1:]), fill, rows.dtype)
            chunk[: len(rows)] = rows
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        start, end = end, end + encode_chunk(out[end:], data, chunk.dtype.itemsize, mine)
        _compare(out[start:end], data, mine)
        end = _seal(out, start, end)
        index[number] = start, end - start
    table = index.reshape(-1).view(np.uint8)
    start, end = end, end + table.nbytes
    out[start:end] = table
    return out[: _seal(out, start, end)]


def applied(profile: str, rows: NDArray[Any]) -> Profile:
    """Give a profile as it is applied to a shard that begins with these rows."""
    mine = PROFILES[profile]
    return replace(mine, repeats=True) if mine.cname == "zstd" and _repeat(rows) else mine


def _repeat(rows: NDArray[Any]) -> bool:
    """Whether an eighth of the first rows were there before, by how they begin."""
    if rows.ndim == 1:
        return False
    begins = rows[:_LOOKED_AT].reshape(min(len(rows), _LOOKED_AT), -1)[:, :_BEGIN]
    return len({one.tobytes() for one in begins}) < 7 / 8 * len(begins)


def encode_chunk(out: Bytes, data: Bytes, itemsize: int, mine: Profile) -> int:
    """Encode a chunk into memory; give its length."""
    if mine.cname == "zstd":
        return codecs.plane_split_into(out, data, itemsize, repeats=mine.repeats)
    encoded = data
    if mine.cname == "lz4":
        frame = blosc.compress(data, b"lz4", mine.clevel, blosc.BITSHUFFLE, 0, itemsize)
        encoded = np.frombuffer(frame, np.uint8)
    out[: len(encoded)] = encoded
    return len(encoded)


def _compare(encoded: Bytes, data: Bytes, mine: Profile) -> None:
    """Decode a chunk by a decoder that is not ours."""
    if not mine.cname:
        return
    found = codecs.scratch("decoded", data.nbytes)
    try:
        blosc.decompress(encoded, found)
    except RuntimeError as error:
        raise MismatchError(str(error)) from error
    if not np.array_equal(found, data):
        msg = f"a chunk of {data.nbytes} bytes decodes to others"
        raise MismatchError(msg)


def _seal(out: Bytes, start: int, end: int) -> int:
    """Put a checksum behind what stands there; give where it ends."""
    _CRC.pack_into(out, end, castagnoli.crc32c(out[start:end]))
    return end + _CRC.size


def is_sealed(data: bytes | memoryview) -> bool:
    """Whether bytes end with the checksum of what stands before, as all chunks do."""
    body, seal = memoryview(data)[: -_CRC.size], data[-_CRC.size :]
    return len(data) >= _CRC.size and castagnoli.crc32c(body) == _CRC.unpack(seal)[0]


def shard_path(folder: PlaceT, name: str, place: tuple[int, ...]) -> PlaceT:
    """Give the file of a shard of an array, by its place in the grid of shards."""
    return folder.joinpath(name, "c", *map(str, place))


def index_bytes(count: int) -> int:
    """Give the bytes of the index of so many chunks, at the end of a shard."""
    return _INDEX_BYTES * count + _CRC.size


def write_shard(path: Path, shard: Bytes) -> int:
    """Write a shard's file, durably, in a folder that no one reads yet; give its bytes.

    Raises
    ------
    MismatchError
        Other bytes are read back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_new(path, [shard])
    at = 0
    with path.open("rb", buffering=0) as file:
        piece = codecs.scratch("decoded", _PIECE)
        while length := file.readinto(piece):
            if not np.array_equal(piece[:length], shard[at : at + length]):
                break
            at += length
        if at != shard.nbytes or file.read(1):
            msg = f"{path} reads back other bytes than were written"
            raise MismatchError(msg)
    return shard.nbytes


def check_shard(path: Place, present: NDArray[np.bool_]) -> Iterator[tuple[int, str]]:
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
    size = index_bytes(present.size)
    with path.open("rb") as file:
        end = path.stat().st_size - size
        if end < 0:
            yield -1, f"it has {end + size} bytes; its index alone has {size}"
            return
        file.seek(end)
        tail = file.read(size)
        if not is_sealed(tail):
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
                if not is_sealed(chunk):
                    yield number, "its bytes don't match their checksum"
