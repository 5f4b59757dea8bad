"""Logs in buckets: uploaded while they grow, through a bounded spool; read as logs."""

from __future__ import annotations

import json
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import crc32c
import jsonschema
import numpy as np
import pytest
import s3_faults
import torch
import xarray as xr
from loopback import Way
from obstore.store import MemoryStore
from s3_faults import check_log, growing, write_passes

import actstore
from actstore import HookGranularity, InstrumentationConfig, InstrumentationFramework
from actstore.buckets import remote
from actstore.errors import (
    BucketError,
    CaptureError,
    ConfigError,
    FormatError,
    MissingFileError,
    StreamCorruptError,
)
from actstore.stream import segments, uploading

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis, decoder_log

Options = dict[str, Any]


def names_of(url: str, said: Options) -> list[str]:
    found = remote(url, said)
    assert found is not None
    return [one.name for one in found.bucket.list()]


def local_log(path: Path, passes: int = 40, *, finish: bool = True) -> Path:
    log = LogBuilder(path)
    write_passes(log, passes)
    return log.close(finish=finish)


def test_a_dataset_of_a_log_in_a_bucket_travels(tmp_path: Path, url: str, said: Options) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=5).path
    actstore.upload(log, url, storage_options=said)
    with (
        actstore.open_dataset(url, chunks=None, storage_options=said) as far,
        actstore.open_dataset(log, chunks=None) as near,
    ):
        xr.testing.assert_equal(pickle.loads(pickle.dumps(far)).load(), near.load())


def test_what_travelled_is_of_the_log_that_was_opened_or_refused(
    tmp_path: Path, url: str, said: Options
) -> None:
    sent = {}
    for run in ("unread", "a", "b"):
        log = decoder_log(
            tmp_path / run, steps=2, dtype=f"float{16 if run == 'b' else 32}", run=run
        )
        actstore.upload(log.path, url, storage_options=said)
        with (
            actstore.open_dataset(url, chunks=None, storage_options=said) as far,
            actstore.open_dataset(log.path, chunks=None) as near,
        ):
            sent[run] = pickle.dumps(far)
            if run != "unread":
                xr.testing.assert_equal(pickle.loads(sent[run]).load(), near.load())
        segments.remove(remote(url, said).bucket)  # type: ignore[union-attr]
    actstore.upload(tmp_path / "b", url, storage_options=said)
    with pytest.raises(FormatError, match="wanted run 'unread'"):
        pickle.loads(sent["unread"])


def test_what_travelled_of_a_log_that_grew_is_what_it_was(
    tmp_path: Path, url: str, said: Options
) -> None:
    def run(passes: int) -> None:
        for number in range(passes):
            log.begin(axis(1, 4))
            log.put("mlp", np.full((1, 4, 2), number, np.float32))
        log.commit()

    log = LogBuilder(tmp_path / "run.stream")
    log.layer("mlp")
    run(2)
    actstore.upload(log.path, url, storage_options=said)
    with actstore.open_dataset(url, chunks=None, storage_options=said) as far:
        sent, short = pickle.dumps(far), far.load()
    run(4)
    log.close()
    actstore.upload(log.path, url, storage_options=said)
    with (
        actstore.open_dataset(url, chunks=None, storage_options=said) as far,
        actstore.open_dataset(log.path, chunks=None) as near,
    ):
        xr.testing.assert_equal(pickle.loads(sent).load(), short)
        xr.testing.assert_equal(pickle.loads(pickle.dumps(far)).load(), near.load())
        assert near.sizes["token"] > short.sizes["token"]


def test_places_are_the_same_only_where_they_are_reached_in_the_same_way(
    url: str, said: Options
) -> None:
    first, again = remote(url, said), remote(url, dict(said))
    other = remote(url, {**said, "endpoint": "http://127.0.0.1:1"})
    assert first == again
    assert hash(first) == hash(again)
    assert first != other
    assert first != remote(f"{url}-2", said)
    assert pickle.loads(pickle.dumps(first)) == first


# -- while it is captured -----------------------------------------------------------------------


@pytest.fixture
def framework(tmp_path: Path, said: Options) -> InstrumentationFramework:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64)
    )
    found = InstrumentationFramework(
        InstrumentationConfig(HookGranularity.FULL_TENSOR, target_throughput_gbps=1e-9)
    )
    found.instrument_model(model)
    found.spool, found.storage_options = tmp_path, said
    found.model = model  # type: ignore[attr-defined]
    return found


def passes_of(framework: Any, count: int = 12) -> list[Any]:
    inputs = [torch.randn(16, 32, 64) for _ in range(count)]
    return [framework.model(one).detach().numpy() for one in inputs]


def test_a_capture_into_a_bucket_is_the_log_of_what_was_computed(
    framework: InstrumentationFramework, tmp_path: Path, url: str, said: Options
) -> None:
    with framework.capture_activations(url, track_per_token=True) as tracker:
        wanted = []
        for number, values in enumerate(passes_of(framework)):
            wanted.append(values)
            tracker.record_token(number, f"<{number}>")  # type: ignore[union-attr]
    assert list(tmp_path.iterdir()) == [], "the spool is empty"
    with actstore.open_stream(url, storage_options=said) as reader:
        assert reader.complete
        found = [one.values for one in reader.packets("2")]
        assert [one.token_text for one in reader.tokens] == [f"<{one}>" for one in range(12)]
    np.testing.assert_array_equal(found, wanted)
    assert actstore.verify(url, storage_options=said, decode=True).ok
    assert framework.analyze_activations(remote(url, said))["tokens"] == 12  # type: ignore[arg-type]
    beside = json.loads(remote(url, said).beside("_tokens.json").read_bytes())  # type: ignore[union-attr]
    assert beside["total_tokens"] == 12
    assert framework.summary["waited_by_cause"].keys() >= {"bucket", "budget"}


def test_the_spool_is_bounded_and_the_wait_is_counted(
    framework: Any, tmp_path: Path, url: str, way: Way, said: Options
) -> None:
    way.rule = lambda request: "slow" if request.method == "PUT" else None
    most, spool = 0, 4_000_000
    framework.spool_gb = spool / 1e9
    framework.config = InstrumentationConfig(
        HookGranularity.FULL_TENSOR,
        compression_algorithm="none",
        max_memory_gb=0.004,
        target_throughput_gbps=1e-9,
    )
    with framework.capture_activations(url):
        for values in passes_of(framework, 40):
            del values
            (log,) = tmp_path.glob("*.stream")
            most = max(most, log.stat().st_blocks * 512)
    raw = framework.summary["raw_bytes"]
    assert raw > 5 * spool
    assert most <= spool + 3_000_000, "what may wait, and the group that was being written"
    assert framework.summary["waited_by_cause"]["bucket"] > 0
    with actstore.open_stream(url, storage_options=said) as reader:
        assert reader.packet_count == framework.summary["packets"]


def test_a_bucket_that_does_not_answer_ends_the_capture_and_nothing_is_lost(
    framework: Any, tmp_path: Path, url: str, way: Way, said: Options
) -> None:
    with (
        pytest.raises(CaptureError, match=r"nothing is lost.*actstore\.upload"),
        framework.capture_activations(url),
    ):
        way.rule = lambda _request: "503"
        passes_of(framework)
    way.clean()
    (spool,) = tmp_path.glob("*.stream")
    with (
        pytest.raises(ConfigError, match="has what a capture"),
        framework.capture_activations(url),
    ):
        pass
    report = actstore.upload(spool, url, remove=True, storage_options=said)
    assert report.complete
    assert list(tmp_path.glob("*.stream")) == []
    with actstore.open_stream(url, storage_options=said) as reader:
        assert reader.complete
        assert reader.packet_count == framework.summary["packets_written"]
    with pytest.raises(ConfigError, match="never overwritten"), framework.capture_activations(url):
        pass


def test_a_capture_into_a_bucket_is_not_resumed(framework: Any, url: str) -> None:
    resumed = {"track_per_token": True, "resume_from_checkpoint": True}
    with (
        pytest.raises(ConfigError, match="can't be resumed"),
        framework.capture_activations(url, **resumed),
    ):
        pass


@pytest.mark.parametrize("wrong", ["x", None, True, -1, 0, float("nan"), float("inf")])
def test_a_spool_of_no_size_is_refused(
    framework: Any, tmp_path: Path, url: str, wrong: object
) -> None:
    framework.spool_gb = wrong
    with pytest.raises(ConfigError, match="spool_gb"), framework.capture_activations(url):
        pass
    assert list(tmp_path.iterdir()) == []


def test_tokens_are_not_tracked_into_a_store_that_nothing_can_be_beside(
    framework: Any, tmp_path: Path
) -> None:
    store, framework.storage_options = MemoryStore(), None
    with (
        pytest.raises(ConfigError, match="beside which nothing can be put"),
        framework.capture_activations(store, track_per_token=True),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    with framework.capture_activations(store):
        passes_of(framework, 2)
    with actstore.open_stream(store) as reader:
        assert reader.complete


def test_a_capture_into_a_bucket_that_an_error_ends_leaves_nothing_in_the_spool(
    framework: Any, tmp_path: Path, url: str, said: Options
) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        framework.capture_activations(url, True, checkpoint_interval_tokens=1) as tracker,
    ):
        passes_of(framework, 2)
        tracker.record_token(1, "a")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with actstore.open_stream(url, storage_options=said) as reader:
        assert reader.complete
    beside = json.loads(remote(url, said).beside("_tokens.json").read_bytes())  # type: ignore[union-attr]
    assert [one["token_text"] for one in beside["tokens"]] == ["a"]


# -- segments -----------------------------------------------------------------------------------


def test_segments_are_the_log_and_complete_json_says_so(
    tmp_path: Path, url: str, said: Options
) -> None:
    path = local_log(tmp_path / "run.stream")
    report = actstore.upload(path, url, segment_bytes=4096, storage_options=said)
    bucket = remote(url, said).bucket  # type: ignore[union-attr]
    objects = {one.name: bucket.get(one.name) for one in bucket.list()}
    told = json.loads(objects.pop("complete.json"))
    assert b"".join(objects[name] for name in sorted(objects)) == path.read_bytes()
    assert [f"{one['start']:020d}.segment" for one in told["segments"]] == sorted(objects)
    for one in told["segments"]:
        data = objects[f"{one['start']:020d}.segment"]
        assert (one["bytes"], one["crc32c"]) == (len(data), f"{crc32c.crc32c(data):08x}")
    schema = Path(__file__).parents[2] / "schemas" / "segments.schema.json"
    jsonschema.validate(told, json.loads(schema.read_text()))
    assert told["bytes"] == report.bytes == path.stat().st_size
    assert told["format"] == "actstore.segments"
    assert report.segments == report.sent == len(objects) > 5


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_a_log_in_a_bucket_is_the_same_dataset_and_compacts_to_the_same_archive(
    kind: str, tmp_path: Path, url: str, said: Options
) -> None:
    if kind == "memory":
        url, said = f"memory://{url[5:]}", {}
    log = decoder_log(tmp_path / "run.stream", steps=20)
    actstore.upload(log.path, url, segment_bytes=4096, storage_options=said)
    with (
        actstore.open_dataset(url, storage_options=said) as far,
        actstore.open_dataset(log.path) as near,
    ):
        s3_faults.same(far, near)
    actstore.compact(url, tmp_path / "far.zarr", storage_options=said, remove_logs=True)
    assert names_of(url, said) == []
    assert actstore.verify(tmp_path / "far.zarr", against=log.path).ok


def test_what_is_uploaded_of_a_running_capture_is_a_log(
    tmp_path: Path, url: str, said: Options
) -> None:
    log = growing(tmp_path / "spool.stream", url, said)
    write_passes(log, 30)
    log.close(finish=False)
    check_log(url, said, None, complete=False)
    report = actstore.upload(tmp_path / "spool.stream", url, storage_options=said)
    assert not report.complete
    check_log(url, said, log.fired, complete=False)
    assert actstore.verify(url, storage_options=said).ok


def test_a_log_that_is_not_whole_in_its_bucket_is_not_removed(
    tmp_path: Path, url: str, said: Options
) -> None:
    path = decoder_log(tmp_path / "run.stream", finish=False).path
    actstore.upload(path, url, storage_options=said)
    before = names_of(url, said)
    with pytest.raises(ConfigError, match=r"is being written, for there is no complete\.json"):
        actstore.compact(url, tmp_path / "a.zarr", remove_logs=True, storage_options=said)
    assert names_of(url, said) == before
    with pytest.raises(MissingFileError):
        actstore.compact(f"{url}-2", tmp_path / "a.zarr", remove_logs=True, storage_options=said)


def test_an_upload_follows_a_growing_log(tmp_path: Path, url: str, said: Options) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(
            actstore.upload(log.path, url, follow=True, segment_bytes=4096, storage_options=said)
        )
    )
    thread.start()
    fired = write_passes(log, 40)
    log.close()
    thread.join()
    assert found[0].complete
    check_log(url, said, fired, complete=True)


def test_segments_stay_small_behind_a_slow_bucket(
    tmp_path: Path, url: str, said: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, send = threading.Event(), uploading._Sender.send

    def send_late(self: uploading._Sender, descriptor: int, end: int) -> None:
        written.wait()
        send(self, descriptor, end)

    monkeypatch.setattr(uploading._Sender, "send", send_late)
    log = growing(tmp_path / "spool.stream", url, said, spool_bytes=1 << 24)
    fired = write_passes(log, 60)
    written.set()
    log.close()
    check_log(url, said, fired, complete=True)
    sizes = [one.size for one in segments.segments_of(remote(url, said).bucket)]  # type: ignore[union-attr]
    assert len(sizes) > 10
    assert max(sizes) < 4096 + 4096, "a segment, and the group that reaches its bound"


def test_an_upload_goes_on_where_one_ended(
    tmp_path: Path, url: str, said: Options, way: Way
) -> None:
    path = local_log(tmp_path / "run.stream")
    left = [12]

    def rule(_request: Any) -> str | None:
        left[0] -= 1
        return "500" if left[0] < 0 else None

    way.rule = rule
    with pytest.raises(BucketError):
        actstore.upload(path, url, segment_bytes=4096, storage_options=said)
    way.clean()
    there = [one for one in names_of(url, said) if one.endswith(".segment")]
    report = actstore.upload(path, url, segment_bytes=4096, storage_options=said)
    assert report.complete
    assert report.sent <= report.segments - len(there) + 1
    check_log(url, said, None, complete=True)


def test_a_last_segment_that_is_not_what_was_sent_is_sent_again(
    tmp_path: Path, url: str, said: Options
) -> None:
    path = local_log(tmp_path / "run.stream")
    actstore.upload(path, url, segment_bytes=4096, storage_options=said)
    bucket = remote(url, said).bucket  # type: ignore[union-attr]
    last = names_of(url, said)[-2]
    data = bytearray(bucket.get(last))
    data[100] ^= 1
    bucket.put(last, bytes(data))
    bucket.delete("complete.json")
    report = actstore.upload(path, url, segment_bytes=4096, storage_options=said)
    assert report.sent == 1
    check_log(url, said, None, complete=True)


def test_what_the_bucket_has_intact_is_not_removed_for_what_is_here(
    tmp_path: Path, url: str, said: Options
) -> None:
    path = local_log(tmp_path / "run.stream", finish=False)
    actstore.upload(path, url, segment_bytes=4096, storage_options=said)
    before = names_of(url, said)
    data = bytearray(path.read_bytes())
    data[-1000:] = bytes(1000)  # as a power cut leaves it
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="another state"):
        actstore.upload(path, url, storage_options=said)
    path.write_bytes(data[:-3000])
    with pytest.raises(ConfigError, match="another state"):
        actstore.upload(path, url, storage_options=said)
    assert names_of(url, said) == before
    check_log(url, said, None, complete=False)


def test_a_torn_tail_stays_here_and_damage_is_refused(
    tmp_path: Path, url: str, said: Options
) -> None:
    path = local_log(tmp_path / "torn.stream", finish=False)
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(path.read_bytes()[-200:-50])
    assert actstore.upload(path, url, storage_options=said).bytes == whole
    other = local_log(tmp_path / "damaged.stream")
    data = bytearray(other.read_bytes())
    place = data.index(data[8:24], len(data) // 2)  # a record's sync marker
    data[place] ^= 1
    other.write_bytes(data)
    with pytest.raises(StreamCorruptError):
        actstore.upload(other, f"{url}-2", storage_options=said)


@pytest.mark.parametrize("number", [0, 3])
def test_a_log_is_not_removed_for_one_that_lacks_a_segment(
    number: int, tmp_path: Path, url: str, said: Options
) -> None:
    path = local_log(tmp_path / "run.stream")
    actstore.upload(path, url, segment_bytes=4096, storage_options=said)
    remote(url, said).bucket.delete(names_of(url, said)[number])  # type: ignore[union-attr]
    for removes in (False, True):
        with pytest.raises(FormatError, match=r"complete\.json tells of"):
            actstore.upload(path, url, remove=removes, storage_options=said)
    assert path.exists()


@pytest.mark.parametrize("told", [True, False])
def test_a_log_is_not_removed_for_one_that_is_damaged(
    told: bool, tmp_path: Path, url: str, said: Options
) -> None:
    path = local_log(tmp_path / "run.stream")
    actstore.upload(path, url, segment_bytes=4096, storage_options=said)
    bucket = remote(url, said).bucket  # type: ignore[union-attr]
    second = names_of(url, said)[1]
    data = bytearray(bucket.get(second))
    data[100] ^= 1
    bucket.put(second, bytes(data))
    if not told:
        bucket.delete("complete.json")
    with pytest.raises(StreamCorruptError, match=rf"{second} is damaged"):
        actstore.upload(path, url, remove=True, segment_bytes=4096, storage_options=said)
    assert path.exists()
    assert ("complete.json" in names_of(url, said)) == told
    for name in names_of(url, said)[1:]:
        bucket.delete(name)
    report = actstore.upload(path, url, remove=True, segment_bytes=4096, storage_options=said)
    assert report.complete
    assert not path.exists()
    assert actstore.verify(url, storage_options=said).ok


@pytest.mark.parametrize("damaged", [False, True])
def test_what_was_given_back_to_the_disk_is_checked_by_its_records(
    damaged: bool, tmp_path: Path, url: str, said: Options
) -> None:
    log = growing(tmp_path / "spool.stream", url, said)
    write_passes(log, 120)
    log.close(finish=False)
    bucket = remote(url, said).bucket  # type: ignore[union-attr]
    far = [one for one in names_of(url, said) if int(one[:20]) > 70_000]  # not what is kept
    assert log.path.stat().st_blocks * 512 < log.path.stat().st_size
    if damaged:
        data = bytearray(bucket.get(far[0]))
        data[1000] ^= 1
        bucket.put(far[0], bytes(data))
        with pytest.raises(StreamCorruptError, match=rf"{far[0]} is damaged"):
            actstore.upload(log.path, url, remove=True, storage_options=said)
    else:
        actstore.upload(log.path, url, remove=True, storage_options=said)
        check_log(url, said, log.fired, complete=False)
    assert log.path.exists() == damaged


def test_another_log_or_none_is_refused(tmp_path: Path, url: str, said: Options) -> None:
    path = local_log(tmp_path / "run.stream")
    actstore.upload(path, url, storage_options=said)
    with pytest.raises(ConfigError, match="another log"):
        actstore.upload(local_log(tmp_path / "other.stream"), url, storage_options=said)
    with pytest.raises(ConfigError, match="wants the URL"):
        actstore.upload(path, "run.stream")
    with pytest.raises(MissingFileError):
        actstore.upload(tmp_path / "none.stream", url, storage_options=said)
    (tmp_path / "text").write_text("no log")
    with pytest.raises(FormatError, match=r"no \.stream log"):
        actstore.upload(tmp_path / "text", url, storage_options=said)
    with pytest.raises(MissingFileError, match="no log at"):
        actstore.open_stream(f"{url}-none", storage_options=said)
    with pytest.raises(ConfigError, match="without follow"):
        actstore.open_stream(url, follow=True, storage_options=said)


def test_a_segment_that_goes_while_its_log_is_open_is_damage(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_WINDOW", 1024)  # else all is read at once
    url = f"memory://{url[5:]}"
    path = local_log(tmp_path / "run.stream")
    actstore.upload(path, url, segment_bytes=4096)
    lost = names_of(url, {})[3]
    with (
        actstore.open_stream(url) as reader,
        actstore.open_stream(url, "skip") as lenient,
    ):
        remote(url).bucket.delete(lost)  # type: ignore[union-attr]
        with pytest.raises(StreamCorruptError, match=rf"{url}/{lost} is not there any more"):
            list(reader.packets())
        assert 0 < len(list(lenient.packets())) < 80
        assert lenient.damage


def test_a_lost_segment_is_damage_of_a_whole_log(tmp_path: Path, url: str, said: Options) -> None:
    path = local_log(tmp_path / "run.stream")
    actstore.upload(path, url, segment_bytes=4096, storage_options=said)
    bucket = remote(url, said).bucket  # type: ignore[union-attr]
    bucket.delete(names_of(url, said)[3])
    with pytest.raises(FormatError, match=r"complete\.json tells of"):
        actstore.open_stream(url, storage_options=said)
    bucket.delete("complete.json")
    with actstore.open_stream(url, storage_options=said) as reader:
        assert not reader.complete
        assert 0 < reader.packet_count < 80
    bucket.put("complete.json", b'{"bytes": 1')
    with pytest.raises(FormatError, match=r"complete\.json"):
        actstore.open_stream(url, storage_options=said)
