"""What a capture says of how it went."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from oracle import framework, quiet
from tiny_models import build, token_ids

from actstore.capture import hooks
from actstore.capture.meter import PROGRESS_SECONDS, Meter
from actstore.stream.reader import open_stream


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_over_the_whole_run_and_over_its_best_second() -> None:
    clock = Clock()
    meter = Meter("run.stream", clock=clock)
    for seconds, nbytes in ((1.0, 10**9), (0.4, 2 * 10**9), (0.4, 3 * 10**9), (2.2, 10**9)):
        clock.now += seconds
        meter.written(5, nbytes, nbytes // 2, 0.1)
    found = meter.rates(1.0, {"budget": 0.0, "disk": 0.0})
    assert (meter.packets, meter.raw_bytes, meter.encoded_bytes) == (20, 7 * 10**9, 35 * 10**8)
    assert found["duration_seconds"] == pytest.approx(4.0)
    assert found["sustained_gbps"] == pytest.approx(7 / 4)
    assert found["peak_gbps"] == pytest.approx(6.0)
    assert (found["target_met"], found["limited_by"]) == (True, None)
    assert meter.writing_seconds == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("waited", "wanted"),
    [
        ({"budget": 0.0, "encoding": 0.0, "disk": 0.0}, "model"),
        ({"budget": 0.3, "encoding": 0.3, "disk": 0.2}, "model"),
        ({"budget": 0.3, "encoding": 1.5, "disk": 0.2}, "encoding"),
        ({"budget": 3.0, "encoding": 1.5, "disk": 0.2}, "budget"),
    ],
)
def test_a_run_that_missed_its_target_says_what_limited_it(
    waited: dict[str, float], wanted: str
) -> None:
    clock = Clock()
    meter = Meter("run.stream", clock=clock)
    clock.now += 10
    meter.written(1, 10**9, 10**9, 0.1)
    found = meter.rates(1.0, waited)
    assert (found["target_met"], found["limited_by"]) == (False, wanted)
    assert found["waited_seconds"] == pytest.approx(sum(waited.values()))
    assert found["waited_by_cause"] == waited


def test_a_line_comes_every_few_seconds_and_says_how_the_run_goes() -> None:
    clock, lines = Clock(), []
    meter = Meter("run.stream", lines.append, clock)
    for _ in range(30):
        clock.now += 0.5
        meter.written(1000, 10**8, 5 * 10**7, 0.01)
    assert len(lines) == int(15 / PROGRESS_SECONDS)
    assert lines[0].startswith("run.stream: 10,000 packets, 1.00 GB, ")
    assert "2.00 times smaller, 5 s" in lines[0]


def test_a_progress_that_raises_is_logged_once_and_the_run_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, (end, terminal) = Clock(), os.pipe()
    os.close(end)
    meter = Meter("run.stream", lambda line: os.write(terminal, line.encode()), clock)
    for _ in range(40):
        clock.now += 0.5
        meter.written(1, 10, 10, 0.01)
    os.close(terminal)
    assert meter.packets == 40
    (told,) = caplog.records
    assert (told.name, told.levelname) == ("actstore", "WARNING")
    assert "run.stream: no more lines of progress: BrokenPipeError" in told.getMessage()


def test_the_share_in_hooks_follows_from_passes_that_were_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of clocks that go on by a second whenever they are looked at, every firing takes one
    monkeypatch.setattr(hooks.time, "perf_counter", itertools.count(1.0).__next__)
    monkeypatch.setattr(Meter, "seconds", 1000.0)
    model, one = build("llama"), framework()
    one.instrument_model(model)
    with quiet(), torch.no_grad(), one.capture_activations(str(tmp_path / "run.stream")):
        for _ in range(4):
            model(token_ids())
    assert 0 < one.summary["packets"] < 1000
    assert one.summary["share_in_hooks"] == one.summary["packets"] / 1000


def test_the_summary_of_a_capture_counts_what_came_and_what_was_written(tmp_path: Path) -> None:
    model, one = build("llama"), framework()
    one.instrument_model(model)
    lines: list[str] = []
    one.progress = lines.append
    with quiet(), torch.no_grad(), one.capture_activations(str(tmp_path / "run.stream")):
        for _ in range(12):
            model(token_ids())
    with open_stream(tmp_path / "run.stream") as reader:
        said = reader.summary
        count, raw = reader.packet_count, int(reader.table.nbytes.sum())
        encoded = int(reader.table.encoded.sum())
    assert said == one.summary
    assert said["packets"] == said["packets_expected"] == said["packets_written"] == count
    assert (said["raw_bytes"], said["encoded_bytes"]) == (raw, encoded)
    assert 0 < said["share_in_hooks"] < 1
    assert said["peak_gbps"] >= said["sustained_gbps"] > 0
    assert set(said["waited_by_cause"]) == {"budget", "encoding", "disk", "device"}
    assert said["writing_seconds"] > 0
