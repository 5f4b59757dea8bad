"""Owns SAELens' cached activations: a folder that Hugging Face datasets wrote, read by pyarrow.

Layout: ``CacheActivationsRunner`` and ``ActivationsStore.load_cached_activation_dataset`` of
SAELens 6.54.12 (``sae_lens/cache_activations_runner.py``,
``sae_lens/training/activations_store.py``) over ``Dataset.save_to_disk`` of datasets 5.2.0:
``state.json`` names Arrow streams, whose rows are sequences. A column named as a hook has
[context, features] (``Array2D``), ``token_ids`` int32 [context]. How such a folder is written
is ``arrow``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.bridges import arrow
from actstore.bridges.foreign import (
    Firing,
    Foreign,
    ForeignPass,
    Options,
    axis_of,
    integers,
    pieces,
    read_json,
    within,
)
from actstore.errors import FormatError

__all__ = ["read", "recognises"]

LAYOUT: Final = "SAELens 6.54.12, cached activations (datasets 5.2.0)"
_INFO: Final = "dataset_info.json"
_STATE: Final = "state.json"
_IDS: Final = "token_ids"


def recognises(source: Path) -> bool:
    """Whether a folder has what ``save_to_disk`` writes beside the Arrow files."""
    return (source / _INFO).is_file() and (source / _STATE).is_file()


def read(source: Path, options: Options) -> Foreign:  # noqa: ARG001 - as every kind's
    """Give the sequences, annotated with the ``sequence`` of the dataset."""
    state = read_json(source / _STATE, dict)
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        msg = f"{source / _STATE}: '_data_files' must list files; found {listed!r:.80}"
        raise FormatError(msg)
    paths = [within(source, one.get("filename")) for one in listed]
    return Foreign(LAYOUT, [source / _INFO, source / _STATE, *paths], _passes(paths))


def _passes(paths: Sequence[Path]) -> Iterator[ForeignPass]:
    before = 0
    for path in paths:
        for columns in arrow.batches(path):
            activations = {
                name: values
                for name, values in columns.items()
                if values.ndim > 2 and name != _IDS
            }
            if not activations:
                shapes = {name: values.shape for name, values in columns.items()}
                msg = (
                    f"{path} has no column of [context, features], named as a hook; it has "
                    f"{shapes!r:.200}"
                )
                raise FormatError(msg)
            leading = {values.shape[:2] for values in activations.values()}
            if len(leading) > 1:
                msg = f"{path}: its hooks have different contexts: {sorted(leading)}"
                raise FormatError(msg)
            ((items, length),) = leading
            ids = _ids(columns, (items, length), path)
            yield from _cut(activations, ids, before)
            before += items


def _ids(
    columns: dict[str, NDArray[Any]], shape: tuple[int, int], path: Path
) -> NDArray[np.int64] | None:
    if _IDS not in columns:
        return None
    if columns[_IDS].shape != shape:
        msg = f"{path}: token_ids are {columns[_IDS].shape}; its hooks have {shape}"
        raise FormatError(msg)
    return integers(columns[_IDS], _IDS, path)


def _cut(
    activations: dict[str, NDArray[Any]], ids: NDArray[np.int64] | None, before: int
) -> Iterator[ForeignPass]:
    items, length = next(iter(activations.values())).shape[:2]
    row_bytes = max(values[:1, :1].nbytes for values in activations.values())
    for some, places in pieces(items, length, row_bytes):
        size = some.stop - some.start, places.stop - places.start
        yield ForeignPass(
            axis_of(size, ids=None if ids is None else ids[some, places], start=places.start),
            [Firing(name, values[some, places]) for name, values in activations.items()],
            {"sequence": list(range(before + some.start, before + some.stop))},
        )
