"""Archives in buckets: read as local ones are, in few requests; written whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import s3_faults
import xarray as xr
from loopback import Request, Way, blobs_of

import actstore
from actstore import (
    HookGranularity,
    InstrumentationConfig,
    InstrumentationFramework,
    analysis,
    plots,
)
from actstore.archive import grid, uploads
from actstore.buckets import Bucket, remote
from actstore.compaction import writing
from actstore.errors import ArchiveError, BucketError, ConfigError, MissingFileError
from actstore.overview import Overview
from actstore.reporting.serving import serve

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import decoder_log, files_of

Options = dict[str, Any]


def bucket_of(url: str, said: Options | None = None) -> Bucket:
    found = remote(url, said)
    assert found is not None
    return found.bucket


def objects_of(url: str, said: Options | None = None) -> dict[str, bytes]:
    bucket = bucket_of(url, said)
    return {one.name: bucket.get(one.name) for one in bucket.list()}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return decoder_log(tmp_path / "run.stream", prompt=(2, 40), steps=4).path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the arrays of `log` into many shards of several chunks."""
    monkeypatch.setattr(grid, "CHUNK_BYTES", 128)
    monkeypatch.setattr(grid, "SHARD_BYTES", 1024)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["s3", "memory", "file"])
def test_an_archive_in_a_bucket_has_the_same_bytes_and_is_the_same_dataset(
    kind: str, log: Path, tmp_path: Path, url: str, said: Options
) -> None:
    name = f"{url}.zarr"
    if kind != "s3":
        said = {}
        name = f"memory://{url[5:]}" if kind == "memory" else f"file://{tmp_path}/far.zarr"
    local = tmp_path / "run.zarr"
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    try:
        actstore.compact(log, local, precision={"mlp": "int8"})
        report = actstore.compact(log, name, precision={"mlp": "int8"}, storage_options=said)
    finally:
        del os.environ["SOURCE_DATE_EPOCH"]
    assert str(report.path) == name
    assert objects_of(name, said) == files_of(local)
    assert actstore.verify(name, storage_options=said).ok
    with (
        actstore.open_dataset(name, storage_options=said) as far,
        actstore.open_dataset(local) as near,
    ):
        xr.testing.assert_identical(far.load(), near.load())


def test_requests_are_few() -> None:
    assert "a layer of 5 shards: 5" in s3_faults.count_requests(5)


@pytest.mark.usefixtures("small_shards")
def test_parts_are_read_by_ranges_that_are_near_each_other_at_once(
    log: Path, url: str, said: Options, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "CHUNK_BYTES", 128)
    monkeypatch.setattr(grid, "SHARD_BYTES", 4096)
    actstore.compact(log, url, storage_options=said)
    with actstore.open_dataset(log) as near:
        wanted = near.load()
    with actstore.open_dataset(url, chunks=None, storage_options=said) as far:
        with way.counted() as seen:
            found = far.resid[1, [3, 20, 21]].values
        np.testing.assert_array_equal(found, wanted.resid[1, [3, 20, 21]])
        assert [one.range.startswith("bytes=") for one in seen] == [True, True], seen
        assert seen[0].range.startswith("bytes=-"), "the index is the end of the shard"
        with way.counted() as seen:
            np.testing.assert_array_equal(far.resid[1, 5].values, wanted.resid[1, 5])
        assert len(seen) == 1, "an index is read once"


def test_an_archive_in_azure_is_read_in_parts(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "CHUNK_BYTES", 128)
    monkeypatch.setattr(grid, "SHARD_BYTES", 4096)
    actstore.compact(log, tmp_path / "run.zarr")
    with (
        blobs_of(tmp_path) as said,
        actstore.open_dataset("az://box/run.zarr", chunks=None, storage_options=said) as far,
        actstore.open_dataset(log) as near,
    ):
        rows = far.resid[1, [3, 20, 21]].values
        np.testing.assert_array_equal(rows, near.resid[1, [3, 20, 21]])
        with pytest.raises(FileNotFoundError):
            bucket_of("az://box/run.zarr", said).tail("none", 4)


def test_an_archive_without_its_indices_in_the_root_opens(
    log: Path, url: str, said: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_index", lambda _coordinates: {})
    actstore.compact(log, url, storage_options=said)
    with actstore.open_dataset(url, storage_options=said) as far:
        assert far.indexes["layer"].tolist() == [0, 1, 2]


def test_what_the_root_says_of_an_index_is_verified(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_index", lambda _coordinates: {"layer": [0, 2, 1]})
    actstore.compact(log, tmp_path / "run.zarr")
    (damaged,) = actstore.verify(tmp_path / "run.zarr").damage
    assert "layer" in damaged.reason


def test_a_dataset_travels_to_another_process(
    log: Path, tmp_path: Path, url: str, said: Options
) -> None:
    actstore.compact(log, url, storage_options=said)
    with actstore.open_dataset(url, storage_options=said) as far:
        (tmp_path / "far.pickle").write_bytes(pickle.dumps(far))
        code = (
            "import pickle, sys; print(float(pickle.load(open(sys.argv[1], 'rb')).token_id.sum()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "far.pickle")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert float(done.stdout) == float(far.token_id.sum())
        xr.testing.assert_identical(pickle.loads(pickle.dumps(far)).load(), far.load())


def test_damage_is_found_and_is_no_value(log: Path, url: str, said: Options) -> None:
    actstore.compact(log, url, storage_options=said)
    bucket = bucket_of(url, said)
    data = bytearray(bucket.get("resid/c/1/0/0"))
    data[5] ^= 1
    bucket.put("resid/c/1/0/0", bytes(data))
    bucket.delete("resid/c/0/0/0")
    found = {one.where: one.reason for one in actstore.verify(url, storage_options=said).damage}
    assert found.keys() == {"resid/c/1/0/0, chunk 0", "resid/c/0/0/0"}
    with (
        actstore.open_dataset(url, storage_options=said) as far,
        pytest.raises(ArchiveError, match="chunk 0 of layer 1 is damaged"),
    ):
        far.resid[1].load()
    bucket.put("resid/c/2/0/0", bytes(9 << 20))
    with (
        actstore.open_dataset(url, storage_options=said) as far,
        pytest.raises(ArchiveError, match="is the most that its chunks can have"),
    ):
        far.resid[2].load()


def test_what_is_not_there_or_not_answered_is_said(url: str, said: Options, way: Way) -> None:
    with pytest.raises(MissingFileError, match="nothing at s3://bucket/"):
        actstore.open_dataset(url, storage_options=said)
    with pytest.raises(ConfigError, match="no URL"):
        actstore.open_dataset("run.zarr", storage_options=said)
    for options in (3, "region"):
        with pytest.raises(ConfigError, match="storage_options must be a mapping"):
            actstore.open_dataset(url, storage_options=options)
    with pytest.raises(MissingFileError, match=f"no log at {url}"):
        actstore.verify(url, storage_options=said)
    with pytest.raises(ConfigError, match="is no store"):
        actstore.open_dataset("nowhere://bucket/run.zarr")
    way.rule = lambda _request: "503"
    with pytest.raises(BucketError, match=r"could not read .*zarr\.json.*asked 4 times"):
        actstore.open_dataset(url, storage_options=said)


def test_a_foreign_url_is_not_asked_for_to_guess_what_it_is(said: Options, way: Way) -> None:
    from actstore.backend import ActstoreBackendEntrypoint

    with way.counted() as seen:
        guess = ActstoreBackendEntrypoint().guess_can_open
        assert not guess(f"{way.endpoint}/bucket/other.nc")
        assert guess("s3://bucket/run.stream")
    assert seen == []


# -- writing ------------------------------------------------------------------------------------


def test_the_root_is_the_last_object_and_nothing_stays_behind(
    log: Path, tmp_path: Path, url: str, said: Options, way: Way
) -> None:
    with way.counted() as seen:
        actstore.compact(log, url, storage_options=said)
    put = [one.path for one in seen if one.method == "PUT"]
    assert put[-1].endswith("/zarr.json")
    assert put[-1].count("/") == 3
    assert put[0].endswith("/.making.json")
    assert not [one for one in objects_of(url, said) if "making" in one]
    assert [one.name for one in tmp_path.iterdir()] == ["run.stream"]


@pytest.mark.usefixtures("small_shards")
def test_few_shards_wait_for_their_upload(
    log: Path, tmp_path: Path, url: str, said: Options, way: Way
) -> None:
    most = 0

    def rule(request: Request) -> str | None:
        nonlocal most
        if request.method == "PUT" and "/resid/c/" in request.path:
            here = list(tmp_path.glob(".*.partial/*/c/**/*"))
            most = max(most, sum(one.is_file() for one in here))
        return None

    way.rule = rule
    report = actstore.compact(log, url, storage_options=said)
    assert report.shards_verified > 20
    assert 0 < most <= 4 + 2 + 1


def test_the_least_memory_that_is_told_is_enough(log: Path, url: str) -> None:
    url = f"memory://{url[5:]}"
    with pytest.raises(ConfigError, match=r"max_memory_gb is 0\.19:") as refused:
        actstore.compact(log, url, max_memory_gb=0.19)
    told = re.search(r"needs (\d+\.\d\d) GB", str(refused.value))
    assert told is not None
    actstore.compact(log, url, max_memory_gb=float(told[1]))


def test_an_archive_that_is_there_is_not_overwritten(log: Path, url: str, said: Options) -> None:
    actstore.compact(log, url, storage_options=said)
    before = objects_of(url, said)
    with pytest.raises(ArchiveError, match="is not overwritten"):
        actstore.compact(log, url, storage_options=said)
    assert objects_of(url, said) == before


def test_an_archive_that_appears_meanwhile_is_not_overwritten(
    log: Path, url: str, said: Options
) -> None:
    bucket = bucket_of(url, said)

    def appear(_done: int, _total: int) -> None:
        bucket.put("zarr.json", b"{}")

    with pytest.raises(ArchiveError, match="by now"):
        actstore.compact(log, url, storage_options=said, progress=appear)
    assert bucket.get("zarr.json") == b"{}"
    assert not (remote(url, said) / ".making.json").exists()  # type: ignore[operator]


def test_what_was_killed_at_its_very_end_is_tidied_by_the_next_call(
    log: Path, tmp_path: Path, url: str, said: Options, way: Way
) -> None:
    way.rule = lambda request: "503" if request.method in ("DELETE", "POST") else None
    with pytest.raises(BucketError, match="could not remove"):
        actstore.compact(log, url, storage_options=said)
    way.clean()
    assert actstore.verify(url, storage_options=said).ok
    with pytest.raises(ArchiveError, match="is not overwritten"):
        actstore.compact(log, url, storage_options=said)
    assert ".making.json" not in objects_of(url, said)
    assert [one.name for one in tmp_path.iterdir()] == ["run.stream"]
    assert actstore.verify(url, storage_options=said).ok


def test_what_was_killed_behind_its_very_end_is_tidied_too(
    log: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{url[5:]}"
    with monkeypatch.context() as killed:
        killed.setattr(uploads.Uploads, "_forget", lambda _self: None)
        actstore.compact(log, url)
    assert len(list(tmp_path.glob(".*"))) == 2
    with pytest.raises(ArchiveError, match="is not overwritten"):
        actstore.compact(log, url)
    assert [one.name for one in tmp_path.iterdir()] == ["run.stream"]
    assert actstore.verify(url).ok


def test_two_machines_do_not_make_one_archive(
    log: Path, tmp_path: Path, url: str, said: Options, way: Way
) -> None:
    cut_off(way, after=12)
    with pytest.raises(BucketError, match="to go on"):
        actstore.compact(log, url, storage_options=said)
    way.clean()
    other = tmp_path / "elsewhere"
    other.mkdir()
    with pytest.raises(ArchiveError, match=r"by another compaction.*actstore\.discard"):
        actstore.compact(log, url, storage_options=said, spool=other)
    assert list(other.iterdir()) == []
    bucket_of(url, said).put(".making.json", b"not what a compaction writes")
    with pytest.raises(ArchiveError, match="by another compaction"):
        actstore.compact(log, url, storage_options=said, spool=other)
    assert actstore.discard(url, storage_options=said) > 0
    assert objects_of(url, said) == {}
    with pytest.raises(ArchiveError, match="nothing was removed"):
        actstore.discard(url, storage_options=said)
    actstore.compact(log, url, storage_options=said, spool=other)
    with pytest.raises(ArchiveError, match="is an archive"):
        actstore.discard(url, storage_options=said)
    assert actstore.verify(url, storage_options=said).ok


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_what_else_is_below_a_url_is_never_removed(
    kind: str, log: Path, tmp_path: Path, url: str
) -> None:
    url = f"memory://{url[5:]}" if kind == "memory" else f"file://{tmp_path}/far"
    actstore.compact(log, f"{url}/a.zarr")
    bucket_of(url).put("notes.txt", b"mine")
    before = objects_of(url)
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "damaged.stream"
    damaged.write_bytes(data)
    for one in (log, damaged):
        with pytest.raises(ArchiveError, match="URL below which there is nothing"):
            actstore.compact(one, url)
    assert objects_of(url) == before
    actstore.upload(log, f"{url}/b.stream")
    with pytest.raises(ArchiveError, match="URL below which there is nothing"):
        actstore.compact(f"{url}/b.stream", f"{url}/b.stream", spool=tmp_path)
    assert actstore.verify(f"{url}/b.stream").ok
    assert not list(tmp_path.glob(".*")), "nothing of a compaction is left"


def test_what_comes_between_the_look_and_the_claim_is_never_removed(
    log: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{url[5:]}"
    bucket_of(url).put("other/data.bin", b"theirs")
    monkeypatch.setattr(uploads, "check_new", lambda *_given: None)
    with pytest.raises(ArchiveError, match=r"such as other/data\.bin"):
        actstore.compact(log, url)
    assert objects_of(url) == {"other/data.bin": b"theirs"}
    assert [one.name for one in tmp_path.iterdir()] == ["run.stream"]


@pytest.mark.parametrize("looks", [0, 2])
def test_a_compaction_that_was_discarded_touches_nothing_of_the_next_one(
    looks: int,
    log: Path,
    tmp_path: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"memory://{url[5:]}"
    theirs = {".making.json": b'{"owner": "another"}', "other/c/0": b"theirs"}
    look, looked, removed = uploads.Uploads._check_claim, [], []

    def discard(*_given: object) -> None:
        if len(looked) == looks and not removed:
            removed.append(actstore.discard(url))
            for name, data in theirs.items():
                bucket_of(url).put(name, data)

    def look_first(self: uploads.Uploads) -> None:
        look(self)
        looked.append(self)
        discard()

    monkeypatch.setattr(uploads.Uploads, "_check_claim", look_first)
    with pytest.raises(ArchiveError, match="no longer this compaction's"):
        actstore.compact(log, url, progress=discard)
    found = objects_of(url)
    assert {name: found.get(name) for name in theirs} == theirs
    assert "zarr.json" not in found
    assert [one.name for one in tmp_path.iterdir()] == ["run.stream"]


def cut_off(way: Way, *, after: int) -> None:
    left, lock = [after], threading.Lock()

    def rule(_request: Request) -> str | None:
        with lock:
            left[0] -= 1
            return None if left[0] > 0 else "503"

    way.rule = rule


@pytest.mark.usefixtures("small_shards")
def test_the_same_call_goes_on_and_sends_nothing_twice(
    log: Path, url: str, said: Options, way: Way
) -> None:
    cut_off(way, after=30)
    with pytest.raises(BucketError):
        actstore.compact(log, url, storage_options=said)
    way.clean()
    there = {name for name in objects_of(url, said) if "/c/" in name}
    assert there, "nothing was uploaded"
    with way.counted() as seen:
        report = actstore.compact(log, url, storage_options=said)
    assert report.shards_resumed >= len(there) - 2
    again = {one.path for one in seen if one.method == "PUT"} & {
        f"{url[4:]}/{one}" for one in there
    }
    assert len(again) <= 2, "those whose answers were lost"
    assert actstore.verify(url, storage_options=said).ok


def test_leftovers_of_something_else_are_removed(
    log: Path, tmp_path: Path, url: str, said: Options, way: Way
) -> None:
    cut_off(way, after=20)
    with pytest.raises(BucketError):
        actstore.compact(log, url, storage_options=said)
    way.clean()
    bucket_of(url, said).put("stray/c/0", b"of another try")
    actstore.compact(log, url, profile="none", storage_options=said)
    assert "stray/c/0" not in objects_of(url, said)
    assert actstore.verify(url, against=log, storage_options=said).ok


def test_a_bit_that_flips_on_the_way_is_found(
    log: Path, url: str, said: Options, way: Way
) -> None:
    way.faulty(3, 0.3, "flipped")
    actstore.compact(log, url, storage_options=said)
    way.clean()
    assert way.met["flipped"] > 3
    assert actstore.verify(url, against=log, storage_options=said).ok


def test_a_large_object_goes_up_in_parts(url: str, said: Options, way: Way) -> None:
    data = np.random.default_rng(1).bytes((16 << 20) + 5)
    with way.counted() as seen:
        bucket_of(url, said).put("large", data)
    assert sum(one.method == "PUT" for one in seen) == 3
    assert not [one for one in seen if one.method == "GET"], "its tag says that it is these bytes"
    assert bucket_of(url, said).get("large") == data


def test_the_command_takes_urls(log: Path, url: str, said: Options, way: Way) -> None:
    actstore.compact(log, url, storage_options=said)
    environment = os.environ | {
        "AWS_ENDPOINT_URL": way.endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    for command in (["info"], ["ls"], ["verify"], ["tokens", "--limit", "3"]):
        done = subprocess.run(
            [sys.executable, "-m", "actstore", *command, url],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_whatever_reads_takes_a_url_and_storage_options(
    log: Path, tmp_path: Path, url: str, said: Options
) -> None:
    far, local = f"{url}.zarr", tmp_path / "run.zarr"
    actstore.compact(log, local)
    norms = analysis.token_norms(actstore.open_dataset(local, chunks=None), "mlp")
    analysis.save(norms, local, "norms")
    for name, data in files_of(local).items():
        bucket_of(far, said).put(name, data)
    actstore.upload(log, url, storage_options=said)
    framework = InstrumentationFramework(InstrumentationConfig(HookGranularity.FULL_TENSOR))
    framework.storage_options = said

    def without_place(found: dict[str, Any]) -> dict[str, Any]:
        return {name: one for name, one in found.items() if name != "stream_path"}

    for here, there in ((log, url), (local, far)):
        for analyse in (
            framework.analyze_activations,
            lambda path: actstore.analyze_activations_with_tokens(path, framework),
        ):
            found = analyse(there)
            assert found["stream_path"] == there
            assert without_place(found) == without_place(analyse(here))
        assert Overview.of(there, storage_options=said).rows == Overview.of(here).rows
        assert plots.run_rates(there, storage_options=said).axes
        with xr.open_dataset(there, engine="actstore", storage_options=said) as opened:
            assert opened.mlp.equals(actstore.open_dataset(here).mlp)
    table = actstore.packet_table(url, storage_options=said)
    pd.testing.assert_frame_equal(table, actstore.packet_table(log))
    assert analysis.saved(far, storage_options=said).equals(analysis.saved(local))
    assert actstore.verify(local, against=[url], storage_options=said).ok


def test_a_file_url_is_read_where_a_path_is(log: Path) -> None:
    actstore.upload(log, f"file://{log.parent}/far.stream")
    table = actstore.packet_table(f"file://{log.parent}/far.stream")
    pd.testing.assert_frame_equal(table, actstore.packet_table(log))


@pytest.mark.parametrize(
    "asked",
    [
        lambda url, path: actstore.append(path, url),
        lambda url, path: actstore.add_coordinates(url, {"a": [1]}),
        lambda url, path: actstore.remove_added(url, "a"),
        lambda url, path: actstore.export(url, path / "a.h5"),
        lambda url, path: actstore.import_archive(url, path / "a.zarr"),
        lambda url, path: actstore.import_activations(url, path / "a.zarr"),
        lambda url, path: actstore.recover(url),
        lambda url, path: actstore.report(url, path / "a.html"),
        lambda url, path: actstore.share(url, path / "a"),
        lambda url, path: actstore.what_leaves(url),
        lambda url, path: analysis.save(xr.Dataset({"a": 1}), url, "a"),
        lambda url, path: serve(url),
    ],
)
@pytest.mark.parametrize("kind", ["s3", "memory", "file"])
def test_what_takes_no_urls_says_so(asked: Any, kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"takes no URLs; got {kind}://.*: copy it"):
        asked(f"{kind}://bucket/run.zarr", tmp_path)
    if kind != "file":  # which a Path can't tell from a folder
        with pytest.raises(ConfigError, match=rf"takes no URLs; got {kind}://bucket/run.zarr: "):
            asked(Path(f"{kind}://bucket/run.zarr"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "asked",
    [
        lambda path, url: actstore.export(path, f"{url}.h5"),
        lambda path, url: actstore.export_rows(path, f"{url}.parquet"),
        lambda path, url: actstore.import_archive(path, url),
        lambda path, url: actstore.import_activations(path, f"{url}.zarr", kind="folder"),
        lambda path, url: actstore.save_cache({"a": np.zeros((1, 1, 1))}, f"{url}.zarr"),
        lambda path, url: actstore.report(path, f"{url}.html"),
        lambda path, url: actstore.share(path, url),
    ],
)
def test_what_makes_nothing_in_a_bucket_says_so(asked: Any, log: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"takes no URLs; got memory://bucket/made.*: give a path"
    ):
        asked(log, "memory://bucket/made")
