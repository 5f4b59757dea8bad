"""Labels of the user's are written into an archive, and everyone finds them there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import actstore
from actstore.archive.adding import add_arrays
from actstore.archive.coordinates import Coordinate
from actstore.archive.root import read_attributes
from actstore.errors import ArchiveError, ConfigError, FormatError, MissingFileError

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, files_of, random_values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = decoder_log(tmp_path_factory.mktemp("made") / "run.stream").path
    return actstore.compact(log, log.with_suffix(".zarr")).path


@pytest.fixture
def archive(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run.zarr"


def rows(archive: Path) -> int:
    return int(read_attributes(archive)["rows"]["token"])


def test_what_was_joined_is_written_and_everyone_finds_it(archive: Path) -> None:
    table = pd.DataFrame({"topic": ["item 1"], "score": [0.5], "who": ["ä b"], "n": [3]})
    with actstore.open_dataset(archive) as dataset:
        joined = dataset.actstore.join(table, "topic")
        names = actstore.add_coordinates(archive, joined)
        assert names == ("score", "who", "n")
        assert "score" not in dataset.coords
        assert joined.resid.compute().identical(joined.resid.compute())
    with actstore.open_dataset(archive) as ours, xr.open_zarr(archive) as plain:
        for found in (ours, plain):
            for name in names:
                assert found[name].dims == ("token",)
                assert found[name].dtype == joined[name].dtype
                np.testing.assert_array_equal(found[name].values, joined[name].values)
        assert (ours.actstore.where(who="ä b").topic.values == "item 1").all()
    assert actstore.verify(archive, against=archive.with_suffix(".stream")).ok


@pytest.mark.parametrize(
    "give",
    [
        lambda values, dataset: values,
        lambda values, dataset: values.tolist(),
        lambda values, dataset: pd.Series(values, index=range(5, 5 + values.size)),
        lambda values, dataset: xr.DataArray(values, dims="token"),
        lambda values, dataset: xr.Variable("token", values),
        lambda values, dataset: dataset.resid.isel(layer=0, feature=0) * 0 + values,
    ],
)
def test_values_are_given_by_name_in_many_forms(
    archive: Path, give: Callable[[Any, xr.Dataset], Any]
) -> None:
    values = np.arange(rows(archive)) * 0.5
    with actstore.open_dataset(archive) as dataset:
        dataset = dataset.assign(resid=xr.zeros_like(dataset.resid))
        assert actstore.add_coordinates(archive, {"mine": give(values, dataset)}) == ("mine",)
    with actstore.open_dataset(archive) as dataset:
        np.testing.assert_array_equal(dataset.mine.values, values)


def test_any_dimension_can_have_labels(archive: Path) -> None:
    actstore.add_coordinates(archive, {"kind_of_module": [1, 2, 3]}, dim="layer")
    actstore.add_coordinates(archive, {"word": list("abcdefghijklmnop")}, dim="vocab")
    with actstore.open_dataset(archive) as dataset:
        assert dataset.logits.word.values.tolist() == list("abcdefghijklmnop")
        assert dataset.actstore.layer("model.layers.1.mlp").kind_of_module == 2
        late = dataset.isel(layer=[2, 1])
        assert late.actstore.layer("model.layers.1.mlp").kind_of_module == 2


def test_of_two_token_axes_one_is_said(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "two.stream")
    log.layer("enc", "encoder_mlp", 0)
    log.begin(axis(1, 3, name="encoder_token"), axis(1, 2, name="decoder_token"))
    log.put("enc", random_values((1, 3, 4)))
    archive = actstore.compact(log.close(), tmp_path / "two.zarr").path
    with pytest.raises(ConfigError, match="'encoder_token', 'decoder_token'"):
        actstore.add_coordinates(archive, {"mine": [1, 2]})
    actstore.add_coordinates(archive, {"mine": [1, 2]}, dim="decoder_token")
    with actstore.open_dataset(archive) as dataset:
        assert dataset.mine.dims == ("decoder_token",)


def test_labels_are_replaced_and_taken_out_on_request(archive: Path) -> None:
    before = files_of(archive)
    actstore.add_coordinates(
        archive, {"mine": [1] * rows(archive), "other": ["x"] * rows(archive)}
    )
    with pytest.raises(ConfigError, match="replace=True"):
        actstore.add_coordinates(archive, {"mine": [2] * rows(archive)})
    actstore.add_coordinates(archive, {"mine": ["y"] * rows(archive)}, replace=True)
    with actstore.open_dataset(archive) as dataset:
        assert set(dataset.mine.values) == {"y"}
        changed = dataset.assign_coords(mine=("token", np.arange(rows(archive))))
        with pytest.raises(ConfigError, match="no coordinate that the archive lacks"):
            actstore.add_coordinates(archive, changed)
        assert actstore.add_coordinates(archive, changed, replace=True) == ("mine",)
    add_arrays(archive, [Coordinate("mean", ("any",), np.zeros(3))], group="statistics/resid")
    actstore.remove_added(archive, ["mine", "statistics/resid"])
    actstore.remove_added(archive, "other")
    assert files_of(archive) == before


def test_an_archive_with_labels_is_appended_to_once_they_are_out(archive: Path) -> None:
    later = decoder_log(archive.with_name("later.stream"), run="later").path
    actstore.add_coordinates(archive, {"mine": [1] * rows(archive)})
    with pytest.raises(ArchiveError, match=r"'mine'; take them out with actstore\.remove_added"):
        actstore.append(later, archive)
    actstore.remove_added(archive, "mine")
    assert actstore.append(later, archive).rows["token"] == 2 * rows(archive) - rows(archive)


def test_labels_of_other_rows_or_in_another_order_are_refused(archive: Path) -> None:
    with actstore.open_dataset(archive) as dataset:
        joined = dataset.actstore.join({"topic": ["item 1"], "n": [1.0]}, "topic")
        before = files_of(archive)
        with pytest.raises(ConfigError, match=r"'n' is of other rows.*'\w+' differs at"):
            actstore.add_coordinates(archive, joined.isel(token=slice(None, None, -1)))
        with pytest.raises(ConfigError, match="in another order"):
            actstore.add_coordinates(archive, {"x": joined.n.isel(token=slice(None, None, -1))})
        with pytest.raises(ConfigError, match=r"'n' has \d values; 'token' is \d+ long"):
            actstore.add_coordinates(archive, joined.actstore.where(n=1.0))
        assert files_of(archive) == before


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"mine": [1, 2]}, "2 values; 'token' is"),
        ({"token_id": [0] * 18}, "'token_id' is taken"),
        ({"a b": [0] * 18}, "'a_b' can"),
        ({3: [0] * 18}, "the name of a label is a text"),
        ({"mine": np.zeros((18, 2))}, r"shape \(18, 2\)"),
        ({"mine": xr.DataArray(np.zeros((3, 18)), dims=("layer", "token"))}, "the dimensions"),
        ({"mine": xr.DataArray(np.zeros(18), dims="row")}, "the dimensions"),
        ({"mine": [pd.Timestamp(0)] * 18}, "labels are numbers, bools or text"),
        ({"mine": [1, "a"] * 9}, "one kind is wanted"),
        ({"mine": [1 << 70] * 18}, "beyond 64 bits"),
        ({"mine": [1 << 60, None] * 9}, r"beyond 2\^53"),
        ({}, "nothing to add"),
        ([1], "labels are a dataset's"),
    ],
)
def test_what_is_no_label_is_refused_and_nothing_changes(
    archive: Path, labels: Any, said: str
) -> None:
    before = files_of(archive)
    with pytest.raises(ConfigError, match=said):
        actstore.add_coordinates(archive, labels)
    assert files_of(archive) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda path: actstore.add_coordinates(path, {"a": [1]}),
        lambda path: actstore.remove_added(path, "a"),
    ],
)
def test_only_archives_are_written_to(archive: Path, call: Callable[[Path], Any]) -> None:
    with pytest.raises(FormatError, match="compact it"):
        call(archive.with_suffix(".stream"))
    with pytest.raises(FormatError):
        call(archive.parent)
    with pytest.raises(MissingFileError):
        call(archive / "nothing")
