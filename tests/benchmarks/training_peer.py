"""Owns how SAELens reads its cached activations, in a process and an environment of its own.

Run by ``training_reads.py``. For each line of standard input, the share of its buffer that is kept
for mixing, it reads so many rows as it gives them to its trainer, and prints the seconds a row. An
empty line ends it.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens.training.activations_store import ActivationsStore


def main() -> None:
    """Do what the command line, and then each line, says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hook")
    for name in ("rows", "context", "width", "batch", "buffer"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"SAELens {version('sae-lens')}, datasets {version('datasets')}", flush=True)
    while (line := sys.stdin.readline()) != "\n":
        store = ActivationsStore(
            model=None, dataset=None, streaming=False, hook_name=given.hook, hook_head_index=None,
            context_size=given.context, d_in=given.width,
            n_batches_in_buffer=given.buffer // given.context,
            total_training_tokens=given.rows, store_batch_size_prompts=16,
            train_batch_size_tokens=given.batch, prepend_bos=False, normalize_activations="none",
            device=torch.device("cpu"), dtype="float32",
            cached_activations_path=str(given.folder), activations_mixing_fraction=float(line),
        )  # fmt: skip
        began, rows = time.perf_counter(), 0
        while rows < given.rows:
            rows += len(next(store))
        print((time.perf_counter() - began) / rows, flush=True)


if __name__ == "__main__":
    main()
