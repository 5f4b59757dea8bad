"""What figures of a million rows take: from opening a log or an archive to a PDF that is written.

Run by ``.venv/bin/python tests/benchmarks/figures.py``; two minutes. Imports are not counted, nor
matplotlib's search for fonts; the dataset is opened anew for each figure, whose median of three is
told. The rows are few numbers wide, so that they are soon written: what is read of wide ones is
less of them, at most 128 MiB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from ml_dtypes import bfloat16

import actstore
from actstore import plots

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis

LAYERS, ITEMS, ITEM, HEADS = 8, 8, 512, 4
WORDS = (" the", " of", "ing", "\n", " 漢字", " שלום", " مرحبا", " price", " $5", "…")
LIMIT = 2.0  # seconds

Draw = Callable[[Any], Any]
FIGURES: dict[str, Draw] = {
    "norm_map": plots.norm_map,
    "layer_change": plots.layer_change,
    "outliers": plots.outliers,
    "distributions": plots.distributions,
    "feature_on_text": lambda rows: plots.feature_on_text(rows, "resid", 3, layer=5),
    "trajectory": plots.trajectory,
    "attention": plots.attention,
    "layer_correlation": plots.layer_correlation,
    "token_progression": plots.token_progression,
    "norm_map, last rows": lambda rows: plots.norm_map(rows, rows=slice(-200, None)),
    "norm_map, a pass": lambda rows: plots.norm_map(rows, pass_index=100, item=3),
    "norm_map, a text": lambda rows: plots.norm_map(rows.actstore.tokens(" price")),
}


def write(log: Path, rows: int, width: int) -> None:
    """Write a log of so many rows, and of attention weights of its first pass."""
    numbers, built = np.random.default_rng(0), LogBuilder(log)
    for block in range(LAYERS):
        built.layer(f"model.layers.{block}", "resid", block)
        built.layer(f"model.layers.{block}.self_attn#weights", "attn_weights", block)
    built.texts({100 + one: WORDS[one % len(WORDS)] for one in range(ITEMS * ITEM)})
    for number in range(-(-rows // (ITEMS * ITEM))):
        built.begin(axis(ITEMS, ITEM))
        for block in range(LAYERS):
            values = numbers.normal(size=(ITEMS, ITEM, width), scale=1 + block)
            values[..., 7] *= 20
            built.put(f"model.layers.{block}", values.astype(bfloat16))
            if not number:
                weights = np.tril(numbers.random((1, HEADS, ITEM, ITEM)) ** 4).astype(np.float32)
                weights /= weights.sum(axis=-1, keepdims=True) + 1e-9
                built.put(f"model.layers.{block}.self_attn#weights", weights)
        built.commit()
    built.close()


def measure(path: Path, draw: Draw, out: Path) -> float:
    """Give the median seconds of three figures, each of a dataset that was just opened."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with actstore.open_dataset(path) as dataset:
            draw(dataset).savefig(out)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> int:
    """Print a row for each figure; 1 if one took longer than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=16)
    given = parser.parse_args()
    print(f"{machine()}\n")
    slow = False
    with tempfile.TemporaryDirectory(dir=Path()) as name:
        folder = Path(name)
        log, archive, out = folder / "run.stream", folder / "run.zarr", folder / "figure.pdf"
        write(log, given.rows, given.width)
        actstore.compact(log, archive)
        with actstore.open_dataset(archive) as dataset:
            print(f"{dataset.sizes['token']:,} rows of {LAYERS} layers x {given.width}\n")
            plots.norm_map(dataset, rows=slice(0, 9)).savefig(out)  # fonts
        print("| figure | of a log, s | of an archive, s |\n|---|---|---|")
        for what, draw in FIGURES.items():
            taken = [measure(path, draw, out) for path in (log, archive)]
            slow |= max(taken) > LIMIT
            print(f"| {what} | {taken[0]:.2f} | {taken[1]:.2f} |", flush=True)
        taken = []
        for path in (log, archive):
            began = time.perf_counter()
            plots.run_rates(path).savefig(out)
            taken.append(time.perf_counter() - began)
        print(f"| run_rates | {taken[0]:.2f} | {taken[1]:.2f} |")
    return int(slow or max(taken) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
