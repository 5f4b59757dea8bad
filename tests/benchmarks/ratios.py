"""How small each codec makes the activations of the shipped, trained model, and how fast.

Run by ``.venv/bin/python tests/benchmarks/ratios.py``; about a minute. Captures every module of
`examples/tiny-llama` on documentation text, joins each kind of site to pieces of 1 MiB, and
prints one table a dtype. "bound" is the zeroth-order entropy of the byte planes: no codec that
takes bytes one by one does better. Speeds are GB/s of source bytes on one thread, the median of
``ROUNDS``, the codecs taking turns.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]

import numpy as np
import torch
from machine import machine
from numcodecs import blosc
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

import actstore
from actstore import codecs

MODEL = ROOT / "examples/tiny-llama"
WINDOWS, LENGTH = 32, 256
PIECE = 1 << 20
ROUNDS = 5
KINDS = {
    "blocks' output": ("resid",),
    "attention and MLP": ("attn", "mlp"),
    "queries, keys, values": tuple(f"model.layers.self_attn.{one}_proj" for one in "qkv"),
    "MLP activation": ("model.layers.mlp.act_fn",),
}
Encode = Callable[[Any, int], Any]
CODECS: dict[str, Encode] = {
    "lz4 (Blosc, bitshuffle)": lambda piece, size: codecs.encode(1, piece, size)[1],
    "zstd (plane-split)": lambda piece, size: codecs.encode(2, piece, size)[1],
    "Blosc zstd 1, shuffle": lambda piece, size: blosc.compress(piece, b"zstd", 1, 1, 0, size),
}


def windows() -> torch.Tensor:
    """Give the first ids of pydoc's topics, each ``LENGTH`` long."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, model_max_length=1 << 20)
    rows = [tokenizer(text).input_ids[:LENGTH] for text in topics.values()]
    return torch.tensor([row for row in rows if len(row) == LENGTH][:WINDOWS])


def model(dtype: torch.dtype, *, trained: bool) -> Any:
    """Give the shipped model, or one of its architecture with random weights."""
    if trained:
        return LlamaForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    torch.manual_seed(0)
    return LlamaForCausalLM(AutoConfig.from_pretrained(MODEL)).to(dtype).eval()


def outputs(dtype: torch.dtype, folder: Path, *, trained: bool) -> dict[str, list[Any]]:
    """Capture every module, and give the bytes of each kind of site in pieces."""
    config = actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR, "none")
    framework = actstore.InstrumentationFramework(config)
    instrumented = model(dtype, trained=trained)
    framework.instrument_model(instrumented)
    log = folder / f"{trained}-{dtype}.stream"
    with torch.no_grad(), framework.capture_activations(str(log)):
        instrumented(windows())
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    with actstore.open_stream(log) as reader:
        for packet in reader.packets():
            site = reader.layers[packet.layer].site
            for kind, sites in KINDS.items():
                if site in sites:
                    found[kind].append(packet.values.reshape(-1).view(np.uint8))
    joined = {kind: np.concatenate(parts) for kind, parts in found.items()}
    return {
        kind: [data[start : start + PIECE] for start in range(0, data.nbytes, PIECE)]
        for kind, data in joined.items()
    }


def bound(pieces: list[Any], size: int) -> float:
    """Give the ratio that the zeroth-order entropy of the byte planes allows."""
    data, bits = np.concatenate(pieces).reshape(-1, size), 0.0
    for plane in data.T:
        share = np.bincount(plane, minlength=256) / len(data)
        bits -= float((share[share > 0] * np.log2(share[share > 0])).sum())
    return 8 * size / bits


def measure(pieces: list[Any], size: int) -> dict[str, tuple[float, float, float]]:
    """Give each codec's ratio, and its speeds to encode and to decode."""
    total = sum(piece.nbytes for piece in pieces)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CODECS}
    ratios: dict[str, float] = {}
    out = np.empty(PIECE, np.uint8)
    for _ in range(ROUNDS):
        for name, encode in CODECS.items():
            started = time.perf_counter()
            encoded = [encode(piece, size) for piece in pieces]
            middle = time.perf_counter()
            for frame, piece in zip(encoded, pieces, strict=True):
                if len(frame) < piece.nbytes:
                    blosc.decompress(frame, out[: piece.nbytes])
            times[name].append((middle - started, time.perf_counter() - middle))
            ratios[name] = total / sum(map(len, encoded))
    return {
        name: (
            ratios[name],
            total / 1e9 / median(one for one, _ in found),
            total / 1e9 / median(one for _, one in found),
        )
        for name, found in times.items()
    }


def main() -> None:
    """Print the tables."""
    blosc.use_threads = False
    torch.set_num_threads(1)
    print(f"{machine()}; one thread; pieces of 1 MiB; {WINDOWS} × {LENGTH} tokens\n")
    heads = ["weights", "dtype", "site", "bound", *CODECS, "encode / decode, GB/s, in that order"]
    print(f"| {' | '.join(heads)} |\n" + "| --- " * len(heads) + "|")
    with tempfile.TemporaryDirectory() as name:
        for trained in (True, False):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for kind, pieces in outputs(dtype, Path(name), trained=trained).items():
                    found = measure(pieces, dtype.itemsize)
                    cells = ["trained" if trained else "random", str(dtype)[6:], kind]
                    cells.append(f"{bound(pieces, dtype.itemsize):.3f}")
                    cells += [f"{ratio:.3f}" for ratio, _, _ in found.values()]
                    cells.append(
                        ", ".join(f"{to:.2f} / {back:.2f}" for _, to, back in found.values())
                    )
                    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
