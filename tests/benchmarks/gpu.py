"""How much of its speed a model on a CUDA device keeps while it is captured to disk.

Run by ``.venv/bin/python tests/benchmarks/gpu.py`` on a machine that has one; ``--models``,
``--cases``, ``--rounds`` and ``--folder`` narrow it. Llamas of random bfloat16 weights, shaped as
those of 1 and 8 billion parameters: a prefill of 8 × 512 tokens, and decoding of a batch of 16
with a cache. Two floors stand beside: "bare", hooks that copy on the device and do nothing else,
and "disk", what is left if nothing but writing the bytes at the disk's own speed took time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]

import torch
from machine import machine
from speed_kept import CODECS, SITES
from transformers import LlamaConfig, LlamaForCausalLM

import actstore
from actstore.capture.select import select
from actstore.errors import ActstoreWarning
from actstore.stream.direct import DirectFile

#: Name -> hidden size, blocks, heads, heads of keys and values, MLP size, vocabulary.
SHAPES = {
    "1B": (2048, 16, 32, 8, 8192, 128_256),
    "8B": (4096, 32, 32, 8, 14_336, 128_256),
}
PROMPTS, PROMPT, PASSES = 8, 512, 8
BATCH, STEPS = 16, 64


def load(name: str) -> Any:
    """Give a model of random weights on the device."""
    hidden, blocks, heads, kv, mlp, vocabulary = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv, intermediate_size=mlp, vocab_size=vocabulary,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def prefill(model: Any) -> int:
    """Run forwards of prompts; give how many tokens."""
    ids = torch.randint(model.config.vocab_size, (PROMPTS, PROMPT), device="cuda")
    for _ in range(PASSES):
        model(ids, use_cache=False, logits_to_keep=1)
    return PASSES * PROMPTS * PROMPT


def decode(model: Any) -> int:
    """Decode a batch greedily with a cache; give how many tokens."""
    ids, cache = torch.randint(model.config.vocab_size, (BATCH, 8), device="cuda"), None
    for _ in range(STEPS):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return BATCH * STEPS


PHASES: dict[str, Callable[[Any], int]] = {"prefill": prefill, "decode": decode}


def rate(model: Any, phase: str) -> float:
    """Give tokens a second, uninstrumented or inside of a capture."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.no_grad():
        tokens = PHASES[phase](model)
    torch.cuda.synchronize()
    return tokens / (time.perf_counter() - began)


def floors(folder: Path) -> tuple[float, float]:
    """Measure what the device sends to pinned memory, and what the disk takes: bytes a second."""
    there = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    here = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    here.copy_(there)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(8):
        here.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    crossing = 8 * here.nbytes / (time.perf_counter() - began)
    path = folder / "raw"
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        direct = DirectFile(file.fileno())
        for _ in range(16):
            direct.write([memoryview(here.numpy())])
        os.fdatasync(file.fileno())
    disk = 16 * here.nbytes / (time.perf_counter() - began)
    path.unlink()
    return crossing, disk


@contextmanager
def bare(model: Any, sites: str) -> Iterator[None]:
    """Let hooks copy what modules return on the device, to one place, and nothing else."""
    hooks = actstore.HookConfig(target_layers=SITES[sites])
    targets = select(model, actstore.HookGranularity.FULL_TENSOR, hooks)
    memory = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")

    def hook(_module: Any, _args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple | dict) else output
        memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    with ExitStack() as stack:
        for target in targets:
            stack.callback(target.module.register_forward_hook(hook).remove)
        yield


def row(
    model: Any, phase: str, sites: str, codec: str, folder: Path, rounds: int, disk: float
) -> str:
    """Measure a line of the table."""
    config = actstore.InstrumentationConfig(
        actstore.HookGranularity.FULL_TENSOR, codec, target_throughput_gbps=1e-6
    )
    framework = actstore.InstrumentationFramework(config)
    framework.instrument_model(model, actstore.HookConfig(target_layers=SITES[sites]))
    log = folder / "run.stream"
    drained, passes, least, written = [], [], [], []
    said: Any = {}
    for number in range(rounds + 1):
        before = rate(model, phase)
        began = time.perf_counter()
        with framework.capture_activations(str(log)):
            captured = rate(model, phase)
            within = time.perf_counter() - began
        whole = time.perf_counter() - began
        with bare(model, sites):
            copied = rate(model, phase)
        after = rate(model, phase)
        plain = (before + after) / 2
        said = framework.summary
        if number:  # the first is what is allocated and compiled once
            passes.append(captured / plain)
            drained.append(captured / plain * within / whole)
            least.append(copied / plain)
            alone = within * captured / plain  # what the passes take without hooks
            written.append(min(alone / (log.stat().st_size / disk), 1.0))
        log.unlink()
    waits = ", ".join(f"{cause} {took:.2f}" for cause, took in said["waited_by_cause"].items())
    return (
        f"| {phase} | {sites} | {codec} | {median(drained):.3f} | {median(passes):.3f} | "
        f"{median(least):.3f} | {median(written):.3f} | "
        f"{said['raw_bytes'] / 1e6:,.0f} | {said['sustained_gbps']:.2f} | {waits} |"
    )


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(SHAPES))
    parser.add_argument("--cases", nargs="*", default=[""], help="words that a case has, each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: this benchmark needs one")
    warnings.simplefilter("ignore", ActstoreWarning)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        crossing, disk = floors(folder)
        print(
            f"{torch.cuda.get_device_name()}; {machine()}; device to pinned memory "
            f"{crossing / 1e9:.1f} GB/s, direct writes to disk {disk / 1e9:.1f} GB/s\n\n"
            "| model | phase | captured | codec | drained | passes | bare | disk | MB | GB/s "
            "| waited s |\n|---|---|---|---|---|---|---|---|---|---|---|"
        )
        for shape in given.models:
            model = load(shape)
            for case in product(PHASES, SITES, CODECS):
                if any(set(wanted.split()) <= set(case) for wanted in given.cases):
                    line = row(model, *case, folder, given.rounds, disk)
                    print(f"| {shape} {line}", flush=True)
            del model
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
