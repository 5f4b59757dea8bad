"""Owns what an archive says of itself: the metadata of its root, read without zarr.

Its arrays are ``store``'s, which is the one importer of zarr.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import crc32c as castagnoli

from actstore import files
from actstore.archive.zipped import Place
from actstore.buckets import RemotePath
from actstore.errors import ConfigError, FormatError, UnsupportedVersionError

__all__ = [
    "CRC_KEY",
    "FORMAT",
    "NO_CRC",
    "VERSION",
    "arrays_of",
    "check_identity",
    "is_archive",
    "metadata_crc",
    "parse_root",
    "read_attributes",
    "read_root",
]

FORMAT: Final = "actstore"
VERSION: Final = 0
CRC_KEY: Final = b'"metadata_crc32c": "'
NO_CRC: Final = "00000000"
_JSON_LIMIT: Final = 1 << 30


def metadata_crc(data: bytes) -> tuple[str, str]:
    """Give the checksum that a root ``zarr.json`` says it has, and that which it has.

    It is the CRC-32C of the file with zeros for the checksum's own eight digits.
    """
    place = data.find(CRC_KEY) + len(CRC_KEY)
    if place < len(CRC_KEY):
        return "", ""
    end = place + len(NO_CRC)
    found = castagnoli.crc32c(data[:place] + NO_CRC.encode() + data[end:])
    return data[place:end].decode("ascii", "replace"), f"{found:08x}"


def is_archive(path: Place) -> bool:
    """Whether a folder or a zip is one of our archives, of whatever version."""
    try:
        read_attributes(path)
    except UnsupportedVersionError:
        return True
    except (FormatError, ConfigError):
        return False
    return True


def read_root(path: Place) -> dict[str, Any]:
    """Read the root metadata of an archive: its attributes, and the metadata of all in it.

    Raises
    ------
    FormatError
        The folder is none of our archives.
    UnsupportedVersionError
        It is one of a version that this actstore doesn't know.
    ConfigError
        It may not be read.
    """
    try:
        data = _read_json(path / "zarr.json")
    except PermissionError as error:
        raise files.unreadable(path, error) from error
    except FileNotFoundError as error:
        msg = f"{path} is no archive of actstore: it has no zarr.json"
        raise FormatError(msg) from error
    except (OSError, ValueError) as error:
        msg = f"{path} is no archive of actstore: {error}"
        raise FormatError(msg) from error
    return parse_root(data, path)


def parse_root(data: bytes, path: Place) -> dict[str, Any]:
    """Parse the root metadata of the archive at ``path``; raises as `read_root` does."""
    wanted = f"wanted a Zarr v3 group whose attribute 'format' is {FORMAT!r}"
    try:
        root: dict[str, Any] = json.loads(data)
        kind, version = (root["attributes"][name] for name in ("format", "format_version"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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


def read_attributes(path: Place) -> dict[str, Any]:
    """Read the root attributes of an archive; raises as `read_root` does."""
    return dict(read_root(path)["attributes"])


def _read_json(place: Place) -> bytes:
    """Read metadata, unless it is larger than any that is worth parsing."""
    if isinstance(place, RemotePath):
        return place.bucket.keep(place.inside, _JSON_LIMIT)
    if place.stat().st_size > _JSON_LIMIT:
        msg = f"{place} is over {_JSON_LIMIT} bytes"
        raise ValueError(msg)
    return place.read_bytes()


def check_identity(path: Place) -> None:
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


def arrays_of(root: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Give the metadata of all arrays of an archive, by their names, of what `read_root` read."""
    below = root["consolidated_metadata"]["metadata"]
    return {name: said for name, said in below.items() if said["node_type"] == "array"}
