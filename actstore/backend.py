"""Owns the xarray entry point: ``xr.open_dataset(path, engine="actstore")``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import xarray as xr
from xarray.backends import BackendEntrypoint

from actstore.buckets import is_remote
from actstore.dataset import is_dataset, open_lazily

__all__ = ["ActstoreBackendEntrypoint"]


class ActstoreBackendEntrypoint(BackendEntrypoint):
    """Opens ``.stream`` logs and actstore's archives in xarray."""

    description: ClassVar[str] = "Open activation logs (.stream) and archives of actstore"
    open_dataset_parameters: ClassVar[tuple[str, ...]] = (
        *("filename_or_obj", "drop_variables", "storage_options"),
    )

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> xr.Dataset:
        """Open a log or an archive; see `actstore.open_dataset`."""
        dataset = open_lazily(filename_or_obj, storage_options)
        if drop_variables is None:
            return dataset
        named = [drop_variables] if isinstance(drop_variables, str) else list(drop_variables)
        kept = dataset.drop_vars(named, errors="ignore")
        kept.set_close(dataset.close)
        return kept

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether this is a log or an archive: by its content first, its suffix second."""
        if not isinstance(filename_or_obj, str | os.PathLike):
            return False
        if is_remote(filename_or_obj):  # nothing is asked for just to guess
            return os.fspath(filename_or_obj).endswith(".stream")
        try:
            return is_dataset(filename_or_obj)
        except OSError:
            return os.fspath(filename_or_obj).endswith(".stream")
