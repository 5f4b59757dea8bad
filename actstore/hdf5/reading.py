"""Owns reading an HDF5 file that an archive was mirrored into, chunk by chunk.

h5py is asked where a chunk is; its bytes are read and decoded by us, in threads, which HDF5 can't.
What a file says is held against the archive's metadata in it before it is believed: what has
another form than we write is refused, and nothing outside of the file is ever opened.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from actstore import files
from actstore.archive.coordinates import STRING
from actstore.archive.reading import ShardedRows, Storage
from actstore.archive.root import FORMAT, parse_root
from actstore.errors import ActstoreError, ArchiveError, FormatError
from actstore.hdf5 import chunks as coded
from actstore.hdf5.mirror import (
    ESCAPE,
    METADATA,
    TEXT_CRC,
    Array,
    arrays,
    dimensions,
    text_crc,
    unescaped,
)
from actstore.hdf5.text import TextError, read_attribute, read_strings

__all__ = ["Hdf5Archive", "Hdf5Rows", "Stored", "is_ours", "reopened"]

Grid = tuple[int, ...]

_MOST_METADATA: Final = 1 << 30
_SHUFFLE, _FLETCHER32 = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32
_OF_HDF5: Final = (OSError, KeyError, RuntimeError, ValueError, TypeError, UnicodeDecodeError)


class Stored(NamedTuple):
    """A dataset of a file that has the form that its array's metadata say."""

    array: Array
    dataset: Any
    compression: str


def is_ours(path: Path) -> bool:
    """Whether an HDF5 file says that it is an archive of actstore, of whatever version."""
    try:
        with h5py.File(path, "r") as file:
            return read_attribute(file, "format") == FORMAT
    except _OF_HDF5:
        return False


class Hdf5Archive:
    """An HDF5 file that is an archive. Safe to use from several threads; a context manager.

    Parameters
    ----------
    path : Path
        The file.

    Attributes
    ----------
    data : bytes
        The root metadata of the archive, as it is in its ``zarr.json``.
    root : mapping
        The same, parsed.
    arrays : mapping of str to Array
        Its arrays.

    Raises
    ------
    FormatError
        It is none, or has another form than actstore writes.
    UnsupportedVersionError
        It is one of a version that this actstore doesn't know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock = threading.Lock()
        self._stored: dict[str, Stored] = {}
        try:
            self._file: Any = h5py.File(path, "r")
        except _OF_HDF5 as error:
            msg = f"{path} can't be opened as HDF5: {error}"
            raise FormatError(msg) from error
        self._raw = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._close_raw = weakref.finalize(self, os.close, self._raw)  # once, and when dropped
        try:
            self.data = self._metadata()
            self.root = parse_root(self.data, path)
            self.arrays = arrays(self.root)
            self._check_dimensions()
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        """Open the file again, in whatever process a copy of this is made."""
        return type(self), (self.path,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; twice does no harm."""
        self._stored.clear()
        self._file.close()
        self._raw = -1
        self._close_raw()

    @property
    def file(self) -> Any:
        """What h5py has of it."""
        return self._file

    def stored(self, name: str) -> Stored:
        """Give the dataset of an array, checked.

        Raises
        ------
        FormatError
            It isn't there, or has another form than the array's metadata say.
        ConfigError
            The file was closed.
        """
        if self._raw < 0:
            raise files.closed(self.path)
        with self._lock:
            if name not in self._stored:
                array = self.arrays[name]
                dataset = self._open(name)
                try:
                    self._stored[name] = Stored(array, dataset, self._checked(array, dataset))
                except _OF_HDF5 as error:
                    if isinstance(error, ActstoreError):
                        raise
                    raise self._refused(name, str(error)) from error
            return self._stored[name]

    def rows(self, name: str) -> Hdf5Rows | None:
        """Give what reads the rows of an array of values; None for an array of another form."""
        storage = Storage.parse(self.arrays[name].said)
        if storage is None or storage.chunk != self.arrays[name].cut():
            return None
        self.stored(name)
        return Hdf5Rows(self, name, storage)

    def part(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        """Read a part of an array, of slices with neither steps nor negative ends."""
        stored = self.stored(name)
        array = stored.array
        if array.is_text:
            found: NDArray[Any] = self.text(name)[part]
            return found
        out = np.full([one.stop - one.start for one in part], array.fill, array.stored)
        if not array.shape:
            out[()] = stored.dataset[()]
        elif out.size:
            cut = array.cut()
            ranges = [
                range(one.start // size, -(-one.stop // size))
                for one, size in zip(part, cut, strict=True)
            ]
            for place in itertools.product(*ranges):
                self._put(stored, place, part, out)
        return out.astype(array.dtype, copy=False)

    def chunk(self, stored: Stored, place: Grid) -> NDArray[Any] | None:
        """Read a whole chunk; None where it was not written."""
        array = stored.array
        encoded = self.encoded(stored, place)
        if encoded is None:
            return None
        out = np.empty(array.cut(), array.stored)
        try:
            coded.decode(encoded, out.reshape(-1).view(np.uint8), out.itemsize, stored.compression)
        except coded.ChunkError as error:
            raise self.damaged(array.name, place, str(error)) from error
        return out

    def encoded(self, stored: Stored, place: Grid) -> bytes | None:
        """Read the bytes of a chunk; None where it was not written."""
        array = stored.array
        offset = tuple(at * size for at, size in zip(place, array.cut(), strict=True))
        nbytes = math.prod(array.cut()) * array.dtype.itemsize
        try:
            found = stored.dataset.id.get_chunk_info_by_coord(offset)
        except _OF_HDF5 as error:
            raise self.damaged(array.name, place, str(error)) from error
        if found.byte_offset is None:
            return None
        if found.filter_mask or not 0 < found.size <= nbytes + nbytes // 64 + coded.SLACK:
            reason = f"it has {found.size} bytes, and filters left out {found.filter_mask:#x}"
            raise self.damaged(array.name, place, reason)
        where = min(found.byte_offset, os.fstat(self._raw).st_size)
        data = os.pread(self._raw, found.size, where)
        if len(data) != found.size:
            raise self.damaged(array.name, place, "the file ends within it")
        return data

    def places(self, stored: Stored) -> list[Grid]:
        """Give the chunks that were written, of which there may be far fewer than could be."""
        found: list[Grid] = []
        if not stored.array.nbytes or not stored.array.shape:
            return found
        cut, grid = stored.array.cut(), stored.array.grid()

        def note(chunk: Any) -> None:
            place = tuple(at // size for at, size in zip(chunk.chunk_offset, cut, strict=True))
            if all(0 <= at < count for at, count in zip(place, grid, strict=True)):
                found.append(place)

        try:
            stored.dataset.id.chunk_iter(note)
        except _OF_HDF5 as error:
            raise self.damaged(stored.array.name, (), str(error)) from error
        return found

    def text(self, name: str) -> NDArray[Any]:
        """Read an array of strings, all of it: only then its checksum is told."""
        stored = self.stored(name)
        array = stored.array
        if not array.nbytes:
            return np.empty(array.shape, STRING)
        try:
            texts = read_strings(self._raw, stored.dataset.id)
            wanted = read_attribute(stored.dataset, TEXT_CRC)
            has_nul = read_attribute(stored.dataset, ESCAPE) is not None
        except (*_OF_HDF5, TextError) as error:
            raise self.damaged(name, (), str(error)) from error
        if wanted != f"{text_crc(texts):08x}":
            raise self.damaged(name, (), "its strings don't match their checksum")
        found = np.array(unescaped(texts) if has_nul else texts, STRING)
        return found.reshape(array.shape)

    def damaged(self, name: str, place: Grid, reason: str) -> ArchiveError:
        """Give the error of a chunk that can't be read."""
        where = f"chunk {place} of {name!r}" if place else repr(name)
        return ArchiveError(f"{self.path}: {where} is damaged: {reason}; see actstore.verify")

    def _put(
        self, stored: Stored, place: Grid, part: tuple[slice, ...], out: NDArray[Any]
    ) -> None:
        """Put what a chunk has of a part to where it belongs."""
        chunk = self.chunk(stored, place)
        if chunk is None:
            return
        here = stored.array.part(place)
        both = [
            slice(max(one.start, other.start), min(one.stop, other.stop))
            for one, other in zip(part, here, strict=True)
        ]
        out[_moved(both, part)] = chunk[_moved(both, here)]

    # -- what is refused

    def _refused(self, name: str, why: str) -> FormatError:
        msg = (
            f"{self.path} is no HDF5 file that actstore wrote, or it is damaged: {name!r}: {why}; "
            "h5py may open it, if you trust who made it"
        )
        return FormatError(msg)

    def _open(self, name: str) -> Any:
        """Open a dataset by links within the file, and no others."""
        where = self._file.id
        try:
            parts = name.split("/")
            for part in parts:
                link = where.links.get_info(part.encode())
                if link.type != h5py.h5l.TYPE_HARD:
                    raise self._refused(name, "it is a link to elsewhere")
                if part is not parts[-1]:
                    where = h5py.h5g.open(where, part.encode())
            return h5py.Dataset(h5py.h5d.open(where, parts[-1].encode()))
        except FormatError:
            raise
        except _OF_HDF5 as error:
            raise self._refused(name, str(error)) from error

    def _metadata(self) -> bytes:
        if self._file.userblock_size:
            raise self._refused(METADATA, "the file begins with a block that isn't HDF5")
        dataset = self._open(METADATA)
        plist, shape = dataset.id.get_create_plist(), dataset.id.shape
        plain = plist.get_layout() == h5py.h5d.CONTIGUOUS and not plist.get_external_count()
        size = os.fstat(self._raw).st_size
        if not plain or len(shape) != 1 or dataset.id.dtype != np.uint8:
            raise self._refused(METADATA, "wanted bytes, one after the other")
        if not 0 < shape[0] <= min(size, _MOST_METADATA):
            raise self._refused(METADATA, f"{shape[0]} bytes in a file of {size}")
        try:
            return bytes(dataset[...])
        except _OF_HDF5 as error:
            raise self._refused(METADATA, str(error)) from error

    def _check_dimensions(self) -> None:
        try:
            dimensions(self.arrays)
        except ArchiveError as error:
            raise self._refused(METADATA, str(error)) from error

    def _checked(self, array: Array, dataset: Any) -> str:
        """Compare a dataset's form with its array's metadata; give what its chunks need."""
        name, mine = array.name, dataset.id
        plist = mine.get_create_plist()
        layout = plist.get_layout()
        filters = [plist.get_filter(one) for one in range(plist.get_nfilters())]
        if plist.get_external_count() or layout == h5py.h5d.VIRTUAL:
            raise self._refused(name, "its values are in other files")
        if mine.shape != array.shape:
            raise self._refused(name, f"its shape is {mine.shape}, not {array.shape}")
        if array.is_text:
            kind = h5py.check_string_dtype(mine.dtype)
            if kind is None or kind.length is not None or filters or layout != h5py.h5d.CONTIGUOUS:
                raise self._refused(name, f"{mine.dtype} of shape {mine.shape}: no text of it")
            return "none"
        if mine.dtype != array.stored:
            raise self._refused(name, f"its dtype is {mine.dtype}, not {array.stored}")
        if not array.shape or not array.nbytes:
            return "none"
        if layout != h5py.h5d.CHUNKED or plist.get_chunk() != array.cut():
            raise self._refused(name, f"its chunks are not of {array.cut()}")
        if not array.sharded and mine.get_num_chunks() != math.prod(array.grid()):
            raise self._refused(name, f"it has {mine.get_num_chunks()} chunks of {array.grid()}")
        compression = _compression(filters, array.stored.itemsize)
        if compression is None:
            raise self._refused(name, f"its filters are {filters!r:.200}")
        return compression


def _compression(filters: list[Any], itemsize: int) -> str | None:
    """Give what filters are, of those that we write."""
    found = [one[0] for one in filters]
    if found == [_FLETCHER32]:
        return "none"
    for compression, number in coded.COMPRESSIONS.items():
        if found == [_SHUFFLE, number, _FLETCHER32] and filters[0][2][:1] == (itemsize,):
            return compression
    return None


def _moved(part: list[slice], origin: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(one.start - base.start, one.stop - base.start)
        for one, base in zip(part, origin, strict=True)
    )


class Hdf5Rows(ShardedRows):
    """The rows of an array of values in an HDF5 file. Safe to use from several threads."""

    def __init__(self, archive: Hdf5Archive, name: str, storage: Storage) -> None:
        super().__init__(archive.path / name, storage.without_order())
        self._archive = archive
        self._name = name

    def __reduce__(self) -> tuple[Callable[[Path, str], Any], tuple[Path, str]]:
        return _rows_again, (self._archive.path, self._name)

    def is_written(self, layer: int, chunk: int) -> bool:
        """Whether a chunk of a layer is there; the others hold the fill value."""
        return self._encoded(layer, chunk) is not None

    def _encoded(self, layer: int, chunk: int) -> memoryview | None:
        place = (*(layer,) * self.axis, chunk, *(0,) * len(self.shape[self.axis + 1 :]))
        found = self._archive.encoded(self._archive.stored(self._name), place)
        return None if found is None else memoryview(found)

    def _decode(self, encoded: memoryview, out: NDArray[np.uint8]) -> None:
        compression = self._archive.stored(self._name).compression
        try:
            coded.decode(encoded, out, self.dtype.itemsize, compression)
        except coded.ChunkError as error:
            raise FormatError(str(error)) from error


def reopened(path: Path) -> Hdf5Archive:
    """Open a file in another process; its arrays share it."""
    said = path.stat()
    return _reopened(path, said.st_size, said.st_mtime_ns)


@lru_cache(maxsize=8)
def _reopened(path: Path, _size: int, _mtime: int) -> Hdf5Archive:
    return Hdf5Archive(path)


def _rows_again(path: Path, name: str) -> Any:
    return reopened(path).rows(name)
