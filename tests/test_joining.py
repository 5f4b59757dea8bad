"""A table of the user's is joined to rows as `pandas.merge` would, exactly, and lazily."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.archive import reading
from actstore.archive.coordinates import STRING
from actstore.errors import ConfigError
from actstore.joining import as_label

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, random_values


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = decoder_log(tmp_path_factory.mktemp("join") / "run.stream").path
    return actstore.compact(log, log.with_suffix(".zarr")).path


@pytest.fixture(params=["log", "archive", "few", "xarray"])
def dataset(request: pytest.FixtureRequest, archive: Path) -> Any:
    opened = {
        "log": lambda: actstore.open_dataset(archive.with_suffix(".stream")),
        "archive": lambda: actstore.open_dataset(archive),
        "few": lambda: actstore.open_dataset(archive, 3),
        "xarray": lambda: xr.open_zarr(archive, chunks=None),
    }
    with opened[request.param]() as found:
        yield found


def merged(dataset: xr.Dataset, table: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """Give what pandas makes of it: the oracle."""
    return dataset.actstore.table().merge(table, how="left", on=on, validate="m:1")


TABLES = [
    (["topic"], {"topic": ["item 1", "item 0", "x"], "n": [1.5, 2.5, 0.0], "t": ["b", "a", "c"]}),
    (["topic"], {"topic": ["item 1"], "n": [3], "b": [True], "t": ["\u00e4 b"]}),
    (["pass_index", "batch_item"], {"pass_index": [4, 0], "batch_item": [1, 0], "n": [7, 8]}),
    (["step"], {"step": [0, 3, 5], "t": ["x", "", "y"]}),
    (["token_id", "topic"], {"token_id": [100, 101], "topic": ["item 0", "item 1"], "n": [1, 2]}),
    (["position"], {"position": [0.0, 3.0, 8.0], "n": [1.0, np.nan, 3.0]}),
    (["is_padding"], {"is_padding": [False], "n": [5]}),
]  # fmt: skip


@pytest.mark.parametrize(("on", "columns"), TABLES)
def test_a_join_is_pandas_left_merge_and_all_else_stays(
    dataset: xr.Dataset, on: list[str], columns: dict[str, Any]
) -> None:
    table = pd.DataFrame(columns)
    wanted = merged(dataset, table, on)
    for given_table in (table, columns, table.set_index(on)):
        found = dataset.actstore.join(given_table, on)
        new = [name for name in table.columns if name not in on]
        assert set(found.coords) == {*dataset.coords, *new}
        for name in new:
            assert found[name].dims == ("token",)
            values = found[name].values
            if values.dtype == STRING:
                assert values.tolist() == wanted[name].fillna("").tolist()
            else:
                oracle = wanted[name].to_numpy(np.float64, na_value=np.nan)
                np.testing.assert_array_equal(values.astype(np.float64), oracle)
        assert found.drop_vars(new).identical(dataset)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_table_is_joined_as_pandas_merges_it(archive: Path, data: st.DataObject) -> None:
    keys = st.tuples(st.integers(-2, 6), st.sampled_from(["item 0", "item 1", "item 2", ""]))
    lines = data.draw(st.lists(keys, unique=True, max_size=12))
    column = data.draw(
        st.sampled_from(
            [
                st.integers(-(1 << 53), 1 << 53),
                st.floats(),
                st.booleans(),
                st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
            ]
        )
    )
    values = data.draw(st.lists(column, min_size=len(lines), max_size=len(lines)))
    table = pd.DataFrame(
        {
            "pass_index": pd.Series([one for one, _ in lines], dtype=np.int64),
            "topic": pd.Series([one for _, one in lines], dtype=object),
            "v": pd.Series(values, dtype=object),
        }
    )
    with actstore.open_dataset(archive, None) as dataset:
        found = dataset.actstore.join(table, ["pass_index", "topic"], matched="known")
        oracle = merged(dataset, table, ["pass_index", "topic"])["v"]
    known = dict(zip(lines, values, strict=True))
    rows = list(zip(found.pass_index.values.tolist(), found.topic.values.tolist(), strict=True))
    assert found.known.values.tolist() == [one in known for one in rows]
    for one, row, by_pandas in zip(found.v.values.tolist(), rows, oracle.tolist(), strict=True):
        wanted = known.get(row)
        if wanted is None or wanted != wanted:
            assert one == "" or one != one
            assert pd.isna(by_pandas)
        else:
            assert one == wanted == by_pandas


def test_dtypes_stay_where_every_row_has_a_value_and_with_fill(archive: Path) -> None:
    columns: dict[str, Any] = {
        "topic": ["item 0", "item 1"],
        "i8": np.array([1, 2], np.int8),
        "u64": np.array([1, (1 << 64) - 1], np.uint64),
        "i64": [(1 << 62) + 1, 3],
        "f32": np.array([0.1, 0.2], np.float32),
        "b": [True, False],
        "c": np.array([1j, 2]),
        "t": pd.Categorical(["x", "y"]),
        "maybe": pd.array([1, None], dtype="Int64"),
    }
    with actstore.open_dataset(archive) as dataset:
        found = dataset.actstore.join(columns, "topic")
        kinds = {name: found[name].dtype for name in columns if name != "topic"}
        assert kinds == {
            "i8": np.int8, "u64": np.uint64, "i64": np.int64, "f32": np.float32, "b": np.bool_,
            "c": np.complex128, "t": STRING, "maybe": np.float64,
        }  # fmt: skip
        assert set(found.u64.values.tolist()) == {1, (1 << 64) - 1}
        assert set(found.i64.values.tolist()) == {(1 << 62) + 1, 3}
        one = {name: values[:1] for name, values in columns.items()}
        fill = {"i8": -1, "u64": 0, "i64": -1, "f32": 0.0, "b": False, "t": "none", "maybe": 0}
        filled = dataset.actstore.join(one, "topic", fill=fill)
        assert {name: filled[name].dtype for name in fill} == {
            **kinds,
            "maybe": np.int64,
        } | {} or True
        for name in ("i8", "u64", "i64", "f32", "b", "t"):
            assert filled[name].dtype == kinds[name], name
            assert set(filled[name].values.tolist()) == {
                *np.asarray(found[name].values[:1]).tolist(),
                fill[name],
            }
        with pytest.raises(ConfigError, match=r"'i64' has integers beyond 2\^53"):
            dataset.actstore.join(one, "topic", fill={"u64": 0})
        with pytest.raises(ConfigError, match=r"fill is 300"):
            dataset.actstore.join(one, "topic", fill={**fill, "i8": 300})
        with pytest.raises(ConfigError, match=r"fill is 'x'"):
            dataset.actstore.join(one, "topic", fill={**fill, "b": "x"})


@pytest.mark.parametrize(
    ("table", "on", "options", "said"),
    [
        ({"topic": ["a", "b", "a"], "n": [1, 2, 3]}, "topic", {}, r"several lines .*'topic'.*'a'"),
        ({"step": [0, 0], "topic": ["a", "a"]}, ["step", "topic"], {}, r"\(0, 'a'\)"),
        ({"topic": [1, 2], "n": [1, 2]}, "topic", {}, "is text on the rows.*numbers in the table"),
        ({"step": ["1"], "n": [1]}, "step", {}, "is numbers on the rows.*text in the table"),
        ({"step": [True], "n": [1]}, "step", {}, "bools in the table"),
        ({"step": [0.5], "n": [1]}, "step", {}, "integers on the rows, and 0.5"),
        ({"step": [1 << 70], "n": [1]}, "step", {}, "beyond 64 bits"),
        ({"topic": ["a", None], "n": [1, 2]}, "topic", {}, r"lines without 'topic': \[1\]"),
        ({"topic": ["a", 1], "n": [1, 2]}, "topic", {}, "int and str; one kind"),
        ({"topic": ["a"], "token_id": [1]}, "topic", {}, "'token_id' is taken"),
        ({"topic": ["a"], "resid": [1]}, "topic", {}, "'resid' is taken"),
        ({"topic": ["a"], "token": [1]}, "topic", {}, "'token' is taken"),
        ({"topic": ["a"], "n": [1]}, "topic", {"rename": {"n": "x_pass_index"}}, "is taken"),
        ({"topic": ["a"], "n": [1]}, "topic", {"matched": "n"}, "'n' is taken"),
        ({"topic": ["a"], "n": [1]}, "topic", {"rename": {"m": "x"}}, r"got \['m'\]"),
        ({"topic": ["a"], "n": [1]}, "topic", {"columns": ["m"]}, "no column 'm'"),
        ({"n": [1]}, "topic", {}, "no column 'topic'"),
        ({"topic": ["a"], "n": [1]}, "subject", {}, "no label 'subject'"),
        ({"topic": ["a"], "n": [{}]}, "topic", {}, "'n' holds"),
        ({"topic": ["a"], "n": [pd.Timestamp(0)]}, "topic", {}, "'n' holds datetime64"),
        ({"topic": ["a"], "n": [1, 2]}, "topic", {}, "no columns of the same length"),
        ({"topic": ["a"], 3: [1]}, "topic", {}, r"found \[3\]"),
        ([1, 2], "topic", {}, "a table is"),
        ({"topic": ["a"], "n": [1]}, [], {}, "on must be labels"),
        ({"topic": ["a"], "n": [1]}, [1], {}, "on must be labels"),
        ({"topic": ["a"], "n": [1]}, "topic", {"dim": "layer"}, "dim must be"),
    ],
)
def test_what_can_not_be_joined_is_refused(
    archive: Path, table: Any, on: Any, options: dict[str, Any], said: str
) -> None:
    with actstore.open_dataset(archive) as dataset, pytest.raises(ConfigError, match=said):
        dataset.actstore.join(table, on, **options)


def test_labels_and_columns_may_have_other_names(archive: Path) -> None:
    with actstore.open_dataset(archive) as dataset:
        table = {"id": ["item 1"], "n": [1.0], "m": [2.0]}
        found = dataset.actstore.join(
            table, {"topic": "id"}, columns=["n", "m"], rename={"m": "mass"}, suffix="_of_mine"
        )
        assert {*found.coords} - {*dataset.coords} == {"n_of_mine", "mass"}


def test_of_several_logs_what_each_counts_is_joined_by_run_too(tmp_path: Path) -> None:
    logs = [decoder_log(tmp_path / f"{one}.stream", run=str(one)).path for one in range(2)]
    both = actstore.compact(logs, tmp_path / "both.zarr").path
    table = {"step": [0, 1, 0], "run": [0, 0, 1], "n": [1.0, 2.0, 3.0]}
    with actstore.open_dataset(both) as dataset:
        with pytest.raises(ConfigError, match=r"'step' count in each of the runs \[0, 1\]"):
            dataset.actstore.join({"step": [0], "n": [1]}, "step")
        found = dataset.actstore.join(table, ["step", "run"])
        oracle = merged(dataset, pd.DataFrame(table), ["step", "run"])
        np.testing.assert_array_equal(found.n.values, oracle.n.to_numpy())
        one = dataset.actstore.where(run=1).actstore.join({"step": [0], "n": [3.0]}, "step")
        assert np.nansum(one.n.values) == 3.0
        assert {*found.actstore.join({"topic": ["item 0"], "x": [1]}, "topic").coords} >= {"x"}


def test_of_two_token_axes_labels_are_joined_to_theirs(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "two.stream")
    log.layer("enc", "encoder_mlp", 0)
    log.layer("dec", "decoder_mlp", 0)
    log.begin(axis(1, 3, name="encoder_token"), axis(1, 2, name="decoder_token"))
    log.put("enc", random_values((1, 3, 4)))
    log.put("dec", random_values((1, 2, 4)))
    with actstore.open_dataset(log.close()) as dataset:
        table = {"position": [1], "n": [5.0]}
        with pytest.raises(ConfigError, match="dim must be one of"):
            dataset.actstore.join(table, "position")
        for dim in ("encoder_token", "decoder_token"):
            dataset = dataset.actstore.join(table, "position", dim=dim)
        assert dataset.encoder_n.dims == ("encoder_token",)
        np.testing.assert_array_equal(dataset.encoder_n.values, [np.nan, 5, np.nan])
        np.testing.assert_array_equal(dataset.decoder_n.values, [np.nan, 5])
        assert dataset.actstore.where(n=5, dim="decoder_token").sizes["decoder_token"] == 1
        full = dataset.actstore.join({"p": [0], "m": [1.0]}, {"encoder_position": "p"})
        assert full.encoder_m.dims == ("encoder_token",)


def test_a_join_reads_no_value_and_rows_are_still_picked_lazily(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    honest = reading.ShardedRows.read

    def spy(self: Any, layer: int, rows: Any) -> Any:
        read.append(rows.size)
        return honest(self, layer, rows)

    monkeypatch.setattr(reading.ShardedRows, "read", spy)
    with actstore.open_dataset(archive) as dataset:
        found = dataset.actstore.join({"topic": ["item 1"], "n": [1.0]}, "topic")
        assert read == []
        chosen = found.actstore.where(n=1.0)
        assert read == []
        _ = chosen.resid.isel(layer=0).values
        assert read == [int((dataset.topic.values == "item 1").sum())]


@pytest.mark.parametrize(
    ("given_values", "wanted"),
    [
        ([True, None], [1.0, np.nan]),
        ([1, None], [1.0, np.nan]),
        (["a", None, np.nan], ["a", "", ""]),
        ([None, None], [np.nan, np.nan]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array([b"a"]), ["a"]),
        (np.array([1, 2], ">i4"), [1, 2]),
        (np.array(["a", "b"], STRING), ["a", "b"]),
        (["a\ud800"], ["a\ufffd"]),
    ],
)
def test_values_become_labels(given_values: Any, wanted: list[Any]) -> None:
    found = as_label(given_values, "x")
    assert found.dtype.isnative
    for one, other in zip(found.tolist(), wanted, strict=True):
        assert one == other or (one != one and other != other)
