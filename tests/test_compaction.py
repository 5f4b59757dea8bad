"""Compaction: an archive holds what the log holds, and appears whole or not at all."""

from __future__ import annotations

import json
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr
from numpy.typing import NDArray

import actstore
from actstore import codecs, dtypes, files
from actstore.archive import grid, shards
from actstore.archive.root import read_attributes
from actstore.compaction import compact, executing
from actstore.errors import (
    ActstoreError,
    ArchiveError,
    ConfigError,
    FormatError,
    MissingFileError,
    StreamCorruptError,
)
from actstore.stream.rows import widen
from actstore.stream.sidecars import token_dict
from actstore.stream.writer import StreamWriter

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, files_of, random_values

SCHEMA = Path(__file__).parents[1] / "schemas" / "archive.schema.json"
NAMES = sorted(dtypes.BY_NAME)


def fired(log: LogBuilder, layer: str) -> NDArray[Any]:
    """Give the rows that a layer fired, one after the other: [rows, width]."""
    mine = [one.values for one in log.fired if one.layer == layer]
    return np.concatenate([one.reshape(-1, one.shape[-1]) for one in mine])


def upper_halves(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Give float32 values that are bfloat16's by their bits; no other bit may be set."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    assert not np.any(bits & 0xFFFF)
    return (bits >> 16).astype(np.uint16)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", shards.PROFILES)
@pytest.mark.parametrize("finish", [True, False])
def test_an_archive_holds_every_row_of_a_log_bit_for_bit(
    tmp_path: Path, profile: str, finish: bool
) -> None:
    log = decoder_log(tmp_path / "run.stream", finish=finish)
    report = compact(log.path, tmp_path / "run.zarr", profile=profile)
    with xr.open_zarr(tmp_path / "run.zarr") as found:
        for site in ("mlp", "resid"):
            for block in range(3):
                name = f"model.layers.{block}" + (".mlp" if site == "mlp" else "")
                wanted = fired(log, name).view(np.uint16)
                assert np.array_equal(upper_halves(found[site].sel(layer=block).values), wanted)
        for site, name in (("embed", "model.embed_tokens"), ("logits", "lm_head")):
            wanted = fired(log, name).view(np.uint16)
            assert np.array_equal(upper_halves(found[site].values), wanted)
        ragged = np.concatenate([o.values.ravel() for o in log.fired if o.layer == "model.rotary"])
        assert found["model.rotary_values"].values.tobytes() == ragged.tobytes()
        assert found["model.rotary_shape"].values.tolist() == [[5, 4]] + [[1, 4]] * 4
        assert found["model.rotary_offset"].values.tolist() == [0, 20, 24, 28, 32]
        assert found["mlp"].attrs["source_dtype"] == "bfloat16"
    assert report.rows == {"token": 18}
    assert report.aliases == {"model": "final_norm", "output": "logits"}
    assert report.shards_verified == report.chunks_verified == 10
    assert report.raw_bytes == sum(
        one.values.nbytes for one in log.fired if one.layer not in ("", "model")
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_of_a_log_comes_back(tmp_path: Path, name: str) -> None:
    """Dense, ragged and in parts; NaNs and infinities included."""
    kind = dtypes.from_name(name)
    log = LogBuilder(tmp_path / "run.stream")
    for layer in ("dense", "loose", "split"):
        log.layer(layer)
    log.begin(axis(2, 3))
    log.put("dense", random_values((2, 3, 40), name))
    log.put("loose", random_values((5, 3), name, seed=1))
    log.put("split", random_values((2, 3, 40), name, seed=2), parts=3)
    compact(log.close(), tmp_path / "run.zarr")
    with xr.open_zarr(tmp_path / "run.zarr", chunks=None) as found:
        for variable, one in zip(("dense", "loose_values", "split"), log.fired, strict=True):
            values = found[variable].values.reshape(one.values.shape)
            assert values.dtype == kind.array
            assert found[variable].attrs["source_dtype"] == name
            if name == "bfloat16":
                assert np.array_equal(upper_halves(values), one.values.view(np.uint16))
            elif kind.array == kind.numpy:
                assert values.tobytes() == one.values.tobytes()
            else:  # float8: a NaN's payload may change, a number's value may not
                narrow = values.astype(kind.numpy).astype(np.float32)
                np.testing.assert_array_equal(narrow, one.values.astype(np.float32))
                np.testing.assert_array_equal(values, one.values.astype(np.float32))


def test_bfloat16_is_widened_by_its_bits_for_each_of_them() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    kind = dtypes.from_name("bfloat16")
    assert np.array_equal(upper_halves(widen(every.view(kind.numpy), kind)), every)


def test_tensorstore_reads_values_and_labels_without_us(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    compact(log.path, tmp_path / "run.zarr")

    def read(name: str) -> NDArray[Any]:
        place = {"driver": "file", "path": str(tmp_path / "run.zarr" / name)}
        opened = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()
        return np.asarray(opened.read().result())

    assert np.array_equal(
        upper_halves(read("mlp")[2]), fired(log, "model.layers.2.mlp").view("u2")
    )
    assert read("token_id").tolist() == [*range(100, 110)] + [100, 101] * 4
    assert read("is_padding").tolist() == [False] * 18
    data, ends = read("text/token_text_bytes"), read("text/token_text_offsets").tolist()
    texts = [bytes(data[a:b]).decode() for a, b in pairwise(ends)]
    assert texts == [f"<{i}>" for i in range(10)] + ["<0>", "<1>"] * 4
    assert read("tokens/step").tolist() == list(range(10))


def test_missing_rows_are_nan_and_their_chunks_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "CHUNK_BYTES", 64)
    monkeypatch.setattr(grid, "SHARD_BYTES", 256)
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("h.0", "resid", 0)
    log.layer("h.1", "resid", 1)
    log.layer("count")
    for number in range(12):
        log.begin(axis(1, 4))
        log.put("h.0", random_values((1, 4, 4), seed=number))
        if number in (2, 11):
            log.put("h.1", random_values((1, 4, 4), seed=number))
            log.put("count", random_values((1, 4, 4), "int32", seed=number))
    report = compact(log.close(), tmp_path / "run.zarr")
    wanted = [number in (2, 11) for number in range(12) for _ in range(4)]
    with xr.open_zarr(tmp_path / "run.zarr") as found:
        assert found.resid_present.values.tolist() == [[True] * 48, wanted]
        assert found.count_present.values.tolist() == wanted
        missing = ~np.array(wanted)
        assert np.isnan(found.resid.sel(layer=1).values[missing]).all()
        assert np.array_equal(found.resid.sel(layer=1).values[wanted], fired(log, "h.1"), True)
        assert not found["count"].values[missing].any()
        assert "embed_present" not in found
    assert len(left(tmp_path / "run.zarr" / "resid" / "c" / "1")) == 2
    assert report.chunks_verified == 12 + 2 + 2


def test_packets_of_any_shape_are_kept(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (2, 2), (5,), (), (1, 1, 1, 1)]
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("a")
    log.begin()
    for call, shape in enumerate(shapes):
        log.put("a", random_values(shape, seed=call), call=call)
    compact(log.close(), tmp_path / "run.zarr")
    with xr.open_zarr(tmp_path / "run.zarr", chunks=None) as found:
        for packet, one in enumerate(log.fired):
            shape = [size for size in found.a_shape.values[packet].tolist() if size >= 0]
            start = int(found.a_offset[packet])
            values = found.a_values.values[start : start + int(np.prod(shape))]
            assert tuple(shape) == one.values.shape
            assert values.tobytes() == one.values.tobytes()


@pytest.mark.parametrize("passes", [0, 1])
def test_a_run_without_packets_is_an_archive(tmp_path: Path, passes: int) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    for _ in range(passes):
        log.begin(axis(1, 1))
    report = compact(log.close(), tmp_path / "run.zarr")
    assert (report.variables, report.ratio) == ((), 1.0)
    with xr.open_zarr(tmp_path / "run.zarr") as found:
        assert dict(found.sizes) == ({"token": 1} if passes else {})


def test_only_empty_packets_make_an_archive(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("a")
    log.layer("b")
    log.begin(axis(1, 1))
    log.put("a", random_values((0,)))
    log.put("b", random_values(()))
    compact(log.close(), tmp_path / "run.zarr")
    with actstore.open_dataset(log.path) as one, xr.open_zarr(tmp_path / "run.zarr") as other:
        assert one.a_values.size == 0
        xr.testing.assert_equal(one.compute(), other.compute())


def test_no_more_threads_work_than_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(grid, "SHARD_BYTES", 1 << 22)
    log = decoder_log(tmp_path / "run.stream", steps=60, width=512)
    lock, now, most = threading.Lock(), 0, 0
    encode = shards.encode_shard

    def counting(*given: Any) -> list[Any]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        try:
            return encode(*given)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(shards, "encode_shard", counting)
    compact(log.path, tmp_path / "one.zarr", workers=8, max_memory_gb=0.0685)
    assert most == 1
    with pytest.raises(ConfigError, match="max_memory_gb"):
        compact(log.path, tmp_path / "none.zarr", max_memory_gb=0.0672)


# -- what it says -------------------------------------------------------------------------------


def test_the_root_attributes_are_what_the_schema_says(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    compact(log.path, tmp_path / "run.zarr")
    said = json.loads((tmp_path / "run.zarr" / "zarr.json").read_bytes())["attributes"]
    schema = json.loads(SCHEMA.read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(said, schema)
    assert (said["format"], said["format_version"]) == ("actstore", 0)
    assert said["aliases"] == {"model": "final_norm", "output": "logits"}
    assert said["rows"] == {"token": 18}
    assert [one["run_id"] for one in said["runs"]] == ["00000000-0000-4000-8000-000000000000"]
    assert said["provenance"]["logs"][0]["bytes"] == log.path.stat().st_size
    assert str(tmp_path) not in json.dumps(said)


def test_analysis_of_an_archive_counts_packets_and_its_own_bytes(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    report = compact(log.path, tmp_path / "run.zarr")
    said = read_attributes(tmp_path / "run.zarr")["analysis"]
    layers = said["per_layer"]
    assert {name: layer["count"] for name, layer in layers.items()} == dict.fromkeys(
        {one.layer for one in log.fired}, 5
    )
    on_disk = sum(
        path.stat().st_size
        for name in report.variables
        for path in (tmp_path / "run.zarr" / name / "c").rglob("*")
        if path.is_file()
    )
    assert sum(layer["bytes"] for layer in layers.values()) == on_disk
    assert report.stored_bytes == said["total_compressed_bytes"] == on_disk
    assert layers["model"]["bytes"] == 0
    assert layers["model.rotary"]["bytes"] > 0


def test_bytes_of_a_ragged_file_are_divided_among_its_layers(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream", compression="none")
    for block in range(2):
        log.layer(f"h.{block}.a", "h.a", block)
    log.begin(axis(1, 2))
    log.put("h.0.a", random_values((30,)))
    log.put("h.1.a", random_values((90,)))
    report = compact(log.close(), tmp_path / "run.zarr", profile="none")
    layers = read_attributes(tmp_path / "run.zarr")["analysis"]["per_layer"]
    first, second = layers["h.0.a"]["bytes"], layers["h.1.a"]["bytes"]
    assert first + second == report.stored_bytes
    assert abs(second - 3 * first) <= 4


def test_a_log_of_odd_numbers_and_text_makes_json_for_every_parser(tmp_path: Path) -> None:
    odd = {"rate": float("nan"), "limit": float("inf"), "name": "\ud800"}
    log = LogBuilder(tmp_path / "run.stream", capture=odd)
    log.layer("\ud800")
    log.begin(axis(1, 2))
    log.put("\ud800", random_values((1, 2, 3)))
    compact(log.close(), tmp_path / "run.zarr")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in (tmp_path / "run.zarr").rglob("zarr.json"):
        said = json.loads(path.read_bytes(), parse_constant=refuse)
        json.dumps(said, ensure_ascii=False).encode()  # no lone surrogate


def test_progress_goes_up_to_all_of_the_bytes(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    seen: list[tuple[int, int]] = []
    report = compact(
        log.path, tmp_path / "a.zarr", progress=lambda *at: seen.append(at), workers=1
    )
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {report.raw_bytes}
    assert seen[-1][0] == report.raw_bytes


def test_the_same_log_gives_the_same_bytes_with_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, took, pool = decoder_log(tmp_path / "run.stream"), [], executing.ThreadPoolExecutor

    def counted(count: int, name: str) -> Any:
        took.append(count)
        return pool(count, name)

    monkeypatch.setattr(executing, "ThreadPoolExecutor", counted)
    monkeypatch.setattr("actstore.machine.cores", lambda: 3)
    for workers in (1, 4, None):
        compact([log.path], tmp_path / f"{workers}.zarr", workers=workers)
    assert took == [1, 4, 3]
    for path in (tmp_path / "1.zarr").rglob("*"):
        for name in ("4.zarr", "None.zarr"):
            other = tmp_path / name / path.relative_to(tmp_path / "1.zarr")
            if path.is_file() and path != tmp_path / "1.zarr" / "zarr.json":
                assert path.read_bytes() == other.read_bytes()


# -- whole or not at all ------------------------------------------------------------------------


def test_what_stands_at_the_target_is_never_touched(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    before = left(tmp_path)
    for name in ("file", "folder", "link"):
        with pytest.raises(ArchiveError, match=r"give another name, or remove it"):
            compact(log.path, tmp_path / name)
    assert left(tmp_path) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"out": "missing/run.zarr"}, "missing"),
        ({"out": None}, "path"),
        ({"profile": "zstd"}, "'balanced'"),
        ({"workers": 0}, "workers"),
        ({"workers": True}, "workers"),
        ({"streams": []}, "path of a log"),
        ({"streams": 3}, "path of a log"),
        ({"streams": [3]}, "path"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    decoder_log(tmp_path / "run.stream")
    given = {"streams": "run.stream", "out": "run.zarr"} | options
    streams, out = given.pop("streams"), given.pop("out")
    with pytest.raises(ConfigError, match=said):
        compact(streams, out, **given)  # type: ignore[arg-type]
    assert left(tmp_path) == ["run.stream"]


def test_a_missing_log_and_a_file_that_is_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no log at all")
    with pytest.raises(MissingFileError):
        compact(tmp_path / "gone.stream", tmp_path / "run.zarr")
    with pytest.raises(FormatError, match=r"notes\.txt"):
        compact(tmp_path / "notes.txt", tmp_path / "run.zarr")
    assert left(tmp_path) == ["notes.txt"]


def test_a_damaged_log_gives_no_archive(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", compression="none")
    data = log.path.read_bytes()
    values = next(one for one in log.fired if one.layer == "model.layers.1.mlp").values
    place = data.index(values.tobytes())
    log.path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(StreamCorruptError):
        compact(log.path, tmp_path / "run.zarr")
    assert left(tmp_path) == ["run.stream"]


class StoppedError(Exception):
    """What a test raises from inside."""


@pytest.fixture
def one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all archives at the same time, so that they are the same bytes."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.mark.parametrize("at", [1, 4, 10])
def test_what_was_finished_before_something_was_raised_is_not_done_again(
    tmp_path: Path, at: int, one_time: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = decoder_log(tmp_path / "run.stream")
    compact(log.path, tmp_path / "whole.zarr")
    seen = 0

    def stop(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        assert not (tmp_path / "run.zarr").exists()
        if seen == at:
            raise StoppedError

    with pytest.raises(StoppedError):
        compact(log.path, tmp_path / "run.zarr", progress=stop, workers=1)
    assert left(tmp_path) == [".run.zarr.journal", ".run.zarr.partial", "run.stream", "whole.zarr"]
    encode, encoded = shards.encode_shard, 0

    def counting(*given: Any) -> list[Any]:
        nonlocal encoded
        encoded += 1
        return encode(*given)

    monkeypatch.setattr(shards, "encode_shard", counting)
    report = compact(log.path, tmp_path / "run.zarr")
    assert report.shards_resumed >= at
    assert report.shards_resumed + encoded == report.shards_verified == 10
    assert files_of(tmp_path / "run.zarr") == files_of(tmp_path / "whole.zarr")
    assert left(tmp_path) == ["run.stream", "run.zarr", "whole.zarr"]


@pytest.mark.parametrize("what", ["write_new", "atomic_write", "replace", "fsync_folder"])
def test_a_full_disk_is_an_archive_error_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    log = decoder_log(tmp_path / "run.stream")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, what, full)
        with pytest.raises(ArchiveError, match="No space left"):
            compact(log.path, tmp_path / "run.zarr")
    assert "run.zarr" not in left(tmp_path)
    report = compact(log.path, tmp_path / "run.zarr")
    assert (report.shards_resumed == 10) == (what in ("atomic_write", "replace"))
    assert left(tmp_path) == ["run.stream", "run.zarr"]


def test_other_settings_or_another_log_begin_anew(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    other = decoder_log(tmp_path / "other.stream", steps=7)

    def stop(done: int, total: int) -> None:
        if done == total:
            raise StoppedError

    for given, how in ((log, {"profile": "fast"}), (other, {}), (log, {})):
        with pytest.raises(StoppedError):
            compact(given.path, tmp_path / "run.zarr", progress=stop, **how)  # type: ignore[arg-type]
    report = compact(other.path, tmp_path / "run.zarr")
    assert report.shards_resumed == 0
    assert actstore.verify(tmp_path / "run.zarr").ok
    with actstore.open_dataset(other.path) as one, xr.open_zarr(tmp_path / "run.zarr") as found:
        xr.testing.assert_equal(one.compute(), found.compute())


def test_a_finished_shard_that_has_another_length_is_made_again(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")

    def stop(done: int, total: int) -> None:
        if done == total:
            raise StoppedError

    with pytest.raises(StoppedError):
        compact(log.path, tmp_path / "run.zarr", workers=1, progress=stop)  # in order
    shard = tmp_path / ".run.zarr.partial/mlp/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    journal = tmp_path / ".run.zarr.journal"
    journal.write_bytes(journal.read_bytes()[:-3])  # its last line is cut
    assert compact(log.path, tmp_path / "run.zarr").shards_resumed == 8
    assert actstore.verify(tmp_path / "run.zarr").ok


def test_two_that_make_the_same_archive_are_refused(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    said = []

    def again(done: int, total: int) -> None:
        with pytest.raises(ArchiveError, match="another compaction") as error:
            compact(log.path, tmp_path / "run.zarr")
        said.append(str(error.value))

    compact(log.path, tmp_path / "run.zarr", progress=again)
    assert len(said) == 10
    assert left(tmp_path) == ["run.stream", "run.zarr"]


def test_logs_are_removed_only_on_request(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    compact(log.path, tmp_path / "one.zarr")
    assert log.path.exists()
    compact(log.path, tmp_path / "two.zarr", remove_logs=True)
    assert left(tmp_path) == ["one.zarr", "two.zarr"]


def test_a_log_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", finish=False)
    with StreamWriter(log.path), pytest.raises(ConfigError, match="is being written"):
        compact(log.path, tmp_path / "run.zarr", remove_logs=True)
    assert left(tmp_path) == ["run.stream"]

    def write(_done: int, _total: int) -> None:
        with log.path.open("ab") as file:
            file.write(bytes(100))

    with pytest.raises(ArchiveError, match="was written while it was compacted"):
        compact(log.path, tmp_path / "run.zarr", remove_logs=True, progress=write)
    assert left(tmp_path) == ["run.stream", "run.zarr"]


def test_what_is_beside_a_log_goes_with_it_where_it_says_no_more(tmp_path: Path) -> None:
    said: dict[str, Any] = {}
    for name in ("same", "other"):
        path = decoder_log(tmp_path / f"{name}.stream", run=name).path
        with actstore.open_stream(path) as reader:
            tokens = [token_dict(one) for one in reader.tokens]
        assert len(tokens) > 2
        said[name] = {"version": 1, "total_tokens": 1, "tokens": tokens}
    said["other"]["tokens"][1]["token_text"] = "another"
    for name, table in said.items():
        (tmp_path / f"{name}.stream_tokens.json").write_text(json.dumps(table))
        short = {**table, "tokens": table["tokens"][:2]}
        (tmp_path / f"{name}.stream.ckpt.json").write_text(json.dumps(short))
    logs = [tmp_path / f"{name}.stream" for name in said]
    compact(logs, tmp_path / "run.zarr", remove_logs=True)
    assert left(tmp_path) == ["other.stream.ckpt.json", "other.stream_tokens.json", "run.zarr"]


# -- several logs -------------------------------------------------------------------------------


def test_several_logs_are_one_archive_in_the_order_given(tmp_path: Path) -> None:
    logs = [
        decoder_log(tmp_path / f"{number}.stream", steps=3 + number, run=str(number))
        for number in range(3)
    ]
    report = compact([one.path for one in logs], tmp_path / "all.zarr")
    with xr.open_zarr(tmp_path / "all.zarr", chunks=None) as found:
        for number, log in enumerate(logs):
            mine = found.isel(token=np.flatnonzero(found.run.values == number))
            with actstore.open_dataset(log.path) as one:
                labels = [name for name in one.coords if name != "token_text"]
                for name in (*one.data_vars, *labels):
                    if "token" in one[name].dims or name == "layer":
                        np.testing.assert_array_equal(mine[name].values, one[name].values, name)
            at = found["model.rotary_run"].values == number
            with actstore.open_dataset(log.path) as one:
                np.testing.assert_array_equal(
                    found["model.rotary_pass"].values[at], one["model.rotary_pass"].values
                )
        assert np.all(np.diff(found.run.values) >= 0)
        assert [one["run_id"] for one in found.attrs["runs"]] == ["0", "1", "2"]
    assert report.rows == {"token": sum(10 + 2 * (3 + one) for one in range(3))}
    said = read_attributes(tmp_path / "all.zarr")
    jsonschema.validate(said, json.loads(SCHEMA.read_bytes()))
    assert said["analysis"]["packets"] == sum(len(one.fired) for one in logs)
    assert actstore.verify(tmp_path / "all.zarr").ok
    with xr.open_zarr(tmp_path / "all.zarr", group="tokens") as tokens:
        assert tokens.run.values.tolist() == [0] * 8 + [1] * 10 + [2] * 12


def test_logs_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    one = decoder_log(tmp_path / "one.stream", run="1")
    with pytest.raises(ConfigError, match="same run '1'"):
        compact([one.path, one.path], tmp_path / "all.zarr")
    other = LogBuilder(tmp_path / "other.stream", run="2")
    other.layer("model.layers.0.mlp", "mlp", 7)
    other.begin(axis(1, 1))
    other.put("model.layers.0.mlp", random_values((1, 1, 4)))
    with pytest.raises(ConfigError, match="different models"):
        compact([one.path, other.close()], tmp_path / "all.zarr")
    sampled = []
    for number, kept in enumerate(([0, 1], [0, 2])):
        log = LogBuilder(tmp_path / f"{number}.stream", run=str(10 + number))
        log.layer("a")
        log.features(4, kept)
        log.begin(axis(1, 1))
        log.put("a", random_values((1, 1, 2)), width=4)
        sampled.append(log.close())
    with pytest.raises(ConfigError, match="other features of width 4"):
        compact(sampled, tmp_path / "all.zarr")


def test_a_shard_that_does_not_read_back_fails_the_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = decoder_log(tmp_path / "run.stream")
    honest = codecs.plane_split_into

    def wrong(out: Any, data: Any, itemsize: int, *, repeats: bool) -> int:
        changed = data.copy()
        changed[0] ^= 1
        return honest(out, changed, itemsize, repeats=repeats)

    monkeypatch.setattr(codecs, "plane_split_into", wrong)
    with pytest.raises(ArchiveError, match="read back"):
        compact(log.path, tmp_path / "run.zarr")
    assert left(tmp_path) == ["run.stream"]


def test_a_shard_that_is_damaged_while_it_is_written_fails_the_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = decoder_log(tmp_path / "run.stream")
    honest = files.write_new

    def wrong(path: Path, buffers: list[Any]) -> None:
        honest(path, buffers)
        if "c" in path.parts:
            data = bytearray(path.read_bytes())
            data[0] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(files, "write_new", wrong)
    with pytest.raises(ActstoreError, match="read back"):
        compact(log.path, tmp_path / "run.zarr")
    assert left(tmp_path) == ["run.stream"]


def test_zarr_lists_an_archives_arrays_and_groups(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    compact(log.path, tmp_path / "run.zarr")
    group = zarr.open_group(tmp_path / "run.zarr", mode="r")
    assert set(dict(group.groups())) == {"text", "tokens", "passes"}
    found = {name for name, _ in group.arrays()}
    assert {"mlp", "resid", "token_id", "token_text", "layer", "module"} <= found


def test_the_tables_of_tokens_and_passes_hold_what_was_recorded(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.begin(axis(1, 3), keep=2)
    log.token(5, "a\0é")
    log.begin(axis(1, 1), aborted=True)
    compact(log.close(), tmp_path / "run.zarr")
    with xr.open_zarr(tmp_path / "run.zarr", group="tokens") as tokens:
        assert {name: one.values.tolist() for name, one in tokens.items()} == {
            **{"step": [0], "token_id": [5], "token_text": ["a\0é"], "pass_index": [0]},
            **{"time": [0.0], "position": [pytest.approx(float("nan"), nan_ok=True)]},
        }
        assert tuple(tokens.sizes) == ("recorded",)
    with xr.open_zarr(tmp_path / "run.zarr", group="passes") as passes:
        assert {name: one.values.tolist() for name, one in passes.items()} == {
            **{"index": [0, 1], "entry": ["", ""], "aborted": [False, True]},
            "logits_to_keep": [2, 0],
        }
        assert tuple(passes.sizes) == ("pass",)


def test_an_archive_is_compared_with_its_logs(tmp_path: Path) -> None:
    logs = [decoder_log(tmp_path / f"{one}.stream", run=str(one)).path for one in range(2)]
    compact(logs, tmp_path / "all.zarr")
    compact(logs[0], tmp_path / "one.zarr")
    assert actstore.verify(tmp_path / "all.zarr", against=logs).ok
    assert actstore.verify(tmp_path / "one.zarr", against=logs[0]).ok
    other = decoder_log(tmp_path / "other.stream", steps=5).path
    found = actstore.verify(tmp_path / "one.zarr", against=other)
    assert {one.where for one in found.damage} >= {"token_id", "step"}
    with pytest.raises(ConfigError, match="no archive"):
        actstore.verify(logs[0], against=logs)


def test_other_values_in_chunks_whose_checksums_fit_are_found(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream").path
    compact(log, tmp_path / "run.zarr")
    array = zarr.open_array(tmp_path / "run.zarr" / "mlp", mode="r+")
    array[1, 3] = 1.0
    assert actstore.verify(tmp_path / "run.zarr").ok
    (found,) = actstore.verify(tmp_path / "run.zarr", against=log).damage
    assert "mlp/c/1/0/0" in found.where
    assert "chunk 0 has other values" in found.reason
