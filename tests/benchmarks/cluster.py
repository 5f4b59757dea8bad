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
from dataclasses import dataclass
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
import psutil
from clusters import cluster_of, processes
from distributed import Client
from logs import files_of
from machine import machine

import actstore
from actstore.compaction import worker
from actstore.compaction.recipe import OfLogs

WORKERS = (1, 2)


@dataclass(frozen=True)
class Took:
    """The seconds of the clock, and of processors: of this process and the workers."""

    clock: float
    processor: float


def processor(processes: Sequence[int]) -> float:
    """Give the seconds that processes have had of processors."""
    times = [psutil.Process(one).cpu_times() for one in processes]
    return sum(one.user + one.system for one in times)


def measure(folder: Path, passes: int, rounds: int) -> dict[str, list[Took]]:
    """Compact by threads and by workers in turn; give what each took.

    Raises
    ------
    AssertionError
        The archives are not the same.
    """
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    log, out = compaction.make_log(folder / "run.stream", passes), folder / "a.zarr"
    found: dict[str, list[Took]] = {}
    with ExitStack() as stack:
        ways: dict[str, Callable[[], Any]] = {}
        busy: dict[str, list[int]] = {}
        for count in WORKERS:
            cluster = stack.enter_context(cluster_of(count))
            client = stack.enter_context(Client(cluster, set_as_default=False))
            ways[f"threads {count}"] = partial(actstore.compact, log, out, workers=count)
            ways[f"workers {count}"] = partial(actstore.compact, log, out, client=client)
            busy[f"threads {count}"] = [os.getpid()]
            busy[f"workers {count}"] = [os.getpid(), *processes(client)]
        wanted: dict[str, bytes] = {}
        for number in range(rounds + 1):
            for name, way in ways.items():
                cpu, began = processor(busy[name]), time.perf_counter()
                way()
                took = Took(time.perf_counter() - began, processor(busy[name]) - cpu)
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
    found = measure(folder, passes, rounds)
    took = {name: median(one.clock for one in mine) for name, mine in found.items()}
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


def table(found: dict[str, list[Took]], nbytes: int) -> str:
    """Give what was measured as a table."""
    clocks = {name: [one.clock for one in mine] for name, mine in found.items()}
    lines = [
        "| | seconds (least to most) | GB/s | of one | processor, s/GB |",
        "|---|---|---|---|---|",
    ]
    for name, mine in clocks.items():
        took, first = median(mine), median(clocks[f"{name.split()[0]} 1"])
        each = median(one.processor for one in found[name]) / nbytes * 1e9
        lines.append(
            f"| {name} | {took:.2f} ({min(mine):.2f} to {max(mine):.2f}) | "
            f"{nbytes / 1e9 / took:.2f} | {first / took:.2f} × | {each:.2f} |"
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
