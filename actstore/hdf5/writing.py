"""Owns making an HDF5 file of an archive: chunks encoded by threads, written by one, compared."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import crc32c as castagnoli
import h5py
import numpy as np
from numpy.typing import NDArray

from actstore import machine
from actstore.archive import shards, store
from actstore.archive.reading import ShardedRows
from actstore.archive.root import metadata_crc, parse_root
from actstore.archive.zipped import Place
from actstore.arguments import count_fitting
from actstore.errors import ArchiveError
from actstore.hdf5 import chunks as coded
from actstore.hdf5.mirror import (
    ESCAPE,
    METADATA,
    PRIVATE,
    TEXT_CRC,
    Array,
    arrays,
    attributes_of,
    dimensions,
    escaped,
    groups,
    scale_of,
    text_crc,
)
from actstore.hdf5.text import read_attribute

__all__ = ["Hdf5Writer"]

Grid = tuple[int, ...]

_STRING: Final = h5py.string_dtype()
_PHONY: Final = "This is a netCDF dimension but not a netCDF variable. {:10d}"
#: What is in memory of a chunk: read, padded, its planes, what encodes it, encoded, decoded.
_COPIES: Final = 7
_BESIDE: Final = 64 << 20


@dataclass(slots=True, eq=False)
class _Written:
    """The chunks of an array that were written, in order, and the CRC-32C of each."""

    places: list[Grid] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)


class Hdf5Writer:
    """Mirrors an archive into an HDF5 file that nobody reads yet.

    Parameters
    ----------
    source : Path or ZipPath
        The archive.
    compression : str
        One of `chunks.COMPRESSIONS`.
    max_memory_gb : float
        GB of memory that it may take.
    done : callable
        Called with bytes of values, as they are done.

    Attributes
    ----------
    raw_bytes : int
        Bytes of the values of all its arrays that are there.
    chunks : int
        How many chunks were written, and read back.

    Raises
    ------
    ConfigError
        A chunk needs more memory.
    ArchiveError
        HDF5 can't have it, or what was written doesn't read back.
    """

    def __init__(
        self,
        source: Place,
        compression: str,
        max_memory_gb: float,
        done: Callable[[int], None],
    ) -> None:
        self.source = source
        self.data = (source / "zarr.json").read_bytes()
        self.root = parse_root(self.data, source)
        if len(set(metadata_crc(self.data))) > 1:
            msg = f"{source}: its metadata don't match their checksum; see actstore.verify"
            raise ArchiveError(msg)
        self.arrays = arrays(self.root)
        self.raw_bytes = self.chunks = 0
        self._compression = compression
        self._done = done
        self._scales = dimensions(self.arrays)
        self._ahead = self._fitting(max_memory_gb)
        self._written: dict[str, _Written] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the values of all its arrays, if all are there."""
        return sum(one.nbytes for one in self.arrays.values())

    def write(self, path: Path) -> None:
        """Write the file, and read it back."""
        # 1.8's format: what netCDF's own library writes, and every HDF5 since reads
        with (
            h5py.File(path, "w", libver=("v108", "v110"), locking=False) as file,
            ThreadPoolExecutor(machine.cores(), "actstore-hdf5") as pool,
        ):
            self._skeleton(file)
            for array in self.arrays.values():
                if array.is_text:
                    self._text(file[array.name], array)
                elif array.nbytes:
                    self._values(file[array.name], array, pool)
        with h5py.File(path, "r", locking=False) as file:
            for array in self.arrays.values():
                self._compare(file[array.name], array)

    def _fitting(self, max_memory_gb: float) -> int:
        """Give how many chunks fit into memory at once."""
        most = max((one.chunk_bytes for one in self.arrays.values()), default=1)
        count = count_fitting("chunk", _COPIES * most, max_memory_gb, _BESIDE)
        return min(count, 2 * machine.cores())

    # -- what is there before any value

    def _skeleton(self, file: Any) -> None:
        """Write groups, arrays without values, attributes and dimensions."""
        for name, said in groups(self.root).items():
            group = file.require_group(name or "/")
            _set_attributes(group, attributes_of(said))
        for number, (name, (size, is_array)) in enumerate(self._scales.items()):
            if is_array:
                scale = self._create(file, self.arrays[name])
                scale.make_scale(name.rpartition("/")[2])
            else:  # a length, as netCDF has it: nothing is ever written there
                scale = file.create_dataset(name, (size,), ">f4")
                scale.make_scale(_PHONY.format(size))
            scale.attrs["_Netcdf4Dimid"] = np.int32(number)
        for array in self.arrays.values():
            made = file[array.name] if array.name in file else self._create(file, array)
            scales = [
                scale_of(array, dim, size, self._scales)
                for dim, size in zip(array.dims, array.shape, strict=True)
            ]
            if scales != [array.name]:
                for axis, name in enumerate(scales):
                    made.dims[axis].attach_scale(file[name])
        mine = file.create_dataset(METADATA, data=np.frombuffer(self.data, np.uint8))
        mine.make_scale(METADATA.rpartition("/")[2])
        mine.attrs["_Netcdf4Dimid"] = np.int32(len(self._scales))
        about = "The archive's metadata, which actstore reads. See schemas/hdf5.md of actstore."
        _set_attributes(file[PRIVATE], {"about": about})

    def _create(self, file: Any, array: Array) -> Any:
        options: dict[str, Any] = {}
        if not array.is_text and array.nbytes and array.shape:
            options = {"chunks": array.cut(), "shuffle": True, "fletcher32": True}
            number = coded.COMPRESSIONS[self._compression]
            if number == 1:
                options |= {"compression": "gzip", "compression_opts": 1}
            elif number is not None:  # who reads it needs the plugin; who writes it doesn't
                options |= {"compression": number, "compression_opts": (1,)}
                options["allow_unknown_filter"] = True
            else:
                options["shuffle"] = False
        dtype = _STRING if array.is_text else array.stored
        fill = None if array.is_text else array.stored.type(array.fill)
        made = file.create_dataset(array.name, array.shape, dtype, fillvalue=fill, **options)
        _set_attributes(made, attributes_of(array.attributes, array))
        return made

    # -- values

    def _values(self, made: Any, array: Array, pool: ThreadPoolExecutor) -> None:
        """Write the chunks of an array that are there, a few ahead, in order."""
        written = self._written[array.name] = _Written()
        if not array.shape:  # HDF5 has no chunks of a single value
            made[()] = store.read_part(self.source, array.name, ()).astype(array.stored)
            return
        source = _Source(self.source, array, self.arrays)
        pending: deque[tuple[Grid, Future[bytes]]] = deque()
        nbytes = int(np.prod(array.cut(), dtype=np.int64)) * array.dtype.itemsize

        def next_written() -> None:
            place, future = pending.popleft()
            encoded = future.result()
            offset = tuple(at * part for at, part in zip(place, array.cut(), strict=True))
            made.id.write_direct_chunk(offset, encoded)
            written.places.append(place)
            written.crcs.append(castagnoli.crc32c(encoded))
            self.raw_bytes += nbytes
            self._done(nbytes)

        try:
            for place in source.places():
                if len(pending) >= self._ahead:
                    next_written()
                pending.append((place, pool.submit(self._encoded, source, place)))
            while pending:
                next_written()
        except BaseException:
            for _, future in pending:
                future.cancel()
            raise
        self.chunks += len(written.places)

    def _encoded(self, source: _Source, place: Grid) -> bytes:
        """Encode a chunk, and decode it again by a decoder that is not ours."""
        array, chunk = source.array, source.chunk(place)
        repeats = shards.applied("balanced", chunk.reshape(-1, *chunk.shape[source.axis + 1 :]))
        data, size = chunk.reshape(-1).view(np.uint8), array.dtype.itemsize
        encoded = coded.encode(data, size, self._compression, repeats=repeats.repeats)
        if not coded.same(encoded, data, size, self._compression):
            raise _unverified(array, place)
        return encoded

    def _text(self, made: Any, array: Array) -> None:
        """Write strings; HDF5 has no filters for them, so that their checksum is an attribute."""
        parts = list(array.lines()) if array.nbytes else []  # read again rather than kept
        has_nul = any("\0" in one for part in parts for one in self._texts(array, part))
        crc = 0
        for part in parts:
            texts = self._texts(array, part)
            texts = escaped(texts) if has_nul else texts
            lengths = [one.stop - one.start for one in part]
            made[part] = np.array(texts, object).reshape(lengths)
            crc = text_crc(texts, crc)
            self._done(16 * len(texts))
        _set_attributes(
            made, {TEXT_CRC: f"{crc:08x}", **({ESCAPE: "backslash"} if has_nul else {})}
        )

    def _texts(self, array: Array, part: tuple[slice, ...]) -> list[str]:
        found = store.read_part(self.source, array.name, part)
        return [str(one) for one in found.reshape(-1).tolist()]

    # -- what was written

    def _compare(self, made: Any, array: Array) -> None:
        """Read an array's chunks back through h5py, and one of them through HDF5's own filters."""
        if array.is_text:
            crc = 0
            for part in array.lines() if array.nbytes else ():
                crc = text_crc(np.asarray(made.asstr()[part], object).reshape(-1).tolist(), crc)
            if f"{crc:08x}" != read_attribute(made, TEXT_CRC):
                raise _unverified(array, ())
            return
        written = self._written.get(array.name, _Written())
        for place, crc in zip(written.places, written.crcs, strict=True):
            offset = tuple(at * part for at, part in zip(place, array.cut(), strict=True))
            mask, data = made.id.read_direct_chunk(offset)
            if mask or castagnoli.crc32c(data) != crc:
                raise _unverified(array, place)
        number = coded.COMPRESSIONS[self._compression]
        if written.places and (number is None or h5py.h5z.filter_avail(number)):
            place = written.places[0]
            part = array.part(place)
            wanted = store.read_part(self.source, array.name, part).astype(array.stored)
            if made[part].tobytes() != wanted.tobytes():
                raise _unverified(array, place)


def _set_attributes(made: Any, values: Mapping[str, Any]) -> None:
    """Write attributes, strings in fixed length: they lie in the object's header, checksummed."""
    for name, value in values.items():
        if isinstance(value, str | list):
            texts = [one.encode() for one in ([value] if isinstance(value, str) else value)]
            kind = h5py.string_dtype("utf-8", max(1, *map(len, texts)))
            made.attrs.create(name, np.array(texts[0] if isinstance(value, str) else texts, kind))
        else:
            made.attrs[name] = value


def _unverified(array: Array, place: Grid) -> ArchiveError:
    msg = (
        f"{array.name} at chunk {place} doesn't read back as the archive has it; nothing was "
        "kept of the file: check the disk, and export again"
    )
    return ArchiveError(msg)


class _Source:
    """What reads the chunks of an archive's array."""

    def __init__(self, folder: Place, array: Array, others: Mapping[str, Array]) -> None:
        self.array = array
        self._folder = folder
        self._rows = ShardedRows.of(folder / array.name, array.said) if array.sharded else None
        self.axis = 0 if self._rows is None else self._rows.axis
        self._companion = array.companion(others)

    def places(self) -> Iterator[Grid]:
        """Give the chunks that are there; all, where it can't be told.

        Raises
        ------
        ArchiveError
            One is not there, though its rows are.
        """
        wanted: NDArray[np.bool_] | None = None
        if self._companion is not None:
            whole = tuple(map(slice, self._companion.shape))
            wanted = self.array.wanted(store.read_part(self._folder, self._companion.name, whole))
        for place in self.array.places():
            if self._rows is None or self._rows.is_written(*self._at(place)):
                yield place
            elif wanted is None or wanted[place[: wanted.ndim]]:
                msg = (
                    f"{self._folder}: chunk {place} of {self.array.name!r} is not there, though "
                    "its rows are; see actstore.verify"
                )
                raise ArchiveError(msg)

    def chunk(self, place: Grid) -> NDArray[Any]:
        """Read a whole chunk, as HDF5 has it: filled up behind the end of the array."""
        array = self.array
        found = None if self._rows is None else self._rows.chunk(*self._at(place))
        if found is None:
            found = store.read_part(self._folder, array.name, array.part(place))
        elif self.axis:
            found = found[np.newaxis]
        found = found.astype(array.stored, copy=False)
        if found.shape != array.cut():
            whole = np.full(array.cut(), array.fill, array.stored)
            whole[tuple(map(slice, found.shape))] = found
            found = whole
        return np.ascontiguousarray(found)

    def _at(self, place: Grid) -> tuple[int, int]:
        """Give the layer and the chunk along the rows."""
        return (place[0] if self.axis else 0), place[self.axis]
