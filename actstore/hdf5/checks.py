"""Owns whether an HDF5 file that an archive was mirrored into is intact, and says one thing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from actstore import machine
from actstore.archive.checks import Finding
from actstore.archive.root import metadata_crc
from actstore.errors import ArchiveError, FormatError, UnsupportedVersionError
from actstore.hdf5.mirror import (
    ESCAPE,
    METADATA,
    PRIVATE,
    TEXT_CRC,
    Array,
    attributes_of,
    dimensions,
    groups,
    scale_of,
)
from actstore.hdf5.reading import Grid, Hdf5Archive, Stored, is_ours

__all__ = ["Hdf5Check"]

_AHEAD: Final = 8
_MOST_FINDINGS: Final = 100  # of an array
_MOST_DEPTH: Final = 16
_MOST_OBJECTS: Final = 1 << 20
_OF_HDF5: Final = (OSError, KeyError, RuntimeError, ValueError, TypeError)
#: Attributes that say how HDF5 and netCDF-4 have something, and nothing of the archive's.
_STRUCTURE: Final = frozenset(
    {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "_Netcdf4Dimid", ESCAPE, TEXT_CRC}
)


@dataclass(slots=True)
class Hdf5Check:
    """Reads all of a file once, a few chunks at a time, and tells what is damaged.

    Parameters
    ----------
    path : Path
        The file.
    progress : callable, optional
        Called with the bytes of values that are done and those that there are.

    Attributes
    ----------
    checked : Counter of str
        How much was looked at: ``arrays``, ``chunks``.

    Raises
    ------
    FormatError
        It is no HDF5 file of actstore.
    UnsupportedVersionError
        It is one of a version that this actstore doesn't know.
    """

    path: Path
    progress: Callable[[int, int], None] | None = None
    checked: Counter[str] = field(default_factory=Counter)

    def findings(self) -> Iterator[Finding]:
        """Yield what is damaged."""
        try:
            archive = Hdf5Archive(self.path)
        except UnsupportedVersionError:
            raise
        except FormatError as error:
            if not is_ours(self.path):
                raise
            yield Finding(METADATA, str(error))
            return
        with archive, ThreadPoolExecutor(machine.cores()) as pool:
            wanted, found = metadata_crc(archive.data)
            if wanted != found or not wanted:
                yield Finding(METADATA, f"its CRC-32C is {found or 'missing'}, not {wanted!r}")
            yield from self._objects(archive)
            done, total = 0, sum(array.nbytes for array in archive.arrays.values())
            for array in archive.arrays.values():
                self.checked["arrays"] += 1
                try:
                    mine = self._array(archive, archive.stored(array.name), pool)
                    yield from itertools.islice(mine, _MOST_FINDINGS)
                except (ArchiveError, FormatError) as error:
                    yield Finding(array.name, str(error))
                done += array.nbytes
                if self.progress is not None:
                    self.progress(done, total)

    # -- what is there

    def _objects(self, archive: Hdf5Archive) -> Iterator[Finding]:
        """Compare groups, dimensions and attributes with the archive's metadata."""
        try:
            scales, all_groups = dimensions(archive.arrays), groups(archive.root)
        except (ArchiveError, FormatError) as error:
            yield Finding(METADATA, str(error))
            return
        known = {PRIVATE, METADATA, *scales, *archive.arrays, *all_groups}
        there: set[str] = set()
        for name, why in _walk(archive.file.id, "", 0):
            there.add(name)
            if why or name not in known:
                yield Finding(name, why or "the archive has no such thing")
            if len(there) > _MOST_OBJECTS:
                yield Finding(name, f"over {_MOST_OBJECTS} objects; the rest was not looked at")
                return
        for name in sorted(known - there - {""}):
            yield Finding(name, "it is gone")
        for name, said in all_groups.items():
            if not name or name in there:
                yield from _said(archive, name, attributes_of(said))
        for array in archive.arrays.values():
            if array.name in there:
                mine = attributes_of(array.attributes, array)
                yield from _said(archive, array.name, mine)

        yield from _of_scales(
            archive, {name: one for name, one in scales.items() if name in there}
        )

    # -- values

    def _array(
        self, archive: Hdf5Archive, stored: Stored, pool: ThreadPoolExecutor
    ) -> Iterator[Finding]:
        array = stored.array
        if array.is_text:
            archive.text(array.name)
            return
        if not array.shape or not array.nbytes:
            return
        wanted = _wanted(archive, array)

        def check(place: Grid) -> str:
            try:
                there = archive.chunk(stored, place) is not None
            except ArchiveError as error:
                return str(error)
            missing = wanted is None or bool(wanted[place[: wanted.ndim]])
            return "" if there or not missing else "it is not there, though its rows are"

        for batch in _batches(array.places()):
            for place, reason in zip(batch, pool.map(check, batch), strict=True):
                self.checked["chunks"] += 1
                if reason:
                    yield Finding(f"{array.name}, chunk {place}", reason)


def _batches(places: Iterator[Grid]) -> Iterator[list[Grid]]:
    while batch := list(itertools.islice(places, _AHEAD)):
        yield batch


def _wanted(archive: Hdf5Archive, array: Array) -> NDArray[np.bool_] | None:
    """Give which chunks hold a row that is there, as the companion says; None: all."""
    companion = array.companion(archive.arrays)
    if companion is None:
        return None
    try:
        present = archive.part(companion.name, tuple(map(slice, [0] * 9, companion.shape)))
    except ArchiveError:
        return np.zeros(array.grid(), np.bool_)  # the companion's own check says so
    return array.wanted(present)


def _walk(group: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:
    """Give every link below a group, and why it must not be there; follow none to elsewhere."""
    try:
        names = [name.decode("utf-8", "surrogateescape") for name in group]
    except _OF_HDF5 as error:
        yield path, f"it can't be listed: {error}"
        return
    for name in names:
        place = f"{path}/{name}" if path else name
        try:
            key = name.encode("utf-8", "surrogateescape")
            if group.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                yield place, "it is a link to elsewhere"
                continue
            below = h5py.h5o.open(group, key)
        except _OF_HDF5 as error:
            yield place, f"it can't be opened: {error}"
            continue
        yield place, ""
        if isinstance(below, h5py.h5g.GroupID):
            if depth == _MOST_DEPTH:
                yield place, f"it is in {depth} groups"
            else:
                yield from _walk(below, place, depth + 1)


def _said(
    archive: Hdf5Archive,
    name: str,
    attributes: Mapping[str, Any],
) -> Iterator[Finding]:
    """Compare the attributes of an object with what they must be."""
    try:
        made = archive.file[name or "/"]
    except _OF_HDF5 as error:
        yield Finding(name, f"it can't be opened: {error}")
        return
    yield from _attributes(made, name, attributes)


def _attributes(made: Any, name: str, wanted: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare attributes with what they must be."""
    try:
        keys = [key for key in made.attrs if key not in _STRUCTURE]
        # strings of variable length are none of ours, and in a heap that may be endless
        found = {key: made.attrs[key] for key in keys if _is_plain(made, key)}
    except _OF_HDF5 as error:
        yield Finding(name, f"its attributes can't be read: {error}")
        return
    found |= dict.fromkeys(set(keys) - set(found))
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found or key not in wanted or not _equal(found[key], wanted[key]):
            yield Finding(name, f"its attribute {key!r} isn't what the archive's metadata say")


def _is_plain(made: Any, key: str) -> bool:
    kind = h5py.h5a.open(made.id, key.encode("utf-8", "surrogateescape")).get_type()
    if isinstance(kind, h5py.h5t.TypeStringID):
        return not kind.is_variable_str()
    return isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID)


def _equal(one: Any, other: Any) -> bool:
    mine, its = np.asarray(one), np.asarray(other)
    if mine.dtype.kind == "S":
        mine = np.char.decode(mine, "utf-8", "replace")
    if mine.dtype.kind in "fiu" and its.dtype.kind in "fiu":
        return np.array_equal(mine, its, equal_nan=True)
    return bool(mine.tolist() == its.tolist())


def _of_scales(archive: Hdf5Archive, scales: Mapping[str, tuple[int, bool]]) -> Iterator[Finding]:
    """Compare what each scale says of whose it is; what the arrays say is in a heap."""
    wanted: dict[str, set[tuple[str, int]]] = {}
    for array in archive.arrays.values():
        for axis, (dim, size) in enumerate(zip(array.dims, array.shape, strict=True)):
            scale = scale_of(array, dim, size, scales)
            if scale != array.name:
                wanted.setdefault(scale, set()).add((f"/{array.name}", axis))
    for name in scales:
        try:
            made = archive.file[name]
            said = made.attrs["REFERENCE_LIST"].tolist() if name in wanted else []
            found = {(archive.file[reference].name, axis) for reference, axis in said}
            if found == wanted.get(name, set()):
                continue
        except (*_OF_HDF5, AttributeError) as error:
            yield Finding(name, f"whose dimension it is can't be read: {error}")
            continue
        yield Finding(name, "it is not the dimension of what the archive's metadata say")
