"""Owns what the HEADER says of models and capture, and whether two HEADERs are of one run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import actstore
from actstore import codecs
from actstore.config import InstrumentationConfig
from actstore.errors import ConfigError
from actstore.parallel import AXES, Parallel

if TYPE_CHECKING:
    from actstore.capture.session import Instrumented

__all__ = ["check_same_run", "describe"]

#: Of a model's config: where it was loaded from, and by which version, is not what it is.
_INCIDENTAL = ("_name_or_path", "transformers_version")
_SAME_MODEL = ("class", "parameters", "target_layers", "inputs", "attention_weights")
_SAME_CAPTURE = ("granularity", "sampling_rate", "sampling_seed", "outputs", "rows")


def describe(
    models: Sequence[Instrumented],
    config: InstrumentationConfig,
    track_per_token: bool,
    parallel: Parallel | None = None,
) -> dict[str, Any]:
    """Give the HEADER's attributes, but for the run's id and time."""
    rank, world_size = _rank()
    hooks = models[0].hooks
    return {
        "writer": {"name": "actstore", "version": actstore.__version__},
        "models": [_model(one) for one in models],
        "capture": {
            "granularity": config.granularity.name,
            "compression": config.compression_algorithm,
            "sampling_rate": hooks.sampling_rate,
            "sampling_seed": hooks.sampling_seed,
            "outputs": hooks.outputs,
            "rows": _named_rows(hooks.rows),
            "target_throughput_gbps": config.target_throughput_gbps,
            "max_memory_gb": config.max_memory_gb,
            "track_per_token": track_per_token,
        },
        "rank": rank,
        "world_size": world_size,
        "codecs": {str(number): entry for number, entry in codecs.CODECS.items()},
    } | ({"parallel": parallel.header()} if parallel is not None else {})


def _named_rows(rows: Any) -> str | None:
    """Say which rows are kept."""
    if isinstance(rows, slice):
        given = (rows.start, rows.stop, rows.step)
        return ":".join("" if one is None else str(one) for one in given)
    return getattr(rows, "__qualname__", "callable") if callable(rows) else rows


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume a log with another model or another capture.

    Raises
    ------
    ConfigError
        They differ; the text says in what.
    """
    if before.get("parallel") is None:  # of before HEADERs said it
        now = {name: value for name, value in now.items() if name != "parallel"}
    was, wanted = _identity(before), _identity(json.loads(json.dumps(now)))
    differing = [
        f"{name}: the log has {_short(was.get(name))}, this capture {_short(value)}"
        for name, value in wanted.items()
        if was.get(name) != value
    ]
    if differing or was.keys() != wanted.keys():
        told = "; ".join(differing) or f"the log has {len(was)} settings, wanted {len(wanted)}"
        msg = (
            f"{path} can't be resumed, it is of another run: {told}; resume it as it was "
            "captured, or give another output_path"
        )
        raise ConfigError(msg)


def _identity(header: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten what must be the same in a resumed run."""
    flat: dict[str, Any] = {}
    for number, model in enumerate(header.get("models", [])):
        flat |= {f"model {number} {name}": model.get(name) for name in _SAME_MODEL}
        for key, value in (model.get("config") or {}).items():
            if key not in _INCIDENTAL:
                flat[f"model {number} config {key}"] = value
    parallel = header.get("parallel")
    if parallel is not None:
        flat |= {f"place on the {axis} axis": parallel.get(axis) for axis in AXES}
    capture = header.get("capture", {})
    return flat | {name: capture.get(name) for name in _SAME_CAPTURE}


def _model(one: Instrumented) -> dict[str, Any]:
    model, targets = one.model, one.hooks.target_layers
    dtypes = Counter[str]()
    for parameter in model.parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            msg = (
                f"{type(model).__name__} has lazy parameters without a shape; run it once before "
                "it is captured"
            )
            raise ConfigError(msg)
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return {
        "name": one.name,
        "class": type(model).__name__,
        "target_layers": getattr(targets, "__qualname__", "callable")
        if callable(targets)
        else targets and list(targets),
        "inputs": one.hooks.inputs,
        "attention_weights": one.hooks.attention_weights,
        "config": _config(model),
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes),
    }


def _config(model: nn.Module) -> dict[str, Any] | None:
    """Give a Hugging Face model's config as JSON has it."""
    dump = getattr(getattr(model, "config", None), "to_json_string", None)
    if not callable(dump):
        return None
    found = json.loads(dump(use_diff=False), parse_constant=str)  # JSON has no NaN
    return found if isinstance(found, dict) else None


def _rank() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return _variable("RANK", 0), _variable("WORLD_SIZE", 1)


def _variable(name: str, least: int) -> int:
    """Give a number that a launcher left in the environment."""
    given = os.environ.get(name, "").strip() or str(least)
    if not given.isdecimal() or int(given) < least:
        msg = f"the environment variable {name} must be an integer from {least}; got {given!r}"
        raise ConfigError(msg)
    return int(given)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
