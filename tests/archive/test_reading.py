"""Rows of an archive's arrays, read by us: equal to what zarr-python reads, and no more of it."""

from __future__ import annotations

import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logs import encode_rows, random_values
from numpy.typing import NDArray

from actstore.archive import reading, shards
from actstore.archive.reading import ShardedRows
from actstore.archive.shards import shard_path
from actstore.archive.store import ArchiveWriter
from actstore.errors import ArchiveError

DTYPES = ["bool", "int8", "uint16", "int32", "float16", "float32", "float64", "complex64"]


def write(
    folder: Path,
    values: NDArray[Any],
    chunk: int,
    per_shard: int,
    profile: str = "balanced",
    missing: frozenset[int] = frozenset(),
) -> Path:
    """Write [layer, row, …] in shards; of every layer the chunks named are not written."""
    folder.mkdir(parents=True)
    fill: Any = np.nan if values.dtype.kind in "fc" else values.dtype.type(0)
    rest = values.shape[2:]
    ArchiveWriter(folder).add_array(
        "a",
        ("layer", *(f"d{i}" for i in range(values.ndim - 1))),
        values.shape,
        values.dtype,
        chunks=(1, chunk, *rest),
        shards=(1, chunk * per_shard, *rest),
        profile=profile,
        attributes={},
    )
    size = chunk * per_shard
    for layer, rows in enumerate(values):
        for number in range(-(-len(rows) // size)):
            mine = rows[number * size : (number + 1) * size]
            chunks = number * per_shard + np.arange(per_shard)
            there = (chunks * chunk < len(rows)) & ~np.isin(chunks, list(missing))
            if there.any():
                shard = encode_rows(mine, chunk, there, fill, profile)
                place = (layer, number, *(0,) * len(rest))
                shards.write_shard(shard_path(folder, "a", place), shard)
    return folder / "a"


def reader(folder: Path) -> ShardedRows:
    found = ShardedRows.of(folder, json.loads((folder / "zarr.json").read_bytes()))
    assert found is not None
    return found


def by_zarr(folder: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_array(folder, mode="r")[...])  # type: ignore[call-overload]


@pytest.mark.parametrize("profile", shards.PROFILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_those_of_zarr(tmp_path: Path, dtype: str, profile: str) -> None:
    values = random_values((2, 150, 5), dtype)
    missing = frozenset((1, 8, 9, 10, 11))
    folder = write(tmp_path / "z", values, 16, 4, profile, missing)
    mine, theirs = reader(folder), by_zarr(folder)
    for layer in range(2):
        found = mine.read(layer, np.arange(150))
        assert found.tobytes() == theirs[layer].tobytes()
        assert found.dtype == values.dtype


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = np.arange(3 * 203 * 6, dtype=np.float32).reshape(3, 203, 2, 3)
    return write(tmp_path_factory.mktemp("archive") / "z", values, 8, 4)


@given(st.lists(st.integers(0, 202), max_size=80), st.integers(0, 2))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_in_any_order(array: Path, rows: list[int], layer: int) -> None:
    found = reader(array).read(layer, np.array(rows, np.int64))
    np.testing.assert_array_equal(found, by_zarr(array)[layer][rows])


@given(st.integers(0, 202), st.integers(0, 202))
def test_any_slice(array: Path, first: int, last: int) -> None:
    rows = np.arange(min(first, last), max(first, last))
    np.testing.assert_array_equal(reader(array).read(1, rows), by_zarr(array)[1][rows])


def test_only_the_chunks_that_rows_are_in_are_read(
    array: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    honest = ShardedRows._encoded

    def counting(self: ShardedRows, layer: int, chunk: int) -> Any:
        seen.append((layer, chunk))
        return honest(self, layer, chunk)

    monkeypatch.setattr(ShardedRows, "_encoded", counting)
    reader(array).read(2, np.array([0, 7, 8, 3, 202, 100, 101]))
    assert sorted(seen) == [(2, 0), (2, 1), (2, 12), (2, 25)]


def test_reads_at_once_have_no_more_threads_together_than_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "a.zarr", random_values((1, 64, 4)), 2, 8)
    reader = ShardedRows.of(folder, json.loads((folder / "zarr.json").read_text()))
    assert reader is not None
    wanted, lock = reader.read(0, np.arange(64)).tobytes(), threading.Lock()
    at_once, most, begun = 0, 0, threading.Barrier(4)

    class Counted(ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            nonlocal at_once, most
            super().__init__(count)
            with lock:
                at_once += count
                most = max(most, at_once)

        def shutdown(self, *how: Any, **options: Any) -> None:
            nonlocal at_once
            super().shutdown(*how, **options)
            with lock:
                at_once -= self._max_workers

    monkeypatch.setattr(reading, "ThreadPoolExecutor", Counted)
    monkeypatch.setattr(reading, "_helpers", threading.Semaphore(3))

    def read(_: int) -> bool:
        begun.wait()
        return all(reader.read(0, np.arange(64)).tobytes() == wanted for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    assert 2 <= most <= 3


def test_rows_without_layers_and_a_copy_in_another_process(tmp_path: Path) -> None:
    values = random_values((1, 90), "float32")
    folder = write(tmp_path / "z", values, 32, 2)
    said = json.loads((folder / "zarr.json").read_bytes())
    assert reader(folder).axis == 1
    again = pickle.loads(pickle.dumps(reader(folder)))
    assert again.read(0, np.arange(90)).tobytes() == values[0].tobytes()
    said["dimension_names"] = ["x", "y"]  # it is cut along its first dimension, so not by rows
    assert ShardedRows.of(folder, said) is None


@pytest.mark.parametrize("place", ["chunk", "index", "cut"])
def test_damage_is_named(tmp_path: Path, place: str) -> None:
    folder = write(tmp_path / "z", random_values((1, 64, 8), "float32"), 32, 2)
    (path,) = (one for one in folder.rglob("c/*/*/*") if one.is_file())
    data = bytearray(path.read_bytes())
    if place == "cut":
        data = data[:20]
    else:
        data[10 if place == "chunk" else -10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"actstore\.verify"):
        reader(folder).read(0, np.arange(64))


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "bytes", "configuration": {"endian": "little"}}],
        [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}],
    ],
)
def test_what_others_write_is_left_to_zarr(tmp_path: Path, codecs: list[Any]) -> None:
    folder = write(tmp_path / "z", random_values((1, 64, 8), "float32"), 32, 2)
    said = json.loads((folder / "zarr.json").read_bytes())
    assert ShardedRows.of(folder, said | {"codecs": codecs}) is None
    sharding = said["codecs"][0]
    sharding["configuration"]["index_location"] = "start"
    assert ShardedRows.of(folder, said) is None
