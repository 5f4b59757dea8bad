"""A log that is being written shows what is committed, also to another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import actstore
from actstore.errors import ConfigError, StreamCorruptError
from actstore.stream import scan
from actstore.stream.reader import StreamReader
from actstore.stream.table import COLUMNS

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis, random_values

WRITER = """
import sys, time, warnings
import torch, actstore
warnings.simplefilter("ignore")
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
framework = actstore.InstrumentationFramework(
    actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR)
)
framework.instrument_model(model)
with torch.no_grad(), framework.capture_activations(
    sys.argv[1], track_per_token=True, checkpoint_interval_tokens=1
) as tracker:
    for step in range(int(sys.argv[2])):
        model(torch.full((1, 4), float(step)))
        tracker.record_token(step, str(step))
        print("recorded", step, flush=True)
        sys.stdin.readline()
"""


@contextmanager
def writing(log: Path, steps: int) -> Iterator[subprocess.Popen[str]]:
    """Run a capture that records a token for each line it is given."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(log), str(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(actstore.__file__).parents[1],
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> None:
    """Let the capture take its next step."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Give the path of a log that is not there yet."""
    return tmp_path / "live.stream"


def test_packets_come_as_they_are_committed_until_the_log_is_closed(log: Path) -> None:
    with writing(log, 4) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "recorded 0\n"
        with actstore.open_stream(log, follow=True) as reader:
            seen = []
            for packet in reader.packets("0"):
                seen.append(packet.pass_index)
                assert process.poll() is None or packet.pass_index == 3
                assert len(reader.tokens) >= packet.pass_index
                go(process)
            assert seen == [0, 1, 2, 3]
            assert reader.complete
            assert len(reader.passes) == 4
        assert process.wait(30) == 0
    with actstore.open_stream(log) as reader:
        assert [one.pass_index for one in reader.packets("0")] == seen


def test_following_ends_when_the_writer_is_killed(log: Path) -> None:
    with writing(log, 4) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with actstore.open_stream(log, follow=True) as reader:
            found = reader.packets()
            first = [next(found).layer for _ in range(3)]
            os.kill(process.pid, signal.SIGKILL)
            began = time.monotonic()
            assert list(found) == []
            assert time.monotonic() - began < 30
        assert first == ["0", "1", ""]
        assert not reader.complete


def test_a_log_that_is_being_written_shows_what_is_committed_without_following(log: Path) -> None:
    with writing(log, 3) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with actstore.open_stream(log) as reader:
            assert not reader.complete
            assert [one.layer for one in reader.packets()] == ["0", "1", ""]
            assert [one.token_text for one in reader.tokens] == ["0"]
        with actstore.open_dataset(log) as dataset:
            assert dataset.token_id.sizes["token"] == 1
        with pytest.raises(ConfigError, match="is being written"):
            actstore.recover(log)


def test_following_a_closed_log_ends_at_its_end(log: Path) -> None:
    with writing(log, 1) as process:
        go(process)
        assert process.wait(30) == 0
    with actstore.open_stream(log, follow=True) as reader:
        assert len(list(reader.packets())) == 3


# -- what was seen before isn't gone through again -----------------------------------------------


def put(log: LogBuilder, first: int, last: int, seed: int = 0) -> None:
    """Commit a group of two layers, and a packet of which each part is in a group, a pass."""
    for number in range(first, last):
        log.begin(axis(1, 2 + number % 2, start=number), index=number)
        for layer in ("a", "b") if number else ("a",):
            log.put(layer, random_values((1, 2 + number % 2, 4), seed=seed + number))
        log.token(number, f"<{number}>")
        log.commit()
        log.put("c", random_values((3, number + 1), seed=seed + number), parts=3, apart=True)
        log.commit()


def begun(path: Path) -> LogBuilder:
    log = LogBuilder(path, compression="none")
    for name in "abc":
        log.layer(name)
    put(log, 0, 2)
    return log


def assert_as_opened(reader: StreamReader, errors: str = "raise") -> None:
    """A reader knows what one would that opens the log now."""
    with actstore.open_stream(reader.path, errors) as fresh:
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(reader.table, name), getattr(fresh.table, name))
        assert reader.table.shapes == fresh.table.shapes
        assert reader.table.blocks == fresh.table.blocks
        assert reader.layers == fresh.layers
        assert reader.tokens == fresh.tokens
        assert list(map(repr, reader.passes)) == list(map(repr, fresh.passes))
        assert (reader.complete, reader.damage) == (fresh.complete, fresh.damage)
        assert reader.summary == fresh.summary


def test_what_comes_is_taken_in_without_going_through_what_was_there(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = begun(log)
    entry, offsets = scan.LogFile.entry, []

    def noted(self: scan.LogFile, offset: int, sync: bytes | None) -> object:
        offsets.append(offset)
        return entry(self, offset, sync)

    with actstore.open_stream(log, follow=True) as reader:
        packets = reader.packets()
        seen = [next(packets).values.tobytes() for _ in range(5)]
        for number in range(2, 6):
            last = next(one for one in reversed(reader.scan.groups) if one.entries).offset
            put(built, number, number + 1)
            with monkeypatch.context() as patched:
                patched.setattr(scan.LogFile, "entry", noted)
                seen += [next(packets).values.tobytes() for _ in range(3)]
            assert offsets
            assert min(offsets) >= last, "the COMMIT that was the last, and what follows it"
            offsets.clear()
            assert_as_opened(reader)
        built.close()
        assert list(packets) == []
        assert reader.complete
        assert_as_opened(reader)
    assert seen == [one.values.tobytes() for one in built.fired]


def test_parts_of_a_packet_come_when_all_of_them_are_there(log: Path) -> None:
    built = begun(log)
    values = random_values((3, 5), seed=9)
    with actstore.open_stream(log, follow=True) as reader:
        packets = reader.packets("c")
        assert [next(packets).shape for _ in range(2)] == [(3, 1), (3, 2)]
        with log.open("rb") as file:  # what a reader sees while the parts are being written
            before = os.fstat(file.fileno()).st_size
            built.put("c", values, parts=3, apart=True)
            built.commit()
            whole = file.read()
        os.truncate(log, before)
        for end in (*range(before + 50, len(whole), 50), len(whole)):
            with log.open("r+b") as file:
                file.seek(before)
                file.write(whole[before:end])
            reader._wait()
            assert_as_opened(reader)
        built.close()
        assert [one.values.tobytes() for one in packets] == [values.tobytes()]


def test_a_log_that_was_cut_and_went_on_is_read_as_it_is_now(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "urandom", lambda count: bytes(range(count)))
    built, other = begun(log), begun(log.with_name("other.stream"))
    put(built, 2, 4)
    put(other, 2, 6, seed=100)  # a run that was resumed behind pass 1
    with actstore.open_stream(log, follow=True) as reader:
        packets = reader.packets()
        assert len([next(packets) for _ in range(11)]) == 11
        last = reader.scan.groups[-1]
        built.close(finish=False)
        other.close()
        log.write_bytes(other.path.read_bytes()[:-1])  # not closed yet
        reader._wait()
        assert_as_opened(reader)
        log.write_bytes(other.path.read_bytes())
        rest = [one.values.tobytes() for one in packets]
        assert last.offset in [one.offset for one in reader.scan.groups]
        assert_as_opened(reader)
    assert rest == [one.values.tobytes() for one in other.fired[11:]]


@pytest.mark.parametrize("errors", ["raise", "skip"])
def test_damage_that_comes_is_told_as_on_opening(log: Path, errors: str) -> None:
    built = begun(log)
    with actstore.open_stream(log, errors, follow=True) as reader:
        packets = reader.packets()
        assert len([next(packets) for _ in range(5)]) == 5
        size = log.stat().st_size
        put(built, 2, 4)
        data = bytearray(log.read_bytes())
        data[data.index(data[8:24], size + 200)] ^= 1  # a record's sync marker
        log.write_bytes(data)
        reader._wait()
        assert reader.damage
        assert_as_opened(reader, errors)
        put(built, 4, 5)
        reader._wait()
        assert_as_opened(reader, errors)
        built.close(finish=False)
        if errors == "raise":
            with pytest.raises(StreamCorruptError):
                list(packets)
        else:
            assert len(list(packets)) == reader.packet_count - 5
