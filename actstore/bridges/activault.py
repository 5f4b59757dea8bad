"""Owns activault's runs: for each hook a folder of ``.pt`` files, of many batches each.

Layout: https://github.com/tilde-research/activault at db6d1e4 (README.md, "Collecting
Activations"; ``pipeline/vault/hook_uploader.py``): ``<run>/cfg.json``,
``<run>/<hook>/metadata.json`` and ``<run>/<hook>/<group>--<attempt>_<job>.saved.pt``, a mapping
with ``states`` [item, token, feature], ``input_ids`` [item, token] and ``tensor_bytes``. Files of
one group have the same tokens in every hook. A run is copied from S3 to a folder before it is
imported.

A hook ``models.layers.24.mlp.post`` is what the module ``model.layers.24.mlp`` returns,
``….mlp.pre`` what it is given (``pipeline/setup.py``); ``models.layers.24.post`` and ``.pre`` are
entries 25 and 24 of ``hidden_states`` (``pipeline/generate.py``), of which the last is behind the
final norm. Tokens were left out before (``clean_batch``): positions count those that are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.bridges import torch_files
from actstore.bridges.foreign import (
    Array,
    Firing,
    Foreign,
    ForeignPass,
    Options,
    axis_of,
    files_in,
    integers,
    pieces,
    read_json,
)
from actstore.errors import FormatError

__all__ = ["read", "recognises"]

LAYOUT: Final = "activault db6d1e4"
_METADATA: Final = "metadata.json"
_CONFIG: Final = "cfg.json"
_ENDING: Final = ".saved.pt"
_HOOK: Final = re.compile(r"models\.layers\.(\d{1,6})(\.mlp|\.self_attn)?\.(pre|post)")


def recognises(source: Path) -> bool:
    """Whether a folder is a hook's, or has one that is."""
    return bool(_hooks(source))


def read(source: Path, options: Options) -> Foreign:  # noqa: ARG001 - as every kind's
    """Give the sequences of all hooks, annotated with ``group`` and their number in it."""
    groups: dict[str, dict[str, Path]] = {}
    paths = []
    for folder in _hooks(source):
        paths.append(folder / _METADATA)
        seen: dict[str, Path] = {}
        for path in files_in(folder, _ENDING):
            group = path.name.removesuffix(_ENDING).rpartition("--")[0] or path.name
            if group in seen:
                msg = f"{seen[group]} and {path.name} are of one group; remove one attempt"
                raise FormatError(msg)
            seen[group] = path
            groups.setdefault(group, {})[_layer(folder.name)] = path
            paths.append(path)
    about: dict[str, Any] = {}
    if (source / _CONFIG).is_file():
        config = read_json(source / _CONFIG, dict)
        paths.append(source / _CONFIG)
        models = config.get("transformer_config")
        model = models.get("model_name") if isinstance(models, dict) else None
        about = {"model": model} if isinstance(model, str) else {}
    return Foreign(LAYOUT, paths, _passes(groups), about)


def _hooks(source: Path) -> list[Path]:
    if not source.is_dir():
        return []
    return [
        folder
        for folder in [source, *sorted(one for one in source.iterdir() if one.is_dir())]
        if (folder / _METADATA).is_file()
        and files_in(folder, _ENDING)
        and "batches_per_file" in read_json(folder / _METADATA, dict)
    ]


def _layer(hook: str) -> str:
    """Give the name of the layer that a hook is of: the module's, ``@in`` for what it's given."""
    found = _HOOK.fullmatch(hook)
    if found is None:
        return hook
    return f"model.layers.{found[1]}{found[2] or ''}{'@in' if found[3] == 'pre' else ''}"


def _passes(groups: Mapping[str, Mapping[str, Path]]) -> Iterator[ForeignPass]:
    for group, paths in groups.items():
        loaded = {layer: _load(path) for layer, path in paths.items()}
        # all hooks of a group have the same tokens; where they don't, they are no one pass
        together: list[tuple[NDArray[np.int64], dict[str, Array]]] = []
        for layer, (states, ids) in loaded.items():
            same = next((one for one in together if np.array_equal(one[0], ids)), None)
            if same is None:
                together.append((ids, {layer: states}))
            else:
                same[1][layer] = states
        for ids, layers in together:
            yield from _cut(group, ids, layers)


def _cut(group: str, ids: NDArray[np.int64], layers: Mapping[str, Array]) -> Iterator[ForeignPass]:
    row_bytes = max(one.shape[2] * one.dtype.itemsize for one in layers.values())
    for items, places in pieces(len(ids), ids.shape[1], row_bytes):
        here = ids[items, places]
        yield ForeignPass(
            axis_of(here.shape, ids=here, start=places.start),
            (Firing(layer, states[items, places]) for layer, states in layers.items()),
            {
                "group": [group] * len(here),
                "sequence": list(range(items.start, items.stop)),
            },
        )


def _load(path: Path) -> tuple[Array, NDArray[np.int64]]:
    found = torch_files.load(path)
    if not isinstance(found, Mapping) or not {"states", "input_ids"} <= set(found):
        held: Sequence[Any] = sorted(map(str, found)) if isinstance(found, Mapping) else [found]
        msg = f"{path}: wanted 'states' and 'input_ids'; found {held!r:.200}"
        raise FormatError(msg)
    states = torch_files.tensor_of(found["states"], "states", path)
    ids = torch_files.tensor_of(found["input_ids"], "input_ids", path)
    if len(states.shape) != 3 or states.shape[:2] != ids.shape:
        msg = (
            f"{path}: wanted states [item, token, feature] and input_ids [item, token]; found "
            f"{states.shape} and {ids.shape}"
        )
        raise FormatError(msg)
    return states, integers(ids[...], "input_ids", path)
