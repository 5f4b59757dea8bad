"""How much of its speed a model keeps while it is captured to disk.

Run by ``.venv/bin/python tests/benchmarks/speed_kept.py``; ``--cases`` takes some of them
(``prefill``, ``bfloat16 decode zstd``), ``--rounds`` and ``--folder`` the rest. A Llama of random
weights (d = 1024, 8 blocks) and the shipped one, un-instrumented and captured in turn: a ratio is
of the tokens a second of a captured run to those of the plain runs before and after it, and the
table has the median over the rounds. "drained" counts the whole ``with``, from opening the log
until everything is durable; "passes" only the forwards. "bare" is what is left by hooks that only
copy, and encode, and write nothing (``bare.py``): no capture in Python keeps more, to within the
noise. The control is the plain run after to that before: what it is off from 1 is the noise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]

import torch
from bare import Bare
from machine import machine
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import actstore
from actstore.capture.select import select
from actstore.errors import ActstoreWarning

logging.disable_progress_bar()
PROMPT = 512
DECODED = 192
PASSES = 8
BLOCKS = "blocks"
PARTS = "attention+MLP+blocks"
FULL = "FULL_TENSOR"
#: What is captured -> the layers; None: all modules.
SITES: dict[str, list[str] | None] = {
    BLOCKS: ["model.layers.*[0-9]"],
    PARTS: ["model.layers.*[0-9]", "model.layers.*.self_attn", "model.layers.*.mlp"],
    FULL: None,
}
CODECS = ("none", "lz4", "zstd")
HEAD = (
    "| model | phase | captured | codec | drained | passes | bare | control | tokens/s | MB "
    "| GB/s | waited s |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Case:
    """What is run, and what of it is captured."""

    model: str
    dtype: str
    phase: str
    sites: str
    codec: str

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} {self.phase} {self.sites} {self.codec}"


@dataclass
class Kept:
    """A case's ratios, one a round, and what its captures say of themselves."""

    case: Case
    framework: Any = None
    drained: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    control: list[float] = field(default_factory=list)
    tokens: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)


def cases() -> list[Case]:
    """Give all cases, those of one model and phase together."""
    kinds = [("llama-1024", one) for one in ("float32", "bfloat16")]
    kinds.append(("tiny-llama", "bfloat16"))
    return [
        Case(model, dtype, phase, sites, codec)
        for (model, dtype), phase in product(kinds, ("prefill", "decode"))
        for sites, codec in product(SITES, CODECS)
    ]


def load(name: str, dtype: str) -> Any:
    """Give a model in eval mode."""
    kind = getattr(torch, dtype)
    if name == "tiny-llama":
        model = LlamaForCausalLM.from_pretrained(ROOT / "examples/tiny-llama", dtype=kind)
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
            intermediate_size=2816, vocab_size=8192,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(kind)
    return model.eval()


def prefill(model: Any, passes: int) -> tuple[int, float]:
    """Run so many forwards of a prompt; give the tokens and the seconds."""
    ids = torch.arange(PROMPT).remainder(model.config.vocab_size).unsqueeze(0)
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(passes):
            model(ids, use_cache=False)
    return passes * PROMPT, time.perf_counter() - began


def decode(model: Any, passes: int) -> tuple[int, float]:
    """Decode greedily with a cache; give the tokens and the seconds."""
    ids, cache = torch.tensor([[1, 2, 3, 4]]), None
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(passes):
            out = model(ids, cache=cache, use_cache=True)
            cache, ids = out.cache, out.logits[:, -1:].argmax(-1)
    return passes, time.perf_counter() - began


PHASES: dict[str, tuple[Callable[[Any, int], tuple[int, float]], int]] = {
    "prefill": (prefill, PASSES),
    "decode": (decode, DECODED),
}


def capturing(model: Any, case: Case) -> Any:
    """Give a framework that captures what a case asks for; its memory is used again."""
    config = actstore.InstrumentationConfig(
        actstore.HookGranularity.FULL_TENSOR, case.codec, target_throughput_gbps=1e-6
    )
    framework = actstore.InstrumentationFramework(config)
    framework.instrument_model(model, actstore.HookConfig(target_layers=SITES[case.sites]))
    return framework


def captured(model: Any, kept: Kept, folder: Path, times: int) -> tuple[float, float]:
    """Run captured; give tokens a second, drained and of the passes alone."""
    run, passes = PHASES[kept.case.phase]
    log = folder / "run.stream"
    began = time.perf_counter()
    with kept.framework.capture_activations(str(log)):
        tokens, seconds = run(model, passes * times)
    drained = tokens / (time.perf_counter() - began)
    kept.summary = dict(kept.framework.summary)
    log.unlink()
    return drained, tokens / seconds


def bare(model: Any, case: Case, times: int) -> float:
    """Run with bare hooks on the same modules; give tokens a second, the last bytes encoded."""
    run, passes = PHASES[case.phase]
    hooks = actstore.HookConfig(target_layers=SITES[case.sites])
    targets = select(model, actstore.HookGranularity.FULL_TENSOR, hooks)
    modules = [target.module for target in targets]
    hooked = Bare(model, modules, case.codec, getattr(torch, case.dtype).itemsize)
    began = time.perf_counter()
    with hooked:
        tokens, _ = run(model, passes * times)
    return tokens / (time.perf_counter() - began)


def round_of(model: Any, mine: Sequence[Kept], folder: Path, times: int) -> None:
    """Run plain, captured, bare, plain, captured, bare, …, plain; note the ratios."""
    run, passes = PHASES[mine[0].case.phase]

    def plain() -> float:
        tokens, seconds = run(model, passes * times)
        return tokens / seconds

    before = plain()
    for kept in mine:
        drained, alone = captured(model, kept, folder, times)
        least = bare(model, kept.case, times)
        after = plain()
        kept.drained.append(2 * drained / (before + after))
        kept.passes.append(2 * alone / (before + after))
        kept.bare.append(2 * least / (before + after))
        kept.control.append(after / before)
        kept.tokens = max(kept.tokens, before, after)
        before = after


def measure(chosen: Sequence[Case], folder: Path, rounds: int) -> list[Kept]:
    """Measure cases, the rounds of those of one model and phase interleaved."""
    found = [Kept(case) for case in chosen]
    groups: dict[tuple[str, str, str], list[Kept]] = {}
    for kept in found:
        groups.setdefault((kept.case.model, kept.case.dtype, kept.case.phase), []).append(kept)
    for (name, dtype, phase), mine in groups.items():
        model = load(name, dtype)
        times = {"tiny-llama": 8}.get(name, 2 if dtype == "bfloat16" else 1)
        PHASES[phase][0](model, 4)
        for kept in mine:  # what is imported and compiled once is in no round
            kept.framework = capturing(model, kept.case)
            captured(model, kept, folder, times)
        for number in range(rounds):
            round_of(model, mine, folder, times)
            print(f"{name} {dtype} {phase}: round {number + 1}", file=sys.stderr, flush=True)
    return found


def row(kept: Kept) -> str:
    """Give a case as a line of the table."""
    case, said = kept.case, kept.summary
    spread = max(abs(one - 1) for one in kept.control)
    return (
        f"| {case.model} {case.dtype} | {case.phase} | {case.sites} | {case.codec} | "
        f"{median(kept.drained):.3f} | {median(kept.passes):.3f} | {median(kept.bare):.3f} | "
        f"{median(kept.control):.3f} ± {spread:.2f} | {kept.tokens:,.0f} | "
        f"{said['raw_bytes'] / 1e6:,.0f} | {said['sustained_gbps']:.2f} | "
        f"{said['waited_seconds']:.2f} |"
    )


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=[""], help="words that a case has, each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args(argv)
    chosen = [
        case for case in cases()
        if any(set(wanted.split()) <= set(str(case).split()) for wanted in given.cases)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        warnings.simplefilter("ignore", ActstoreWarning)
        found = measure(chosen, Path(folder), given.rounds)
    print(f"{machine()}; {torch.get_num_threads()} torch threads\n")
    print(HEAD, *map(row, found), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
