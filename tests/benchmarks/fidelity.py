"""What a lossy rounding of the residual stream changes downstream, in the model and in probes.

After a block of `examples/tiny-llama` the residual stream is replaced by its reconstruction, and
the model goes on with that; for each block by itself, on documentation. Each method is told by

- nmse: the mean over rows of |x - x'|² / |x|²;
- KL(original ‖ reconstructed) of the distributions of the next token, in nats: the mean over all
  blocks and tokens, the 99th percentile, and the mean of the worst block;
- top-1: how often the likeliest next token stays the same;
- probes: ridge classifiers, one for each block, fitted to original rows of other text, and their
  accuracy on original rows; then what that changes by on reconstructed rows, the mean over the
  blocks and the largest (in points of percent).

Run by ``.venv/bin/python tests/benchmarks/fidelity.py [--tokens 8192] [--dtype float32]
[--by-block]``; about four minutes. To measure another method, put it into ``METHODS``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import numpy as np
import torch
from machine import machine
from trained import BATCH, MODEL, windows
from transformers import AutoTokenizer, LlamaForCausalLM

from actstore.archive.precision import Precision, decoded

Rounding = Callable[[torch.Tensor], torch.Tensor]
#: [rows, features] float32, of which the first axis is that of tokens -> the same, reconstructed.
METHODS: dict[str, Rounding] = {}
RIDGE: Final = 1e-3  # of the mean eigenvalue of the features' covariance


# -- methods ------------------------------------------------------------------------------------


def by(name: str) -> Rounding:
    """Keep rows at a precision of `actstore.compact`, and read them."""
    precision = Precision.parse(name)

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        values = rows.numpy()
        if not precision.coded:
            return torch.from_numpy(precision.rounded(values)[0])
        codes = precision.quantised(values)
        assert codes is not None
        return torch.from_numpy(decoded(codes.codes, codes.scale, values.dtype))

    return rounded


PRECISIONS: Final = (
    *("bfloat16", "relative=0.0078125", "relative=0.03125", "relative=0.0625"),
    *("int8", "nmse=2e-5", "nmse=2e-4", "nmse=1e-3", "mse=1e-3"),
)
METHODS.update({"all": lambda rows: rows, **{name: by(name) for name in PRECISIONS}})


# -- the model ----------------------------------------------------------------------------------


@contextmanager
def replaced(model: Any, block: int, rounding: Rounding) -> Iterator[None]:
    """Let the model go on after a block with what a rounding makes of its output."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        whole = output if isinstance(output, torch.Tensor) else output[0]
        found = rounding(whole.float().reshape(-1, whole.shape[-1]))
        found = found.reshape(whole.shape).to(whole.dtype)
        return found if isinstance(output, torch.Tensor) else (found, *output[1:])

    handle = model.model.layers[block].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def residual(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Give the outputs of all blocks: each float32 [tokens, features]."""
    found: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.register_forward_hook(
            lambda module, args, output, mine=mine: mine.append(
                (output if isinstance(output, torch.Tensor) else output[0]).float()
            )
        )
        for layer, mine in zip(model.model.layers, found, strict=True)
    ]
    try:
        for batch in ids.split(BATCH):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat([one.reshape(-1, one.shape[-1]) for one in mine]) for mine in found]


def log_probabilities(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Give the distributions of the next token, in float64: [tokens, vocabulary]."""
    return torch.log_softmax(model(batch).logits.double().flatten(0, 1), -1)


# -- probes -------------------------------------------------------------------------------------


def classes(ids: torch.Tensor, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Give what probes predict of each token, from its own row: class numbers."""
    texts = [tokenizer.decode([one]) for one in range(len(tokenizer))]

    def of_next(text: str) -> int:
        bare = text.strip()
        kinds = (not bare, bare.isalpha() and text[:1].isspace(), bare.isalpha(), bare.isdigit())
        return kinds.index(True) if any(kinds) else len(kinds)

    def told(tell: Callable[[str], int]) -> torch.Tensor:
        return torch.tensor([tell(text) for text in texts])[ids]

    following = told(of_next).roll(-1, dims=1)
    following[:, -1] = -1  # of the last token of a window none is known
    return {
        "next token's class (5)": following.flatten(),
        "begins a word": told(
            lambda text: int(text[:1].isspace() and text.strip() != "")
        ).flatten(),
        "indentation": told(lambda text: int(not text.strip())).flatten(),
    }


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear classifier: what features are scaled by, and a score for each class."""

    shift: torch.Tensor
    scale: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def fit(cls, rows: torch.Tensor, wanted: torch.Tensor) -> Probe:
        """Fit ridge regression to one-hot classes, in closed form."""
        kept = wanted >= 0
        rows, wanted = rows[kept].double(), wanted[kept]
        shift, scale = rows.mean(0), rows.std(0).clamp_min(1e-12)
        features = _with_one((rows - shift) / scale)
        target = torch.nn.functional.one_hot(wanted).double()
        gram = features.T @ features
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        return cls(shift, scale, torch.linalg.solve(gram, features.T @ target))

    def accuracy(self, rows: torch.Tensor, wanted: torch.Tensor) -> float:
        """Give the share of rows whose class has the highest score."""
        kept = wanted >= 0
        scores = _with_one((rows[kept].double() - self.shift) / self.scale) @ self.weights
        return float((scores.argmax(-1) == wanted[kept]).double().mean())


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], -1)


# -- the measurement ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """What a method changes after one block."""

    nmse: float
    divergence: torch.Tensor
    same: float
    probes: Mapping[str, float]


def downstream(
    model: Any, ids: torch.Tensor, tokens: int
) -> dict[str, list[tuple[torch.Tensor, float]]]:
    """Give of each method and block the divergence of each token, and how often top-1 stays."""
    blocks = range(len(model.model.layers))
    parts: dict[tuple[str, int], list[torch.Tensor]] = {}
    same: dict[tuple[str, int], int] = {}
    for batch in ids.split(BATCH):
        plain = log_probabilities(model, batch)
        for name, rounding in METHODS.items():
            for block in blocks:
                with replaced(model, block, rounding):
                    found = log_probabilities(model, batch)
                key = name, block
                parts.setdefault(key, []).append((plain.exp() * (plain - found)).sum(-1))
                agree = int((plain.argmax(-1) == found.argmax(-1)).sum())
                same[key] = same.get(key, 0) + agree
    return {
        name: [(torch.cat(parts[name, block]), same[name, block] / tokens) for block in blocks]
        for name in METHODS
    }


def measure(model: Any, tokenizer: Any, tokens: int) -> tuple[dict[str, list[Change]], Any]:
    """Measure each method after each block; and give the probes' accuracies on original rows."""
    ids = windows(MODEL, 3 * tokens)
    test, train = ids[: len(ids) // 3], ids[len(ids) // 3 :]
    rows, training = residual(model, test), residual(model, train)
    wanted, taught = classes(test, tokenizer), classes(train, tokenizer)
    probes = [{name: Probe.fit(mine, taught[name]) for name in taught} for mine in training]
    plain = [
        {name: one.accuracy(mine, wanted[name]) for name, one in of_block.items()}
        for of_block, mine in zip(probes, rows, strict=True)
    ]
    found: dict[str, list[Change]] = {}
    for name, after in downstream(model, test, test.numel()).items():
        for block, (divergence, same) in enumerate(after):
            mine = rows[block]
            again = METHODS[name](mine)
            error = (again - mine).double().square().sum(-1) / mine.double().square().sum(-1)
            change = {
                kind: one.accuracy(again, wanted[kind]) - plain[block][kind]
                for kind, one in probes[block].items()
            }
            found.setdefault(name, []).append(
                Change(float(error.mean()), divergence, same, change)
            )
    most = {
        kind: float(one[one >= 0].bincount().max() / (one >= 0).sum())
        for kind, one in wanted.items()
    }
    return found, (plain, most)


def line(name: str, changes: list[Change]) -> str:
    """Give a method's line of the table, over some blocks."""
    divergence = torch.stack([one.divergence for one in changes])
    cells = [
        f"{sum(one.nmse for one in changes) / len(changes):.2g}",
        f"{divergence.mean():.2g}",
        f"{np.quantile(divergence.numpy(), 0.99):.2g}",
        f"{divergence.mean(-1).max():.2g}",
        f"{100 * sum(one.same for one in changes) / len(changes):.2f} %",
    ]
    for kind in changes[0].probes:
        points = [100 * one.probes[kind] for one in changes]
        cells.append(f"{sum(points) / len(points):+.2f} ({max(points, key=abs):+.2f})")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8_192, help="of the tested text")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--by-block", action="store_true", help="a line for each block, too")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, given.dtype)).eval()
    with torch.no_grad():
        found, (plain, most) = measure(model, tokenizer, given.tokens)
    print(machine())
    print(f"tiny-llama in {given.dtype}, {given.tokens} tokens, probes of {2 * given.tokens}\n")
    heads = ["replaced by", "nmse", "KL, mean", "KL, 99 %", "KL, worst block", "top-1", *most]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, changes in found.items():
        print(line(name, changes))
        if given.by_block:
            for block, one in enumerate(changes):
                print(line(f"– block {block}", [one]))
    for kind, least in most.items():
        told = ", ".join(f"{100 * of_block[kind]:.1f}" for of_block in plain)
        print(f"\nprobe of {kind}, on original rows of each block: {told} %")
        print(f"guessing the commonest class: {100 * least:.1f} %")


if __name__ == "__main__":
    main()
