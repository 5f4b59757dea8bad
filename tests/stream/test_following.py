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

import pytest

import actstore
from actstore.errors import ConfigError

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
