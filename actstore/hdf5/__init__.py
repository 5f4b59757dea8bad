"""HDF5: an archive as one ``.h5`` file, mirrored array by array; the one importer of h5py.

What an archive is, ``archive`` says. See ``schemas/hdf5.md``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from actstore.errors import ConfigError

__all__ = ["check_installed", "is_hdf5"]

_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 does."""
    with path.open("rb") as file:
        return file.read(len(_SIGNATURE)) == _SIGNATURE


def check_installed() -> None:
    """Raise a `ConfigError` where h5py is missing."""
    if find_spec("h5py") is None:
        msg = "HDF5 needs h5py, which is not installed: pip install 'actstore[hdf5]'"
        raise ConfigError(msg)
