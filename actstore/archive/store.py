"""Owns the Zarr store on disk: its metadata, its small arrays, and how it is opened.

The one importer of zarr, when arrays are opened or made: what an archive says of itself is read
without. The bytes of large arrays are ``shards.py``'s; whether they are intact,
``checks.py``'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final

import crc32c as castagnoli
import numpy as np
from numpy.typing import NDArray

from actstore import files
from actstore.archive.coordinates import STRING, Coordinate
from actstore.archive.names import GROUPS, plain_json
from actstore.archive.shards import codec_metadata
from actstore.errors import ArchiveError, FormatError, UnsupportedVersionError

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "FORMAT",
    "VERSION",
    "ArchiveWriter",
    "arrays_of",
    "check_identity",
    "is_archive",
    "metadata_crc",
    "open_xarray",
    "read_attributes",
    "read_part",
    "read_root",
    "read_rows",
]

FORMAT: Final = "actstore"
VERSION: Final = 0
_SMALL_CHUNK: Final = 1 << 20  # elements along each dimension
_CHUNK_ELEMENTS: Final = 1 << 24  # in all
_JSON_LIMIT: Final = 1 << 30
_METADATA: Final = "zarr.json"
_CRC_KEY: Final = b'"metadata_crc32c": "'
_NO_CRC: Final = "00000000"


class ArchiveWriter:
    """Write what an archive has beside its shards into a folder that no one reads yet.

    Parameters
    ----------
    folder : Path
        It exists; shards may be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add_array(
        self,
        name: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: np.dtype,
        *,
        chunks: tuple[int, ...],
        shards: tuple[int, ...],
        profile: str,
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
            "codecs": codec_metadata(chunks, dtype, profile),
            "attributes": dict(attributes),
            "dimension_names": list(dims),
            "storage_transformers": [],
        }
        (self.folder / name).mkdir(exist_ok=True)
        self._write_metadata(name, metadata)

    def add_small(self, coordinate: Coordinate, group: str = "") -> None:
        """Write a small array, whole; every chunk is there and has a checksum."""
        import zarr
        from zarr.codecs import BloscCodec, Crc32cCodec

        values = coordinate.values
        text = values.dtype == STRING
        size = 1 if text else values.itemsize
        blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=size)
        array: Any = zarr.create_array(
            self.folder / group / coordinate.name,
            shape=values.shape,
            chunks=_small_chunks(values.shape),
            dtype="string" if text else values.dtype,
            compressors=[blosc, Crc32cCodec()],
            dimension_names=coordinate.dims,
            config={"write_empty_chunks": True},
            zarr_format=3,
        )
        if values.size:
            array[...] = values

    def add_text(self, coordinate: Coordinate, group: str = "text") -> None:
        """Write text also as UTF-8 bytes and offsets, in the group ``text``, for other readers."""
        encoded = [str(one).encode() for one in coordinate.values.tolist()]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        data = np.frombuffer(b"".join(encoded), np.uint8)
        stem = coordinate.name
        for name, values in ((f"{stem}_bytes", data), (f"{stem}_offsets", ends)):
            self.add_small(Coordinate(name, (name,), values), group)

    def add_group(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Make a group, whose folder may be there."""
        (self.folder / name).mkdir(exist_ok=True)
        self._write_metadata(name, _group(attributes))

    def finish(self, attributes: Mapping[str, Any]) -> None:
        """Write the root: attributes, and the metadata of all that is in it; all is durable."""
        for group in GROUPS:
            self.add_group(group, {})
        for path in sorted(self.folder.rglob("*")):
            (files.fsync_folder if path.is_dir() else files.fsync_file)(path)
        self.write_root(attributes, self.nodes("."))

    def nodes(self, *below: str) -> dict[str, Any]:
        """Read the metadata of what is in folders of the archive, by name."""
        found = {}
        for path in sorted(one for name in below for one in (self.folder / name).rglob(_METADATA)):
            name = path.parent.relative_to(self.folder).as_posix()
            if name != ".":
                found[name] = json.loads(path.read_bytes())
        return found

    def write_root(self, attributes: Mapping[str, Any], nodes: Mapping[str, Any]) -> None:
        """Write the root's metadata, in place of what it was before: from then on it is so.

        Parameters
        ----------
        attributes : mapping
            The root's.
        nodes : mapping
            The metadata of all that is in the archive, by name; all of it is durable.
        """
        rest = {name: said for name, said in attributes.items() if name != "metadata_crc32c"}
        root = _group({"metadata_crc32c": _NO_CRC, **plain_json(rest)}) | {
            "consolidated_metadata": {
                "kind": "inline",
                "must_understand": False,
                "metadata": {name: nodes[name] for name in sorted(nodes, key=PurePath)},
            }
        }
        data = json.dumps(root, indent=2).encode()
        crc = f"{castagnoli.crc32c(data):08x}".encode()
        files.atomic_write(self.folder / _METADATA, data.replace(_NO_CRC.encode(), crc, 1))

    def _write_metadata(self, name: str, metadata: Mapping[str, Any]) -> None:
        data = json.dumps(metadata, indent=2).encode()
        files.write_new(self.folder / name / _METADATA, [data])


def _small_chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Cut a small array, from its first dimension on, so that no chunk is too large for Blosc."""
    chunks = [max(1, min(length, _SMALL_CHUNK)) for length in shape]
    for axis, length in enumerate(chunks):
        others = math.prod(chunks) // length
        chunks[axis] = max(1, min(length, _CHUNK_ELEMENTS // others))
    return tuple(chunks)


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _fill(dtype: np.dtype) -> Any:
    if dtype.kind == "f":
        return "NaN"
    if dtype.kind == "c":
        return ["NaN", 0.0]
    return False if dtype.kind == "b" else 0


def metadata_crc(data: bytes) -> tuple[str, str]:
    """Give the checksum that a root ``zarr.json`` says it has, and that which it has.

    It is the CRC-32C of the file with zeros for the checksum's own eight digits.
    """
    place = data.find(_CRC_KEY) + len(_CRC_KEY)
    if place < len(_CRC_KEY):
        return "", ""
    end = place + len(_NO_CRC)
    found = castagnoli.crc32c(data[:place] + _NO_CRC.encode() + data[end:])
    return data[place:end].decode("ascii", "replace"), f"{found:08x}"


def is_archive(path: Path) -> bool:
    """Whether a folder is one of our archives, of whatever version."""
    try:
        read_attributes(path)
    except UnsupportedVersionError:
        return True
    except FormatError:
        return False
    return True


def read_root(path: Path) -> dict[str, Any]:
    """Read the root metadata of an archive: its attributes, and the metadata of all in it.

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
        root: dict[str, Any] = json.loads(_read_json(place))
        kind, version = (root["attributes"][name] for name in ("format", "format_version"))
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
    return root


def read_attributes(path: Path) -> dict[str, Any]:
    """Read the root attributes of an archive; raises as `read_root` does."""
    return dict(read_root(path)["attributes"])


def _read_json(place: Path) -> bytes:
    """Read metadata, unless it is larger than any that is worth parsing."""
    if place.stat().st_size > _JSON_LIMIT:
        msg = f"{place} is over {_JSON_LIMIT} bytes"
        raise ValueError(msg)
    return place.read_bytes()


def check_identity(path: Path) -> None:
    """Raise as `read_attributes`, unless this is an archive whose root metadata is damaged.

    Such a one still says that it has a checksum, in bytes that nothing else has there.
    """
    try:
        read_attributes(path)
    except UnsupportedVersionError:
        raise
    except FormatError:
        place = path / "zarr.json"
        if not place.is_file() or place.stat().st_size > _JSON_LIMIT:
            raise
        if metadata_crc(place.read_bytes())[0] == "":
            raise


def open_xarray(path: Path, group: str = "") -> xr.Dataset:
    """Open an archive, or a group of it, lazily, without dask."""
    import xarray as xr

    dataset: xr.Dataset = xr.open_zarr(
        path, group=group or None, chunks=None, consolidated=not group, zarr_format=3
    )
    return dataset


def arrays_of(root: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Give the metadata of all arrays of an archive, by their names, of what `read_root` read."""
    below = root["consolidated_metadata"]["metadata"]
    return {name: said for name, said in below.items() if said["node_type"] == "array"}


def read_rows(folder: Path, name: str, place: tuple[int, ...], first: int, last: int) -> Any:
    """Read rows of an array by zarr-python: a decoder that is not ours."""
    import zarr

    array: Any = zarr.open_array(folder / name, mode="r", zarr_format=3)
    found: NDArray[Any] = np.asarray(array[(*place, slice(first, last))])
    if found.shape[0] != last - first:
        msg = f"{folder / name} has {found.shape[0]} of the rows {first} to {last}"
        raise ArchiveError(msg)
    return found


def read_part(folder: Path, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
    """Read a part of an array."""
    import zarr

    array: Any = zarr.open_array(folder / name, mode="r", zarr_format=3)
    return np.asarray(array[part])
