"""Owns writing labels of the user's into an archive, and taking out what was added to one.

How that is done, and what a kill leaves, is ``archive.adding``'s; what a label is, ``joining``'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.archive import store
from actstore.archive.adding import ADDED, add_arrays, remove_arrays
from actstore.archive.coordinates import Coordinate
from actstore.archive.root import read_attributes
from actstore.buckets import local
from actstore.compaction import Pathlike
from actstore.errors import ConfigError, FormatError
from actstore.joining import as_label

__all__ = ["add_coordinates", "remove_added"]

Array = NDArray[Any]
_MOST: Final = 5


def add_coordinates(
    archive: Pathlike,
    labels: xr.Dataset | Mapping[str, Any],
    *,
    dim: str | None = None,
    replace: bool = False,
) -> tuple[str, ...]:
    """Write labels of yours into an archive, as coordinates that every reader finds.

    No value is read or written; a kill at any moment leaves the archive with all of them, or as
    it was. Datasets that are open stay as they are, and don't have them. `append` refuses an
    archive that has some: `remove_added` takes them out.

    Parameters
    ----------
    archive : path
        An archive on a local disk.
    labels : xarray.Dataset or mapping
        Of a dataset all of its coordinates that the archive lacks, those that
        ``dataset.actstore.join`` brought say; it has all rows of the archive, in their order. Or
        name -> values, one for each place on ``dim``: a list, array or `pandas.Series`; or an
        `xarray.DataArray`, which knows its dimension. Bools, numbers or text; where some are
        missing they are NaN, and of text ``""``.
    dim : str, optional
        The dimension of values that don't know theirs. It can be left out where there is one
        token axis.
    replace : bool
        Whether labels that were added before are replaced. What the archive was made with is
        never.

    Returns
    -------
    tuple of str
        The names of what was written.

    Raises
    ------
    ConfigError
        A name is taken, or can't be one in an archive; the values are no labels, have another
        length, or are labels of other rows; or there is nothing to write.
    MissingFileError, FormatError
        There is no archive.
    ArchiveError
        Another process is writing it, or it can't be written.
    """
    place = _archive(archive, "add_coordinates")
    root = read_attributes(place)
    with store.open_xarray(place) as held:
        if isinstance(labels, xr.Dataset):
            named: dict[str, Any] = _news(labels, held, root.get(ADDED, {}), replace=replace)
        elif isinstance(labels, Mapping):
            named = dict(cast("Mapping[str, Any]", labels))
        else:
            msg = f"labels are a dataset's, or name -> values; got {type(labels)!r}"
            raise ConfigError(msg)
        only = next(iter(root["rows"])) if len(root["rows"]) == 1 else None
        found = [
            _coordinate(name, values, dim if dim is not None else only, held)
            for name, values in named.items()
        ]
    add_arrays(place, found, replace=replace)
    return tuple(one.name for one in found)


def remove_added(archive: Pathlike, names: str | Iterable[str]) -> None:
    """Take out of an archive what was added to it; all of it at once, and nothing else.

    Parameters
    ----------
    archive : path
        An archive on a local disk.
    names : str or iterable of str
        Labels, and groups of statistics: ``"statistics/<name>"``. An archive's attribute
        ``added`` has them all.

    Raises
    ------
    ConfigError
        Something was not added.
    MissingFileError, FormatError
        There is no archive.
    ArchiveError
        Another process is writing it, or it can't be written.
    """
    place = _archive(archive, "remove_added")
    remove_arrays(place, [names] if isinstance(names, str) else names)


def _archive(path: Pathlike, asked: str) -> Path:
    place = local(path, asked)
    if not place.is_dir():
        msg = f"{place} is no archive, which is a folder: compact it, and give the archive"
        raise FormatError(msg)
    return place


def _news(
    labels: xr.Dataset, held: xr.Dataset, added: Mapping[str, Any], *, replace: bool
) -> dict[str, Any]:
    """Give the coordinates of a dataset that the archive lacks, or that are to be replaced."""
    known = {str(name): one for name, one in labels.coords.items() if name not in labels.dims}
    found = {
        name: one
        for name, one in known.items()
        if name not in held.variables
        or (replace and name in added and not _equal(one.values, held[name].values))
    }
    if not found:
        msg = (
            "the dataset has no coordinate that the archive lacks; "
            "give those that are to be written by their names: {name: values}"
        )
        raise ConfigError(msg)
    return found


def _coordinate(name: Any, values: Any, dim: str | None, held: xr.Dataset) -> Coordinate:
    """Give a label of the archive's rows, or of another of its dimensions."""
    if not isinstance(name, str):
        msg = f"the name of a label is a text; got {name!r}"
        raise ConfigError(msg)
    if isinstance(values, xr.DataArray):
        _check_rows(name, values, held)
        dims: tuple[Hashable, ...] = values.dims
        values = values.values
    elif isinstance(values, xr.Variable):
        dims, values = values.dims, values.values
    elif dim is None:
        axes = ", ".join(map(repr, held.attrs["rows"]))
        msg = f"say with dim which dimension {name!r} is of; the token axes are {axes}"
        raise ConfigError(msg)
    else:
        dims = (dim,)
    if len(dims) != 1 or dims[0] not in held.sizes:
        there = ", ".join(map(repr, held.sizes))
        msg = f"{name!r} has the dimensions {dims}; one of the archive's is wanted: {there}"
        raise ConfigError(msg)
    array = as_label(values, name)
    size = held.sizes[dims[0]]
    if array.size != size:
        msg = f"{name!r} has {array.size} values; {dims[0]!r} is {size} long: give one for each"
        raise ConfigError(msg)
    return Coordinate(name, (str(dims[0]),), array)


def _check_rows(name: str, values: xr.DataArray, held: xr.Dataset) -> None:
    """Refuse values whose labels say that they are of other rows, or in another order."""
    if values.ndim != 1 or values.sizes[values.dims[0]] != held.sizes.get(values.dims[0]):
        return  # is told by what follows
    dim = values.dims[0]
    added = held.attrs.get(ADDED, {})
    for label, one in values.coords.items():
        same = label in held.coords and one.dims == (dim,) == held[label].dims
        if same and label not in added and not _equal(one.values, held[label].values):
            places = np.flatnonzero(np.asarray(one.values != held[label].values))
            msg = (
                f"{name!r} is of other rows than the archive's, or in another order: {label!r} "
                f"differs at {places[:_MOST].tolist()}{', …' if places.size > _MOST else ''}"
            )
            raise ConfigError(msg)


def _equal(one: Array, other: Array) -> bool:
    if one.dtype.kind in "fc" and other.dtype.kind in "fc":
        return np.array_equal(one, other, equal_nan=True)
    return np.array_equal(one, other)
