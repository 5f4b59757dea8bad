"""How much faster two workers of a dask cluster make an archive than one, beside threads.

Run by ``.venv/bin/python tests/benchmarks/cluster.py`` on a machine that does nothing else; about
two minutes. The log is that of ``compaction.py``: 8 layers of ``--passes`` × 512 rows of 1,024
bfloat16 values. Workers are processes of one thread each, of a LocalCluster; they have imported
actstore and written an archive before. The ways take turns, and medians are told. GB are of the
model's values (bfloat16). ``--parts`` tells where the time of a worker goes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(ROOT),
    *(str(ROOT / "tests" / one) for one in ("archive", "benchmarks", "cluster")),
]

import compaction
from clusters import cluster_of
from distributed import Client
from logs import files_of
from machine import machine

import actstore
from actstore.compaction import worker
from actstore.compaction.recipe import OfLogs

WORKERS = (1, 2)


def measure(folder: Path, passes: int, rounds: int) -> dict[str, list[float]]:
    """Compact by threads and by workers in turn; give the seconds of each.

    Raises
    ------
    AssertionError
        The archives are not the same.
    """
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    log, out = compaction.make_log(folder / "run.stream", passes), folder / "a.zarr"
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        ways: dict[str, Callable[[], Any]] = {}
        for count in WORKERS:
            cluster = stack.enter_context(cluster_of(count))
            client = stack.enter_context(Client(cluster, set_as_default=False))
            ways[f"threads {count}"] = partial(actstore.compact, log, out, workers=count)
            ways[f"workers {count}"] = partial(actstore.compact, log, out, client=client)
        wanted: dict[str, bytes] = {}
        for number in range(rounds + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                took = time.perf_counter() - began
                if number:  # the first warms up
                    found.setdefault(name, []).append(took)
                else:
                    wanted = wanted or files_of(out)
                    assert files_of(out) == wanted, f"{name}: other bytes"
                shutil.rmtree(out)
    return found


def two_workers(folder: Path, passes: int = 256, rounds: int = 5) -> tuple[float, float, float]:
    """Give how many times faster two workers are than one, two threads than one; and GB/s of two.

    The ratios are of the medians.
    """
    took = {name: median(one) for name, one in measure(folder, passes, rounds).items()}
    gigabytes = passes * compaction.PASS_BYTES / 1e9
    return (
        took["workers 1"] / took["workers 2"],
        took["threads 1"] / took["threads 2"],
        gigabytes / took["workers 2"],
    )


def parts(log: Path, folder: Path) -> dict[str, float]:
    """Give the seconds of what a worker does besides writing shards, and of a shard."""
    recipe = OfLogs((log,))
    began = time.perf_counter()
    with recipe.made() as (content, jobs):
        planned = time.perf_counter() - began
        began = time.perf_counter()
        content.fingerprint(jobs)
        marked = time.perf_counter() - began
        began = time.perf_counter()
        for job in jobs[:4]:
            worker.write_shard(job, folder / "alone", "balanced")
        alone = (time.perf_counter() - began) / min(4, len(jobs))
    return {"open and plan": planned, "fingerprint": marked, "a shard alone": alone}


def table(found: dict[str, list[float]], nbytes: int) -> str:
    """Give what was measured as a table."""
    one = {name.split()[0]: took for name, took in found.items() if name.endswith(" 1")}
    lines = ["| | seconds (least to most) | GB/s | of one |", "|---|---|---|---|"]
    for name, took in found.items():
        first = median(one[name.split()[0]])
        lines.append(
            f"| {name} | {median(took):.2f} ({min(took):.2f} to {max(took):.2f}) | "
            f"{nbytes / 1e9 / median(took):.2f} | {first / median(took):.2f} × |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--parts", action="store_true")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder, nbytes = Path(name).absolute(), given.passes * compaction.PASS_BYTES
        load = os.getloadavg()[0]
        print(f"{machine()}, distributed {version('distributed')}; {nbytes / 1e9:.2f} GB; load "
              f"{load:.1f} before\n")  # fmt: skip
        print(table(measure(folder, given.passes, given.rounds), nbytes), flush=True)
        if given.parts:
            said = parts(folder / "run.stream", folder)
            print("\n" + ", ".join(f"{part}: {took:.3f} s" for part, took in said.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
