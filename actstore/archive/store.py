"""Owns the Zarr store on disk: its metadata, its small arrays, and how it is opened.

The one importer of zarr. What the root says is read by ``root.py``, without; the bytes of large
arrays are ``shards.py``'s; whether they are intact, ``checks.py``'s.
"""

from __future__ import annotations

import asyncio
import json
import math
import zipfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, Final

import crc32c as castagnoli
import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ZipStore

from actstore import files
from actstore.archive.coordinates import STRING, Coordinate
from actstore.archive.names import GROUPS, plain_json
from actstore.archive.root import NO_CRC, arrays_of, read_root
from actstore.archive.shards import codec_metadata
from actstore.archive.zipped import Place, ZipPath
from actstore.buckets import RemotePath
from actstore.errors import ArchiveError

__all__ = [
    "ArchiveWriter",
    "open_xarray",
    "read_part",
    "read_rows",
    "write_metadata",
    "write_part",
]

_SMALL_CHUNK: Final = 1 << 20  # elements along each dimension
_CHUNK_ELEMENTS: Final = 1 << 24  # in all
_METADATA: Final = "zarr.json"
_ROOT_LIMIT: Final = 1 << 30


class ArchiveWriter:
    """Write what an archive has beside its shards into a folder that no one reads yet.

    Parameters
    ----------
    folder : Path
        It exists; shards may be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add_array(
        self,
        name: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: np.dtype,
        *,
        chunks: tuple[int, ...],
        shards: tuple[int, ...],
        profile: str,
        attributes: Mapping[str, Any],
    ) -> None:
        """Describe an array whose shards are written by themselves (see ``shards.py``)."""
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shards)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _fill(dtype),
            "codecs": codec_metadata(chunks, dtype, profile),
            "attributes": dict(attributes),
            "dimension_names": list(dims),
            "storage_transformers": [],
        }
        (self.folder / name).mkdir(exist_ok=True)
        self._write_metadata(name, metadata)

    def add_small(self, coordinate: Coordinate, group: str = "") -> None:
        """Write a small array, whole; every chunk is there and has a checksum."""
        values = coordinate.values
        text = values.dtype == STRING
        size = 1 if text else values.itemsize
        blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=size)
        array: Any = zarr.create_array(
            self.folder / group / coordinate.name,
            shape=values.shape,
            chunks=_small_chunks(values.shape),
            dtype="string" if text else values.dtype,
            compressors=[blosc, Crc32cCodec()],
            dimension_names=coordinate.dims,
            config={"write_empty_chunks": True},
            zarr_format=3,
        )
        for part in _pieces(len(values)) if values.ndim else [()]:
            array[part] = values[part]

    def add_text(self, coordinate: Coordinate, group: str = "text") -> None:
        """Write text also as UTF-8 bytes and offsets, in the group ``text``, for other readers."""
        data, lengths = bytearray(), [np.zeros(1, np.int64)]
        texts = coordinate.values.reshape(-1)
        for part in _pieces(texts.size):
            encoded = [one.encode() for one in texts[part].tolist()]
            data += b"".join(encoded)
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        ends = np.cumsum(np.concatenate(lengths))
        stem = coordinate.name
        for name, values in (
            (f"{stem}_bytes", np.frombuffer(data, np.uint8)),
            (f"{stem}_offsets", ends),
        ):
            self.add_small(Coordinate(name, (name,), values), group)

    def add_group(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Make a group, whose folder may be there."""
        (self.folder / name).mkdir(exist_ok=True)
        self._write_metadata(name, _group(attributes))

    def finish(self, attributes: Mapping[str, Any]) -> None:
        """Write the root: attributes, and the metadata of all that is in it; all is durable."""
        for group in GROUPS:
            self.add_group(group, {})
        for path in sorted(self.folder.rglob("*")):
            (files.fsync_folder if path.is_dir() else files.fsync_file)(path)
        self.write_root(attributes, self.nodes("."))

    def nodes(self, *below: str) -> dict[str, Any]:
        """Read the metadata of what is in folders of the archive, by name."""
        found = {}
        for path in sorted(one for name in below for one in (self.folder / name).rglob(_METADATA)):
            name = path.parent.relative_to(self.folder).as_posix()
            if name != ".":
                found[name] = json.loads(path.read_bytes())
        return found

    def write_root(self, attributes: Mapping[str, Any], nodes: Mapping[str, Any]) -> None:
        """Write the root's metadata, in place of what it was before: from then on it is so.

        Parameters
        ----------
        attributes : mapping
            The root's.
        nodes : mapping
            The metadata of all that is in the archive, by name; all of it is durable.
        """
        rest = {name: said for name, said in attributes.items() if name != "metadata_crc32c"}
        root = _group({"metadata_crc32c": NO_CRC, **plain_json(rest)}) | {
            "consolidated_metadata": {
                "kind": "inline",
                "must_understand": False,
                "metadata": {name: nodes[name] for name in sorted(nodes, key=PurePath)},
            }
        }
        data = json.dumps(root, indent=2).encode()
        crc = f"{castagnoli.crc32c(data):08x}".encode()
        files.atomic_write(self.folder / _METADATA, data.replace(NO_CRC.encode(), crc, 1))

    def _write_metadata(self, name: str, metadata: Mapping[str, Any]) -> None:
        data = json.dumps(metadata, indent=2).encode()
        files.write_new(self.folder / name / _METADATA, [data])


def _pieces(length: int) -> Iterator[slice]:
    """Cut what is as long as a dimension into whole chunks of small arrays."""
    return (slice(at, at + _SMALL_CHUNK) for at in range(0, length, _SMALL_CHUNK))


def _small_chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Cut a small array, from its first dimension on, so that no chunk is too large for Blosc."""
    chunks = [max(1, min(length, _SMALL_CHUNK)) for length in shape]
    for axis, length in enumerate(chunks):
        others = math.prod(chunks) // length
        chunks[axis] = max(1, min(length, _CHUNK_ELEMENTS // others))
    return tuple(chunks)


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _fill(dtype: np.dtype) -> Any:
    if dtype.kind == "f":
        return "NaN"
    if dtype.kind == "c":
        return ["NaN", 0.0]
    return False if dtype.kind == "b" else 0


def open_xarray(path: Place, group: str = "") -> xr.Dataset:
    """Open an archive, or a group of it, lazily, without dask."""
    held: Any = _Zip(path.file, mode="r") if isinstance(path, ZipPath) else path
    known: dict[str, xr.Variable] = {}
    if isinstance(path, RemotePath):
        held, known = _Objects(path), {} if group else _indices(read_root(path))
    dataset: xr.Dataset = xr.open_zarr(
        held,
        group=group or None,
        chunks=None,
        consolidated=not group,
        zarr_format=3,
        drop_variables=list(known),
    )
    return dataset.assign_coords(known)


def _indices(root: Mapping[str, Any]) -> dict[str, xr.Variable]:
    """Give the indices whose values the root has: xarray would ask for each of them at once."""
    arrays, found = arrays_of(root), {}
    for name, values in root["attributes"].get("index", {}).items():
        said = arrays.get(name)
        if said is not None and said["shape"] == [len(values)]:
            array = np.array(values, np.dtype(said["data_type"]))
            found[name] = xr.Variable((name,), array, said.get("attributes"))
    return found


def read_rows(folder: Place, name: str, place: tuple[int, ...], first: int, last: int) -> Any:
    """Read rows of an array by zarr-python: a decoder that is not ours."""
    found: NDArray[Any] = np.asarray(_open(folder, name)[(*place, slice(first, last))])
    if found.shape[0] != last - first:
        msg = f"{folder / name} has {found.shape[0]} of the rows {first} to {last}"
        raise ArchiveError(msg)
    return found


def read_part(folder: Place, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
    """Read a part of an array."""
    return np.asarray(_open(folder, name)[part])


def write_metadata(folder: Path, name: str, said: Mapping[str, Any]) -> None:
    """Write the metadata of an array or a group, as another archive has it."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    files.write_new(folder / name / "zarr.json", [json.dumps(said, indent=2).encode()])


def write_part(folder: Path, name: str, part: tuple[slice, ...], values: NDArray[Any]) -> None:
    """Write whole chunks of an array whose metadata is there; each chunk, whatever it holds."""
    with zarr.config.set({"array.write_empty_chunks": True}):
        array: Any = zarr.open_array(folder / name, mode="r+", zarr_format=3)
        array[part] = values


def _open(folder: Place, name: str) -> Any:
    if isinstance(folder, ZipPath):
        said = folder.file.stat()
        held = _held(folder.file, said.st_size, said.st_mtime_ns)
        return zarr.open_array(held, path=name, mode="r", zarr_format=3)
    if isinstance(folder, RemotePath):
        return zarr.open_array(_Objects(folder), path=name, mode="r", zarr_format=3)
    return zarr.open_array(folder / name, mode="r", zarr_format=3)


@lru_cache(maxsize=2)
def _held(path: Path, _size: int, _mtime: int) -> ZipStore:
    return _Zip(path, mode="r")


class _Zip(ZipStore):
    """A zip whose damage is an error of ours."""

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().get(key, *args, **kwargs)
        except zipfile.BadZipFile as error:
            msg = f"{self.path}/{key} is damaged: {error}; see actstore.verify"
            raise ArchiveError(msg) from error


class _Objects(Store):
    """An archive in a bucket, as zarr-python reads it: each key is an object.

    The root's metadata, which has that of all arrays, is what was read on opening.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, where: RemotePath) -> None:
        super().__init__(read_only=True)
        self._where = where

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Objects) and self._where == other._where

    def __hash__(self) -> int:
        return hash(self._where)

    def __str__(self) -> str:
        return str(self._where)

    def with_read_only(self, read_only: bool = False) -> _Objects:
        if not read_only:
            msg = f"{self._where} is read, and not written, as a store of zarr"
            raise ArchiveError(msg)
        return self

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        try:
            data = await asyncio.to_thread(self._read, key, byte_range)
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(data)

    def _read(self, key: str, wanted: ByteRequest | None) -> bytes:
        bucket, name = self._where.bucket, (self._where / key).inside
        match wanted:
            case RangeByteRequest(start, end):
                return bucket.part(name, start, end - start)
            case OffsetByteRequest(offset):
                return bucket.get(name)[offset:]
            case SuffixByteRequest(length):
                return bucket.tail(name, length)
        return bucket.keep(name, _ROOT_LIMIT) if key == _METADATA else bucket.get(name)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        asked = [self.get(key, prototype, wanted) for key, wanted in key_ranges]
        return list(await asyncio.gather(*asked))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread((self._where / key).exists)

    async def set(self, key: str, value: Buffer) -> None:
        msg = f"{self._where / key} is read, and not written, as a store of zarr; {value!r}"
        raise ArchiveError(msg)

    async def delete(self, key: str) -> None:
        msg = f"{self._where / key} is read, and not removed, as a store of zarr"
        raise ArchiveError(msg)

    async def list(self) -> AsyncIterator[str]:
        async for name in self.list_prefix(""):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for one in await asyncio.to_thread(self._where.listed):
            if one.name.startswith(prefix):
                yield one.name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        below = f"{prefix.rstrip('/')}/" if prefix else ""
        seen = set()
        async for name in self.list_prefix(below):
            seen.add(name.removeprefix(below).partition("/")[0])
        for name in sorted(seen):
            yield name
