"""Small, seeded models: one of each architecture, built once a process, never changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import families
import torch
from families import VOCABULARY
from torch import Tensor, nn
from transformers.utils import ModelOutput

#: Short names of families -> those of ``families.py``.
_FAMILIES = {
    "llama": "Llama",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "qwen2": "Qwen2",
    "gemma2": "Gemma 2",
    "phi": "Phi",
    "mixtral": "Mixtral",
    "opt": "OPT",
    "bloom": "Bloom",
    "falcon": "Falcon",
    "bert": "BERT",
    "t5": "T5",
}
DECODERS = [name for name in _FAMILIES if name not in ("bert", "t5")]
#: name -> its site "attn" or "mlp" -> the names of its modules, ``{}`` the block.
ARCHITECTURES = {short: families.FAMILIES[name].sites for short, name in _FAMILIES.items()}


@cache
def build(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """Give the model of an architecture, in eval mode: the same one each time."""
    return families.build.__wrapped__(_FAMILIES[name], dtype, **settings)


def token_ids(batch: int = 2, sequence: int = 5) -> Tensor:
    """Give token ids without the padding id 0; the same ones every time."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, VOCABULARY, (batch, sequence), generator=generator)


class Apply(nn.Module):
    """A module that computes a given function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute it."""
        return self.function(*args, **kwargs)


class Each(nn.Module):
    """Calls each of its children on its input; returns what the last one returns."""

    def __init__(self, **functions: Callable[..., Any] | nn.Module) -> None:
        super().__init__()
        for name, function in functions.items():
            module = function if isinstance(function, nn.Module) else Apply(function)
            self.add_module(name, module)

    def forward(self, x: Any) -> Any:
        """Call them in order of registration."""
        out = None
        for child in self.children():
            out = child(x)
        return out


class Pair(NamedTuple):
    """A named tuple, as models return them."""

    first: Any
    second: Any


@dataclass
class Output(ModelOutput):
    """A `ModelOutput`, as Hugging Face models return it."""

    loss: Any = None
    logits: Any = None
    hidden: Any = None


def sequential() -> nn.Sequential:
    """Give a plain ``nn.Sequential``, seeded."""
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.ReLU(inplace=True),
        nn.Identity(),
        nn.Dropout(0.5),
        nn.LayerNorm(16),
        nn.Linear(16, 4),
    ).eval()
