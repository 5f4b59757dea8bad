"""Batches of an archive, a zip, HDF5 and a log: the rows' own values, none lost, none doubled."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

import actstore
from actstore.archive import grid
from actstore.errors import ArchiveError, ConfigError

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, RandomSampler  # noqa: E402

from actstore.training import Batches, RowDataset  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis, random_values  # noqa: E402

PASSES, ITEMS, LENGTH, WIDTH, BLOCKS = 12, 3, 17, 24, 3
LAYER = "model.layers.1"
SMALL = {"batch_size": 32, "buffer_mb": 0.02}
#: What a test's own layers are called in all kinds of a run.
KINDS = ("shuffled", "captured", "zip", "h5", "log", "nmse")


def made_log(path: Path, run: str = "first") -> Path:
    """Write a log of random values, a part of them padding, whose last layer lacks a pass."""
    log = LogBuilder(path, run=run)
    for block in range(BLOCKS):
        log.layer(f"model.layers.{block}", "resid", block)
    log.layer("lm_head", "logits")
    for number in range(PASSES):
        mask = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 4], [5]])
        log.begin(axis(ITEMS, LENGTH, start=0, mask=mask), annotations={"topic": ["a", "b", "c"]})
        for block in range(BLOCKS - (number == 3)):
            values = np.random.default_rng([number, block]).normal(size=(ITEMS, LENGTH, WIDTH))
            log.put(f"model.layers.{block}", values.astype(np.float32))
        log.put("lm_head", random_values((ITEMS, LENGTH, 8), "bfloat16", seed=number))
        log.commit()
    return log.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("run")
    log = made_log(folder / "run.stream")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "CHUNK_BYTES", 1 << 11)
        patch.setattr(grid, "SHARD_BYTES", 1 << 13)
        actstore.compact(log, folder / "captured.zarr")
        actstore.compact(log, folder / "shuffled.zarr", layout="shuffled", seed=5)
        actstore.compact(log, folder / "nmse.zarr", layout="shuffled", precision="nmse=1e-3")
    actstore.export(folder / "shuffled.zarr", folder / "run.zarr.zip")
    actstore.export(folder / "shuffled.zarr", folder / "run.h5")
    return {
        "log": log,
        "zip": folder / "run.zarr.zip",
        "h5": folder / "run.h5",
        **{one: folder / f"{one}.zarr" for one in ("captured", "shuffled", "nmse")},
    }


def oracle(path: Path, variable: str = "resid") -> tuple[xr.Dataset, NDArray[np.int64]]:
    """Give the dataset, and the rows that are trained on, by xarray alone."""
    dataset = actstore.open_dataset(path, chunks=None)
    return dataset, np.flatnonzero(~dataset.is_padding.values)


def ids_of(batches: Iterable[Any]) -> list[int]:
    return [one for batch in batches for one in batch["source_row"].tolist()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_has_each_row_once_with_its_values(
    run: dict[str, Path], kind: str, shuffle: bool
) -> None:
    dataset, rows = oracle(run[kind])
    labels = ["position", "pass_index", "batch_item"]
    batches = Batches(run[kind], LAYER, labels=labels, shuffle=shuffle, **SMALL)
    values = dataset.resid.values[1]
    where = {
        key: row
        for row, key in enumerate(
            zip(*(dataset[one].values.tolist() for one in labels), strict=True)
        )
    }
    seen = []
    for batch in batches:
        keys = zip(*(batch[one].tolist() for one in labels), strict=True)
        mine = [where[key] for key in keys]
        assert batch["values"].numpy().tobytes() == values[mine].tobytes()
        seen += mine
    assert sorted(seen) == rows.tolist()
    assert (seen == rows.tolist()) is not shuffle
    assert batches.rows == rows.size
    assert batches.epoch == 1


def test_rows_that_a_layer_lacks_are_in_no_batch(run: dict[str, Path]) -> None:
    dataset, rows = oracle(run["shuffled"])
    there = rows[dataset.resid_present.values[2][rows]]
    assert 0 < there.size < rows.size
    batches = Batches(run["shuffled"], "resid", labels=["source_row"], **SMALL)
    assert batches.shape == (BLOCKS, WIDTH)
    place = {row: index for index, row in enumerate(dataset.source_row.values.tolist())}
    seen = []
    for batch in batches:
        mine = [place[one] for one in batch["source_row"].tolist()]
        wanted = dataset.resid.values[:, mine].swapaxes(0, 1)
        np.testing.assert_array_equal(batch["values"].numpy(), wanted)
        seen += mine
    assert sorted(seen) == there.tolist()


def test_padding_and_chosen_rows(run: dict[str, Path]) -> None:
    dataset, _ = oracle(run["captured"])
    every = Batches(run["captured"], LAYER, padding=True, **SMALL)
    assert every.rows == dataset.sizes["token"]
    chosen = np.array([40, 3, 7])
    few = Batches(run["captured"], LAYER, rows=chosen, padding=True, shuffle=False)
    (batch,) = few
    np.testing.assert_array_equal(batch.numpy(), dataset.resid.values[1][np.sort(chosen)])
    half = Batches(
        run["captured"], LAYER, rows=np.arange(dataset.sizes["token"]) % 2 == 0, **SMALL
    )
    assert half.rows == (~dataset.is_padding.values[::2]).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_converted_as_torch_does(run: dict[str, Path], dtype: Any) -> None:
    options = {"shuffle": False, "drop_last": True, **SMALL}
    plain = Batches(run["captured"], LAYER, **options)
    other = Batches(run["captured"], LAYER, dtype=dtype, **options)
    for one, two in zip(plain, other, strict=True):
        assert two.dtype == dtype
        assert torch.equal(one.to(dtype), two)


def test_batches_that_are_kept_stay_as_they_are(run: dict[str, Path]) -> None:
    batches = Batches(run["shuffled"], LAYER, threads=3, prefetch=2, **SMALL)
    kept = [one for _ in range(3) for one in batches]
    batches.set_epoch(0)
    copies = []
    for _ in range(3):
        copies += [one.clone() for one in batches]
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))


def test_neither_threads_nor_prefetch_change_what_comes(run: dict[str, Path]) -> None:
    ways = [{"threads": 1, "prefetch": 0}, {"threads": 4, "prefetch": 3}]
    one, two = (
        ids_of(Batches(run["zip"], LAYER, labels=["source_row"], **SMALL, **way)) for way in ways
    )
    assert one == two


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", ["shuffled", "captured"])
def test_ranks_share_the_rows(run: dict[str, Path], kind: str, drop_last: bool) -> None:
    _, rows = oracle(run[kind])
    label = "source_row" if kind == "shuffled" else "pass_index"
    ranks = [
        Batches(
            run[kind], LAYER, labels=[label], rank=rank, world_size=3, drop_last=drop_last, **SMALL
        )
        for rank in range(3)
    ]
    found = [list(one) for one in ranks]
    assert [len(one) for one in found] == [len(one) for one in ranks]
    assert len({len(one) for one in found}) == 1
    seen = [one for mine in found for batch in mine for one in batch[label].tolist()]
    if drop_last:
        assert len(seen) == sum(len(one) for one in found) * 32
    else:
        assert len(seen) == rows.size
    if kind == "shuffled":
        assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(("kind", "context"), [("shuffled", "fork"), ("log", "spawn")])
def test_workers_read_each_batch_once(run: dict[str, Path], kind: str, context: str) -> None:
    labels = ["pass_index", "batch_item", "position"]
    batches = Batches(run[kind], LAYER, labels=labels, **SMALL)

    def keys(found: Iterable[Any]) -> Counter[tuple[tuple[int, ...], ...]]:
        return Counter(
            tuple(zip(*(one[label].tolist() for label in labels), strict=True)) for one in found
        )

    mine = keys(batches)
    batches.set_epoch(0)
    for workers in (1, 2):
        loader = DataLoader(
            batches, batch_size=None, num_workers=workers, persistent_workers=workers == 2,
            multiprocessing_context=multiprocessing.get_context(context),
        )  # fmt: skip
        assert keys(loader) == mine
        if workers == 2:  # the workers are at the next epoch
            again = keys(loader)
            assert again != mine
            assert sorted(row for one in again.elements() for row in one) == sorted(
                row for one in mine.elements() for row in one
            )


@pytest.mark.parametrize("kind", ["shuffled", "log"])
def test_a_state_goes_on_with_the_very_next_batch(run: dict[str, Path], kind: str) -> None:
    options = {"labels": ["position"], "seed": 3, **SMALL}
    whole = Batches(run[kind], LAYER, **options)
    wanted = [one["values"].clone() for _ in range(2) for one in whole]
    for stop in (0, 1, 5, len(whole) - 1, len(whole), len(whole) + 4):
        first = Batches(run[kind], LAYER, **options)
        reading = first.forever()
        before = [next(reading)["values"].clone() for _ in range(stop)]
        state = first.state_dict()
        reading.close()
        after = Batches(run[kind], LAYER, threads=1, **options)
        after.load_state_dict(state)
        running = after.forever()
        rest = [next(running)["values"].clone() for _ in range(len(wanted) - stop)]
        running.close()
        assert all(torch.equal(*pair) for pair in zip(before + rest, wanted, strict=True))


def test_a_state_of_a_worker_goes_on_there(run: dict[str, Path]) -> None:
    """What a stateful loader does: each worker's dataset gives its state and takes it back."""
    options = {"labels": ["source_row"], **SMALL}
    loader = DataLoader(_Stateful(run["shuffled"], options), batch_size=None, num_workers=2)
    found = list(loader)
    rows = [row for batch, _ in found for row in batch["source_row"].tolist()]
    _, state = found[5]
    later = [one for one, other in found[6:] if other["worker"] == state["worker"]]
    again = DataLoader(
        _Stateful(run["shuffled"], options, {state["worker"]: state}),
        batch_size=None,
        num_workers=2,
    )
    rest = [one for one, other in again if other["worker"] == state["worker"]]
    assert len(set(rows)) == len(rows)
    assert [one["source_row"].tolist() for one in rest] == [
        one["source_row"].tolist() for one in later
    ]


def test_a_worker_without_batches_does_not_wait_for_ever(run: dict[str, Path]) -> None:
    loader = DataLoader(_Endless(run["shuffled"]), batch_size=None, num_workers=2, timeout=60)
    with pytest.raises(ConfigError, match="too few for 2 workers"):
        list(loader)


class _Endless(torch.utils.data.IterableDataset):  # type: ignore[misc] # torch's is untyped
    """Gives batches of an epoch of a single buffer, without an end."""

    def __init__(self, path: Path) -> None:
        self._batches = Batches(path, LAYER)

    def __iter__(self) -> Iterator[Any]:
        return self._batches.forever()


class _Stateful(torch.utils.data.IterableDataset):  # type: ignore[misc] # torch's is untyped
    """Gives batches with the state behind each, as a stateful loader asks for it in a worker."""

    def __init__(
        self, path: Path, options: dict[str, Any], states: dict[int, Any] | None = None
    ) -> None:
        self._batches = Batches(path, LAYER, **options)
        self._states = states or {}

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        worker = torch.utils.data.get_worker_info().id
        if worker in self._states:
            self._batches.load_state_dict(self._states[worker])
        for batch in self._batches:
            yield batch, self._batches.state_dict() | {"worker": worker}


def test_rows_by_number(run: dict[str, Path]) -> None:
    dataset, rows = oracle(run["shuffled"])
    found = RowDataset(run["shuffled"], LAYER, labels=["source_row"])
    assert len(found) == rows.size
    values = dataset.resid.values[1][rows]
    np.testing.assert_array_equal(found[5]["values"].numpy(), values[5])
    np.testing.assert_array_equal(found[-1]["values"].numpy(), values[-1])
    with pytest.raises(IndexError, match="rows; got"):
        found[rows.size]
    sampler = RandomSampler(found, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(found, batch_size=50, sampler=sampler, num_workers=2)
    assert sorted(ids_of(loader)) == sorted(dataset.source_row.values[rows].tolist())


def test_what_is_refused(run: dict[str, Path]) -> None:
    path = run["shuffled"]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("no label 'nothing'", {"labels": ["nothing"]}),
        ("is text", {"labels": ["token_text"]}),
        ("batch_size must be", {"batch_size": 0}),
        ("seed must be", {"seed": -1}),
        ("threads must be", {"threads": 0}),
        ("belong together", {"rank": 0}),
        ("rank must be", {"rank": 2, "world_size": 2}),
        ("dtype must be", {"dtype": "float32"}),
        ("rows must be", {"rows": [[1, 2]]}),
        ("rows must be from 0", {"rows": [10**6]}),
        ("twice", {"rows": [1, 1]}),
        ("bools", {"rows": [True]}),
        ("fill no batch of 100000", {"batch_size": 100_000, "drop_last": True}),
        *(("buffer_mb must be", {"buffer_mb": one}) for one in (np.nan, np.inf, "x", -3, None)),
    ]
    if not torch.cuda.is_available():
        wrong.append(("pin_memory=True needs a GPU", {"pin_memory": True}))
    for said, options in wrong:
        with pytest.raises(ConfigError, match=said):
            Batches(path, LAYER, **options)
    with pytest.raises(ConfigError, match="dtype must be"):
        RowDataset(path, LAYER, dtype="bfloat16")
    with pytest.raises(ConfigError, match="no layer"):
        Batches(path, "model.layers.9")
    with pytest.raises(ConfigError, match="one shape"):
        Batches(path, [LAYER, "lm_head"])
    state = Batches(path, LAYER).state_dict()
    with pytest.raises(ConfigError, match="seed 0, not 1"):
        Batches(path, LAYER, seed=1).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"state_dict\(\) gave"):
        Batches(path, LAYER).load_state_dict({})


def test_a_state_of_other_rows_is_refused(run: dict[str, Path], tmp_path: Path) -> None:
    every = actstore.open_dataset(run["captured"]).sizes["token"]
    mine = np.arange(every) % 2 == 0
    options: dict[str, Any] = {"padding": True, "batch_size": 8}
    state = Batches(run["captured"], LAYER, rows=mine, **options).state_dict()
    state = json.loads(json.dumps(state))
    Batches(run["captured"], LAYER, rows=mine, **options).load_state_dict(state)
    others: dict[str, dict[str, Any]] = {
        "crc32_of_rows": {"rows": np.roll(mine, 1)},
        "labels": {"rows": mine, "labels": ["position"]},
        "dtype 'torch.float32', not 'torch.float64'": {"rows": mine, "dtype": torch.float64},
    }
    for said, other in others.items():
        with pytest.raises(ConfigError, match=f"other batches.*{said}"):
            Batches(run["captured"], LAYER, **options, **other).load_state_dict(state)
    state = Batches(run["shuffled"], LAYER).state_dict()
    for kind in ("zip", "h5"):  # the same archive
        Batches(run[kind], LAYER).load_state_dict(state)
    with pytest.raises(ConfigError, match="shuffle_seed 5, not 0"):
        Batches(run["nmse"], LAYER).load_state_dict(state)
    with pytest.raises(ConfigError, match="layout 'shuffled', not None"):
        Batches(run["captured"], LAYER).load_state_dict(state)
    another = made_log(tmp_path / "run.stream", run="another")
    state = Batches(run["log"], LAYER).state_dict()
    with pytest.raises(ConfigError, match=r"runs .*, not \['another'\]"):
        Batches(another, LAYER).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"state_dict\(\) gave"):
        Batches(another, LAYER).load_state_dict(state | {"of": 3})


def test_a_process_that_ends_amid_an_epoch_says_nothing(run: dict[str, Path]) -> None:
    code = f"""
from actstore.training import Batches, sae_lens_provider
batches = iter(Batches({str(run["zip"])!r}, {LAYER!r}, batch_size=2, buffer_mb=1e-3))
provider = sae_lens_provider(Batches({str(run["zip"])!r}, {LAYER!r}, batch_size=2))
print(next(batches).shape, next(provider).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.count(str(WIDTH)) == 2
    assert done.stderr == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_that_a_device_is_late_with_are_of_their_own_batches(run: dict[str, Path]) -> None:
    options = {"labels": ["position"], **SMALL}
    wanted = list(Batches(run["shuffled"], LAYER, **options))
    torch.cuda._sleep(1 << 31)  # cycles: longer than an epoch takes
    found = []
    for batch in Batches(run["shuffled"], LAYER, pin_memory=True, **options):
        assert all(one.is_pinned() for one in batch.values())
        found.append({name: one.to("cuda", non_blocking=True) for name, one in batch.items()})
        del batch
    torch.cuda.synchronize()
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(one[name].cpu(), other[name]) for name in other)


def test_a_damaged_chunk_is_an_error_in_its_batch(run: dict[str, Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "CHUNK_BYTES", 1 << 11)
        patch.setattr(grid, "SHARD_BYTES", 1 << 13)
        actstore.compact(run["log"], tmp_path / "a.zarr", layout="shuffled")
    shard = next((tmp_path / "a.zarr" / "resid" / "c" / "1").glob("*/0"))
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArchiveError, match="damaged"):
        list(Batches(tmp_path / "a.zarr", LAYER, **SMALL))
