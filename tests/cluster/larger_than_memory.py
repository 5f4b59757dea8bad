"""Statistics of an archive that is larger than the memory limits of all workers together."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import xarray as xr
from distributed import Client

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from clusters import cluster_of, processes
from logs import LogBuilder, axis

import actstore
from actstore import analysis

LAYERS, ROWS, WIDTH = 8, 512, 1024
WORKERS, LIMIT = 2, 400_000_000
GIGABYTES = 0.06  # of a thread: what a block takes, several times over


@dataclass(frozen=True)
class Peaks:
    """What was seen, in bytes: the values, each worker's limit, and the most that each took."""

    values: int
    limit: int
    peaks: tuple[int, ...]


def make_archive(folder: Path, nbytes: int) -> Path:
    """Write an archive of as many bytes of float32, which takes a tenth of that on the disk."""
    log = LogBuilder(folder / "run.stream")
    for block in range(LAYERS):
        log.layer(f"model.layers.{block}", "resid", block)
    rng = np.random.default_rng(0)
    levels = rng.standard_normal(4).astype(ml_dtypes.bfloat16)
    pool = [levels[rng.integers(0, 4, (1, ROWS, WIDTH))] for _ in range(5)]
    for number in range(-(-nbytes // (LAYERS * ROWS * WIDTH * 4))):
        log.begin(axis(1, ROWS))
        for block in range(LAYERS):
            log.put(f"model.layers.{block}", pool[(number + block) % len(pool)])
        log.commit()
    archive = actstore.compact(log.close(), folder / "run.zarr").path
    log.path.unlink()
    return archive


def peak_of(process: int) -> int:
    """Give the most bytes that a process had in memory since it began."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def statistics_past_memory(folder: Path, nbytes: int = 1_300_000_000) -> Peaks:
    """Compute statistics by two workers whose limits are less than the values, and here.

    Raises
    ------
    AssertionError
        They differ, a worker died, or took more than its limit.
    """
    archive = make_archive(folder, nbytes)
    options = {"max_memory_gb": GIGABYTES, "workers": 1}
    with actstore.open_dataset(archive, chunks=None) as found:
        values = found.resid.nbytes
        wanted = analysis.statistics(found, **options)
        with cluster_of(WORKERS, memory=LIMIT) as cluster, Client(cluster) as client:
            before = processes(client)
            xr.testing.assert_identical(analysis.statistics(found, **options), wanted)
            assert processes(client) == before, "a worker died"
            peaks = tuple(map(peak_of, before))
    assert values > WORKERS * LIMIT
    assert max(peaks) <= LIMIT, peaks
    return Peaks(values, LIMIT, peaks)
