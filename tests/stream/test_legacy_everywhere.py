"""What reads a log of ours reads one of llm-instrumentation, or says why not."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from jsonschema import Draft202012Validator
from legacy_logs import (
    ENCODE,
    VECTORS,
    by_codec,
    by_name,
    copied,
    expected,
    expected_values,
    flat,
    named,
    packet,
)

import actstore
from actstore.config import HookGranularity, InstrumentationConfig
from actstore.errors import ActstoreWarning, ConfigError, FormatError
from actstore.framework import InstrumentationFramework, analyze_activations_with_tokens
from actstore.stream.legacy import LegacyReader

#: The variables of `sequential` in make_logs.py, whose root has no name.
VARIABLES = {"0": "0", "1": "1", "2": "2", "": "output"}


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    said = expected(path)["values"]
    return {name: (1, -1, *mine[0]["shape"][2:]) for name, mine in said.items()}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "gen.stream"


@pytest.fixture
def framework() -> InstrumentationFramework:
    return InstrumentationFramework(InstrumentationConfig(HookGranularity.FULL_TENSOR))


# -- open_stream --------------------------------------------------------------------------------


@by_name
def test_open_stream_reads_it(path: Path) -> None:
    with actstore.open_stream(path) as reader, LegacyReader(path) as wanted:
        assert isinstance(reader, LegacyReader)
        assert flat(reader) == flat(wanted)


def test_open_stream_takes_shapes_and_dtypes_and_refuses_to_follow() -> None:
    path = named("lz4.stream")
    with actstore.open_stream(path, shapes={"1": (1, -1, 24)}, dtypes={"2": "int16"}) as reader:
        assert next(reader.packets("1")).shape == (1, 4, 24)
        assert next(reader.packets("2")).dtype == np.int16
    with pytest.raises(ConfigError, match="follow"):
        actstore.open_stream(path, follow=True)


@pytest.mark.parametrize("told", [{"shapes": {"a": (1,)}}, {"shapes": {}}, {"dtypes": {}}])
def test_a_log_of_ours_has_its_own_shapes(told: dict[str, dict[str, tuple[int]]]) -> None:
    path = VECTORS / "good" / "raw-float32.stream"
    with pytest.raises(ConfigError, match="says itself"):
        actstore.open_stream(path, **told)


# -- analysing ----------------------------------------------------------------------------------


@by_name
def test_analysing_says_what_the_tool_says(
    path: Path, framework: InstrumentationFramework
) -> None:
    wanted = expected(path).get("analysis")
    if wanted is None:  # of the log of a process that was killed
        return
    found = analyze_activations_with_tokens(path, framework)
    assert wanted.keys() - found.keys() == set()
    for name in wanted.keys() - {"per_layer"}:
        assert found[name] == wanted[name]
    for name, mine in wanted["per_layer"].items():
        assert {key: found["per_layer"][name][key] for key in mine} == mine


def test_packets_are_counted_by_token_only_where_it_is_known_whose_they_are(
    framework: InstrumentationFramework,
) -> None:
    known = analyze_activations_with_tokens(named("none-tokens.stream"), framework)
    assert [one["packets"] for one in known["per_token"]] == [4, 4, 4]
    unknown = analyze_activations_with_tokens(named("killed.stream"), framework)
    assert "per_token" not in unknown
    assert unknown["packets_per_token"] == 40 / 12


# -- datasets and archives ----------------------------------------------------------------------


@by_name
def test_a_dataset_over_it_has_its_values_flat(path: Path) -> None:
    with LegacyReader(path) as reader:
        wanted = {
            info.site: np.concatenate([one.values for one in reader.packets(name)])
            for name, info in reader.layers.items()
        }
    with xr.open_dataset(path, engine="actstore") as dataset:
        assert set(dataset.data_vars) == {f"{site}_values" for site in wanted}
        for site, values in wanted.items():
            np.testing.assert_array_equal(dataset[f"{site}_values"].values, values)


def test_a_dataset_over_it_goes_to_other_processes() -> None:
    with actstore.open_dataset(named("zstd.stream"), chunks=None) as dataset:
        again = pickle.loads(pickle.dumps(dataset))
        assert again.identical(dataset)


def test_xarray_finds_out_by_itself_who_opens_it() -> None:
    with xr.open_dataset(named("zstd.stream")) as dataset:
        assert dataset.attrs["runs"][0]["writer"]["name"] == "llm-instrumentation"


@by_codec
def test_compacting_with_shapes_gives_rows_of_tokens(tmp_path: Path, codec: str) -> None:
    path = named(f"{codec}-tokens.stream")
    actstore.compact(path, tmp_path / "out.zarr", shapes=shapes_of(path))
    with xr.open_zarr(tmp_path / "out.zarr") as dataset:
        for layer, variable in VARIABLES.items():
            rows = [
                np.frombuffer(bytes.fromhex(one["hex"]), one["dtype"]).reshape(one["shape"])[0]
                for one in expected(path)["values"][layer]
            ]
            assert dataset[variable].dims[0] == "token"
            np.testing.assert_array_equal(dataset[variable].values, np.concatenate(rows))
        np.testing.assert_array_equal(
            dataset["pass_index"].values, np.repeat([0, 1, 2], [4, 5, 6])
        )
        assert dataset["step"].values[[3, 8, 14]].tolist() == [0, 1, 2]
    assert actstore.verify(tmp_path / "out.zarr").ok


def test_a_compaction_of_one_log_is_not_gone_on_with_by_another_of_its_size(
    log: Path, tmp_path: Path
) -> None:
    def write(value: float) -> None:
        values = np.full((4, 8), value, np.float16).tobytes()
        log.write_bytes(b"".join(packet(name, values) for name in (b"a", b"b")))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    told = dict.fromkeys("ab", (1, 4, 8))
    write(1.0)
    with pytest.raises(KeyboardInterrupt):
        actstore.compact(log, tmp_path / "out.zarr", shapes=told, workers=1, progress=stop)
    write(2.0)
    os.utime(log, ns=(log.stat().st_atime_ns, log.stat().st_mtime_ns + 1))
    report = actstore.compact(log, tmp_path / "out.zarr", shapes=told)
    assert report.shards_resumed == 0
    with xr.open_zarr(tmp_path / "out.zarr", chunks=None) as found:
        assert np.unique([found["a"].values, found["b"].values]).tolist() == [2.0]


def test_compacting_without_shapes_keeps_the_values_ragged(tmp_path: Path) -> None:
    path = named("zstd.stream")
    actstore.compact(path, tmp_path / "out.zarr")
    with xr.open_zarr(tmp_path / "out.zarr") as dataset:
        wanted = b"".join(expected_values(path)["1"])
        assert dataset["1_values"].values.tobytes() == wanted


def test_compacting_without_known_passes_keeps_the_told_shapes(tmp_path: Path) -> None:
    path = named("named.stream")
    actstore.compact(path, tmp_path / "out.zarr", shapes=shapes_of(path))
    with xr.open_zarr(tmp_path / "out.zarr") as dataset:
        assert dataset["mlp_shape"].values.tolist() == [[1, 4, 8], [1, 4, 8], [1, 5, 8], [1, 5, 8]]
        assert dataset["mlp_values"].values.tobytes() == b"".join(expected_values(path)["mlp"])


def test_told_dtypes_are_those_of_the_archive(tmp_path: Path) -> None:
    path = named("dtypes-none.stream")
    dtypes = {name: mine[0]["dtype"] for name, mine in expected(path)["values"].items()}
    actstore.compact(path, tmp_path / "out.zarr", dtypes=dtypes)
    with xr.open_zarr(tmp_path / "out.zarr") as dataset:
        for name in ("to_float64", "to_int64", "to_bool"):
            assert dataset[f"{name}_values"].dtype == np.dtype(dtypes[name])
            wanted = b"".join(expected_values(path)[name])
            assert dataset[f"{name}_values"].values.tobytes() == wanted


def test_the_attributes_of_its_archive_are_valid(tmp_path: Path) -> None:
    actstore.compact(named("zstd-tokens.stream"), tmp_path / "out.zarr")
    schema = json.loads((VECTORS.parent / "archive.schema.json").read_bytes())
    found = json.loads((tmp_path / "out.zarr" / "zarr.json").read_bytes())["attributes"]
    Draft202012Validator(schema).validate(found)


# -- verifying and recovering -------------------------------------------------------------------


@by_name
def test_verifying_decodes_it_and_says_that_it_has_no_checksums(path: Path) -> None:
    with pytest.warns(ActstoreWarning, match="no checksums"):
        report = actstore.verify(path)
    assert report.ok
    assert report.kind == "legacy log"
    assert report.complete == expected(path)["complete"]
    with LegacyReader(path) as reader:
        assert report.checked == {"packets": reader.packet_count}


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_verifying_finds_what_does_not_decode(log: Path, codec: str) -> None:
    good = ENCODE[codec](bytes(range(200)) * 2)
    bad = good[: len(good) // 2] + b"\xff" * (len(good) - len(good) // 2)
    log.write_bytes(packet(b"a", good) + packet(b"a", bad) + packet(b"a", good))
    with pytest.warns(ActstoreWarning, match="no checksums"):
        report = actstore.verify(log)
    assert [(one.where, one.offset) for one in report.damage] == [
        ("packet", len(packet(b"a", good)))
    ]


def test_it_is_not_recovered(log: Path) -> None:
    data = copied("zstd", log).read_bytes()[:-3]
    log.write_bytes(data)
    with pytest.raises(FormatError, match=r"log of llm-instrumentation.*errors='skip'"):
        actstore.recover(log)
    assert [path.name for path in log.parent.iterdir()] == [log.name]
    assert log.read_bytes() == data
