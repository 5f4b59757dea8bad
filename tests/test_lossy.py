"""Archives of less precision: what plain readers see, what is promised, what is said of it."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tensorstore
import xarray as xr
from numpy.typing import NDArray

import actstore
from actstore.archive import grid
from actstore.archive.precision import decoded
from actstore.choosing import choose_precision
from actstore.errors import ArchiveError, ConfigError

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, files_of

SCHEMA = Path(__file__).parents[1] / "schemas" / "archive.schema.json"
CODED = ("int8", "mse=1e-3", "nmse=2e-4")
PLAIN = ("relative=0.01", "float16", "bfloat16")
WIDTH, ROWS = 64, 40


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut chunks of 8 rows, and shards of 16."""
    monkeypatch.setattr(grid, "CHUNK_BYTES", 8 * WIDTH * 4)
    monkeypatch.setattr(grid, "SHARD_BYTES", 16 * WIDTH * 4)


def made(path: Path, *, outlier: float = 0.0, dtype: str = "float32") -> LogBuilder:
    """Write a log: two blocks, the second without some rows; integers; small rows; a ragged one.

    ``outlier`` is in row 21 of block 0: the second chunk of the second shard.
    """
    generator = np.random.default_rng(3)
    log = LogBuilder(path)
    for block in range(2):
        log.layer(f"h.{block}", "resid", block)
    for name in ("wide", "count", "gate", "loose"):
        log.layer(name)
    for number in range(ROWS // 4):
        log.begin(axis(1, 4))
        values = generator.standard_normal((2, 1, 4, WIDTH)).astype(dtype)
        if number == 5:
            values[0, 0, 1, 7] += np.array(outlier, dtype)
        log.put("h.0", values[0])
        if number > 2:
            log.put("h.1", 3 * values[1])
        log.put("wide", generator.standard_normal((1, 4, WIDTH)))
        log.put("count", generator.integers(0, 9, (1, 4, 3)).astype(np.int32))
        log.put("gate", generator.standard_normal((1, 4, 3)).astype(np.float32))
        log.put("loose", generator.standard_normal((7, 5)).astype(np.float32))
    return log


def compacted(tmp_path: Path, precision: Any, **how: Any) -> tuple[xr.Dataset, xr.Dataset, Path]:
    """Give the datasets of a log and of its archive, and the archive."""
    log = made(tmp_path / "run.stream", **how).close()
    actstore.compact(log, tmp_path / "run.zarr", precision=precision)
    with actstore.open_dataset(log) as source:
        return (
            source.compute(),
            actstore.open_dataset(tmp_path / "run.zarr"),
            tmp_path / "run.zarr",
        )


def off(one: xr.DataArray, other: xr.DataArray) -> NDArray[np.float64]:
    found: NDArray[np.float64] = one.values.astype("f8") - other.values.astype("f8")
    return found


@pytest.mark.parametrize("precision", [*PLAIN, *CODED])
def test_what_is_read_is_within_the_bound_and_everything_else_is_whole(
    tmp_path: Path, precision: str
) -> None:
    source, found, archive = compacted(tmp_path, precision)
    bound = float(precision.partition("=")[2] or 0)
    for name in ("resid", "wide"):
        assert found[name].dtype == source[name].dtype
        assert found[name].attrs["precision"] == str(actstore.Precision.parse(precision))
        error, size = off(found[name], source[name]), np.abs(source[name].values.astype("f8"))
        gone = np.isnan(size)
        assert np.array_equal(np.isnan(error), gone)
        error, size = np.abs(error[~gone]), size[~gone]
        assert error.any()
        if precision.startswith("relative"):
            assert (error <= bound * size).all()
        elif precision.startswith("mse"):
            assert (error**2).mean() <= bound
        elif precision.startswith("nmse"):
            assert (error**2).sum() <= bound * (size**2).sum()
        else:
            assert (error <= size.max() / 252).all()
    assert ("precision" in found.gate.attrs) == (precision not in ("int8", "nmse=2e-4"))
    xr.testing.assert_identical(found["count"].compute(), source["count"])
    xr.testing.assert_identical(found.loose_values.compute(), source.loose_values)
    assert set(found.variables) == set(source.variables)
    assert actstore.verify(archive, against=tmp_path / "run.stream").ok


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("precision", [*PLAIN, *CODED])
def test_every_dtype_of_floats_can_be_smaller(tmp_path: Path, precision: str, dtype: str) -> None:
    source, found, archive = compacted(tmp_path, precision, dtype=dtype)
    wide = precision in CODED and dtype == "float16"  # values between those of float16
    assert found.resid.dtype == (np.float32 if wide else source.resid.dtype)
    error = off(found.resid, source.resid)[0]
    assert np.abs(error).max() < 0.06
    assert actstore.verify(archive, against=tmp_path / "run.stream").ok


@pytest.mark.parametrize("precision", PLAIN)
def test_plain_floats_are_what_any_reader_decodes(tmp_path: Path, precision: str) -> None:
    _, found, archive = compacted(tmp_path, precision)
    with xr.open_zarr(archive) as plain:
        assert plain.resid.equals(found.resid.compute())
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{archive / 'resid'}/"}}
    values = tensorstore.open(spec, read=True).result().read().result()
    assert np.array_equal(values, found.resid.values, equal_nan=True)


def test_xarray_decodes_a_uniform_step_by_itself(tmp_path: Path) -> None:
    _, found, archive = compacted(tmp_path, "mse=1e-3")
    with xr.open_zarr(archive) as plain:
        assert "scale_factor" in plain.resid.encoding
        assert np.array_equal(plain.resid.values.astype("f4"), found.resid.values, equal_nan=True)
        assert "resid_scale" not in plain


@pytest.mark.parametrize("precision", CODED)
@pytest.mark.parametrize("outlier", [0.0, 1e6, np.nan])
@pytest.mark.parametrize("decoded", [True, False])
def test_what_others_opened_is_decoded_by_the_accessor(
    tmp_path: Path, precision: str, outlier: float, *, decoded: bool
) -> None:
    _, found, archive = compacted(tmp_path, precision, outlier=outlier)
    with xr.open_zarr(archive, mask_and_scale=decoded) as plain:
        assert plain.resid.chunks is not None
        ours = plain.actstore.decode()
        assert ours.resid.chunks is not None
        assert set(ours.variables) == set(found.variables)
        for name in ("resid", "wide"):
            xr.testing.assert_identical(ours[name].compute(), found[name].compute())


@pytest.mark.parametrize("precision", CODED)
@pytest.mark.parametrize("outlier", [1e6, np.nan, np.inf])
def test_a_chunk_that_would_break_the_bound_is_whole_and_no_other(
    tmp_path: Path, precision: str, outlier: float
) -> None:
    source, found, archive = compacted(tmp_path, precision, outlier=outlier)
    kept = slice(16, 24)
    whole = found.resid.isel(layer=0, token=kept).values
    if precision != "mse=1e-3" and outlier == 1e6:
        assert not np.array_equal(whole, source.resid.isel(layer=0, token=kept).values)
        return  # one value is the row's scale: the others are small beside it, and become 0
    assert whole.tobytes() == source.resid.isel(layer=0, token=kept).values.tobytes()
    source.resid.values[0, kept] = np.nan
    rest = off(found.resid, source.resid)
    assert (np.nan_to_num(rest) != 0).sum() > 0.9 * np.isfinite(rest).sum()
    with xr.open_zarr(archive) as plain:
        there = np.zeros((2, ROWS), np.bool_)
        there[0, kept] = True
        assert np.array_equal(plain.resid_exact_present, there)
        assert "wide_exact" not in plain
    assert [*files_of(archive / "resid_exact" / "c")] == ["0/1/0"]
    errors = json.loads((archive / "zarr.json").read_bytes())["attributes"]["analysis"]
    assert errors["per_layer"]["h.0"]["errors"]["lossless_elements"] in (8 * WIDTH, 8 * WIDTH - 1)
    assert actstore.verify(archive, against=tmp_path / "run.stream").ok


@pytest.mark.parametrize("precision", CODED)
@pytest.mark.parametrize("chunks", ["auto", None])
def test_any_part_of_codes_is_read_as_the_whole_is(
    tmp_path: Path, precision: str, chunks: Any
) -> None:
    _, whole, archive = compacted(tmp_path, precision, outlier=np.nan)
    values = whole.resid.values
    with actstore.open_dataset(archive, chunks=chunks) as found:
        again = pickle.loads(pickle.dumps(found))
        for one in (found, again):
            part = one.resid.isel(layer=[1, 0], token=[30, 2, 21, 22], feature=slice(3, 50, 7))
            wanted = values[[1, 0]][:, [30, 2, 21, 22]][:, :, 3:50:7]
            assert np.array_equal(part.values, wanted, equal_nan=True)
        last = found.actstore.last_positions()
        assert np.array_equal(last.resid.values, values[:, 3::4], equal_nan=True)
        assert found.resid.isel(token=slice(0, 0)).values.shape == (2, 0, WIDTH)


@pytest.mark.parametrize("what", ["resid", "resid_scale", "resid_exact"])
@pytest.mark.parametrize("gone", [True, False])
def test_damage_to_each_part_is_found_and_never_read(
    tmp_path: Path, what: str, *, gone: bool
) -> None:
    _, found, archive = compacted(tmp_path, "nmse=2e-4", outlier=np.nan)
    files = [path for path in sorted((archive / what / "c" / "0").rglob("*")) if path.is_file()]
    path = next(one for one in files if "1" in one.relative_to(archive / what / "c" / "0").parts)
    if gone:
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[1] ^= 1
        path.write_bytes(data)
    report = actstore.verify(archive)
    assert not report.ok
    assert all(one.where.startswith(f"{what}/c/0/1") for one in report.damage)
    if not gone:
        with pytest.raises(ArchiveError, match="damaged"):
            found.resid.isel(layer=0, token=slice(16, 24)).values  # noqa: B018


def test_what_is_said_of_errors_is_what_they_are(tmp_path: Path) -> None:
    source, found, archive = compacted(tmp_path, {"resid": "nmse=2e-4", "g*": "bfloat16"})
    config = actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR)
    said = actstore.InstrumentationFramework(config).analyze_activations(archive)["per_layer"]
    error = off(found.resid, source.resid)
    for block in range(2):
        mine = said[f"h.{block}"]["errors"]
        there = np.isfinite(error[block])
        square = np.square(source.resid.values[block][there].astype("f8"))
        assert mine["precision"] == "nmse=0.0002"
        assert mine["mse"] == pytest.approx(np.nanmean(error[block] ** 2))
        assert mine["nmse"] == pytest.approx(np.nansum(error[block] ** 2) / square.sum())
        assert mine["mean_error"] == pytest.approx(np.nanmean(np.abs(error[block])))
        assert mine["largest_error"] == pytest.approx(np.nanmax(np.abs(error[block])))
        assert mine["elements"] == there.sum()
        assert mine["lossless_elements"] == 0
    assert said["gate"]["errors"]["precision"] == "bfloat16"
    assert "errors" not in said["wide"]
    attributes = json.loads((archive / "zarr.json").read_bytes())["attributes"]
    assert attributes["precision"] == {"resid": "nmse=0.0002", "gate": "bfloat16"}


@pytest.mark.parametrize("precision", [*PLAIN, *CODED, None])
def test_metadata_are_what_the_schema_says(tmp_path: Path, precision: str | None) -> None:
    _, _, archive = compacted(tmp_path, precision, outlier=np.inf)
    root = json.loads((archive / "zarr.json").read_bytes())
    schema = json.loads(SCHEMA.read_bytes())
    jsonschema.validate(root["attributes"], schema)
    for name in ("resid", "wide", "gate"):
        said = root["consolidated_metadata"]["metadata"][name]["attributes"]
        jsonschema.validate(said, {"$ref": "#/$defs/values", "$defs": schema["$defs"]})


def test_a_mapping_says_it_of_some_and_the_first_that_matches_counts(tmp_path: Path) -> None:
    _, found, _ = compacted(tmp_path, {"wide": "float16", "*": "relative=0.1"})
    assert found.wide.attrs["precision"] == "float16"
    assert found.resid.attrs["precision"] == "relative=0.1"


def test_the_name_of_a_variable_is_of_no_other_of_its_site(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("h", "resid", 0)
    log.begin(axis(1, 4))
    for call in range(2):
        log.put("h", np.ones((1, 4, WIDTH), np.float32), call=call)
    actstore.compact(log.close(), tmp_path / "run.zarr", precision={"resid": "int8"})
    with actstore.open_dataset(tmp_path / "run.zarr") as found:
        assert found.resid.attrs["precision"] == "int8"
        assert "precision" not in found.resid_call1.attrs


def test_codes_are_counted_from_what_the_metadata_say() -> None:
    codes = np.array([[5, 7]], np.uint16)
    assert decoded(codes, np.array([2], "f4"), "f4", 6).tolist() == [[-2, 2]]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("int3", "precision must be one of"),
        ({"residue": "int8"}, "precision names 'residue', which no variable is called; there are"),
        ({"resid": 3}, "a precision is a str"),
    ],
)
def test_a_precision_that_can_not_be_is_refused_before_anything_is_written(
    tmp_path: Path, wrong: Any, said: str
) -> None:
    log = made(tmp_path / "run.stream").close()
    with pytest.raises(ConfigError, match=said):
        actstore.compact(log, tmp_path / "run.zarr", precision=wrong)
    assert [one.name for one in tmp_path.iterdir()] == ["run.stream"]


def test_nothing_is_appended_to_less_precision(tmp_path: Path) -> None:
    _, _, archive = compacted(tmp_path, "nmse=2e-4")
    later = LogBuilder(tmp_path / "later.stream", run="11111111-0000-4000-8000-000000000000")
    later.layer("h.0", "resid", 0)
    later.begin(axis(1, 4))
    later.put("h.0", np.zeros((1, 4, WIDTH), np.float32))
    before = files_of(archive)
    with pytest.raises(ArchiveError, match="what it keeps of floats is less than they were"):
        actstore.append(later.close(), archive)
    assert files_of(archive) == before


@pytest.mark.parametrize("precision", ["nmse=2e-4", "bfloat16"])
@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_compaction_that_was_cut_short_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, precision: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    log = made(tmp_path / "run.stream", outlier=np.nan).close()
    seen = 0

    def stop(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actstore.compact(log, tmp_path / "run.zarr", precision=precision, progress=stop)
    partial = tmp_path / ".run.zarr.partial"
    (partial / "resid_scale" / "c" / "9").mkdir(parents=True)
    (partial / "resid_scale" / "c" / "9" / "9").write_bytes(b"of a shard that was not finished")
    report = actstore.compact(log, tmp_path / "run.zarr", precision=precision)
    assert report.shards_resumed >= at
    whole = actstore.compact(log, tmp_path / "whole.zarr", precision=precision)
    assert (report.stored_bytes, whole.shards_resumed) == (whole.stored_bytes, 0)
    assert files_of(tmp_path / "run.zarr") == files_of(tmp_path / "whole.zarr")


def test_another_precision_begins_anew(tmp_path: Path) -> None:
    log = made(tmp_path / "run.stream").close()

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actstore.compact(log, tmp_path / "run.zarr", precision="int8", progress=stop)
    assert actstore.compact(log, tmp_path / "run.zarr").shards_resumed == 0
    with actstore.open_dataset(log) as source, xr.open_zarr(tmp_path / "run.zarr") as found:
        xr.testing.assert_equal(source.compute(), found.compute())


# -- choosing -----------------------------------------------------------------------------------


def test_the_choice_is_the_smallest_that_keeps_the_bound(tmp_path: Path) -> None:
    log = made(tmp_path / "run.stream").close()
    with actstore.open_dataset(log) as source:
        choice = choose_precision(source, nmse=1e-3)
        table = choice.table
        for name, chosen in choice.precision.items():
            good = table.sel(variable=name).where(table.nmse.sel(variable=name) <= 1e-3)
            assert float(good.ratio.max()) == float(
                table.ratio.sel(variable=name, precision=chosen)
            )
        assert set(choice.precision) == {"resid", "wide", "gate"}
        assert float(table.nmse.sel(precision="").max()) == 0
        actstore.compact(log, tmp_path / "run.zarr", precision=choice.precision)
        with actstore.open_dataset(tmp_path / "run.zarr") as found:
            error = off(found.resid, source.resid)
            assert np.nansum(error**2) <= 1e-3 * np.nansum(source.resid.values.astype("f8") ** 2)
        plain = choose_precision(source, nmse=1e-3, plain=True, variables=["resid"])
        assert plain.precision["resid"].startswith("relative=")
        assert "int8" not in plain.table.precision
        lines = str(choice).splitlines()
        assert len(lines) == len(table.variable)
        assert choice.precision["resid"] in str(choice)


def test_a_choice_does_not_sacrifice_features_to_a_few_that_are_large() -> None:
    values = np.random.default_rng(1).standard_normal((512, 128)).astype("f4")
    values[:, :2] *= 300
    array = xr.DataArray(values, dims=("token", "feature"), attrs={"source_dtype": "float32"})
    choice = choose_precision(array.to_dataset(name="resid"), nmse=2e-4)
    assert choice.precision["resid"].startswith("relative=")
    blind = choose_precision(array.to_dataset(name="resid"), nmse=2e-4, features=1e9)
    assert blind.precision["resid"] == "nmse=0.0002"


def test_a_choice_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with actstore.open_dataset(made(tmp_path / "run.stream").close()) as source:
        for name in ("count", "loose_values", "nothing"):
            with pytest.raises(ConfigError, match="no variable of floats with rows of tokens"):
                choose_precision(source, nmse=1e-3, variables=[name])
        for nmse in (2.0, "1e-3", None, True):
            with pytest.raises(ConfigError, match="takes a bound over 0 and under 1"):
                choose_precision(source, nmse=nmse)
        with pytest.raises(ConfigError, match="'nothing' is no variable"):
            choose_precision(source, nmse=1e-3, variables="nothing")


# -- other containers ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".h5", ".zarr.zip"])
@pytest.mark.parametrize("precision", [*CODED, "bfloat16"])
def test_one_file_has_the_same_values_and_becomes_the_same_archive(
    tmp_path: Path, precision: str, suffix: str
) -> None:
    _, found, archive = compacted(tmp_path, precision, outlier=np.nan)
    file = tmp_path / f"run{suffix}"
    actstore.export(archive, file)
    with actstore.open_dataset(file) as held:
        assert set(held.variables) == set(found.variables)
        xr.testing.assert_equal(held.compute(), found.compute())
        assert held.resid.attrs == found.resid.attrs
    actstore.import_archive(file, tmp_path / "again.zarr")
    with actstore.open_dataset(tmp_path / "again.zarr") as again:
        xr.testing.assert_identical(again.compute(), found.compute())
    assert actstore.verify(tmp_path / "again.zarr", against=tmp_path / "run.stream").ok
