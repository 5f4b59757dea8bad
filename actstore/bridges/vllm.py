"""Owns vLLM's extracted hidden states: a safetensors file for each request.

Layout: ``ExampleHiddenStatesConnector`` of vLLM 0.33.0, and of 0.18.0, its first release
(``vllm/distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py``):
``<request>.safetensors`` with ``hidden_states`` [token, layer, feature] and ``token_ids`` [token],
and beside it ``<request>.safetensors.lock``, which the writer holds while it writes. The files
don't say which layers these are. The ids in ``eagle_aux_hidden_state_layer_ids`` count what
*enters* a block (``vllm/model_executor/models/llama.py`` takes number 0 in front of the first
block, and i + 1 behind block i), so that id 0 is the embedding and id k the residual stream behind
block k - 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from actstore import files
from actstore.bridges import safe_tensors
from actstore.bridges.foreign import (
    Firing,
    Foreign,
    ForeignPass,
    Options,
    axis_of,
    files_in,
    integers,
    pieces,
)
from actstore.errors import ConfigError, FormatError

__all__ = ["read", "recognises"]

LAYOUT: Final = "vLLM 0.18.0 to 0.33.0, ExampleHiddenStatesConnector"
_ENDING: Final = ".safetensors"
_TENSORS: Final = {"hidden_states", "token_ids"}


def recognises(source: Path) -> bool:
    """Whether the first file has the two tensors."""
    paths = _paths(source)
    if not paths:
        return False
    with safe_tensors.opened(paths[0]) as (arrays, _):
        return set(arrays) == _TENSORS and len(arrays["hidden_states"].shape) == 3


def read(source: Path, options: Options) -> Foreign:
    """Give the requests as passes, each one sequence, annotated with ``request_id``."""
    paths = _paths(source)
    if not paths:
        msg = f"{source} holds no {_ENDING} files; give the shared_storage_path of vLLM"
        raise FormatError(msg)
    about = {} if options.layers is None else {"layer_ids": list(map(int, options.layers))}
    return Foreign(LAYOUT, paths, _passes(paths, options.layers), about)


def _paths(source: Path) -> list[Path]:
    if source.is_dir():
        return files_in(source, _ENDING)
    return [source] if source.name.endswith(_ENDING) else []


def _passes(paths: Sequence[Path], layers: Sequence[int] | None) -> Iterator[ForeignPass]:
    for path in paths:
        lock = path.with_name(f"{path.name}.lock")
        if lock.is_file() and files.is_locked(lock):
            msg = f"{path} is being written by vLLM; import it when the request is finished"
            raise ConfigError(msg)
        with safe_tensors.opened(path) as (arrays, _):
            if set(arrays) != _TENSORS or len(arrays["hidden_states"].shape) != 3:
                found = {name: array.shape for name, array in arrays.items()}
                msg = (
                    f"{path}: wanted hidden_states [token, layer, feature] and token_ids [token]; "
                    f"found {found!r:.200}"
                )
                raise FormatError(msg)
            states, ids = arrays["hidden_states"], arrays["token_ids"]
            rows, count, width = states.shape
            if ids.shape not in ((rows,), (0,)):
                msg = f"{path}: {rows} rows have token_ids of shape {ids.shape}; wanted one each"
                raise FormatError(msg)
            told = integers(ids[...], "token_ids", path) if ids.shape == (rows,) else None
            names = _names(count, layers, path)
            for _, places in pieces(1, rows, count * width * states.dtype.itemsize):
                values = states[places]
                here = None if told is None else told[places]
                yield ForeignPass(
                    axis_of((1, len(values)), ids=here, start=places.start),
                    [
                        Firing(name, np.ascontiguousarray(values[np.newaxis, :, number]))
                        for number, name in enumerate(names)
                    ],
                    {"request_id": [path.name.removesuffix(_ENDING)]},
                )


def _names(count: int, layers: Sequence[int] | None, path: Path) -> list[str]:
    if layers is None:
        return [f"hidden_states.{number}" for number in range(count)]
    if len(layers) != count or len(set(layers)) != count or min(layers, default=0) < 0:
        msg = (
            f"{path} has {count} layers; layers must be as many different ids, those that vLLM "
            f"was told in eagle_aux_hidden_state_layer_ids; got {list(layers)}"
        )
        raise ConfigError(msg)
    return ["embed" if number == 0 else f"layers.{number - 1}" for number in layers]
