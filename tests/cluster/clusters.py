"""Clusters of worker processes on this machine, and what happens to their workers."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import decoder_log, files_of

import actstore
from actstore.archive import grid

SMALL = Path(__file__).with_name("small_shards.py")


@contextmanager
def cluster_of(
    workers: int, *, small: bool = False, threads: int = 1, memory: int = 0, restart: bool = True
) -> Iterator[LocalCluster]:
    """Run worker processes; small: their shards are; restart: another takes a dead one's place."""
    options: dict[str, Any] = {"preload": str(SMALL)} if small else {}
    with LocalCluster(
        n_workers=workers,
        threads_per_worker=threads,
        memory_limit=memory,
        dashboard_address=":0",  # else it wants 8787
        silence_logs=logging.CRITICAL,
        **options,
    ) as cluster:
        for nanny in () if restart else cluster.workers.values():
            nanny.instantiate = _stay_dead  # what it calls when its process has ended
        yield cluster


async def _stay_dead() -> None:
    """Start no worker."""


@contextmanager
def small_shards() -> Iterator[None]:
    """Let this process cut arrays as the workers of a small cluster do."""
    before = grid.CHUNK_BYTES, grid.SHARD_BYTES
    grid.CHUNK_BYTES, grid.SHARD_BYTES = 1 << 12, 1 << 14
    try:
        yield
    finally:
        grid.CHUNK_BYTES, grid.SHARD_BYTES = before


def processes(client: Client) -> list[int]:
    """Give the process ids of the workers that there are."""
    return sorted(client.run(os.getpid, on_error="ignore").values())


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


@dataclass(frozen=True)
class Killed:
    """How often a worker was killed while a compaction ran, and how many compactions there were.

    All of them had the same bytes as one that this process made.
    """

    kills: int
    compactions: int


def kill_one_of_four(folder: Path, kills: int, seed: int = 0) -> Killed:
    """Compact by four workers; kill one at a random moment, until so many kills struck."""
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    generator, struck, number = random.Random(seed), 0, 0
    log = decoder_log(folder / "run.stream", steps=400, width=96, vocab=160).path
    with small_shards(), cluster_of(4, small=True) as cluster, Client(cluster) as client:
        whole = actstore.compact(log, folder / "whole.zarr").path
        wanted = files_of(whole)
        took = 0.0
        for name in ("cold", "warm"):  # the first has workers import what they need
            began = time.monotonic()
            actstore.compact(log, folder / f"{name}.zarr", client=client)
            took = time.monotonic() - began
            assert files_of(folder / f"{name}.zarr") == wanted
        while struck < kills:
            client.wait_for_workers(4)
            out, number = folder / f"{number}.zarr", number + 1
            victim, ended = generator.choice(processes(client)), threading.Event()
            hit: list[bool] = []

            def strike(victim=victim, ended=ended, hit=hit) -> None:
                hit.append(not ended.is_set())
                kill(victim)

            timer = threading.Timer(generator.uniform(0, 0.9 * took), strike)
            timer.start()
            report = actstore.compact(log, out, client=client)
            ended.set()
            timer.join()
            struck += hit[0]
            assert files_of(out) == wanted, f"kill {number} changed the archive"
            assert report.shards_resumed == 0
            assert not [one.name for one in folder.iterdir() if one.name.startswith(".")]
    return Killed(struck, number)
