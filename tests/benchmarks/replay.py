"""Owns a model whose blocks return given values, to time how a tool keeps them, without a model.

Run as ``python replay.py GIVEN.safetensors OUT`` by the Python that has llm-instrumentation, it
captures them with that, and prints the seconds; ``shelf.py`` does so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["Replay"]

BATCH, LENGTH = 8, 256


class Block(nn.Module):
    """Returns what it is given."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Give it back."""
        return values


class Replay(nn.Module):
    """Blocks that return what they are said to have returned, [tokens, width] each.

    A forward is of `BATCH` × `LENGTH` tokens.
    """

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.values = [one.reshape(-1, BATCH, LENGTH, one.shape[1]) for one in values.values()]
        self.blocks = nn.ModuleList(Block() for _ in values)

    def forward(self, input_ids: torch.Tensor, number: int) -> None:
        """Have every block return its values of the batch of that number."""
        for block, values in zip(self.blocks, self.values, strict=True):
            block(values[number])

    def run(self) -> None:
        """Run all forwards."""
        ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
        for number in range(len(self.values[0])):
            self(ids, number)


def main(given: str, out: str) -> None:
    """Capture with llm-instrumentation."""
    from llm_instrumentation import (
        HookGranularity,
        InstrumentationConfig,
        InstrumentationFramework,
    )
    from safetensors.torch import load_file

    model: Any = Replay(dict(sorted(load_file(given).items())))
    framework = InstrumentationFramework(
        InstrumentationConfig(granularity=HookGranularity.FULL_TENSOR)
    )
    framework.instrument_model(model.blocks)
    began = time.perf_counter()
    with framework.capture_activations(out):
        model.run()
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
