"""Owns which function of the library makes which file: by how a name ends, or by a kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import actstore
from actstore.cli.output import Output
from actstore.errors import ConfigError

__all__ = ["export", "import_"]

#: How names of one file with a whole archive end.
WHOLE: Final = (".h5", ".hdf5", ".zarr.zip")
#: How names of what holds rows for other tools end; "" is a folder.
ROWS: Final = (".parquet", ".safetensors", "")


def export(  # noqa: PLR0913 - options of a command, each by its name
    out: Output,
    source: Path,
    target: Path,
    *,
    compression: str | None,
    layers: Sequence[str] | None,
    form: str | None,
    names: Sequence[str] | None,
    context_size: int | None,
    dim: str | None,
    max_memory_gb: float,
) -> Any:
    """Make a file of an archive or a log; give the report."""
    name = target.name.lower()
    of_rows = {"layers": layers, "format": form, "names": named(names),
               "context_size": context_size, "dim": dim}  # fmt: skip
    given = {name: value for name, value in of_rows.items() if value}
    if form is None and name.endswith(WHOLE):
        if given:
            msg = (
                f"{target.name} holds all of an archive: {', '.join(given)} are of {_ended(ROWS)}"
            )
            raise ConfigError(msg)
        with out.progress(f"export {target.name}") as progress:
            return actstore.export(
                source,
                target,
                compression=compression,
                max_memory_gb=max_memory_gb,
                progress=progress,
            )
    if form is None and target.suffix.lower() not in ROWS:
        msg = f"{target.name}: wanted a name that ends in {_ended((*WHOLE, *ROWS))}"
        raise ConfigError(msg)
    if compression is not None:
        msg = f"compression is of {_ended(WHOLE[:2])}"
        raise ConfigError(msg)
    return actstore.export_rows(source, target, max_memory_gb=max_memory_gb, **given)


def import_(
    out: Output,
    source: Path,
    target: Path,
    *,
    kind: str | None,
    names: Sequence[str] | None,
    tokens: Path | None,
    layer_ids: Sequence[int] | None,
    max_memory_gb: float,
) -> Any:
    """Make an archive, or a log, of a file; give the report."""
    if kind is None and source.name.lower().endswith(WHOLE):
        with out.progress(f"import {source.name}") as progress:
            return actstore.import_archive(
                source, target, max_memory_gb=max_memory_gb, progress=progress
            )
    given = {"kind": kind, "layers": layer_ids, "names": named(names)}
    if tokens is not None:
        import numpy as np

        try:
            given["tokens"] = np.load(tokens, allow_pickle=False)
        except ValueError as error:
            msg = f"{tokens} is no array of NumPy: {error}"
            raise ConfigError(msg) from error
    return actstore.import_activations(
        source, target, **{name: value for name, value in given.items() if value is not None}
    )


def named(given: Sequence[str] | None) -> dict[str, str] | None:
    """Give the names that layers get, of ``LAYER=NAME``."""
    found = {}
    for one in given or ():
        layer, gap, name = one.partition("=")
        if not (layer and gap and name):
            msg = f"--name wants LAYER=NAME; got {one!r}"
            raise ConfigError(msg)
        found[layer] = name
    return found or None


def _ended(names: Sequence[str]) -> str:
    return ", ".join(one or "nothing (a folder)" for one in names)
