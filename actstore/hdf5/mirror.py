"""Owns what an archive's metadata becomes in HDF5: types, attributes, dimensions; pure.

The metadata itself is kept too, as it is: that is what actstore reads. What is made of it here is
for everybody else, in the terms of HDF5 and netCDF-4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import crc32c as castagnoli
import numpy as np
from numpy.typing import NDArray

from actstore.archive.coordinates import STRING
from actstore.archive.reading import fill_of
from actstore.errors import ArchiveError, FormatError

__all__ = [
    "METADATA",
    "PRIVATE",
    "TEXT_CRC",
    "Array",
    "arrays",
    "attributes_of",
    "dimensions",
    "escaped",
    "groups",
    "text_crc",
    "unescaped",
]

#: The group of what only actstore reads, and the dataset in it that is the root's ``zarr.json``.
PRIVATE: Final = "_actstore"
METADATA: Final = f"{PRIVATE}/zarr.json"
#: Attributes of string arrays: how NUL is written in them, and the checksum of their strings.
ESCAPE, TEXT_CRC = "nul_escape", "crc32c"

_MOST_CHUNK: Final = 1 << 30  # bytes: as many as a row of an archive has at most
_MOST_SHARDS: Final = 1 << 20  # of an array: 64 TiB of values
_MOST_LIST: Final = 1000  # items of an attribute
_INT64: Final = range(-(1 << 63), 1 << 63)
_TAKEN: Final = frozenset(
    {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "_Netcdf4Dimid", "_Netcdf4Coordinates"}
    | {"_NCProperties", "_nc3_strict", ESCAPE, TEXT_CRC}
)
_DTYPES: Final = frozenset(
    {"bool", "string", "float16", "float32", "float64", "complex64", "complex128"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
_MALFORMED: Final = (
    *(AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError),
)


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """An array of an archive, as it is in HDF5.

    Attributes
    ----------
    name : str
        Its path in the archive and in the file.
    dtype : numpy.dtype
        Of its values: `STRING` for text.
    shape, chunk, shard : tuple of int
        Of the array, of its chunks, which are the archive's inner chunks, and of the archive's
        shards; where there are none, of its chunks.
    dims : tuple of str
        Its dimensions.
    fill : object
        What stands where nothing was written.
    sharded : bool
        Whether it is one of the arrays whose chunks may be missing.
    said : mapping
        Its metadata in the archive.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    dims: tuple[str, ...]
    fill: Any
    sharded: bool
    said: Mapping[str, Any]

    @classmethod
    def parse(cls, name: str, said: Mapping[str, Any]) -> Array:
        """Read an array's metadata.

        Raises
        ------
        FormatError
            It describes none that an archive has.
        """
        try:
            shape, kind = _lengths(said["shape"], 0), said["data_type"]
            shard = _lengths(said["chunk_grid"]["configuration"]["chunk_shape"], 1)
            codec = said["codecs"][0]
            dims = said["dimension_names"] if shape else ()  # zarr-python then leaves it out
            sharded = codec["name"] == "sharding_indexed"
            chunk = _lengths(codec["configuration"]["chunk_shape"], 1) if sharded else shard
            dtype = STRING if kind == "string" else np.dtype(kind)
            fill = "" if kind == "string" else fill_of(said["fill_value"], dtype)
            found = cls(name, dtype, shape, chunk, shard, tuple(dims), fill, sharded, said)
            if kind not in _DTYPES or not isinstance(found.attributes, dict):
                msg = f"data_type {kind!r:.40}, attributes {found.attributes!r:.40}"
                raise FormatError(msg)
            if not all(isinstance(dim, str) and _is_plain(dim) for dim in dims):
                msg = f"dimensions {dims!r:.200}"
                raise FormatError(msg)
            found._check_cut()
        except _MALFORMED as error:
            msg = f"the metadata of {name!r} describe no array of an archive: {error!r:.200}"
            raise FormatError(msg) from error
        return found

    def _check_cut(self) -> None:
        """Refuse chunks and shards that compaction doesn't make, such as absurdly many."""
        cuts = list(zip(self.shape, self.chunk, self.shard, self.dims, strict=True))
        whole = all(not shard % chunk for _, chunk, shard, _ in cuts)
        needed = all(shard <= max(-(-size // chunk), 1) * chunk for size, chunk, shard, _ in cuts)
        count = math.prod(-(-size // shard) for size, _, shard, _ in cuts)
        if not whole or (self.sharded and not needed) or count > _MOST_SHARDS:
            msg = f"{count} shards of {self.shard}, chunks of {self.chunk}, of {self.shape}"
            raise FormatError(msg)

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Its attributes in the archive."""
        return self.said.get("attributes", {})  # type: ignore[no-any-return]

    @property
    def is_text(self) -> bool:
        """Whether its values are strings."""
        return self.dtype == STRING

    @property
    def stored(self) -> np.dtype:
        """What its values are in HDF5, text aside: there are no bools in netCDF."""
        return np.dtype("i1") if self.dtype == np.bool_ else self.dtype.newbyteorder("<")

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a whole chunk."""
        return math.prod(self.chunk) * (16 if self.is_text else self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * (16 if self.is_text else self.dtype.itemsize)

    def cut(self) -> tuple[int, ...]:
        """Give its chunks in HDF5, which are no longer than the array.

        Raises
        ------
        ArchiveError
            They are larger than any that an archive has.
        """
        if self.chunk_bytes > _MOST_CHUNK:
            msg = f"a chunk of {self.name!r} has {self.chunk_bytes} bytes, over {_MOST_CHUNK}"
            raise ArchiveError(msg)
        return tuple(
            max(1, min(part, size)) for part, size in zip(self.chunk, self.shape, strict=True)
        )

    def grid(self) -> tuple[int, ...]:
        """Give how many chunks it has along each dimension."""
        return tuple(-(-size // part) for size, part in zip(self.shape, self.cut(), strict=True))

    def places(self) -> Iterator[tuple[int, ...]]:
        """Give the places of its chunks, however many it says there are."""
        counts = self.grid()
        for number in range(math.prod(counts)):
            place, rest = [], number
            for count in reversed(counts):
                rest, at = divmod(rest, count)
                place.append(at)
            yield tuple(reversed(place))

    def lines(self) -> Iterator[tuple[slice, ...]]:
        """Give parts of it, one after the other, in C order: whole but along the first axis."""
        if not self.shape:
            yield ()
            return
        step = self.cut()[0]
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0])), *map(slice, self.shape[1:])

    def companion(self, found: Mapping[str, Array]) -> Array | None:
        """Give the array that says which of its rows are there; None: all are."""
        mine = found.get(f"{self.name}_present")
        if mine is None or mine.shape != self.shape[: len(mine.shape)]:
            return None
        return mine

    def wanted(self, present: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Give which of its chunks hold a row that is there, along the axes of ``present``."""
        for axis, part in enumerate(self.cut()[: present.ndim]):
            starts = range(0, self.shape[axis], part)
            present = np.logical_or.reduceat(present, starts, axis=axis)
        return present

    def part(self, place: tuple[int, ...]) -> tuple[slice, ...]:
        """Give what the chunk at a place in the grid holds of the array."""
        return tuple(
            slice(at * part, min((at + 1) * part, size))
            for at, part, size in zip(place, self.cut(), self.shape, strict=True)
        )


def _lengths(given: Any, least: int) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(
        type(one) is int and least <= one < 1 << 62 for one in given
    ):
        msg = f"lengths from {least} on were wanted; found {given!r:.100}"
        raise FormatError(msg)
    return tuple(given)


def _is_plain(name: str) -> bool:
    return bool(name) and name not in (".", "..") and "/" not in name and "\0" not in name


def _nodes(root: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give what is in an archive, by name, of names that can be paths in a file."""
    try:
        for name, said in root["consolidated_metadata"]["metadata"].items():
            parts = name.split("/")
            if not all(map(_is_plain, parts)) or parts[0] == PRIVATE:
                msg = f"it names {name!r}, which can't be in it"
                raise FormatError(msg)
            if said["node_type"] == kind:
                yield name, said
    except _MALFORMED as error:
        if isinstance(error, FormatError):
            raise
        msg = f"its metadata describe no archive: {error!r:.200}"
        raise FormatError(msg) from error


def arrays(root: Mapping[str, Any]) -> dict[str, Array]:
    """Give an archive's arrays, of its root metadata; a `FormatError` where they are none."""
    return {name: Array.parse(name, said) for name, said in _nodes(root, "array")}


def groups(root: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Give an archive's groups and their attributes, the root (``""``) first."""
    below = {name: said.get("attributes", {}) for name, said in _nodes(root, "group")}
    found = {"": root["attributes"], **dict(sorted(below.items()))}
    if not all(isinstance(said, dict) for said in found.values()):
        msg = "its metadata describe no archive: attributes that are no object"
        raise FormatError(msg)
    return found


# -- dimensions ---------------------------------------------------------------------------------


def dimensions(found: Mapping[str, Array]) -> dict[str, tuple[int, bool]]:
    """Give the dimension scales of a file: path -> length, and whether an array is it.

    A dimension is that of the nearest group, from the array's up, in which it has that length; if
    there is none, the array's group gets one. The array of a dimension's own name is its scale.

    Raises
    ------
    ArchiveError
        A name is a dimension's and another array's, or has two lengths in a group.
    """
    scales: dict[str, tuple[int, bool]] = {}
    for array in sorted(found.values(), key=lambda one: (one.name.count("/"), one.name)):
        for dim, size in zip(array.dims, array.shape, strict=True):
            place = scale_of(array, dim, size, scales)
            mine = found.get(place)
            is_array = mine is not None and mine.dims == (dim,) and mine.shape == (size,)
            clash = mine is not None and not is_array
            if clash or scales.setdefault(place, (size, is_array))[0] != size:
                msg = f"{place!r} can't be the scale of {array.name!r}'s dimension {dim!r}"
                raise ArchiveError(msg)
    return scales


def scale_of(array: Array, dim: str, size: int, scales: Mapping[str, tuple[int, bool]]) -> str:
    """Give the path of the scale of an array's dimension."""
    parents = PurePosixPath(array.name).parent.parts
    for depth in range(len(parents), -1, -1):
        place = "/".join((*parents[:depth], dim))
        if scales.get(place, (-1, False))[0] == size:
            return place
    return "/".join((*parents, dim))


# -- attributes ---------------------------------------------------------------------------------


def attributes_of(said: Mapping[str, Any], array: Array | None = None) -> dict[str, Any]:
    """Give the attributes of an object in HDF5.

    Strings, integers and numbers are that; so are lists of strings, of integers or of numbers.
    What netCDF has no type for is its JSON, as a string.
    """
    found = {
        name: _attribute(name, value, array)
        for name, value in said.items()
        if name not in _TAKEN and name and "\0" not in name
    }
    if array is not None and array.dtype == np.bool_:
        found["dtype"] = "bool"  # by which xarray knows them
    if array is not None and array.sharded and array.dtype.kind == "f":
        found.setdefault("_FillValue", array.stored.type(np.nan))
    return found


def _attribute(name: str, value: Any, array: Array | None) -> Any:
    if isinstance(value, str) and "\0" not in value:
        return value
    if name == "_FillValue" and array is not None and _is_number(value):
        return array.stored.type(value)
    many = value if isinstance(value, list) and 0 < len(value) <= _MOST_LIST else ()
    for kind in (int, float):
        if _is(kind, value):
            return np.dtype(kind).type(value)
        if many and all(_is(kind, one) for one in many):
            return np.array(many, kind)
    if many and all(isinstance(one, str) and "\0" not in one for one in many):
        return many
    return json.dumps(value)


def _is(kind: type, value: Any) -> bool:
    if type(value) is int:
        return kind is int and value in _INT64
    return type(value) is float and kind is float and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return _is(int, value) or _is(float, value)


# -- text ---------------------------------------------------------------------------------------


def escaped(texts: list[str]) -> list[str]:
    """Write NUL, which HDF5's strings can't hold, as backslash and 0, a backslash as two."""
    return [one.replace("\\", "\\\\").replace("\0", "\\0") for one in texts]


def unescaped(texts: list[str]) -> list[str]:
    """Undo `escaped`."""
    return ["\\".join(part.replace("\\0", "\0") for part in one.split("\\\\")) for one in texts]


def text_crc(texts: list[str], crc: int = 0) -> int:
    """Give the CRC-32C of strings as they are in the file, in UTF-8, each with a NUL behind it."""
    data = "".join(f"{one}\0" for one in texts).encode("utf-8", "surrogatepass")
    return int(castagnoli.crc32c(data, crc))
