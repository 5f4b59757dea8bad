"""Owns opening a log or an archive as the same lazy `xarray.Dataset`.

Values stay where they are until they are asked for. What the dataset is, is planned in
``archive.layout``; rows of a log are read by ``stream.rows``, those of an archive by
``archive.reading``.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from actstore import hdf5
from actstore.accessor import remember_lazy
from actstore.archive import layout, store, zipped
from actstore.archive.precision import CODING
from actstore.archive.reading import Rows, ShardedRows, value_rows
from actstore.archive.root import FORMAT, arrays_of, is_archive, read_root
from actstore.archive.zipped import Place, ZipPath
from actstore.buckets import RemotePath, place_of, remote
from actstore.compaction.logs import element_reader, plan_log, row_reader
from actstore.errors import FormatError, MissingFileError, UnsupportedVersionError
from actstore.stream.legacy import is_legacy
from actstore.stream.reader import StreamReader, open_stream
from actstore.stream.resume import is_log
from actstore.stream.segments import is_segmented

if TYPE_CHECKING:
    from actstore.hdf5.reading import Hdf5Archive

__all__ = [
    "ChunkReader",
    "LayerReader",
    "chunk_reader",
    "is_dataset",
    "layer_reader",
    "open_dataset",
    "open_lazily",
]

#: Reads rows of a layer, by its place: [n, *row_shape].
LayerReader = Callable[[int, NDArray[np.int64]], NDArray[Any]]
#: Reads a chunk of a layer, by their places; None where it was not written.
ChunkReader = Callable[[int, int], NDArray[Any] | None]
Chunks = Literal["auto"] | Mapping[Any, Any] | int | None

#: What an encoding says of how a variable is cut.
_CUT: Final = ("chunks", "shards", "preferred_chunks")


def open_dataset(
    path: str | os.PathLike[str],
    chunks: Chunks = "auto",
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Open a log or an archive as a lazy dataset, every row knowing its token.

    Parameters
    ----------
    path : path
        A ``.stream`` log, an archive's folder, or a ``.zarr.zip`` or ``.h5`` that `export` made
        of one; the URL of a log or an archive in a bucket (``s3://bucket/run.zarr``), or a store
        of obstore whose root it is. The packets of a log of ``llm-instrumentation``,
        which holds no shapes, are flat; `compact` with ``shapes`` gives them rows.
    chunks : "auto", mapping, int or None
        ``"auto"``: dask arrays with a chunk for each shard where dask is installed, else
        xarray's own lazy arrays. None: those. Anything else as for `xarray.Dataset.chunk`.
    storage_options : mapping, optional
        Of a bucket: what obstore's ``from_url``, or the protocol's fsspec file system, takes
        beside the URL; by default as the environment says.

    Returns
    -------
    xarray.Dataset
        A variable for each site: ``(layer, token, feature)`` for sites that repeat in every
        block, ``(token, feature)`` otherwise; bfloat16 as float32 with the attribute
        ``source_dtype``. Coordinates of ``token``: ``pass_index``, ``batch_item``,
        ``position``, ``token_id``, ``token_text``, ``step``, ``is_padding``, annotations. Its
        accessor ``actstore`` chooses rows and layers. Close it, or use it as a context manager,
        to close the file.

    Raises
    ------
    MissingFileError
        There is nothing at that path.
    FormatError
        It is neither a log nor an archive.
    StreamCorruptError
        It is a damaged log.
    BucketError
        The bucket doesn't answer.
    """
    dataset = open_lazily(path, storage_options)
    if chunks is None or (chunks == "auto" and find_spec("dask") is None):
        return dataset
    try:
        chunked = _by_shards(dataset) if chunks == "auto" else dataset.chunk(chunks)
        remember_lazy(chunked, dataset)
    except BaseException:
        dataset.close()
        raise
    chunked.set_close(dataset.close)
    return chunked


def layer_reader(variable: xr.Variable) -> LayerReader:
    """Give what reads rows of a layer of a variable of `open_lazily`, past xarray.

    Returns
    -------
    callable
        Takes the place on ``layer`` (0 where there is none) and int64 [n]: rows; gives
        [n, *row_shape]. Safe to use from several threads.
    """
    held: Any = variable._data
    if isinstance(held, indexing.LazilyIndexedArray) and isinstance(held.array, _Layers):
        return held.array.layer
    axis = int(variable.dims[0] == "layer")

    def read(place: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        return np.asarray(variable[(*(place,) * axis, rows)].values)

    return read


def chunk_reader(variable: xr.Variable) -> ChunkReader | None:
    """Give what reads whole chunks of a variable of an archive; None where nothing of ours can.

    Returns
    -------
    callable or None
        Takes the place on ``layer`` and the number of a chunk along the rows; gives
        [chunk rows, *row_shape], with what stands behind the last row; None of one that was not
        written. Safe to use from several threads.
    """
    held: Any = variable._data
    if isinstance(held, indexing.LazilyIndexedArray) and isinstance(held.array, _Shards):
        return held.array.chunks
    return None


def is_dataset(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a log or an archive, by its content."""
    far = remote(path)
    if far is not None:
        return is_archive(far) or is_segmented(far)
    place = Path(path)
    if place.is_dir():
        return is_archive(place)
    if not place.is_file():
        return False
    if hdf5.is_hdf5(place):
        return find_spec("h5py") is not None and _is_mirror(place)
    if zipped.is_zip(place):
        return is_archive(ZipPath(place))
    return is_log(place) or is_legacy(place)


def _is_mirror(place: Path) -> bool:
    from actstore.hdf5.reading import is_ours

    return is_ours(place)


def open_lazily(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> xr.Dataset:
    """Open a log or an archive without dask; raises as `open_dataset` does."""
    place = place_of(path, "open_dataset", storage_options)
    if isinstance(place, RemotePath):
        return _over_bucket(place)
    if place.is_dir():
        return _over_archive(place)
    if hdf5.is_hdf5(place):
        return _over_hdf5(place)
    if zipped.is_zip(place):
        return _over_archive(ZipPath(place.absolute()))
    if not (is_log(place) or is_legacy(place)):
        msg = f"{place} is neither a .stream log nor an archive: a Zarr folder, .zarr.zip or .h5"
        raise FormatError(msg)
    return _opened_log(place)


def _over_bucket(far: RemotePath) -> xr.Dataset:
    """Open what a URL has: an archive, which is asked for first, or a log."""
    try:
        return _over_archive(far)
    except FormatError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
    if is_segmented(far):
        return _opened_log(far)
    msg = (
        f"nothing at {far}: give the URL of an archive or of an uploaded log; files of one, as "
        ".zarr.zip and .h5, are to be fetched first"
    )
    raise MissingFileError(msg)


def _opened_log(place: Path | RemotePath) -> xr.Dataset:
    reader = open_stream(place)
    try:
        reader.check()
        return _over_log(reader)
    except BaseException:
        reader.close()
        raise


def _read_root(folder: Place) -> dict[str, Any]:
    try:
        return read_root(folder)
    except UnsupportedVersionError:
        raise
    except FormatError as error:
        if isinstance(folder, ZipPath | RemotePath):
            raise
        msg = f"{folder} is a folder, so no .stream log; {error}"
        raise FormatError(msg) from error


def _by_shards(dataset: xr.Dataset) -> xr.Dataset:
    """Chunk each variable by its own shards."""
    chunked = {}
    for name in dataset.data_vars:
        variable = dataset.variables[name]
        shape = variable.encoding.get("shards") or variable.encoding.get("chunks")
        if shape and variable.size:
            chunked[name] = variable.chunk(dict(zip(variable.dims, shape, strict=True)))
    return dataset.assign(chunked)  # at once: each assignment goes through all variables


def _over_archive(folder: Place) -> xr.Dataset:
    """Open an archive; its large arrays are read by us, which is faster, what we can't by zarr."""
    arrays = arrays_of(_read_root(folder))
    dataset = store.open_xarray(folder)
    return _with_rows(
        dataset, arrays, lambda name: ShardedRows.of(folder.absolute() / name, arrays[name])
    )


def _over_hdf5(path: Path) -> xr.Dataset:
    """Open an HDF5 file that an archive was mirrored into, as the archive."""
    hdf5.check_installed()
    from actstore.hdf5.reading import Hdf5Archive

    archive = Hdf5Archive(path)
    try:
        variables = {}
        for name, array in archive.arrays.items():
            if "/" in name:
                continue
            if array.dims == (name,):
                archive.stored(name)  # xarray reads it at once, however long it is
            lazy = indexing.LazilyIndexedArray(_Parts(archive, name))
            cached: Any = indexing.MemoryCachedArray(  # type: ignore[no-untyped-call]
                indexing.CopyOnWriteArray(lazy)  # type: ignore[arg-type]
            )
            preferred = dict(zip(array.dims, array.shard, strict=True))
            encoding: dict[str, Any] = {"chunks": array.chunk, "preferred_chunks": preferred}
            encoding["dtype"] = array.dtype  # else xarray makes objects of text
            encoding |= {"shards": array.shard} if array.sharded else {}
            said = dict(array.attributes)
            variables[name] = xr.Variable(array.dims, cached, said, encoding)
        raw = xr.Dataset(variables, attrs=dict(archive.root["attributes"]))
        dataset = _with_rows(xr.decode_cf(raw), arrays_of(archive.root), archive.rows)
    except BaseException:
        archive.close()
        raise
    dataset.set_close(archive.close)
    return dataset


def _with_rows(
    dataset: xr.Dataset,
    arrays: Mapping[str, Mapping[str, Any]],
    opened: Callable[[str], Rows | None],
) -> xr.Dataset:
    """Let an archive's arrays of values be read by what reads their rows, where there is such."""
    said = {name: one["attributes"] for name, one in arrays.items() if "/" not in name}
    found, parts = value_rows(said, opened)
    ours = {
        name: _values(dataset.variables[name], rows, said[name]) for name, rows in found.items()
    }
    return dataset.assign(ours).drop_vars(parts)


def _values(variable: xr.Variable, rows: Rows, said: Mapping[str, Any]) -> xr.Variable:
    """Give a variable as values, whatever they are stored as."""
    attributes = {name: one for name, one in said.items() if name not in CODING}
    encoding = {name: one for name, one in variable.encoding.items() if name in _CUT}
    lazy = indexing.LazilyIndexedArray(_Shards(rows))
    return xr.Variable(variable.dims, lazy, attributes, encoding)


def _over_log(reader: StreamReader) -> xr.Dataset:
    plan = plan_log(reader)
    variables: dict[Hashable, Any] = {}
    for one in plan.variables:
        variables[one.name] = _lazy(one, _Rows(reader, one))
        if one.partial:
            present = one.present()
            variables[present.name] = xr.Variable(present.dims, present.values)
    for ragged in plan.ragged:
        variables[ragged.values_name] = _lazy(ragged, _Elements(reader, ragged))
    labels = {one.name: (one.dims, one.values) for one in plan.coordinates}
    about = {
        "format": FORMAT,
        "rows": dict(plan.rows),
        "aliases": dict(plan.aliases),
        "runs": [dict(reader.header)],
    }
    dataset = xr.Dataset(variables, labels, about)
    dataset.set_close(reader.close)
    return dataset


def _lazy(one: layout.Variable | layout.Ragged, array: BackendArray) -> xr.Variable:
    preferred = dict(zip(one.dims, one.shards, strict=True))
    encoding = {"shards": one.shards, "chunks": one.chunks, "preferred_chunks": preferred}
    return xr.Variable(one.dims, indexing.LazilyIndexedArray(array), one.attributes, encoding)


class _Layers(BackendArray, ABC):
    """An array ``[layer,] rows, …``: reads what is asked for of rows and layers, and no others.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : numpy.dtype
        Its dtype.
    axis : int
        The place of the rows: 0, or 1 behind ``layer``.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, axis: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self._axis = axis

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """Read what an outer index asks for: of each dimension an int, a slice or an array."""
        axis = self._axis
        rows = _positions(key[axis], self.shape[axis])
        places = _positions(key[0], self.shape[0]) if axis else np.zeros(1, np.int64)
        parts = [_pick(self.layer(place, rows), key[axis + 1 :]) for place in places.tolist()]
        if not parts:
            row = np.empty((0, *self.shape[axis + 1 :]), self.dtype)
            found = np.empty((0, rows.size, *_pick(row, key[axis + 1 :]).shape[1:]), self.dtype)
        else:  # a single layer is not copied
            found = np.stack(parts) if len(parts) > 1 else parts[0][np.newaxis]
        if isinstance(key[axis], int | np.integer):
            found = found[:, 0]
        return found if axis and not isinstance(key[0], int | np.integer) else found[0]

    @abstractmethod
    def layer(self, place: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Read rows of one layer: [n, …]."""


class _Shards(_Layers):
    """An array of values of an archive."""

    def __init__(self, reader: Rows) -> None:
        super().__init__(reader.shape, reader.dtype, reader.axis)
        self._reader = reader

    @property
    def chunks(self) -> ChunkReader | None:
        """What reads whole chunks; None of codes."""
        return self._reader.chunk if isinstance(self._reader, ShardedRows) else None

    def layer(self, place: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        return self._reader.read(place, rows)


class _Parts(BackendArray):
    """An array of an HDF5 file: reads the chunks between the first and the last asked for."""

    def __init__(self, archive: Hdf5Archive, name: str) -> None:
        array = archive.arrays[name]
        self.shape, self.dtype = array.shape, array.dtype
        self._archive = archive
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return _parts_again, (self._archive.path, self._name)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        wanted = [_positions(*one) for one in zip(key, self.shape, strict=True)]
        starts = [int(one.min()) if one.size else 0 for one in wanted]
        ends = [int(one.max()) + 1 if one.size else 0 for one in wanted]
        found = self._archive.part(self._name, tuple(map(slice, starts, ends)))
        for axis, (one, start) in reversed(list(enumerate(zip(wanted, starts, strict=True)))):
            single = isinstance(key[axis], int | np.integer)
            found = found[(slice(None),) * axis + (one[0] - start if single else one - start,)]
        return found


class _Rows(_Layers):
    """A variable of a log."""

    def __init__(self, reader: StreamReader, variable: layout.Variable) -> None:
        super().__init__(variable.shape, variable.dtype, variable.token_axis)
        self._reader = reader
        self._variable = variable
        self._lock = threading.Lock()
        self._readers: dict[int, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rows_again, (_opened_as(self._reader), self._variable.name)

    def layer(self, place: int, rows: NDArray[np.int64]) -> NDArray[Any]:
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

    def __init__(self, reader: StreamReader, ragged: layout.Ragged) -> None:
        self.shape = (ragged.size,)
        self.dtype = ragged.source.array
        self._elements = element_reader(reader, ragged)
        self._where = _opened_as(reader), ragged.values_name

    def __reduce__(self) -> tuple[Any, ...]:
        return _elements_again, self._where

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        places = _positions(key[0], self.shape[0])
        parts = [self._elements.read(int(run[0]), int(run[-1]) + 1) for run in _runs(places)]
        found = np.concatenate(parts) if parts else np.empty(0, self.dtype)
        return found[0] if isinstance(key[0], int | np.integer) else found


class _Opened(NamedTuple):
    """A log as it was when a dataset of it was opened: whose it is, and how far it went."""

    path: Path | RemotePath
    run_id: str
    size: int


def _opened_as(reader: StreamReader) -> _Opened:
    return _Opened(reader.path.absolute(), str(reader.header.get("run_id", "")), reader.file_bytes)


def _reopened(log: _Opened) -> tuple[StreamReader, layout.Plan]:
    """Open a log in another process; its arrays share the reader."""
    if isinstance(log.path, RemotePath):  # many objects: what they hold is told by the log alone
        return _planned(log, 0, 0)
    said = log.path.stat()
    return _planned(log, said.st_size, said.st_mtime_ns)


@lru_cache(maxsize=8)
def _planned(log: _Opened, _size: int, _mtime: int) -> tuple[StreamReader, layout.Plan]:
    reader = open_stream(log.path)
    found = _opened_as(reader)
    if found.run_id != log.run_id or found.size < log.size:
        reader.close()
        msg = (
            f"{log.path} is not the log that the dataset was opened of: wanted run {log.run_id!r} "
            f"with at least {log.size} bytes, found {found.run_id!r} with {found.size}; open the "
            "dataset again"
        )
        raise FormatError(msg)
    if found.size > log.size:
        reader.go_back(log.size)
    return reader, plan_log(reader)


def _rows_again(log: _Opened, name: str) -> _Rows:
    reader, plan = _reopened(log)
    return _Rows(reader, next(one for one in plan.variables if one.name == name))


def _elements_again(log: _Opened, name: str) -> _Elements:
    reader, plan = _reopened(log)
    return _Elements(reader, next(one for one in plan.ragged if one.values_name == name))


def _parts_again(path: Path, name: str) -> _Parts:
    from actstore.hdf5.reading import reopened

    return _Parts(reopened(path), name)


def _positions(key: Any, length: int) -> NDArray[np.int64]:
    """Give the positions that one key of an outer index asks for."""
    if isinstance(key, slice):
        return np.arange(*key.indices(length))
    return np.atleast_1d(np.asarray(key, np.int64)) % max(length, 1)


def _runs(positions: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut positions where they don't go up by one."""
    if not positions.size:
        return []
    return np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)


def _pick(rows: NDArray[Any], keys: tuple[Any, ...]) -> NDArray[Any]:
    """Apply an outer index to the features of rows, one dimension after the other."""
    for axis, key in reversed(list(enumerate(keys, start=1))):
        rows = rows[(slice(None),) * axis + (key,)]
    return rows
