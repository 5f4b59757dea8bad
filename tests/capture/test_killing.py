"""A process killed with SIGKILL loses nothing that it said was saved, and can go on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import refeed
import torch
from oracle import quiet

import actstore
from actstore.stream.reader import open_stream

STEPS, INTERVAL = 24, 5
LINES = STEPS * 6  # what refeed.py says a step: forward, 3 blocks, recording, recorded


def _kill_at(log: Path, line: int) -> int:
    """Run the script until it has said so many lines, kill it; give the tokens it recorded."""
    root = Path(actstore.__file__).parents[1]
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    arguments = [sys.executable, refeed.__file__, str(log), str(STEPS), str(INTERVAL)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(line)]
        process.kill()
        said += process.stdout.readlines()
    assert process.returncode == -9, "".join(said)
    return sum(one.startswith("recorded") for one in said)


def _contents(log: Path) -> tuple[list, list, list]:
    with open_stream(log) as reader:
        packets = [
            (one.seq, one.layer, one.pass_index, one.call, one.shape, one.values.tobytes())
            for one in reader.packets()
        ]
        tokens = [
            (one.step, one.token_id, one.token_text, one.pass_index) for one in reader.tokens
        ]
        passes = [
            (one.index, one.aborted, one.axes[0].token_ids.tolist()) for one in reader.passes
        ]
    return packets, tokens, passes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, list, list]:
    """Give what a run that nobody killed says."""
    log = tmp_path_factory.mktemp("whole") / "gen.stream"
    torch.set_num_threads(1)
    with quiet():
        refeed.run(log, STEPS, INTERVAL)
    return _contents(log)


def _check(log: Path, line: int, whole: tuple[list, list, list]) -> None:
    recorded = _kill_at(log, line)
    packets, tokens, passes = whole
    checkpoint = log.with_name("gen.stream.ckpt.json")
    saved = recorded - recorded % INTERVAL
    if saved:
        state = json.loads(checkpoint.read_text())
        assert state["total_tokens"] >= saved
        saved = state["total_tokens"]
    if log.stat().st_size:
        found_packets, found_tokens, found_passes = _contents(log)
        assert found_packets == packets[: len(found_packets)]
        assert found_tokens == tokens[: len(found_tokens)]
        assert found_passes[:-1] == passes[: len(found_passes)][:-1]
        assert len(found_tokens) >= saved
        assert len(found_packets) >= sum(one[2] < saved for one in packets)
    with quiet():
        refeed.run(log, STEPS, INTERVAL, resume=True)
    assert _contents(log) == whole
    assert not checkpoint.exists()
    table = json.loads(log.with_name("gen.stream_tokens.json").read_text())
    assert [one["token_id"] for one in table["tokens"]] == [one[1] for one in tokens]


@pytest.mark.parametrize("line", [1, 16, 30, 31, 95, 142])
def test_a_killed_run_keeps_its_checkpoints_and_resumes_to_the_same_log(
    line: int, log: Path, whole: tuple[list, list, list]
) -> None:
    _check(log, line, whole)


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.parametrize("line", random.Random(0).sample(range(1, LINES), 40))
def test_a_run_killed_anywhere_keeps_its_checkpoints_and_resumes_to_the_same_log(
    line: int, log: Path, whole: tuple[list, list, list]
) -> None:
    _check(log, line, whole)


def test_a_run_killed_again_and_again_still_ends_at_the_same_log(
    log: Path, whole: tuple[list, list, list]
) -> None:
    _kill_at(log, 40)
    with quiet(), pytest.raises(ZeroDivisionError):
        _resume_until(log, "recorded 12")
    with quiet(), pytest.raises(KeyboardInterrupt):
        _resume_until(log, "block 1", KeyboardInterrupt)
    with quiet():
        refeed.run(log, STEPS, INTERVAL, resume=True)
    assert _contents(log) == whole


def _resume_until(log: Path, at: str, error: type[BaseException] = ZeroDivisionError) -> None:
    def said(line: str) -> None:
        if line == at:
            raise error

    refeed.run(log, STEPS, INTERVAL, resume=True, said=said)
