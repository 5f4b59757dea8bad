"""The xarray entry point opens logs and archives, and leaves what it doesn't know to others."""

from __future__ import annotations

import io
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

import actstore
from actstore.backend import ActstoreBackendEntrypoint

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import decoder_log


@pytest.fixture(params=["log", "archive", "h5", "zarr.zip"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    log = decoder_log(tmp_path / "run.stream")
    if request.param == "log":
        return log.path
    archive = actstore.compact(log.path, tmp_path / "run.zarr").path
    if request.param == "archive":
        return archive
    return actstore.export(archive, tmp_path / f"run.{request.param}").path


@pytest.mark.parametrize("engine", ["actstore", ActstoreBackendEntrypoint])
@pytest.mark.parametrize("kind", [str, Path])
def test_xarray_opens_what_open_dataset_opens(place: Path, engine: Any, kind: Any) -> None:
    with (
        xr.open_dataset(kind(place), engine=engine) as one,
        actstore.open_dataset(place) as other,
    ):
        xr.testing.assert_equal(one.compute(), other.compute())
        assert set(one.coords) == set(other.coords)
        assert not one.resid.variable._in_memory or one.resid.chunks is None


def test_chunks_of_xarray_make_dask_arrays(place: Path) -> None:
    with (
        xr.open_dataset(place, engine="actstore", chunks={}) as one,
        actstore.open_dataset(place, None) as other,
    ):
        assert one.resid.chunks is not None
        xr.testing.assert_equal(one.compute(), other.compute())


@pytest.mark.parametrize("dropped", ["resid", ["resid", "token_text", "not there"]])
def test_variables_can_be_dropped(place: Path, dropped: Any) -> None:
    with xr.open_dataset(place, engine="actstore", drop_variables=dropped) as found:
        assert "resid" not in found
        assert ("token_text" in found.coords) is (dropped == "resid")
        assert "mlp" in found


def test_a_log_and_an_archive_are_recognised_by_their_content_whatever_their_name(
    place: Path,
) -> None:
    renamed = place.rename(place.with_name("any name"))
    guess = ActstoreBackendEntrypoint().guess_can_open
    assert guess(renamed)
    assert guess(str(renamed))


def test_what_is_neither_is_left_to_other_engines(tmp_path: Path) -> None:
    guess = ActstoreBackendEntrypoint().guess_can_open
    (tmp_path / "notes.stream").write_text("no log")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder.zarr").mkdir()
    xr.Dataset({"a": ("x", [1])}).to_zarr(tmp_path / "other.zarr", consolidated=False)
    for name in ("notes.stream", "empty", "folder.zarr", "other.zarr", "gone", "gone.zarr"):
        assert not guess(tmp_path / name), name
    for other in (io.BytesIO(b""), 3, None, "https://example.org/run.zarr", {"a": 1}):
        assert not guess(other)


def test_a_log_is_opened_without_naming_the_engine(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    with xr.open_dataset(log.path) as found:
        assert "resid" in found


def test_the_package_declares_the_engine() -> None:
    (declared,) = entry_points(group="xarray.backends", name="actstore")
    assert declared.load() is ActstoreBackendEntrypoint
    assert ActstoreBackendEntrypoint.description
    assert "actstore" in xr.backends.list_engines()
