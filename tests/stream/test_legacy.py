"""Logs of llm-instrumentation 1.3.1 are read as that tool wrote them."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from legacy_logs import (
    ENCODE,
    LOGS,
    VECTORS,
    by_codec,
    by_name,
    copied,
    expected,
    expected_values,
    named,
    values,
)

from actstore.errors import ActstoreWarning, ConfigError, FormatError, MissingFileError
from actstore.stream import sidecars, summary
from actstore.stream.legacy import LegacyReader, is_legacy


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "gen.stream"


# -- what the tool wrote ----------------------------------------------------------------------


def test_there_is_a_log_of_each_codec_with_and_without_tokens() -> None:
    found = {(path.stem.removesuffix("-tokens"), "-tokens" in path.stem) for path in LOGS}
    assert {(codec, tracked) for codec in ENCODE for tracked in (False, True)} <= found


@by_name
def test_every_packet_has_the_values_that_the_tool_was_given(path: Path) -> None:
    with LegacyReader(path) as reader:
        found, wanted = values(reader), expected_values(path)
    if expected(path)["complete"]:
        assert found == wanted
    else:  # a process that was killed: what it had written
        assert found
        assert {name: wanted[name][: len(mine)] for name, mine in found.items()} == found
        assert found != wanted


@by_name
def test_it_is_complete_unless_its_process_was_killed(path: Path) -> None:
    with LegacyReader(path) as reader:
        assert reader.complete == expected(path)["complete"]
        assert reader.damage == []


@by_name
def test_told_shapes_and_dtypes_give_the_tensors(path: Path) -> None:
    said = expected(path)["values"]
    shapes = {name: (1, -1, *mine[0]["shape"][2:]) for name, mine in said.items()}
    shapes |= {"to_nothing": (1, 0)} if "to_nothing" in said else {}
    dtypes = {name: mine[0]["dtype"] for name, mine in said.items()}
    place = dict.fromkeys(said, 0)
    with LegacyReader(path, shapes=shapes, dtypes=dtypes) as reader:
        for one in reader.packets():
            wanted = said[one.layer][place[one.layer]]
            place[one.layer] += 1
            assert list(one.shape) == wanted["shape"]
            assert one.dtype == np.dtype(wanted["dtype"])


def test_untold_values_are_flat_float16_and_bytes_where_they_are_odd_in_number() -> None:
    with LegacyReader(named("dtypes-lz4.stream")) as reader:
        kinds = {one.layer: (one.dtype.name, one.shape) for one in reader.packets()}
    assert kinds["to_float64"] == ("float16", (12,))
    assert kinds["to_bool"] == ("uint8", (3,))
    assert kinds["to_nothing"] == ("float16", (0,))


@by_name
def test_it_is_recognised_by_its_first_bytes(path: Path) -> None:
    assert is_legacy(path)


@pytest.mark.parametrize("path", sorted(VECTORS.glob("good/*.stream")), ids=lambda one: one.stem)
def test_no_log_of_ours_is_taken_for_one(path: Path, log: Path) -> None:
    data = path.read_bytes()
    assert not is_legacy(path)
    for cut in range(min(len(data), 60)):
        log.write_bytes(data[:cut])
        assert not is_legacy(log)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", bytes(100), b"PK\3\4" + bytes(50_000), b'{"a": 1}\n' * 5_000, b"a\n" * 50_000],
)
def test_other_files_are_not_taken_for_one(log: Path, data: bytes) -> None:
    log.write_bytes(data)
    assert not is_legacy(log)


def test_neither_a_folder_nor_a_missing_file_is_one(tmp_path: Path) -> None:
    assert not is_legacy(tmp_path)
    assert not is_legacy(tmp_path / "none")
    with pytest.raises(MissingFileError):
        LegacyReader(tmp_path / "none")
    with pytest.raises(FormatError):
        LegacyReader(tmp_path)


@by_name
def test_a_summary_counts_what_the_tool_counts(path: Path) -> None:
    wanted = expected(path).get("analysis")
    if wanted is None:
        return
    with LegacyReader(path) as reader:
        found = summary.summarise(reader)
    for name in ("compression", "packets", "total_compressed_bytes"):
        assert found[name] == wanted[name]
    assert {
        name: {"count": one["count"], "bytes": one["bytes"]}
        for name, one in found["per_layer"].items()
    } == wanted["per_layer"]
    raw = {name: sum(map(len, mine)) for name, mine in expected_values(path).items()}
    assert {name: one["raw_bytes"] for name, one in found["per_layer"].items()} == raw


def test_a_reader_can_be_pickled_with_what_it_was_told() -> None:
    shapes = {"1": (1, -1, 24)}
    with LegacyReader(named("lz4.stream"), "skip", shapes=shapes) as reader:
        again = pickle.loads(pickle.dumps(reader))
    with again:
        assert [one.shape for one in again.packets("1")] == [(1, 4, 24), (1, 5, 24)]


# -- passes and tokens ------------------------------------------------------------------------


def test_the_nth_packet_of_a_layer_is_of_pass_n_where_all_have_as_many() -> None:
    with LegacyReader(named("zstd-tokens.stream")) as reader:
        found = {name: [one.pass_index for one in reader.packets(name)] for name in reader.layers}
        assert len(reader.passes) == 3
    assert found == {name: [0, 1, 2] for name in ("0", "1", "2", "")}


def test_no_pass_is_known_where_a_layer_fires_twice() -> None:
    with LegacyReader(named("named.stream")) as reader:
        assert reader.passes == ()
        assert {one.pass_index for one in reader.packets()} == {-1}
        assert [one.call for one in reader.packets("mlp")] == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", ["_tokens.json", ".stream_tokens.json"])
@by_codec
def test_tokens_are_found_by_both_names(log: Path, codec: str, suffix: str) -> None:
    copied(f"{codec}-tokens", log)
    shutil.copyfile(named(f"{codec}-tokens_tokens.json"), log.with_name(f"gen{suffix}"))
    wanted = expected(named(f"{codec}-tokens.stream"))["analysis"]["token_metadata"]
    with LegacyReader(log) as reader:
        assert reader.header["capture"]["track_per_token"]
        assert [(one.step, one.token_id, one.token_text) for one in reader.tokens] == [
            (0, 5, " téxt0"),
            (1, 6, " téxt1"),
            (2, 7, " téxt2"),
        ]
        assert [one.pass_index for one in reader.tokens] == [0, 1, 2]
        assert sidecars.token_metadata(reader) == wanted
        per_token = summary.summarise_tokens(reader)
    assert [one["packets"] for one in per_token] == [4, 4, 4]


def test_a_killed_run_has_the_tokens_of_its_checkpoint() -> None:
    with LegacyReader(named("killed.stream")) as reader:
        assert [one.token_text for one in reader.tokens] == [f" t{step}" for step in range(12)]
        assert len(reader.passes) == 10  # so that no token's pass is known
        assert {one.pass_index for one in reader.tokens} == {-1}


def test_without_a_file_beside_it_no_tokens_were_tracked(log: Path) -> None:
    with LegacyReader(copied("lz4-tokens", log)) as reader:
        assert reader.tokens == ()
        assert sidecars.token_metadata(reader) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"tokens": 3}',
        b'{"tokens": [3]}',
        b'{"tokens": {"a": 1}}',
        b'{"tokens": [{"token_index": 0}]}',
        b'{"tokens": [{"token_index": 0, "token_id": 1e999, "token_text": ""}]}',
    ],
)
def test_a_token_table_that_is_none_is_warned_of_and_costs_only_the_tokens(
    log: Path, data: bytes
) -> None:
    copied("lz4", log)
    log.with_name("gen_tokens.json").write_bytes(data)
    with pytest.warns(ActstoreWarning, match=r"gen_tokens\.json"):
        reader = LegacyReader(log)
    with reader:
        assert reader.tokens == ()
        assert values(reader) == expected_values(named("lz4.stream"))


# -- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ({"9": (1, 2)}, "has no layer '9'"),
        ({"1": (1, -1, 23)}, "no float16 of the shape"),
        ({"1": (1, 4, 24)}, "no float16 of the shape"),
        ({"1": (0, -1)}, "no float16 of the shape"),
        ({"1": (-1, -1)}, "one may be -1"),
        ({"1": (1, -2)}, "one may be -1"),
        ({"1": (1, 2.0)}, "one may be -1"),
        ({"1": 5}, "one may be -1"),
        ({"1": "ab"}, "one may be -1"),
        ([("1", (1,))], "must be a mapping"),
        ({1: (1,)}, "must be a mapping"),
    ],
)
def test_impossible_shapes_are_refused(shapes: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LegacyReader(named("lz4.stream"), shapes=shapes)


@pytest.mark.parametrize("dtypes", [{"1": "float17"}, {"1": ["float16"]}, {"1": "complex128"}])
def test_impossible_dtypes_are_refused(dtypes: Any) -> None:
    shapes = {"1": (1, -1, 24)}
    with pytest.raises(ConfigError):
        LegacyReader(named("lz4.stream"), shapes=shapes, dtypes=dtypes)


def test_other_errors_than_raise_and_skip_are_refused() -> None:
    with pytest.raises(ConfigError, match="errors must be"):
        LegacyReader(named("lz4.stream"), "ignore")


def test_told_shapes_that_agree_are_rows_of_an_axis() -> None:
    shapes = {"0": (1, -1, 16), "1": (1, -1, 24)}
    with LegacyReader(named("lz4-tokens.stream"), shapes=shapes) as reader:
        axes = [one.axes[0] for one in reader.passes]
    assert [(axis.name, axis.batch, axis.sequence) for axis in axes] == [
        ("token", 1, 4),
        ("token", 1, 5),
        ("token", 1, 6),
    ]


def test_told_shapes_that_differ_are_no_axis() -> None:
    shapes = {"0": (1, -1, 16), "1": (2, -1, 12)}
    with LegacyReader(named("lz4-tokens.stream"), shapes=shapes) as reader:
        assert [one.axes for one in reader.passes] == [(), (), ()]


def test_told_shapes_of_two_dimensions_are_rows_too() -> None:
    with LegacyReader(named("lz4.stream"), shapes={"0": (-1, 16)}) as reader:
        axes = [one.axes[0] for one in reader.passes]
    assert [(axis.batch, axis.sequence, axis.flat) for axis in axes] == [
        (1, 4, True),
        (1, 5, True),
    ]


# -- the package for LZ4 -----------------------------------------------------------------------


def test_lz4_that_is_not_installed_is_named_and_counting_does_not_need_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lz4", None)
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    with LegacyReader(named("lz4.stream")) as reader:
        assert summary.summarise(reader)["packets"] == 8
        with pytest.raises(ConfigError, match=r"pip install 'actstore\[legacy\]'"):
            next(reader.packets())
