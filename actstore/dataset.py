"""Owns opening a log or an archive as the same lazy `xarray.Dataset`.

Values stay where they are until they are asked for. What the dataset is, is planned in
``archive.layout``; rows of a log are read by ``stream.rows``, those of an archive by zarr.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from actstore.archive import layout, store
from actstore.compaction import element_reader, plan_log, row_reader, variable_attributes
from actstore.errors import ConfigError, FormatError, MissingFileError
from actstore.stream.reader import StreamReader
from actstore.stream.recover import is_log

__all__ = ["is_dataset", "open_dataset", "open_lazily"]

Chunks = Literal["auto"] | Mapping[Any, Any] | int | None


def open_dataset(path: str | os.PathLike[str], chunks: Chunks = "auto") -> xr.Dataset:
    """Open a log or an archive as a lazy dataset, every row knowing its token.

    Parameters
    ----------
    path : path
        A ``.stream`` log or an archive's folder.
    chunks : "auto", mapping, int or None
        ``"auto"``: dask arrays with a chunk for each shard where dask is installed, else
        xarray's own lazy arrays. None: those. Anything else as for `xarray.Dataset.chunk`.

    Returns
    -------
    xarray.Dataset
        A variable for each site: ``(layer, token, feature)`` for sites that repeat in every
        block, ``(token, feature)`` otherwise; bfloat16 as float32 with the attribute
        ``source_dtype``. Coordinates of ``token``: ``pass_index``, ``batch_item``,
        ``position``, ``token_id``, ``token_text``, ``step``, ``is_padding``, annotations. Close
        it, or use it as a context manager, to close the file.

    Raises
    ------
    MissingFileError
        There is nothing at that path.
    FormatError
        It is neither a log nor an archive.
    StreamCorruptError
        It is a damaged log.
    """
    dataset = open_lazily(path)
    if isinstance(chunks, str) and chunks == "auto":
        if find_spec("dask") is None:
            return dataset
        return _by_shards(dataset)
    return dataset if chunks is None else dataset.chunk(chunks)


def is_dataset(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a log or an archive, by its content."""
    place = Path(path)
    return store.is_archive(place) if place.is_dir() else place.is_file() and is_log(place)


def open_lazily(path: str | os.PathLike[str]) -> xr.Dataset:
    """Open a log or an archive without dask; raises as `open_dataset` does."""
    try:
        place = Path(path)
    except TypeError:
        msg = f"open_dataset wants the path of a log or an archive; got {path!r}"
        raise ConfigError(msg) from None
    if not place.exists():
        msg = f"nothing at {place}: give the path of a .stream log or of an archive"
        raise MissingFileError(msg)
    if place.is_dir():
        store.read_attributes(place)
        return store.open_xarray(place)
    if not is_log(place):
        msg = (
            f"{place} is neither a .stream log nor an archive (a Zarr folder); zip archives and "
            "HDF5 files can't be opened yet"
        )
        raise FormatError(msg)
    reader = StreamReader(place)
    try:
        reader.check()
        return _over_log(reader)
    except BaseException:
        reader.close()
        raise


def _by_shards(dataset: xr.Dataset) -> xr.Dataset:
    """Chunk each variable by its own shards."""
    chunked: dict[Hashable, xr.Variable] = {}
    for name, variable in dataset.data_vars.items():
        shape = variable.encoding.get("shards") or variable.encoding.get("chunks")
        if shape and variable.size:
            sizes = dict(zip(variable.dims, shape, strict=True))
            chunked[name] = variable.variable.chunk(sizes)
    result = dataset.assign({name: (one.dims, one.data) for name, one in chunked.items()})
    for name in chunked:
        result[name].attrs = dataset[name].attrs
        result[name].encoding = dataset[name].encoding
    result.set_close(dataset.close)
    return result


def _over_log(reader: StreamReader) -> xr.Dataset:
    plan = plan_log(reader)
    variables: dict[Hashable, Any] = {}
    lock = threading.Lock()
    for one in plan.variables:
        array = _Rows(reader, one, lock)
        encoding = {"shards": one.shards, "chunks": one.chunks}
        variables[one.name] = _lazy(one.dims, array, variable_attributes(one), encoding)
        if one.partial:
            dims = one.dims[: one.token_axis + 1]
            variables[f"{one.name}_present"] = xr.Variable(dims, one.present())
    for ragged in plan.ragged:
        elements = _Elements(reader, ragged, lock)
        attributes = {"site": ragged.site, "source_dtype": ragged.source.name}
        encoding = {"shards": ragged.shards, "chunks": ragged.chunks}
        variables[ragged.values_name] = _lazy(ragged.dims, elements, attributes, encoding)
    labels = {one.name: (one.dims, one.values) for one in plan.coordinates}
    about = {
        "format": store.FORMAT,
        "aliases": dict(plan.aliases),
        "run": dict(reader.header),
    }
    dataset = xr.Dataset(variables, labels, about)
    dataset.set_close(reader.close)
    return dataset


def _lazy(
    dims: tuple[str, ...], array: BackendArray, attributes: Mapping[str, Any], encoding: Any
) -> xr.Variable:
    return xr.Variable(dims, indexing.LazilyIndexedArray(array), attributes, encoding)


class _Rows(BackendArray):
    """A variable of a log: reads the rows that are asked for, and no others."""

    def __init__(
        self, reader: StreamReader, variable: layout.Variable, lock: threading.Lock
    ) -> None:
        self.shape = variable.shape
        self.dtype = variable.dtype
        self._reader = reader
        self._variable = variable
        self._lock = lock
        self._readers: dict[int, Any] = {}

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        variable, axis = self._variable, self._variable.token_axis
        rows = _positions(key[axis], self.shape[axis])
        rest = key[axis + 1 :]
        if not variable.layered:
            found = self._layer(0, rows)[(slice(None), *_outer(rest))]
            return found[0] if _single(key[0]) else found
        places = _positions(key[0], self.shape[0])
        parts = [self._layer(place, rows)[(slice(None), *_outer(rest))] for place in places]
        shape = (0, len(rows), *(len(range(n)) for n in variable.row_shape))
        found = np.stack(parts) if parts else np.empty(shape, self.dtype)
        found = found[:, 0] if _single(key[1]) else found
        return found[0] if _single(key[0]) else found

    def _layer(self, place: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        variable = self._variable
        with self._lock:
            if place not in self._readers:
                self._readers[place] = row_reader(self._reader, variable, place)
            reader = self._readers[place]
        if reader is None:
            return np.full((len(rows), *variable.row_shape), variable.fill, variable.dtype)
        parts = [reader.read(int(run[0]), int(run[-1]) + 1, variable.fill) for run in _runs(rows)]
        return np.concatenate(parts) if parts else reader.read(0, 0, variable.fill)


class _Elements(BackendArray):
    """The values of a ragged array of a log."""

    def __init__(self, reader: StreamReader, ragged: layout.Ragged, lock: threading.Lock) -> None:
        self.shape = (ragged.size,)
        self.dtype = ragged.source.array
        self._elements = element_reader(reader, ragged)
        self._lock = lock

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        places = _positions(key[0], self.shape[0])
        parts = [self._elements.read(int(run[0]), int(run[-1]) + 1) for run in _runs(places)]
        found = np.concatenate(parts) if parts else np.empty(0, self.dtype)
        return found[0] if _single(key[0]) else found


def _single(key: Any) -> bool:
    return isinstance(key, int | np.integer)


def _positions(key: Any, length: int) -> NDArray[np.int64]:
    """Give the positions that one key of an outer index asks for."""
    if _single(key):
        return np.array([key], np.int64) % length
    if isinstance(key, slice):
        return np.arange(*key.indices(length))
    return np.asarray(key, np.int64) % max(length, 1)


def _runs(positions: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut positions where they don't go up by one."""
    if not positions.size:
        return []
    return np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)


def _outer(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make an outer index of features one that NumPy takes: at most one array at a time."""
    if sum(not _single(key) and not isinstance(key, slice) for key in keys) <= 1:
        return keys
    msg = "two arrays index the features of a row; index one dimension after the other"
    raise ConfigError(msg)
