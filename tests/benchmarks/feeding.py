"""Owns firing the hooks of a capture without a model: what the hooks and the log can take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import actstore

__all__ = ["feed"]


class Layers(nn.Module):
    """So many modules that never run: only their hooks do."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(count))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Nothing."""
        return input_ids


def feed(
    log: Path, codec: str, packets: Sequence[Tensor], layers: int, passes: int
) -> tuple[float, dict[str, Any]]:
    """Capture packets, of each layer one a pass, in turn from those given.

    Returns
    -------
    seconds : float
        From the first hook until everything is durable.
    summary : dict
        The run's own.
    """
    model = Layers(layers)
    framework = framework_of(codec)
    framework.instrument_model(model, actstore.HookConfig(target_layers=["layers.*"]))
    ids = torch.tensor([[1]])
    with framework.capture_activations(str(log)):
        hooks = [next(iter(one._forward_hooks.values())) for one in model.layers]
        enter, *_ = model._forward_pre_hooks.values()
        *_, leave = model._forward_hooks.values()
        began, number = time.perf_counter(), 0
        for _ in range(passes):
            enter(model, (ids,), {})
            for hook, module in zip(hooks, model.layers, strict=True):
                hook(module, (), packets[number])
                number = (number + 1) % len(packets)
            leave(model, (), None)
    return time.perf_counter() - began, dict(framework.summary)


_frameworks: dict[str, Any] = {}


def framework_of(codec: str) -> Any:
    """Give a fresh framework in the memory of the one before, as a second capture has it."""
    config = actstore.InstrumentationConfig(
        actstore.HookGranularity.FULL_TENSOR, codec, target_throughput_gbps=1e-6
    )
    framework = actstore.InstrumentationFramework(config)
    if codec in _frameworks:
        framework._memory = _frameworks[codec]._memory
    _frameworks[codec] = framework
    return framework
