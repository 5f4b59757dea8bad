"""How fast rows of an archive are read for training, and of SAELens' cache of the same rows.

Run by ``.venv/bin/python tests/benchmarks/training_reads.py --sae-lens VENV/bin/python``; three
minutes, of which two write what is read. Without ``--sae-lens``, the interpreter of an environment
with SAELens, that is left out. Ways take turns, and the median of their rounds is told: rows, as
float32, and the ratio to the median of reading the chunks in their order, decoded by as many
threads, each into memory of its own, and nothing done with them. Also told is what reading the
shards' files takes, decoding nothing. All are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from machine import machine
from ml_dtypes import bfloat16
from torch.utils.data import DataLoader

import actstore
from actstore.dataset import layer_reader, open_lazily
from actstore.training import Batches

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis

LAYER, HOOK = "model.layers.0", "blocks.0.hook_resid_post"
ITEMS, CONTEXT = 16, 128
BATCH, THREADS = 4096, 2
LEAST = 0.8

Way = Callable[[], float]


def write(log: Path, rows: int, width: int) -> None:
    """Write a log of a layer whose features are as unlike as those of a residual stream."""
    numbers, built = np.random.default_rng(0), LogBuilder(log)
    built.layer(LAYER, "resid", 0)
    scale = np.exp(numbers.normal(size=width))
    for _ in range(rows // (ITEMS * CONTEXT)):
        built.begin(axis(ITEMS, CONTEXT))
        values = numbers.standard_normal((ITEMS, CONTEXT, width), np.float32) * scale
        built.put(LAYER, values.astype(bfloat16))
        built.commit()
    built.close()


def in_order(archive: Path, threads: int, size: int = 0) -> Way:
    """Read the chunks of a layer in their order, or as many rows at a time as are told."""
    variable = open_lazily(archive).variables["resid"]
    read, rows = layer_reader(variable), variable.shape[1]
    size = size or variable.encoding["chunks"][1]
    pieces = [np.arange(one, min(one + size, rows)) for one in range(0, rows, size)]

    def way() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            found = sum(pool.map(lambda piece: len(read(0, piece)), pieces))
        assert found == rows
        return (time.perf_counter() - began) / rows

    return way


def files(archive: Path, rows: int) -> Way:
    """Read the bytes of the shards."""
    paths = sorted(path for path in (archive / "resid/c").rglob("*") if path.is_file())

    def way() -> float:
        memory = memoryview(bytearray(4 << 20))
        began = time.perf_counter()
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(memory):
                    pass
        return (time.perf_counter() - began) / rows

    return way


def trained_on(batches: Batches, workers: int = 0) -> Way:
    """Read an epoch; each has another order."""
    loader = DataLoader(
        batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )

    def way() -> float:
        began, rows = time.perf_counter(), 0
        for batch in loader if workers else batches:
            rows += len(batch)
        assert rows == batches.rows
        return (time.perf_counter() - began) / rows

    return way


@contextmanager
def sae_lens(interpreter: Path, folder: Path, rows: int, width: int) -> Iterator[dict[str, Way]]:
    """Have SAELens read a quarter of its cache, with and without mixing rows."""
    command = [
        interpreter, Path(__file__).with_name("training_peer.py"), folder, "--hook", HOOK,
        *("--rows", rows // 4, "--context", CONTEXT, "--width", width, "--batch", BATCH),
        *("--buffer", int(64e6) // (4 * width)),
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        asked, said = child.stdin, child.stdout
        name = said.readline().strip()

        def way(mixed: float) -> float:
            print(mixed, file=asked, flush=True)
            return float(said.readline())

        yield {
            f"{name}, mixing rows": lambda: way(0.5),
            f"{name}, in order": lambda: way(0.0),
        }
        print(file=asked, flush=True)


def measure(
    ways: dict[str, Way], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Give the seconds a row that each way takes in each round, and this process' seconds of CPU.

    They take turns.
    """
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            before = time.process_time()
            found[name].append(way())
            busy[name].append(time.process_time() - before)
    return found, busy


def table(
    found: dict[str, list[float]], busy: dict[str, list[float]], width: int, base: str
) -> Iterator[str]:
    """Give lines that say how fast each way was."""
    yield "| read by | rows/s | MB/s of float32 | of reading in order | CPU, s an epoch |"
    yield "|---|---|---|---|---|"
    for name, seconds in found.items():
        rows = 1 / statistics.median(seconds)
        of = statistics.median(one / two for one, two in zip(found[base], seconds, strict=True))
        own = (
            "" if "SAELens" in name or "worker" in name else f"{statistics.median(busy[name]):.3f}"
        )
        speed = f"{rows:,.0f} | {rows * width * 4 / 1e6:,.0f}"
        yield f"| {name} | {speed} | {of:.2f} | {own} |"


def main() -> None:
    """Write the rows, read them in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sae-lens", type=Path, help="the interpreter of an environment with it")
    parser.add_argument("--json", action="store_true", help="print medians as JSON, too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        write(folder / "run.stream", given.rows, given.width)
        seconds = {}
        for layout in ("captured", "shuffled"):
            out = folder / f"{layout}.zarr"
            seconds[layout] = actstore.compact(folder / "run.stream", out, layout=layout).seconds
        shuffled = folder / "shuffled.zarr"
        print(f"{machine()}\n\ncompacted in {seconds['captured']:.1f} s, ", end="")
        print(f"shuffled in {seconds['shuffled']:.1f} s\n", flush=True)
        base = f"chunks in order, {THREADS} threads"
        ours = f"Batches, {THREADS} threads"
        ways = {
            base: in_order(shuffled, THREADS),
            "chunks in order, 1 thread": in_order(shuffled, 1),
            "rows of a batch in order": in_order(shuffled, 1, BATCH),
            "bytes of the shards": files(shuffled, given.rows),
            ours: trained_on(Batches(shuffled, LAYER, batch_size=BATCH, threads=THREADS)),
            "Batches, 1 thread": trained_on(Batches(shuffled, LAYER, batch_size=BATCH, threads=1)),
            "Batches, bfloat16": trained_on(
                Batches(shuffled, LAYER, batch_size=BATCH, dtype=torch.bfloat16)
            ),
            "Batches, captured layout": trained_on(
                Batches(folder / "captured.zarr", LAYER, batch_size=BATCH)
            ),
            "Batches in a DataLoader of 2 workers": trained_on(
                Batches(shuffled, LAYER, batch_size=BATCH, threads=1), workers=2
            ),
        }
        if given.sae_lens is None:
            found, busy = measure(ways, given.rounds)
        else:
            cache = folder / "cache"
            actstore.export_rows(
                folder / "captured.zarr", cache, layers=LAYER, format="saelens",
                names={LAYER: HOOK}, context_size=CONTEXT,
            )  # fmt: skip
            with sae_lens(given.sae_lens, cache, given.rows, given.width) as peers:
                found, busy = measure(ways | peers, given.rounds)
        print("\n".join(table(found, busy, given.width, base)))
        kept = statistics.median(a / b for a, b in zip(found[base], found[ours], strict=True))
        print(f"\n{'PASS' if kept >= LEAST else 'FAIL'}: {kept:.2f} of reading in order")
        others = [statistics.median(one) for name, one in found.items() if "SAELens" in name]
        ahead = [one / statistics.median(found[ours]) for one in others]
        for one in ahead:
            print(f"{'PASS' if one > 1 else 'FAIL'}: {one:.1f} times as fast as SAELens")
        if given.json:
            print(json.dumps({"kept": kept, "ahead": ahead}))


if __name__ == "__main__":
    main()
