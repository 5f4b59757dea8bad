"""A tracked capture of the documented re-feeding loop, as a script that can be killed.

``python refeed.py LOG STEPS INTERVAL`` prints a line wherever a kill may strike, and waits
for it at the last one.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from actstore.config import HookConfig, HookGranularity, InstrumentationConfig
from actstore.errors import ActstoreWarning
from actstore.framework import InstrumentationFramework

PROMPT = (3, 1, 4)
WIDTH = 96


class Block(nn.Module):
    """Mixes a token with those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, WIDTH] -> the same."""
        x = x + self.attn(x.cumsum(1) / x.shape[1])
        return x + self.mlp(x).tanh()


class Model(nn.Module):
    """A language model that costs nothing; seeded, so that every process has the same."""

    def __init__(self, blocks: int = 3, seed: int = 0) -> None:
        super().__init__()
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 50)
        torch.set_rng_state(state)
        self.said: Callable[[str], None] = lambda _: None

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, sequence] -> logits [batch, sequence, 50]."""
        x = self.embed(input_ids)
        for number, block in enumerate(self.blocks):
            x = block(x)
            self.said(f"block {number}")
        return self.head(x)


def run(
    log: Path,
    steps: int,
    interval: int | None = 4,
    *,
    model: Model | None = None,
    granularity: HookGranularity = HookGranularity.FULL_TENSOR,
    codec: str = "lz4",
    hooks: HookConfig | None = None,
    resume: bool = False,
    said: Callable[[str], None] = lambda _: None,
) -> list[dict]:
    """Capture until there are so many tokens; give them."""
    model = model or Model()
    model.said = said
    config = InstrumentationConfig(granularity, codec, max_memory_gb=0.0015)
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, hooks)
    with framework.capture_activations(
        str(log),
        track_per_token=True,
        checkpoint_interval_tokens=interval,
        resume_from_checkpoint=resume,
    ) as tracker:
        ids = torch.tensor([[*PROMPT, *(one["token_id"] for one in tracker.tokens)]])
        while len(tracker.tokens) < steps:
            said("forward")
            with torch.no_grad():
                following = model(ids)[:, -1, :].argmax(dim=-1, keepdim=True)
            said("recording")
            tracker.record_token(following.item(), f"<{following.item()}>")
            said(f"recorded {len(tracker.tokens)}")
            ids = torch.cat([ids, following], dim=-1)
    return tracker.tokens


def _say(line: str) -> None:
    print(line, flush=True)
    if line == f"recorded {sys.argv[2]}":  # who kills it may be late: it must not have ended
        signal.pause()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ActstoreWarning)
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), said=_say)
