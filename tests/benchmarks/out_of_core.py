"""How fast statistics of an archive ten times the budget are, against reading it; and the memory.

Run by ``.venv/bin/python tests/benchmarks/out_of_core.py``; about two minutes. The archive is
compacted from the log of ``compaction.py``: 8 layers of ``--passes`` × 512 rows of 1,024 bfloat16
values, which it holds as float32, zstd. The budget is a tenth of its float32 values. Each run is a
process of its own, with 2 threads; they take turns, and medians are told. "Reading" is to read
every value through `open_dataset`, and do nothing with it: its dask arrays, a chunk of which is a
shard; or, faster, three chunks of the archive at a time, as the statistics read. Memory is the
process's most, over what it had when the archive was open. GB are of float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/archive")]

import numpy as np
import xarray as xr

import actstore
from actstore import analysis
from actstore.analysis import engine, source

THREADS = 2


def by_shards(found: xr.Dataset, gigabytes: float) -> None:
    """Read a shard at a time, by dask."""
    blocks = found.resid.data.to_delayed().ravel()
    engine.compute([engine.later(np.shape)(one) for one in blocks], _budget(gigabytes))


def by_blocks(found: xr.Dataset, gigabytes: float) -> None:
    """Read as the statistics do."""
    budget = _budget(gigabytes)
    (resid,) = source.sources(found, "resid", padding=True)
    block, task = resid.grid(budget)
    engine.compute(
        [
            engine.later(_read)(part, block)
            for place in resid.places
            for part in resid.parts(place, task)
        ],
        budget,
    )


def _budget(gigabytes: float) -> engine.Budget:
    return engine.Budget(THREADS, gigabytes)


def _read(values: xr.Variable, step: int) -> None:
    for _ in source.blocks_of(values, np.ones(values.shape[0], np.bool_), step):
        pass


#: What is measured -> how it is done.
WORK: dict[str, Callable[[xr.Dataset, float], Any]] = {
    "read, a shard at a time": by_shards,
    "read, three chunks at a time": by_blocks,
    "statistics": lambda one, gb: analysis.statistics(one, max_memory_gb=gb, workers=THREADS),
    "statistics, quantiles of all values": lambda one, gb: analysis.statistics(
        one, sample=None, max_memory_gb=gb, workers=THREADS
    ),
    "statistics without quantiles": lambda one, gb: analysis.statistics(
        one, quantiles=(), max_memory_gb=gb, workers=THREADS
    ),
    "token_norms": lambda one, gb: analysis.token_norms(one, max_memory_gb=gb, workers=THREADS),
    "layer_change": lambda one, gb: analysis.layer_change(one, max_memory_gb=gb, workers=THREADS),
    "outlier_features": lambda one, gb: analysis.outlier_features(
        one, "resid", max_memory_gb=gb, workers=THREADS
    ),
    "top_activations of 8 features of a layer": lambda one, gb: analysis.top_activations(
        one, "resid", range(8), layer=3, max_memory_gb=gb, workers=THREADS
    ),
    "covariance of a layer": lambda one, gb: analysis.covariance(
        one.isel(layer=[3]), "resid", max_memory_gb=gb, workers=THREADS
    ),
    "pca of a layer": lambda one, gb: analysis.pca(
        one.isel(layer=[3]), "resid", max_memory_gb=gb, workers=THREADS
    ),
}
READING: tuple[str, ...] = ("read, a shard at a time", "read, three chunks at a time")
MUST = "statistics"


def child(archive: Path, gigabytes: float, name: str) -> None:
    """Do one thing, in this process, and print the seconds and bytes that it took."""
    # what isel gives of dask's arrays reads whole shards, two of which don't fit
    chunks: Any = None if name.endswith("of a layer") else "auto"
    with actstore.open_dataset(archive, chunks) as found:
        before = resident("VmRSS")
        began, cpu = time.perf_counter(), time.process_time()
        WORK[name](found, gigabytes)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"seconds": took, "cpu": cpu, "bytes": resident("VmHWM") - before}))


def resident(name: str) -> int:
    """Give the bytes in memory: now (``VmRSS``), or at most since the process began."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def measure(
    archive: Path, gigabytes: float, rounds: int, names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Give the median seconds, of the clock and of processors, and the most bytes, of each."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, mine in runs.items():
            command = [sys.executable, __file__, "--child", str(archive), str(gigabytes), name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            mine.append(json.loads(done.stdout))
    return {
        name: {
            "seconds": median(one["seconds"] for one in mine),
            "cpu": median(one["cpu"] for one in mine),
            "bytes": max(one["bytes"] for one in mine),
        }
        for name, mine in runs.items()
    }


def make(folder: Path, passes: int) -> tuple[Path, float]:
    """Write the archive; gives it, and the GB of its values."""
    import compaction

    log = compaction.make_log(folder / "run.stream", passes)
    archive = actstore.compact(log, folder / "run.zarr").path
    log.unlink()
    return archive, passes * compaction.PASS_BYTES * 2 / 1e9


def table(found: dict[str, dict[str, float]], size: float) -> str:
    """Give what was measured as a table; a layer's is of an eighth of the bytes."""
    lines = [
        "| | GB/s | of reading | of reading as it does | processor, s/GB | memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        share = 8 if name.endswith("of a layer") else 1
        ratios = (found[way]["seconds"] / share / one["seconds"] for way in READING)
        lines.append(
            f"| {name} | {size / share / one['seconds']:.2f} | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios)
            + f" | {one['cpu'] * share / size:.2f} | {one['bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, and what must hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--all", action="store_true", help="measure everything, not what must hold"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        archive, gigabytes, name = given.child
        child(Path(archive), float(gigabytes), name)
        return
    from machine import machine

    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        archive, size = make(Path(folder).absolute(), given.passes)
        names = tuple(WORK) if given.all else (*READING, MUST, "statistics without quantiles")
        found = measure(archive, size / 10, given.rounds, names)
    print(f"{size:.2f} GB of float32, a budget of {size / 10:.2f} GB\n\n{table(found, size)}\n")
    ratio = found[READING[0]]["seconds"] / found[MUST]["seconds"]
    over = found[MUST]["bytes"] / 1e6 - size * 100
    print(f"statistics: {ratio:.2f} of the speed of reading, {over:+.0f} MB over the budget")


if __name__ == "__main__":
    main()
