"""Owns keeping results in the archive that they are of, and finding them there again.

How that is made durable, and what a kill leaves, is ``archive.adding``'s.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from actstore.archive import store
from actstore.archive.adding import add_arrays
from actstore.archive.coordinates import Coordinate, texts_of
from actstore.archive.names import STATISTICS
from actstore.archive.root import read_attributes, read_root
from actstore.buckets import local, place_of
from actstore.errors import ConfigError

__all__ = ["save", "saved"]

#: The group's attributes that have those of its arrays, and of the dataset.
_ARRAYS, _DATASET = "array_attributes", "dataset_attributes"


def save(
    results: xr.Dataset | xr.DataArray,
    archive: str | os.PathLike[str],
    name: str,
    *,
    replace: bool = False,
) -> None:
    """Keep results in an archive, where every reader finds them.

    They are in its group ``statistics/<name>``: ``xarray.open_zarr(archive,
    group="statistics/<name>")`` opens them without actstore, and `actstore.verify` checks them.
    `xarray.open_datatree` opens it with the archive, unless they are of some layers or rows only:
    a dimension then has another length there than in the archive.
    No value of the archive is read or written; a kill leaves all of them or none. `append`
    refuses an archive that has some, since they are not of the new rows:
    ``actstore.remove_added(archive, "statistics/<name>")`` takes them out.

    Parameters
    ----------
    results : xarray.Dataset or xarray.DataArray
        What a function of `actstore.analysis` gave, say, of this archive. It is not checked that
        it is.
    archive : path
        An archive on a local disk.
    name : str
        What to call them: letters, digits, ``_``, ``.`` and ``-``.
    replace : bool, optional
        Whether results of that name are replaced.

    Raises
    ------
    ConfigError
        The results are no such thing, the name can't be one or is taken.
    MissingFileError, FormatError
        There is no archive.
    ArchiveError
        Another process is writing it, or it can't be written.
    """
    if isinstance(results, xr.DataArray):
        results = results.to_dataset(name=results.name or "values")
    if not isinstance(results, xr.Dataset):
        msg = f"results must be an xarray.Dataset or DataArray; got {type(results)!r}"
        raise ConfigError(msg)
    if not isinstance(name, str) or not name or "/" in name:
        msg = f"name must be letters, digits, '_', '.' and '-', such as 'summary'; got {name!r}"
        raise ConfigError(msg)
    place = local(archive, "save")
    read_attributes(place)  # raises where it is none
    labels = [str(one) for one in results.coords if one not in results.dims]
    attributes = {
        "coordinates": " ".join(labels),
        _ARRAYS: {
            str(one): _plain(variable.attrs)
            for one, variable in results.variables.items()
            if variable.attrs
        },
        _DATASET: _plain(results.attrs),
    }
    arrays = [_array(one, variable) for one, variable in results.variables.items()]
    group = f"{STATISTICS}/{name}"
    add_arrays(place, arrays, group=group, attributes=attributes, replace=replace)


def saved(
    archive: str | os.PathLike[str],
    name: str | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Give results that `save` kept, as they were.

    Parameters
    ----------
    archive : path
        The archive, or the URL of one in a bucket.
    name : str, optional
        What they are called. It can be left out where there is one.
    storage_options : mapping, optional
        Of a bucket, as for `actstore.open_dataset`.

    Returns
    -------
    xarray.Dataset
        In memory.

    Raises
    ------
    ConfigError
        There are none of that name; the message says which there are.
    MissingFileError, FormatError
        There is no archive.
    """
    place = place_of(archive, "saved", storage_options)
    below = read_root(place)["consolidated_metadata"]["metadata"]
    heads = [one.partition("/") for one, said in below.items() if said["node_type"] == "group"]
    known = [tail for head, _, tail in heads if head == STATISTICS and tail]
    if name is None and len(known) == 1:
        (name,) = known
    if name not in known:
        there = ", ".join(map(repr, known)) or "none"
        msg = f"name must be that of results in {place}, which has {there}; got {name!r}"
        raise ConfigError(msg)
    with store.open_xarray(place, f"{STATISTICS}/{name}") as found:
        loaded = found.load()
    arrays, attributes = (loaded.attrs.pop(one, {}) for one in (_ARRAYS, _DATASET))
    for one, said in arrays.items():
        if one in loaded.variables and isinstance(said, Mapping):
            loaded[one].attrs.update(said)
    return loaded.drop_attrs(deep=False).assign_attrs(attributes)


def _array(name: Hashable, variable: xr.Variable) -> Coordinate:
    values = np.asarray(variable.values)
    if values.dtype.kind in "OUT":
        values = texts_of(values.ravel().tolist()).reshape(values.shape)
    return Coordinate(str(name), tuple(map(str, variable.dims)), values)


def _plain(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Give attributes as JSON has them."""
    return {
        str(name): value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        for name, value in attributes.items()
    }
