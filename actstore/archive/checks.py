"""Owns whether an archive is intact: its metadata, and the checksum of every chunk."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.archive import store
from actstore.archive.adding import ADDED
from actstore.archive.names import leads_out
from actstore.archive.precision import SCALE
from actstore.archive.root import metadata_crc
from actstore.archive.shards import check_shard, is_sealed, shard_path
from actstore.archive.zipped import Place
from actstore.buckets import RemotePath
from actstore.errors import FormatError

__all__ = ["ArchiveCheck", "Finding"]

_MOST_FINDINGS: Final = 100
_MALFORMED: Final = (AttributeError, KeyError, IndexError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something of an archive that is not as it was written.

    Attributes
    ----------
    where : str
        The file within the archive and, of a shard, the inner chunk.
    reason : str
        What was wanted and what was found.
    """

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Array:
    """What an array's metadata says of its files."""

    name: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    inner: tuple[int, ...] | None
    dims: tuple[str, ...]

    @classmethod
    def parse(cls, name: str, said: Mapping[str, Any]) -> _Array:
        grid = _lengths(said["chunk_grid"]["configuration"]["chunk_shape"])
        shape, codec = _lengths(said["shape"], least=0), said["codecs"][0]
        inner = None
        if codec["name"] == "sharding_indexed":
            inner = _lengths(codec["configuration"]["chunk_shape"])
            if any(whole % part for whole, part in zip(grid, inner, strict=True)):
                msg = f"shards of {grid} don't hold whole chunks of {inner}"
                raise FormatError(msg)
            codec = codec["configuration"]
            said = {**said, "codecs": codec["codecs"]}
        if said["codecs"][-1]["name"] != "crc32c" or len(grid) != len(shape):
            msg = "its chunks have no checksum, or another number of dimensions"
            raise FormatError(msg)
        dims = said["dimension_names"] if shape else ()  # zarr-python then leaves it out
        return cls(name, shape, grid, inner, tuple(map(str, dims)))

    def places(self) -> Iterator[tuple[int, ...]]:
        """Give the places of its files in the grid, however many it says there are."""
        counts = [-(-size // part) for size, part in zip(self.shape, self.grid, strict=True)]
        for number in range(math.prod(counts)):
            place, rest = [], number
            for count in reversed(counts):
                rest, at = divmod(rest, count)
                place.append(at)
            yield tuple(reversed(place))

    def wanted(self, place: tuple[int, ...]) -> tuple[slice, ...]:
        """Give what a shard holds of the array."""
        return tuple(
            slice(at * part, min((at + 1) * part, size))
            for at, part, size in zip(place, self.grid, self.shape, strict=True)
        )


def _lengths(given: Any, least: int = 1) -> tuple[int, ...]:
    if not all(type(one) is int and one >= least for one in given):
        msg = f"lengths of at least {least} were wanted; found {given!r:.100}"
        raise FormatError(msg)
    return tuple(given)


@dataclass(slots=True)
class ArchiveCheck:
    """Reads all of an archive once, a chunk at a time, and tells what is damaged.

    Parameters
    ----------
    folder : Path or ZipPath
        The archive.

    Attributes
    ----------
    checked : Counter of str
        How much was looked at: ``arrays``, ``files``, ``chunks``.
    nbytes : int
        Bytes of the files that were looked at.
    progress : callable, optional
        Called with these after each file.
    """

    folder: Place
    checked: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    progress: Callable[[int], None] | None = None

    def findings(self) -> Iterator[Finding]:
        """Yield what is damaged."""
        place = self.folder / "zarr.json"
        place = place.fetched() if isinstance(place, RemotePath) else place
        data = place.read_bytes()
        self._looked_at(place)
        wanted, found = metadata_crc(data)
        if wanted != found or not wanted:
            yield Finding("zarr.json", f"its CRC-32C is {found or 'missing'}, not {wanted!r}")
        try:
            root = json.loads(data)
            below = root["consolidated_metadata"]["metadata"]
            yield from self._nodes(below)
            arrays = {
                name: _Array.parse(name, said)
                for name, said in below.items()
                if said["node_type"] == "array" and ".." not in name.split("/")
            }
            yield from self._agreement(root["attributes"], arrays, below)
        except (*_MALFORMED, RecursionError) as error:
            yield Finding("zarr.json", f"it describes no archive: {error!r:.200}")
            return
        for array in arrays.values():
            self.checked["arrays"] += 1
            yield from self._array(array, arrays)

    def _looked_at(self, path: Place) -> None:
        self.checked["files"] += 1
        self.nbytes += path.stat().st_size
        if self.progress is not None:
            self.progress(self.nbytes)

    def _nodes(self, below: Mapping[str, Any]) -> Iterator[Finding]:
        """Compare each node's own metadata with what the root says of it."""
        for name, said in below.items():
            if leads_out(name):
                yield Finding("zarr.json", f"it names something outside of the archive: {name!r}")
                continue
            place = self.folder / name / "zarr.json"
            try:
                place = place.fetched() if isinstance(place, RemotePath) else place
                found = json.loads(place.read_bytes())
            except (OSError, ValueError, RecursionError) as error:
                yield Finding(f"{name}/zarr.json", f"it can't be read: {error}")
                continue
            self._looked_at(place)
            if found != said:
                yield Finding(f"{name}/zarr.json", "it says something else than the root's")

    def _agreement(
        self, said: Mapping[str, Any], arrays: Mapping[str, _Array], below: Container[str]
    ) -> Iterator[Finding]:
        """Compare what the root's attributes and the arrays say of one another."""
        sizes: dict[tuple[str, str], int] = {("", dim): size for dim, size in said["rows"].items()}
        for array in arrays.values():
            group = array.name.rpartition("/")[0]
            for dim, size in zip(array.dims, array.shape, strict=True):
                other = sizes.setdefault((group, dim), size)
                if other != size:
                    reason = f"its dimension {dim} is {size} long; another's is {other}"
                    yield Finding(f"{array.name}/zarr.json", reason)
        for name in said["coordinates"].split():
            if name not in arrays:
                yield Finding("zarr.json", f"it names a coordinate {name!r} that is not there")
        for name, values in said.get("index", {}).items():
            if name in arrays and not self._same(name, values):
                yield Finding("zarr.json", f"it says other values of the index {name!r}")
        for name in said.get(ADDED, {}):
            if name not in below:
                yield Finding("zarr.json", f"it says that {name!r} was added, which is not there")

    def _same(self, name: str, values: Any) -> bool:
        """Whether an index has these values; one that can't be read is its own check's."""
        try:
            found = store.read_part(self.folder, name, (slice(None),))
        except (*_MALFORMED, OSError, RuntimeError):
            return True
        return bool(found.tolist() == values)

    def _array(self, array: _Array, arrays: Mapping[str, _Array]) -> Iterator[Finding]:
        """Check an array's files; what is wrong in very many places is told of some."""
        companion = arrays.get(f"{array.name.removesuffix(SCALE)}_present")
        if companion is not None and companion.shape != array.shape[: len(companion.shape)]:
            companion = None
        found = 0
        for place in array.places():
            check = self._chunk if array.inner is None else self._shard
            for one in check(array, place, companion):
                yield one
                found += 1
            if found >= _MOST_FINDINGS:
                yield Finding(array.name, f"after {found} findings the rest was not looked at")
                return

    def _shard(
        self, array: _Array, place: tuple[int, ...], companion: _Array | None
    ) -> Iterator[Finding]:
        path = shard_path(self.folder, array.name, place)
        name = "/".join([array.name, "c", *map(str, place)])
        wanted = self._wanted(array, place, companion)
        try:
            path = path.fetched() if isinstance(path, RemotePath) else path
            there = path.exists()
        except FileNotFoundError:
            there = False
        if not there:
            if wanted.any():
                yield Finding(name, "the file is gone")
            return
        self._looked_at(path)
        self.checked["chunks"] += wanted.size
        try:
            for number, reason in check_shard(path, wanted):
                yield Finding(name if number < 0 else f"{name}, chunk {number}", reason)
        except OSError as error:
            yield Finding(name, f"the file can't be read: {error}")

    def _wanted(
        self, array: _Array, place: tuple[int, ...], companion: _Array | None
    ) -> NDArray[np.bool_]:
        """Give which inner chunks of a shard hold a row that is there, as the companion says."""
        inner, inside = array.inner or array.grid, array.wanted(place)
        counts = tuple(whole // part for whole, part in zip(array.grid, inner, strict=True))
        starts = [
            range(0, one.stop - one.start, part) for one, part in zip(inside, inner, strict=True)
        ]
        wanted = np.zeros(counts, np.bool_)
        wanted[tuple(slice(len(one)) for one in starts)] = True
        if companion is None:
            return wanted.ravel()
        try:
            present = store.read_part(self.folder, companion.name, inside[: len(companion.shape)])
        except (*_MALFORMED, OSError, RuntimeError):
            return np.zeros(wanted.size, np.bool_)  # the companion's own check says so
        for axis, one in enumerate(starts[: present.ndim]):
            present = np.logical_or.reduceat(present, list(one), axis=axis)
        there = present.reshape(*present.shape, *(1,) * (wanted.ndim - present.ndim))
        wanted[tuple(slice(len(one)) for one in starts)] &= there
        return wanted.ravel()

    def _chunk(
        self, array: _Array, place: tuple[int, ...], _companion: _Array | None
    ) -> Iterator[Finding]:
        path = shard_path(self.folder, array.name, place)
        name = "/".join([array.name, "c", *map(str, place)])
        try:
            path = path.fetched() if isinstance(path, RemotePath) else path
            data = path.read_bytes()
        except OSError as error:
            yield Finding(name, f"the file can't be read: {error}")
            return
        self._looked_at(path)
        self.checked["chunks"] += 1
        if not is_sealed(data):
            yield Finding(name, "its bytes don't match their checksum")
