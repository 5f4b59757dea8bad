"""Owns a model that computes nothing: its layers return values that were drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Replay"]


class Replay(nn.Module):
    """Layers that return values which were drawn once: normal, each feature of its own scale.

    Parameters
    ----------
    layers, tokens, width : int
        How many layers, and the shape of what each returns: [1, tokens, width] of bfloat16.
    drawn : int
        Passes whose values differ; then they come again.
    """

    def __init__(self, layers: int, tokens: int, width: int, drawn: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.input_ids = torch.arange(tokens)[None]
        generator = torch.Generator().manual_seed(0)
        scales = torch.randn(layers, 1, width, generator=generator).exp()
        self._values = [
            (torch.randn(layers, tokens, width, generator=generator) * scales).to(torch.bfloat16)
            for _ in range(drawn)
        ]
        self._passes = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        """[1, tokens] -> the same."""
        values = self._values[self._passes % len(self._values)]
        self._passes += 1
        for place, layer in enumerate(self.layers):
            layer(values[place : place + 1])
        return input_ids
