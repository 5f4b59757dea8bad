"""Statistics by the workers of a cluster: the bits that threads give, in the workers' memory."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from dask.threaded import get
from distributed import Client, LocalCluster
from threadpoolctl import threadpool_limits

import actstore
from actstore import analysis
from actstore.analysis import engine, source
from actstore.errors import ArchiveError, ConfigError

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from clusters import cluster_of
from larger_than_memory import statistics_past_memory
from logs import LogBuilder, axis

WORK: dict[str, Callable[[xr.Dataset], Any]] = {
    "statistics": analysis.statistics,
    "token_norms": analysis.token_norms,
    "layer_change": lambda found: analysis.layer_change(found, "resid"),
    "covariance": lambda found: analysis.covariance(found, "resid"),
    "pca": lambda found: analysis.pca(found, "resid", components=3),
    "outlier_features": lambda found: analysis.outlier_features(found, "resid"),
    "top_activations": lambda found: analysis.top_activations(
        found, "resid", [0, 3], layer=1, k=3, context=2
    ),
}


def write_log(path: Path, width: int = 64, rows: int = 700) -> Path:
    """Write a log of finite values, with padding, and rows that one layer hasn't."""
    log, rng = LogBuilder(path), np.random.default_rng(0)
    for block in range(3):
        log.layer(f"h.{block}", "resid", block)
    log.texts({100 + one: f"<{one}>" for one in range(rows)})
    for number in range(4):
        mask = [[one >= 10 * number for one in range(rows)]]
        log.begin(axis(1, rows, mask=mask))
        for block in range(3):
            if (number, block) != (2, 1):
                values = rng.standard_normal((1, rows, width)) * np.exp(rng.standard_normal(width))
                log.put(f"h.{block}", values.astype(ml_dtypes.bfloat16))
        log.commit()
    return log.close()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows in every container."""
    folder = tmp_path_factory.mktemp("places")
    found = {"log": write_log(folder / "run.stream"), "archive": folder / "run.zarr"}
    actstore.compact(found["log"], found["archive"])
    found["lossy"] = folder / "lossy.zarr"
    actstore.compact(found["log"], found["lossy"], precision="nmse=1e-3")
    for name in ("zip", "h5"):
        found[name] = folder / {"zip": "run.zarr.zip", "h5": "run.h5"}[name]
        actstore.export(found["archive"], found[name])
    return found


@pytest.fixture
def computing(workers: LocalCluster) -> Iterator[Client]:
    """A client that dask computes by."""
    with Client(workers) as client:
        client.wait_for_workers(4)
        yield client


@pytest.mark.parametrize("chunks", [None, "auto"])
@pytest.mark.parametrize("place", ["log", "archive", "lossy", "zip", "h5"])
def test_a_cluster_gives_the_bits_that_threads_give(
    workers: LocalCluster, places: dict[str, Path], place: str, chunks: Any
) -> None:
    with actstore.open_dataset(places[place], chunks=chunks) as found:
        with threadpool_limits(1):  # as workers have it: products of matrices go by that
            wanted = {name: work(found) for name, work in WORK.items()}
        with Client(workers):
            for name, work in WORK.items():
                xr.testing.assert_identical(work(found), wanted[name])


def test_components_of_many_features_are_the_same(workers: LocalCluster, tmp_path: Path) -> None:
    with actstore.open_dataset(write_log(tmp_path / "run.stream", 512, 300)) as found:
        with threadpool_limits(1):
            wanted = [analysis.covariance(found, "resid"), analysis.pca(found, "resid")]
        with Client(workers):
            xr.testing.assert_identical(analysis.covariance(found, "resid"), wanted[0])
            xr.testing.assert_identical(analysis.pca(found, "resid"), wanted[1])


def test_what_is_computed_is_labels_and_chosen_rows_too(
    workers: LocalCluster, places: dict[str, Path]
) -> None:
    with actstore.open_dataset(places["archive"]) as found:
        chosen = found.isel(token=slice(5, 900, 3), layer=[2, 0])
        wanted = analysis.statistics(chosen)
        with Client(workers):
            xr.testing.assert_identical(analysis.statistics(chosen), wanted)


def test_a_log_that_goes_on_is_opened_again(computing: Client, tmp_path: Path) -> None:
    log = tmp_path / "run.stream"
    for rows in (50, 80):  # the same path, and the same workers
        write_log(log, rows=rows)
        with actstore.open_dataset(log) as found:
            counted = analysis.statistics(found, padding=True).resid_count
            assert counted.max() == 4 * rows
        log.unlink()


def test_damage_that_a_worker_finds_is_our_error(computing: Client, tmp_path: Path) -> None:
    archive = actstore.compact(write_log(tmp_path / "run.stream"), tmp_path / "run.zarr").path
    shard = next(path for path in sorted((archive / "resid/c").rglob("*")) if path.is_file())
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with actstore.open_dataset(archive) as found, pytest.raises(ArchiveError, match="damaged"):
        analysis.statistics(found)


# -- what travels -------------------------------------------------------------------------------


def test_a_graph_holds_no_values_and_little_of_a_task(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_TASK_BYTES", 1)
    sizes: list[tuple[int, int]] = []

    def measured(graph: Any, keys: Any, **options: Any) -> Any:
        sizes.append((len(cloudpickle.dumps(graph)), len(graph.__dask_graph__())))
        return get(graph, keys, **options)

    with dask.config.set(scheduler=measured):
        for place in ("archive", "log", "h5"):
            with actstore.open_dataset(places[place], chunks=None) as found:
                monkeypatch.setitem(found.resid.variable.encoding, "shards", None)
                for work in WORK.values():
                    work(found)
    assert len(sizes) == 3 * len(WORK)
    for nbytes, tasks in sizes:
        assert nbytes < 8_000 + 1_500 * tasks


def test_the_tasks_of_a_variable_are_counted() -> None:
    rows, width = 1 << 26, 1 << 14  # 4.4 TB
    values = xr.Variable(("token", "feature"), np.broadcast_to(np.float32(0), (rows, width)))
    keep = np.broadcast_to(np.True_, (1, rows))
    wide = source.Source("v", xr.DataArray(values), values, "token", (None,), keep, 0, 0)
    _, task = wide.grid(engine.Budget(2, 1.0))
    assert rows / task <= 1 << 16


@pytest.mark.parametrize("count", [0, 1, 7, 16_384, 100_003])
def test_a_mask_travels_as_few_bytes(count: int) -> None:
    rng = np.random.default_rng(count)
    runs = np.repeat(rng.integers(0, 2, count // 50 + 1), 50)[:count].astype(np.bool_)
    for rows in (np.ones(count, np.bool_), runs, np.stack([runs, ~runs])):
        packed = pickle.dumps(engine.Mask(rows))
        np.testing.assert_array_equal(pickle.loads(packed).rows, rows)
        assert pickle.loads(packed).rows.dtype == np.bool_
    assert len(pickle.dumps(engine.Mask(np.ones(count, np.bool_)))) < 200


# -- memory -------------------------------------------------------------------------------------


def test_workers_without_room_are_refused_by_name(places: dict[str, Path]) -> None:
    with (
        cluster_of(1, threads=2, memory=400_000_000) as tight,
        Client(tight),
        actstore.open_dataset(places["archive"]) as found,
    ):
        with pytest.raises(ConfigError, match=r"on host .* has 2 threads, .*limit of 0\.400 GB"):
            analysis.statistics(found)
        analysis.statistics(found, max_memory_gb=0.05)


@pytest.mark.slow
def test_statistics_of_more_than_all_workers_may_hold(tmp_path: Path) -> None:
    assert statistics_past_memory(tmp_path).values > 1_200_000_000
