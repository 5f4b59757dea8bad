"""Owns the Zarr store on disk: its metadata, its small arrays, and how it is opened.

The one importer of zarr. The bytes of large arrays are ``shards.py``'s.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from actstore import files
from actstore.archive.coordinates import STRING, Coordinate
from actstore.archive.shards import codec_metadata
from actstore.errors import ArchiveError, FormatError, UnsupportedVersionError

__all__ = [
    "FORMAT",
    "VERSION",
    "ArchiveWriter",
    "is_archive",
    "open_xarray",
    "read_attributes",
    "read_rows",
    "shard_path",
]

FORMAT: Final = "actstore"
VERSION: Final = 0
_SMALL_CHUNK: Final = 1 << 20
_JSON_LIMIT: Final = 1 << 30


class ArchiveWriter:
    """Write a new archive into a folder that no one reads yet.

    Parameters
    ----------
    folder : Path
        It must not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._group = zarr.create_group(folder, zarr_format=3)

    def add_array(
        self,
        name: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: np.dtype,
        *,
        chunks: tuple[int, ...],
        shards: tuple[int, ...],
        compression: str,
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
            "codecs": codec_metadata(chunks, dtype, compression),
            "attributes": dict(attributes),
            "dimension_names": list(dims),
            "storage_transformers": [],
        }
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        files.atomic_write(folder / "zarr.json", json.dumps(metadata, indent=2).encode())

    def add_small(self, coordinate: Coordinate, group: str = "") -> None:
        """Write a small array, whole."""
        values = coordinate.values
        parent = self._group.require_group(group) if group else self._group
        length = tuple(max(1, min(size, _SMALL_CHUNK)) for size in values.shape)
        array = parent.create_array(
            coordinate.name,
            shape=values.shape,
            chunks=length,
            dtype="string" if values.dtype == STRING else values.dtype,
            dimension_names=coordinate.dims,
        )
        if values.size:
            array[...] = values

    def add_text(self, coordinate: Coordinate) -> None:
        """Write text also as UTF-8 bytes and offsets, in the group ``text``, for other readers."""
        encoded = [str(one).encode("utf-8", "surrogatepass") for one in coordinate.values.tolist()]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        data = np.frombuffer(b"".join(encoded), np.uint8)
        stem = coordinate.name
        for name, values in ((f"{stem}_bytes", data), (f"{stem}_offsets", ends)):
            self.add_small(Coordinate(name, (name,), values), group="text")

    def finish(self, attributes: Mapping[str, Any]) -> None:
        """Write the root's attributes and the consolidated metadata, durably."""
        self._group.attrs.put(dict(attributes))
        with warnings.catch_warnings():
            # not in the v3 specification; a reader may ignore it, xarray opens fast by it
            warnings.filterwarnings("ignore", "Consolidated metadata")
            zarr.consolidate_metadata(self.folder, zarr_format=3)
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and path.name != "zarr.json" and "c" not in path.parts[-4:]:
                continue
            (files.fsync_folder if path.is_dir() else files.fsync_file)(path)
        files.fsync_folder(self.folder)


def _fill(dtype: np.dtype) -> Any:
    if dtype.kind == "f":
        return "NaN"
    if dtype.kind == "c":
        return ["NaN", 0.0]
    return False if dtype.kind == "b" else 0


def shard_path(folder: Path, name: str, place: tuple[int, ...]) -> Path:
    """Give the file of a shard of an array, by its place in the grid of shards."""
    return folder.joinpath(name, "c", *map(str, place))


def is_archive(path: Path) -> bool:
    """Whether a folder is one of our archives."""
    try:
        read_attributes(path)
    except UnsupportedVersionError:
        return True
    except FormatError:
        return False
    return True


def read_attributes(path: Path) -> dict[str, Any]:
    """Read the root attributes of an archive.

    Raises
    ------
    FormatError
        The folder is none of our archives.
    UnsupportedVersionError
        It is one of a version that this actstore doesn't know.
    """
    place = path / "zarr.json"
    wanted = f"wanted a Zarr v3 group whose attribute 'format' is {FORMAT!r}"
    try:
        if place.stat().st_size > _JSON_LIMIT:
            msg = f"{place} is over {_JSON_LIMIT} bytes; {wanted}"
            raise FormatError(msg)
        attributes = json.loads(place.read_bytes())["attributes"]
        kind, version = attributes["format"], attributes["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"{path} is no archive of actstore: {wanted}; {error!r}"
        raise FormatError(msg) from error
    if kind != FORMAT:
        msg = f"{path} is no archive of actstore: {wanted}; found {kind!r}"
        raise FormatError(msg)
    if version != VERSION:
        msg = (
            f"{path} is an archive of version {version!r}; this actstore reads version {VERSION}: "
            "install the version that wrote it, or open it with xarray.open_zarr"
        )
        raise UnsupportedVersionError(msg)
    return dict(attributes)


def open_xarray(path: Path) -> xr.Dataset:
    """Open an archive lazily, without dask."""
    dataset: xr.Dataset = xr.open_zarr(path, chunks=None, consolidated=True, zarr_format=3)
    return dataset


def read_rows(folder: Path, name: str, place: tuple[int, ...], first: int, last: int) -> Any:
    """Read rows of an array by zarr-python: a decoder that is not ours."""
    array: Any = zarr.open_array(folder / name, mode="r", zarr_format=3)
    found: NDArray[Any] = np.asarray(array[(*place, slice(first, last))])
    if found.shape[0] != last - first:
        msg = f"{folder / name} has {found.shape[0]} of the rows {first} to {last}"
        raise ArchiveError(msg)
    return found
