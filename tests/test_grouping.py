"""Statistics of groups of rows are those of NumPy over the rows of each, out of core."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore import grouping
from actstore.archive import grid
from actstore.archive.coordinates import STRING
from actstore.archive.precision import Precision
from actstore.errors import ConfigError
from actstore.grouping import group_statistics

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis


def make_log(path: Path, *, passes: int = 6, loc: float = 0.0, width: int = 5) -> Path:
    """Write passes of 2 × 7 with padding; the second layer fires in some of them."""
    generator = np.random.default_rng(3)
    log = LogBuilder(path)
    log.layer("h.0", "resid", 0)
    log.layer("h.3", "resid", 3)
    log.layer("norm", "final_norm")
    log.texts({100 + one: f"<{one % 5}>" for one in range(14)})
    for number in range(passes):
        mask = generator.random((2, 7)) < 0.8
        log.begin(axis(2, 7, mask=mask), annotations={"topic": [f"t{number % 3}", "x"]})
        for name in ("h.0", "h.3")[: 1 + number % 2]:
            log.put(name, generator.normal(loc, 1, (2, 7, width)).astype(np.float32))
        log.put("norm", generator.normal(loc % 97, 1, (2, 7, width)).astype(np.float16))
    return log.close()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    log = make_log(tmp_path_factory.mktemp("groups") / "run.stream")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grid, "CHUNK_BYTES", 8 * 20)
        patched.setattr(grid, "SHARD_BYTES", 32 * 20)
        archive = actstore.compact(log, log.with_suffix(".zarr")).path
    return {"log": log, "archive": archive}


@pytest.fixture(params=["log", "archive", "lazy", "few", "xarray"])
def dataset(request: pytest.FixtureRequest, places: dict[str, Path]) -> Any:
    opened = {
        "log": lambda: actstore.open_dataset(places["log"]),
        "archive": lambda: actstore.open_dataset(places["archive"]),
        "lazy": lambda: actstore.open_dataset(places["archive"], None),
        "few": lambda: actstore.open_dataset(places["archive"], 5),
        "xarray": lambda: xr.open_zarr(places["archive"]),
    }
    with opened[request.param]() as found:
        yield found


def check(
    found: xr.Dataset, whole: xr.Dataset, variable: str, by: list[str], *, padding: bool = False
) -> None:
    """Compare each group with NumPy over its rows, in float64."""
    values = whole[variable].values.astype(np.float64)
    values = values if "layer" in whole[variable].dims else values[np.newaxis]
    blocks = np.atleast_1d(found["layer"].values) if "layer" in found.dims else np.zeros(1, int)
    keep = np.ones(values.shape[1], bool) if padding else ~whole.is_padding.values
    keys = list(zip(*(whole[one].values.tolist() for one in by), strict=True))
    wanted = sorted({key for key, kept in zip(keys, keep, strict=True) if kept and key == key})
    assert list(zip(*(found[one].values.tolist() for one in by), strict=True)) == wanted
    known = whole["layer"].values.tolist()
    for place, block in enumerate(blocks.tolist()):
        layer = known.index(block) if "layer" in found.dims else 0
        there = keep.copy()
        if f"{variable}_present" in whole:
            there &= whole[f"{variable}_present"].values[layer]
        for number, key in enumerate(wanted):
            rows = there & np.array([one == key for one in keys])
            part = found.isel(layer=place) if "layer" in found.dims else found
            part = part.isel(group=number)
            assert part["count"] == rows.sum()
            if rows.any():
                mine = values[layer, rows]
                np.testing.assert_allclose(part["mean"], mine.mean(0), rtol=1e-12, atol=1e-13)
                np.testing.assert_allclose(part.variance, mine.var(0), rtol=1e-11, atol=1e-13)
            else:
                assert np.isnan(part["mean"]).all()
                assert np.isnan(part.variance).all()


@pytest.mark.parametrize(
    "by", [["token_text"], ["position"], ["topic"], ["topic", "position"], ["token_id"]]
)
@pytest.mark.parametrize("variable", ["resid", "final_norm"])
def test_groups_have_the_mean_variance_and_count_of_their_rows(
    dataset: xr.Dataset, by: list[str], variable: str
) -> None:
    found = group_statistics(dataset, variable, by if len(by) > 1 else by[0])
    front = ("layer",) * (variable == "resid")
    assert found["mean"].dims == found.variance.dims == (*front, "group", "feature")
    assert found["count"].dims == (*front, "group")
    assert {found["mean"].dtype, found.variance.dtype} == {np.dtype(np.float64)}
    assert found["count"].dtype == np.int64
    assert found.attrs == {"variable": variable, "by": by}
    check(found, dataset.load(), variable, by)


def test_blocks_workers_and_budget_change_no_bit_that_rows_do_not(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with actstore.open_dataset(places["archive"]) as dataset:
        one = group_statistics(dataset, "resid", workers=1)
        assert one.identical(group_statistics(dataset, "resid", workers=4))
        monkeypatch.setattr("actstore.machine.cores", lambda: 5)
        assert one.identical(group_statistics(dataset, "resid"))
        monkeypatch.setattr(grouping, "_BLOCK_BYTES", 1)
        small = group_statistics(dataset, "resid")
        check(small, dataset.load(), "resid", ["token_text"])
        xr.testing.assert_allclose(small, one, rtol=1e-13)


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "wide.stream", compression="none")
    log.layer("h.0", "resid", 0)
    log.layer("h.1", "resid", 1)
    for number in range(8):
        log.begin(axis(8, 128))
        for name in ("h.0", "h.1"):
            log.put(name, np.full((8, 128, 512), number, np.float32))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grid, "CHUNK_BYTES", 1 << 17)
        archive = actstore.compact(log.close(), tmp_path / "wide.zarr").path
    with actstore.open_dataset(archive) as dataset:
        assert dataset.resid.nbytes == 1 << 25
        group_statistics(dataset, "resid", "batch_item")  # what is loaded once isn't counted
        tracemalloc.start()
        try:
            found = group_statistics(dataset, "resid", "batch_item", max_memory_gb=0.005)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (found["count"] == 8 * 128).all()
    assert (found["mean"] == 3.5).all()
    assert peak < 5_000_000


@pytest.mark.parametrize("loc", [1e4, -1e6])
def test_a_far_mean_costs_no_precision(
    tmp_path: Path, loc: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "_BLOCK_BYTES", 500)
    with actstore.open_dataset(make_log(tmp_path / "far.stream", loc=loc)) as dataset:
        found = group_statistics(dataset, "resid", "topic", padding=True)
        check(found, dataset.load(), "resid", ["topic"], padding=True)


def test_layers_rows_and_labels_may_be_chosen_before(dataset: xr.Dataset) -> None:
    found = group_statistics(dataset, "resid", "topic", layer=3)
    assert found["layer"].values.tolist() == [3]
    assert found["module"].dims == ("layer",)
    check(found, dataset.load(), "resid", ["topic"])
    assert found.identical(group_statistics(dataset, "resid", "topic", layer=[3]))
    chosen = dataset.actstore.where(topic="x").actstore.join(
        {"position": [0, 1, 2, 3], "half": ["a", "a", "b", "b"]}, "position"
    )
    part = group_statistics(chosen, "resid", "half")
    assert part.half.values.dtype == STRING
    assert part.half.values.tolist() == ["", "a", "b"]
    check(part, chosen.load(), "resid", ["half"])
    single = group_statistics(dataset.isel(layer=1), "resid", "topic")
    assert single["mean"].dims == ("group", "feature")
    np.testing.assert_array_equal(single.variance.values, found.variance.values[0])


def test_rows_whose_label_is_missing_are_in_no_group(dataset: xr.Dataset) -> None:
    joined = dataset.actstore.join({"position": [0, 2], "n": [5, 6]}, "position")
    found = group_statistics(joined, "final_norm", "n")
    assert found.n.values.tolist() == [5, 6]
    zero = (joined.position.values == 0) & ~joined.is_padding.values
    assert found["count"].values[0] == zero.sum()


def test_the_largest_groups_are_kept(dataset: xr.Dataset) -> None:
    whole = group_statistics(dataset, "final_norm", "position", padding=False)
    counts = whole["count"].values
    order = np.argsort(-counts, kind="stable")
    found = group_statistics(dataset, "final_norm", "position", top=3)
    assert found.identical(whole.isel(group=np.sort(order[:3])))
    least = int(np.sort(counts)[-3])
    few = group_statistics(dataset, "final_norm", "position", min_count=least)
    assert few.identical(whole.isel(group=counts >= least))
    assert group_statistics(dataset, "final_norm", "position", min_count=99).sizes["group"] == 0


def test_values_that_are_no_numbers_stay_in_their_groups() -> None:
    values = np.ones((4, 2), np.float32)
    values[1, 0], values[2, 0] = np.nan, np.inf
    labels = {"pass_index": ("token", [0, 0, 1, 2]), "g": ("token", list("aabc"))}
    found = group_statistics(xr.Dataset({"x": (("token", "feature"), values)}, labels), "x", "g")
    np.testing.assert_array_equal(found["mean"], [[np.nan, 1], [np.inf, 1], [1, 1]])
    np.testing.assert_array_equal(found.variance, [[np.nan, 0], [np.nan, 0], [0, 0]])


@pytest.mark.parametrize("precision", ["int8", "nmse=1e-3", "mse=1e-3", "float16"])
def test_rows_that_were_kept_as_codes_are_grouped_by_their_values(
    precision: str, tmp_path: Path
) -> None:
    log = make_log(tmp_path / "run.stream", width=96)
    archive = actstore.compact(log, tmp_path / "a.zarr", precision=precision).path
    with actstore.open_dataset(archive) as dataset, xr.open_zarr(archive) as plain:
        found = group_statistics(dataset, "resid", "topic")
        check(found, dataset.load(), "resid", ["topic"])
        assert dataset.resid.attrs["precision"] == str(Precision.parse(precision))
        if "code_offset" in plain.resid.attrs:
            with pytest.raises(ConfigError, match="decode"):
                group_statistics(plain, "resid", "topic")
        decoded = group_statistics(plain.actstore.decode(), "resid", "topic")
        xr.testing.assert_allclose(decoded.drop_attrs(), found.drop_attrs())
        assert ("code_offset" in plain.resid.attrs) == (precision in ("int8", "nmse=1e-3"))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_values_in_any_groups(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40))
    labels = data.draw(st.lists(st.sampled_from("abcd"), min_size=rows, max_size=rows))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    scale = 10.0 ** data.draw(st.integers(-6, 6))
    values = generator.normal(data.draw(st.floats(-100, 100)), 1, (rows, 3)) * scale
    ds = xr.Dataset(
        {"x": (("token", "feature"), values)},
        {"pass_index": ("token", np.zeros(rows, int)), "g": ("token", labels)},
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grouping, "_BLOCK_BYTES", 24 * data.draw(st.integers(1, rows)))
        found = group_statistics(ds, "x", "g")
    for number, label in enumerate(found.g.values.tolist()):
        mine = values[np.array(labels) == label]
        np.testing.assert_allclose(
            found["mean"][number], mine.mean(0), rtol=1e-10, atol=1e-12 * scale
        )
        np.testing.assert_allclose(
            found.variance[number], mine.var(0), rtol=1e-8, atol=1e-9 * scale**2
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing",), "no variable 'nothing'"),
        ((None,), "no variable None"),
        ((["resid"],), r"no variable \['resid'\]"),
        (("turned",), "real numbers along one token axis are wanted"),
        (("loose",), "real numbers along one token axis are wanted"),
        (("resid", "colour"), r"by must be labels.*\['colour'\]"),
        (("resid", []), "by must be labels"),
        (("resid", None), r"by must be labels.*\[None\]"),
        (("resid", ["topic", 3]), r"by must be labels.*\[3\]"),
        (("resid", ["topic", "topic"]), "twice"),
    ],
)
def test_what_can_not_be_grouped_is_refused(
    places: dict[str, Path], arguments: tuple[Any, ...], said: str
) -> None:
    with actstore.open_dataset(places["archive"]) as dataset:
        odd = dataset.assign(turned=dataset.final_norm * 1j, loose=("feature", np.zeros(5)))
        with pytest.raises(ConfigError, match=said):
            group_statistics(odd, *arguments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer": 1}, r"no layer 1; it has \[0, 3\]"),
        ({"top": 0}, "top must be"),
        ({"min_count": True}, "min_count must be"),
        ({"workers": 0}, "workers must be"),
        ({"max_memory_gb": 0}, "max_memory_gb must be"),
        ({"max_memory_gb": 1e-6}, r"5 groups of 5 features in 2 layers take 0\.000 GB.*top="),
        ({"dim": "layer"}, "one token axis"),
    ],
)
def test_options_that_can_not_be_honoured_are_refused(
    places: dict[str, Path], options: dict[str, Any], said: str
) -> None:
    with (
        actstore.open_dataset(places["archive"]) as dataset,
        pytest.raises(ConfigError, match=said),
    ):
        group_statistics(dataset, "resid", **options)
