"""Statistics in blocks are those of NumPy over all rows at once, in float64."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import actstore
from actstore import analysis
from actstore.analysis import engine, moments, sketch, source
from actstore.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log

Values = np.ndarray[Any, Any]


def dataset(values: Any, **labels: Any) -> xr.Dataset:
    """Give a dataset of ``v``, (layer, token, feature) or (token, feature)."""
    values = np.asarray(values)
    dims = ("layer", "token", "feature")[3 - values.ndim :]
    rows = values.shape[-2]
    columns = {
        "pass_index": np.zeros(rows, np.int64),
        "batch_item": np.zeros(rows, np.int64),
        "position": np.arange(rows),
        "token_id": np.arange(rows),
        "token_text": np.array([f"<{row}>" for row in range(rows)], object),
        "is_padding": np.zeros(rows, np.bool_),
    } | labels
    coordinates: dict[str, Any] = {name: ("token", column) for name, column in columns.items()}
    if values.ndim == 3:
        coordinates["layer"] = 2 * np.arange(values.shape[0])
    return xr.Dataset({"v": (dims, values)}, coordinates)


@pytest.fixture(params=["one block", "blocks of 7 rows"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut rows into blocks and tasks, or not."""
    if request.param != "one block":
        monkeypatch.setattr(
            source.Source, "grid", lambda self, budget, rows=0: (7, 21), raising=True
        )


def wanted(values: Values) -> dict[str, Values]:
    """Give the statistics of columns [rows, width] of finite values, in float64."""
    x = values.astype(np.longdouble)  # a float64 mean of 1e8 is off by 1e-8
    mean, variance = x.mean(axis=0), x.var(axis=0)
    with np.errstate(all="ignore"):
        kurtosis = ((x - mean) ** 4).mean(axis=0) / variance**2
    found = {
        "mean": mean,
        "variance": variance,
        "kurtosis": kurtosis,
        "rms": np.sqrt((x**2).mean(axis=0)),
        "minimum": x.min(axis=0),
        "maximum": x.max(axis=0),
        "sparsity": (x == 0).mean(axis=0),
    }
    return {name: one.astype(np.float64) for name, one in found.items()}


def close(found: xr.DataArray, expected: Any, tolerance: float, scale: Any = 0) -> None:
    error = np.abs(found.values - expected)
    bound = tolerance * np.maximum(np.abs(expected), scale)
    assert ((error <= bound) | (np.isnan(found.values) & np.isnan(expected))).all(), (
        found.name,
        float(np.nanmax(error - bound)),
    )


def assert_right(found: xr.Dataset, values: Values, tolerance: float = 3e-6) -> None:
    """Compare statistics of finite values with NumPy's."""
    expected = wanted(values)
    spread = np.sqrt(expected["variance"])
    close(found.v_mean, expected["mean"], 1e-15, spread * tolerance / 1e-15)
    for name, times in (("variance", 1), ("kurtosis", 5), ("rms", 1)):
        close(found[f"v_{name}"], expected[name], times * tolerance)
    for name in ("minimum", "maximum", "sparsity"):
        np.testing.assert_array_equal(found[f"v_{name}"], expected[name])
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    close(found.v_norm_mean, norms.mean(), 1e-6)
    close(found.v_norm_max, norms.max(), 1e-6)
    np.testing.assert_array_equal(found.v_count, len(values))
    np.testing.assert_array_equal(found.v_nonfinite, 0)
    assert_quantiles(found.v_quantile, values)


def assert_quantiles(found: xr.DataArray, values: Values) -> None:
    expected = np.quantile(values.astype(np.float64), found["quantile"], method="inverted_cdf")
    close(found, expected, 2.0**-8, 2.0**-125)


def normal(*shape: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


ROWS, WIDTH = 400, 33
CASES: dict[str, Callable[[], Values]] = {
    "normal": lambda: normal(ROWS, WIDTH),
    "scales from 1e-4 to 1e4": lambda: (
        normal(ROWS, WIDTH) * np.logspace(-4, 4, WIDTH).astype(np.float32)
    ),
    "outliers of 1e4": lambda: np.where(
        np.random.default_rng(1).random((ROWS, WIDTH)) < 0.01, 1e4, normal(ROWS, WIDTH)
    ).astype(np.float32),
    "an outlier in the first row": lambda: np.concatenate(
        [np.full((1, WIDTH), 3e4, np.float32), normal(ROWS - 1, WIDTH)]
    ),
    "mean 1e5 times the deviation": lambda: (1e5 + normal(ROWS, WIDTH)).astype(np.float32),
    "a drift": lambda: normal(ROWS, WIDTH) + np.linspace(0, 1e3, ROWS, dtype=np.float32)[:, None],
    "constants": lambda: np.tile(np.linspace(-3, 1e30, WIDTH).astype(np.float32), (ROWS, 1)),
    "two neighbours": lambda: np.where(
        normal(ROWS, WIDTH) > 0, np.float32(1e4), np.nextafter(np.float32(1e4), np.float32(2e4))
    ),
    "zeros": lambda: np.maximum(normal(ROWS, WIDTH), 0) * np.float32(-1),
    "tiny": lambda: normal(ROWS, WIDTH) * np.float32(1e-20),
    "denormal": lambda: normal(ROWS, WIDTH) * np.float32(1e-40),
    "huge": lambda: normal(ROWS, WIDTH) * np.float32(1e30),
    "near the largest": lambda: np.sign(normal(ROWS, WIDTH)) * np.float32(3e38),
    "float16": lambda: normal(ROWS, WIDTH).astype(np.float16),
    "float16, largest": lambda: (np.sign(normal(ROWS, WIDTH)) * 65504).astype(np.float16),
    "float64": lambda: normal(ROWS, WIDTH).astype(np.float64) + 1e8,
    "int32": lambda: np.random.default_rng(0).integers(-9, 9, (ROWS, WIDTH), np.int32),
    "bool": lambda: normal(ROWS, WIDTH) > 0,
    "one feature": lambda: normal(ROWS, 1),
    "an even width": lambda: normal(ROWS, 8),
    "wide": lambda: normal(40, 9001),
    "one row": lambda: normal(1, WIDTH),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("cut")
def test_statistics_are_those_of_numpy_in_float64(case: str) -> None:
    values = CASES[case]()
    found = analysis.statistics(dataset(values), "v", quantiles=(0, 0.01, 0.3, 0.5, 0.77, 1))
    assert_right(found, values, 1e-8 if values.dtype == np.float64 else 3e-6)


@pytest.mark.usefixtures("cut")
def test_a_constant_has_no_variance_and_no_kurtosis() -> None:
    found = analysis.statistics(dataset(np.full((50, 2), 0.1, np.float32)))
    np.testing.assert_array_equal(found.v_variance, 0)
    assert np.isnan(found.v_kurtosis).all()
    np.testing.assert_array_equal(found.v_quantile, np.float32(0.1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.usefixtures("cut")
def test_what_is_not_finite_is_counted_and_left_out(dtype: Any) -> None:
    values = normal(60, 5).astype(dtype)
    values[3, 0] = np.nan
    values[[7, 9, 40], 1] = np.inf, -np.inf, np.nan
    values[:, 4] = np.nan
    found = analysis.statistics(dataset(values), quantiles=(0.5,))
    np.testing.assert_array_equal(found.v_nonfinite, [1, 3, 0, 0, 60])
    np.testing.assert_array_equal(found.v_count, [59, 57, 60, 60, 0])
    for column in range(4):
        mine = values[np.isfinite(values[:, column]), column][:, None]
        for name, expected in wanted(mine).items():
            tolerance = 1e-5 if name != "mean" else 1e-4
            close(found[f"v_{name}"][column], expected[0], tolerance)
    for name in wanted(values[:, 2:4]):
        assert np.isnan(found[f"v_{name}"][4])
    assert_quantiles(found.v_quantile, values[np.isfinite(values)])
    assert np.isnan(found.v_norm_mean)  # every row has a NaN


def test_there_may_be_no_rows_and_only_padding() -> None:
    for rows, pads in ((0, []), (3, [True] * 3)):
        empty = dataset(np.ones((2, rows, 3), np.float32), is_padding=np.array(pads, np.bool_))
        found = analysis.statistics(empty)
        assert (found.v_count == 0).all()
        for name in ("mean", "variance", "kurtosis", "minimum", "sparsity", "rms", "norm_max"):
            assert np.isnan(found[f"v_{name}"]).all(), name
        assert np.isnan(found.v_quantile).all()
        assert np.isnan(analysis.covariance(empty, "v")).all()
        assert np.isnan(analysis.pca(empty, "v").v_component).all()
        assert np.isnan(analysis.layer_change(empty, "v")).all()
        assert np.isnan(analysis.token_norms(empty).v_norm).all()
        assert not analysis.outlier_features(empty, "v").v_outlier.any()
        top = analysis.top_activations(empty, "v", [1], layer=2)
        assert (top.row == -1).all()
        assert (top.context_text == "").all()


# -- which rows ---------------------------------------------------------------------------------


def test_padding_and_missing_rows_are_left_out() -> None:
    values = normal(2, 30, 4)
    pads = np.arange(30) < 5
    there = np.ones((2, 30), np.bool_)
    there[1, [3, 10, 11]] = False
    values[~there] = np.nan
    whole = dataset(values, is_padding=pads).assign(v_present=(("layer", "token"), there))
    found = analysis.statistics(whole)
    keep = there & ~pads
    for layer in range(2):
        mine = values[layer, keep[layer]]
        assert_right(found.isel(layer=layer), mine)
    assert found.v_mean.attrs == {"rows": 25, "padding_left_out": 5, "missing_left_out": 2}
    norms = analysis.token_norms(whole).v_norm
    np.testing.assert_array_equal(~np.isnan(norms), keep)
    kept = analysis.statistics(whole, padding=True)
    assert_right(kept.isel(layer=0), values[0])
    assert kept.v_mean.attrs == {"rows": 30, "padding_left_out": 0, "missing_left_out": 3}
    spread = analysis.covariance(whole, "v")
    mine = values[1, keep[1]].astype(np.float64)
    np.testing.assert_allclose(spread[1], np.cov(mine.T, bias=True), rtol=1e-5, atol=1e-6)


def test_variables_that_are_not_numbers_of_rows_are_refused_by_name() -> None:
    one = dataset(normal(4, 2)).assign(
        z=(("token", "feature"), np.ones((4, 2), np.complex64)),
        n=(("token", "feature"), np.ones((4, 2), np.int64)),
        other=("thing", np.ones(3)),
    )
    assert {name.split("_")[0] for name in map(str, analysis.statistics(one))} == {"v"}
    assert analysis.statistics(one, ["n"]).n_mean.values.tolist() == [1, 1]
    for name in ("z", "other", "none"):
        with pytest.raises(ConfigError, match=name):
            analysis.statistics(one, name)
    with pytest.raises(ConfigError, match="real numbers"):
        analysis.statistics(one, "z")
    with pytest.raises(ConfigError, match="no variable"):
        analysis.statistics(one[["n"]])
    with pytest.raises(ConfigError, match=r"wanted an xarray\.Dataset"):
        analysis.statistics(one.v)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantiles": [0.5, 1.5]}, "from 0 to 1"),
        ({"quantiles": ["x"]}, "from 0 to 1"),
        ({"sample": 0}, "sample"),
        ({"workers": 0}, "workers"),
        ({"max_memory_gb": -1}, "max_memory_gb"),
        ({"max_memory_gb": 1e-9}, "too little"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        analysis.statistics(dataset(normal(4, 2)), **options)


def test_without_dask_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"actstore\[dask\]"):
        analysis.token_norms(dataset(normal(4, 2)))


def test_results_have_the_labels_of_what_they_are_of() -> None:
    one = dataset(normal(3, 9, 4)).assign_coords(
        feature=[1, 5, 6, 9], module=("layer", ["a", "b", "c"]), run=0
    )
    found = analysis.statistics(one, quantiles=(0.5,))
    assert found.v_mean.dims == ("layer", "feature")
    assert found.v_quantile.dims == ("layer", "quantile")
    assert found.layer.values.tolist() == [0, 2, 4]
    assert found.module.values.tolist() == ["a", "b", "c"]
    assert found.feature.values.tolist() == [1, 5, 6, 9]
    assert analysis.statistics(one.isel(layer=1)).v_mean.dims == ("feature",)
    assert analysis.statistics(one.isel(layer=1)).layer.item() == 2
    spread = analysis.covariance(one, "v")
    assert spread.feature_other.values.tolist() == [1, 5, 6, 9]
    change = analysis.layer_change(one, "v")
    assert change.layer.values.tolist() == [2, 4]
    assert change.module.values.tolist() == ["b", "c"]
    assert change.token_text.values.tolist() == one.token_text.values.tolist()


# -- however the rows are cut -------------------------------------------------------------------


@st.composite
def split_values(draw: st.DrawFn) -> tuple[Values, list[int]]:
    values = draw(
        arrays.arrays(
            np.float32,
            st.tuples(st.integers(1, 60), st.integers(1, 5)),
            elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1e4, np.nan, np.inf]),
        )
    )
    cuts = draw(st.lists(st.integers(0, len(values)), max_size=6))
    return values, sorted(cuts)


@given(split_values())
def test_any_split_of_the_rows_gives_the_same_state(case: tuple[Values, list[int]]) -> None:
    values, cuts = case
    variable = xr.Variable(("token", "feature"), values)

    def state(rows: slice) -> moments.State:
        part = variable[rows]
        keep = np.ones(part.shape[0], np.bool_)
        return moments.state_of(part, keep, 1 << 20, every=1, threshold=100.0)

    whole = state(slice(None))
    bounds = [0, *cuts, len(values)]
    parts = [state(slice(*pair)) for pair in pairwise(bounds)]
    merged = moments.merge_states(parts)
    one, other = whole.moments, merged.moments
    for name in ("count", "minimum", "maximum", "zeros", "nonfinite", "large"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    np.testing.assert_array_equal(whole.histogram, merged.histogram)
    x = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    count = np.maximum(np.isfinite(x).sum(axis=0), 1)
    mean = np.nansum(x, axis=0) / count
    with np.errstate(all="ignore"):
        for power, name in ((2, "second"), (3, "third"), (4, "fourth")):
            exact = np.nansum((x - mean) ** power, axis=0)
            scale = np.nansum(np.abs(x - mean) ** power, axis=0) * 1e-5 + 1e-30
            for found in (one, other):
                assert (np.abs(getattr(found, name) - exact) <= scale).all(), name
    np.testing.assert_allclose(
        other.mean, one.mean, rtol=1e-6, atol=1e-6 * np.nanmax(np.abs(np.r_[x.ravel(), 1]))
    )
    assert whole.norms.count == merged.norms.count
    assert whole.norms.total == pytest.approx(merged.norms.total)


@given(arrays.arrays(np.float32, st.integers(1, 200), elements=st.floats(width=32)))
def test_a_quantile_is_within_its_relative_error(values: Values) -> None:
    histogram = np.zeros(sketch.BINS, np.int64)
    sketch.count(values, 1, np.empty(values.size, np.int64), histogram)
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        assert np.isnan(sketch.quantiles(histogram, np.array([0.5]), np.inf, -np.inf)).all()
        return
    shares = np.linspace(0, 1, 11)
    found = sketch.quantiles(histogram, shares, finite.min(), finite.max())
    expected = np.quantile(finite, shares, method="inverted_cdf")
    assert (np.abs(found - expected) <= np.maximum(np.abs(expected), 2.0**-125) * 2.0**-8).all()


@pytest.mark.parametrize("width", [1, 6, 33, 9001])
@pytest.mark.usefixtures("cut")
def test_a_sample_is_of_the_same_number_of_values_of_each_row_and_feature(width: int) -> None:
    rows = 35
    values = (np.arange(rows * width).reshape(rows, width) % 2**15).astype(np.float64)
    bins = (values + 2**14).astype(np.uint32) << 16  # floats of which each has its own bin
    found = analysis.statistics(
        dataset(bins.view(np.float32)), quantiles=(0, 0.5), sample=values.size // 6
    )
    every = found.v_quantile.attrs["every"]
    assert every == {1: 7, 6: 5, 33: 5, 9001: 5}[width]
    counted = []
    honest = moments.merge_states
    (one,) = source.sources(dataset(bins.view(np.float32)), "v", padding=False)
    state = moments.state_of(one.variable, one.keep[0], 7, every=every)
    assert honest([state, state]).histogram.sum() == 2 * state.histogram.sum()
    if width < 4096:
        counted = np.flatnonzero(state.histogram) - 2**14
        np.testing.assert_array_equal(counted, np.arange(0, values.size, every))
        assert set(np.bincount(counted % width, minlength=width)) <= {
            rows // every,
            rows // every + 1,
        }
    assert abs(state.histogram.sum() - values.size / every) <= 1


def test_values_beyond_float32_count_as_its_largest() -> None:
    values = np.array([[1e300], [-1e300], [2.0], [np.inf]])
    found = analysis.statistics(dataset(values), quantiles=(0.01, 0.5, 0.99))
    largest = float(np.finfo(np.float32).max)
    np.testing.assert_allclose(found.v_quantile, [-largest, 2, largest], rtol=2.0**-8)


def test_the_same_call_gives_the_same_bits_whatever_the_workers(archive: Path) -> None:
    with actstore.open_dataset(archive) as found:
        one, other = (analysis.statistics(found, workers=count) for count in (1, 3))
        xr.testing.assert_identical(one, other)


def test_tasks_can_be_sent_to_other_processes(archive: Path) -> None:
    with actstore.open_dataset(archive, chunks=None) as found:
        (resid,) = source.sources(found, "resid", padding=False)
        part = next(resid.parts(1, 10))
        work, keep = pickle.loads(pickle.dumps((moments.state_of, part)))
        there = np.ones(keep.shape[0], np.bool_)
        state = work(keep, there, 4, every=1, threshold=np.inf)
        again = pickle.loads(pickle.dumps(state))
        np.testing.assert_array_equal(again.moments.maximum, found.resid[1, :10].max("token"))


# -- whatever it was opened from ----------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> LogBuilder:
    """Write a log of finite values, with padding, missing rows, and a prompt that goes on."""
    built = LogBuilder(tmp_path / "run.stream")
    for block in range(3):
        built.layer(f"h.{block}", "resid", block)
    built.layer("norm", "final_norm")
    built.texts({100 + one: f"<{one}>" for one in range(20)})
    for number in range(5):
        rows = (2, 6) if number == 0 else (2, 1)
        mask = [[False, False, True, True, True, True], [True] * 6] if number == 0 else None
        start = 0 if number == 0 else 5 + number
        built.begin(axis(*rows, start=start, mask=mask))
        for block in range(3):
            if (number, block) != (3, 1):
                built.put(f"h.{block}", normal(*rows, 8, seed=10 * number + block))
        built.put("norm", normal(*rows, 8, seed=99 + number))
        built.commit()
    built.close()
    return built


@pytest.fixture
def archive(log: LogBuilder) -> Path:
    return actstore.compact(log.path, log.path.with_suffix(".zarr")).path


@pytest.fixture(
    params=["log", "archive", "log, dask", "archive, dask", "chunked", "plain", "loaded"]
)
def opened(request: pytest.FixtureRequest, log: LogBuilder, archive: Path) -> Iterator[xr.Dataset]:
    how = request.param
    if how == "plain":
        found = xr.open_zarr(archive)
    elif how == "loaded":
        found = actstore.open_dataset(archive).load()
    else:
        place = log.path if how.startswith("log") else archive
        chunks: Any = {"token": 4} if how == "chunked" else "auto" if "dask" in how else None
        found = actstore.open_dataset(place, chunks)
    with found:
        yield found


def test_log_and_archive_however_opened_give_the_same(opened: xr.Dataset, archive: Path) -> None:
    loaded = actstore.open_dataset(archive).load()
    calls: list[Callable[[xr.Dataset], Any]] = [
        analysis.statistics,
        analysis.token_norms,
        lambda one: analysis.covariance(one, "resid"),
        lambda one: analysis.pca(one, "resid", components=3),
        analysis.layer_change,
        lambda one: analysis.outlier_features(one, "resid"),
        lambda one: analysis.top_activations(one, "resid", [0, 3], layer=1, k=3),
        lambda one: analysis.top_activations(one, "final_norm", 7, k=3),
    ]
    for call in calls:
        xr.testing.assert_allclose(call(opened), call(loaded), rtol=1e-6)
    computed = opened.assign(v=opened.resid * 2)
    xr.testing.assert_allclose(
        analysis.statistics(computed, "v").v_mean, 2 * analysis.statistics(loaded).resid_mean
    )
    chosen = opened.actstore.where(position=lambda place: place % 2 == 1)
    some = loaded.actstore.where(position=lambda place: place % 2 == 1)
    xr.testing.assert_allclose(analysis.statistics(chosen), analysis.statistics(some), rtol=1e-6)
    turned = opened.transpose(..., "token")
    xr.testing.assert_allclose(
        analysis.statistics(turned).resid_mean, analysis.statistics(loaded).resid_mean
    )


def test_every_chunk_is_read_once(log: LogBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    from actstore.archive import grid, reading

    monkeypatch.setattr(grid, "CHUNK_BYTES", 4 * 32)
    archive = actstore.compact(log.path, log.path.with_suffix(".few.zarr")).path
    seen: list[tuple[str, int, int]] = []
    honest = reading.ShardedRows._encoded

    def counting(self: Any, layer: int, chunk: int) -> Any:
        seen.append((self.folder.name, layer, chunk))
        return honest(self, layer, chunk)

    monkeypatch.setattr(reading.ShardedRows, "_encoded", counting)
    with actstore.open_dataset(archive) as found:
        analysis.statistics(found)
    assert len(seen) == len(set(seen)) > 10


def test_chunks_of_dask_that_do_not_fit_are_refused(archive: Path) -> None:
    with xr.open_zarr(archive) as found, pytest.raises(ConfigError, match="chunks=None"):
        analysis.statistics(found, max_memory_gb=1e-6)


# -- features together, and rows ----------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [one for one in CASES if one not in ("wide", "near the largest", "denormal")]
)
@pytest.mark.usefixtures("cut")
def test_covariance_is_that_of_numpy_in_float64(case: str) -> None:
    values = CASES[case]()
    found = analysis.covariance(dataset(values), "v")
    x = values.astype(np.float64)
    apart = x - x.mean(axis=0)
    expected = apart.T @ apart / len(x)
    spread = np.sqrt(expected.diagonal())
    error = np.abs(found.values - expected)
    assert (error <= 3e-6 * np.outer(spread, spread) + 1e-300).all()
    assert found.attrs["rows"] == len(values)


def test_rows_that_are_not_finite_are_left_out_of_the_covariance() -> None:
    values = normal(50, 4)
    values[3, 1], values[20, 2] = np.nan, np.inf
    found = analysis.covariance(dataset(values), "v")
    mine = np.delete(values, [3, 20], axis=0).astype(np.float64)
    np.testing.assert_allclose(found, np.cov(mine.T, bias=True), rtol=1e-6, atol=1e-7)
    assert found.attrs["nonfinite_left_out"] == 2


@pytest.mark.usefixtures("cut")
def test_components_are_the_directions_of_most_variance() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((6, 6)) * [9, 5, 3, 1, 0.5, 0.1]
    values = (rng.standard_normal((2, 300, 6)) @ mixing.T + 50).astype(np.float32)
    found = analysis.pca(dataset(values), "v", components=4)
    for layer in range(2):
        x = values[layer].astype(np.float64)
        _, singular, axes = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
        variances = singular**2 / len(x)
        np.testing.assert_allclose(found.v_explained_variance[layer], variances[:4], rtol=1e-4)
        np.testing.assert_allclose(
            found.v_explained_variance_ratio[layer], variances[:4] / variances.sum(), rtol=1e-4
        )
        mine = found.v_component[layer].values
        np.testing.assert_allclose(np.abs((mine * axes[:4]).sum(axis=1)), 1, rtol=1e-5)
        assert (mine[range(4), np.abs(mine).argmax(axis=1)] > 0).all()
        np.testing.assert_allclose(found.v_mean[layer], x.mean(axis=0), rtol=1e-6)
    assert analysis.pca(dataset(values), "v", components=99).sizes["component"] == 6


def test_a_covariance_that_does_not_fit_says_what_it_needs() -> None:
    wide = dataset(np.zeros((2, 3000), np.float32))
    for call in (analysis.covariance, analysis.pca):
        with pytest.raises(ConfigError, match=r"3000 features.* GB: give that much"):
            call(wide, "v", max_memory_gb=0.1)
    heads = xr.Dataset(
        {"v": (("token", "head", "x"), np.zeros((2, 3, 4)))}, dataset([[1.0]] * 2).coords
    )
    with pytest.raises(ConfigError, match="no one of them is features"):
        analysis.covariance(heads, "v")
    with pytest.raises(ConfigError, match="components"):
        analysis.pca(wide, "v", components=0)


@pytest.mark.parametrize("scale", [1, 1e-25, 1e25])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.usefixtures("cut")
def test_norms_and_cosines_are_those_of_numpy_in_float64(scale: float, dtype: Any) -> None:
    factor = 1 if dtype == np.float16 else scale
    values = (normal(3, 40, 12) * factor).astype(dtype)
    values[1, 5] = 0
    one = dataset(values)
    x = values.astype(np.float64)
    np.testing.assert_allclose(
        analysis.token_norms(one).v_norm, np.linalg.norm(x, axis=-1), rtol=1e-6
    )
    with np.errstate(all="ignore"):
        units = x / np.linalg.norm(x, axis=-1, keepdims=True)
    expected = (units[1:] * units[:-1]).sum(axis=-1)
    np.testing.assert_allclose(analysis.layer_change(one, "v"), expected, atol=1e-6)
    assert np.isnan(analysis.layer_change(one, "v")[0, 5])


def test_layers_to_compare_must_be_two() -> None:
    for one in (dataset(normal(4, 2)), dataset(normal(1, 4, 2))):
        with pytest.raises(ConfigError, match="no two layers"):
            analysis.layer_change(one, "v")


def test_outliers_are_features_far_over_the_median() -> None:
    values = normal(4, 100, 10)
    values[:, :, 3] *= 50
    values[0, :5, 7] = 6  # large, but in 5 % of the rows
    values[1, :7, 8] = -6  # in 7 %, and in one layer of four
    values[2, :, 9] = 5.9
    found = analysis.outlier_features(dataset(values), "v", factor=8.0)
    rms = np.sqrt((values.astype(np.float64) ** 2).mean(axis=1))
    np.testing.assert_allclose(found.v_rms, rms, rtol=1e-6)
    ratio = rms / np.median(rms, axis=1, keepdims=True)
    np.testing.assert_allclose(found.v_rms_ratio, ratio, rtol=1e-6)
    np.testing.assert_array_equal(found.v_outlier, ratio > 8)
    np.testing.assert_allclose(found.v_large, (np.abs(values) >= 6).mean(axis=1))
    assert np.flatnonzero(found.v_llm_int8).tolist() == [3, 8]
    with pytest.raises(ConfigError, match="factor"):
        analysis.outlier_features(dataset(values), "v", factor=0)


@pytest.mark.usefixtures("cut")
def test_top_activations_are_the_largest_earlier_rows_first() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 20, (50, 3)).astype(np.float32)
    values[10, 0] = np.nan
    values[11] = np.inf
    pads = np.arange(50) == 12
    values[12] = 1e9
    found = analysis.top_activations(dataset(values, is_padding=pads), "v", [2, 0], k=12)
    for place, feature in enumerate([2, 0]):
        column = np.where(pads | np.isnan(values[:, feature]), -np.inf, values[:, feature])
        expected = np.argsort(-column, kind="stable")[:12]
        np.testing.assert_array_equal(found.row[place], expected)
        np.testing.assert_array_equal(found.value[place], column[expected])
        np.testing.assert_array_equal(found.token_id[place], expected)
    assert found.feature.values.tolist() == [2, 0]


def test_the_context_is_of_the_same_sequence_through_its_passes(archive: Path) -> None:
    with actstore.open_dataset(archive) as found:
        top = analysis.top_activations(found, "resid", [4], layer=2, k=50, context=20)
        table = found.actstore.table()
    assert top.sizes["rank"] == (~table.is_padding).sum()
    for rank in range(top.sizes["rank"]):
        row = table.loc[top.row.values[0, rank]]
        mine = table[(table.batch_item == row.batch_item) & ~table.is_padding]
        around = top.isel(feature=0, rank=rank)
        there = around.context_row.values >= 0
        assert around.context_row.values[there].tolist() == mine.index.tolist()
        assert around.context_text.values[there].tolist() == mine.token_text.tolist()
        assert around.context_id.values[there].tolist() == mine.token_id.tolist()
        assert around.context_row.sel(offset=0) == around.row
        assert (around.context_text.values[~there] == "").all()
        assert around.position == row.position


def test_a_context_ends_where_positions_do_not_follow() -> None:
    position = np.array([0, 1, 2, 0, 1, 5])
    one = dataset(normal(6, 1), position=position, pass_index=np.array([0, 0, 0, 1, 1, 2]))
    top = (
        analysis.top_activations(one, "v", 0, k=6, context=5).sortby("row", "rank")
        if False
        else (analysis.top_activations(one, "v", 0, k=6, context=5))
    )
    around = {
        int(row): sorted(one for one in rows if one >= 0)
        for row, rows in zip(top.row.values[0], top.context_row.values[0].tolist(), strict=True)
    }
    assert around == {0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1, 2], 3: [3, 4], 4: [3, 4], 5: [5]}


def test_features_and_layers_go_by_their_labels() -> None:
    one = dataset(normal(2, 9, 3)).assign_coords(feature=[10, 20, 30])
    top = analysis.top_activations(one, "v", 20, layer=2, k=1)
    assert top.value.item() == one.v.sel(layer=2, feature=20).max()
    for features, layer, said in (
        (1, 2, "labels of 'feature'"),
        ([], 2, "integers"),
        ([1.5], 2, "integers"),
        (20, None, "layer"),
        (20, 1, "layer"),
    ):
        with pytest.raises(ConfigError, match=said):
            analysis.top_activations(one, "v", features, layer=layer)
    with pytest.raises(ConfigError, match="leave layer out"):
        analysis.top_activations(one.isel(layer=0), "v", 20, layer=0)
    for options in ({"k": 0}, {"context": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            analysis.top_activations(one, "v", 20, layer=0, **options)


def test_two_token_axes_are_looked_at_each_by_itself() -> None:
    one = (
        dataset(normal(5, 2))
        .rename(
            {
                name: f"encoder_{name}"
                for name in (
                    "token",
                    "pass_index",
                    "batch_item",
                    "position",
                    "token_id",
                    "token_text",
                    "is_padding",
                )
            }
        )
        .rename(v="e")
    )
    other = dataset(normal(7, 3)).rename(feature="x")
    both = xr.merge([one, other], combine_attrs="drop")
    both["encoder_is_padding"][0] = True
    found = analysis.statistics(both)
    assert found.e_count.values.tolist() == [4, 4]
    assert found.v_count.values.tolist() == [7, 7, 7]
    top = analysis.top_activations(both, "e", 1, k=1)
    assert top.token_text.item() == both.encoder_token_text[top.row.item()]


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, actstore.analysis; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_random_bits_of_every_kind_are_taken(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    with actstore.open_dataset(log.path) as found, np.errstate(invalid="ignore"):
        some = analysis.statistics(found)
        x = found.resid.values.astype(np.float64)
    finite = np.isfinite(x)
    np.testing.assert_array_equal(some.resid_nonfinite, (~finite).sum(axis=1))
    mean = np.where(finite, x, 0).sum(axis=1) / finite.sum(axis=1)
    np.testing.assert_allclose(
        some.resid_mean, mean, rtol=1e-6, atol=1e-6 * np.abs(x[finite]).max()
    )


# -- kept in the archive ------------------------------------------------------------------------


def test_results_are_kept_in_the_archive_and_verified(archive: Path) -> None:
    with actstore.open_dataset(archive) as found:
        summary = analysis.statistics(found)
        top = analysis.top_activations(found, "resid", [1, 2], layer=1, k=3)
        change = analysis.layer_change(found)
    for name, one in (("summary", summary), ("top", top), ("change", change.to_dataset())):
        analysis.save(one, archive, name)
        again = analysis.saved(archive, name)
        xr.testing.assert_identical(_as_text(again), _as_text(one))
        with xr.open_zarr(archive, group=f"statistics/{name}", consolidated=False) as plain:
            xr.testing.assert_equal(_as_text(plain.compute()), _as_text(one))
    assert actstore.verify(archive).ok
    with actstore.open_dataset(archive) as found:
        xr.testing.assert_identical(analysis.statistics(found), summary)
    chunk = next(
        one for one in (archive / "statistics/summary/resid_mean/c").rglob("*") if one.is_file()
    )
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    damaged = actstore.verify(archive)
    assert not damaged.ok
    assert "statistics/summary/resid_mean" in str(damaged.damage)


def _as_text(one: xr.Dataset) -> xr.Dataset:
    """Give text as objects, however it is held."""
    return one.assign(
        {name: v.astype(object) for name, v in one.variables.items() if v.dtype.kind in "OUT"}
    )


def test_results_are_replaced_only_when_asked(archive: Path) -> None:
    one = analysis.statistics(dataset(normal(4, 2)), quantiles=())
    analysis.save(one, archive, "mine")
    with pytest.raises(ConfigError, match="replace=True"):
        analysis.save(one, archive, "mine")
    analysis.save(one.v_mean, archive, "mine", replace=True)
    assert list(analysis.saved(archive)) == ["v_mean"]
    actstore.remove_added(archive, "statistics/mine")
    with pytest.raises(ConfigError, match="which has none"):
        analysis.saved(archive)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", None])
def test_a_name_that_is_no_folders_is_refused(archive: Path, name: Any) -> None:
    with pytest.raises(ConfigError):
        analysis.save(analysis.token_norms(dataset(normal(4, 2))), archive, name)
    assert actstore.verify(archive).ok


def test_only_archives_keep_results_and_only_results_are_kept(
    log: LogBuilder, archive: Path
) -> None:
    one = analysis.token_norms(dataset(normal(4, 2)))
    with pytest.raises(actstore.ActstoreError, match="archive"):
        analysis.save(one, log.path, "x")
    with pytest.raises(ConfigError, match="results must be"):
        analysis.save({}, archive, "x")  # type: ignore[arg-type]


def test_codes_are_not_taken_for_values(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("h.0", "resid", 0)
    log.begin(axis(2, 40))
    log.put("h.0", normal(2, 40, 64))
    log.commit()
    log.close()
    archive = actstore.compact(log.path, tmp_path / "small.zarr", precision="int8").path
    with actstore.open_dataset(archive) as found, xr.open_zarr(archive) as plain:
        assert plain.resid.dtype.kind in "iu"
        for variables in (None, "resid"):
            with pytest.raises(ConfigError, match="decode"):
                analysis.statistics(plain, variables)
        xr.testing.assert_allclose(
            analysis.statistics(plain.actstore.decode()), analysis.statistics(found)
        )
