"""Kills captures at random points, and compares what is left: shared by the acceptance scripts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import oracle

import actstore

ROOT = Path(__file__).parents[2]
STEPS = 24

__all__ = ["lose_nothing"]


def lose_nothing(kills: int) -> str:
    """Kill a tracked capture at random points; what a checkpoint named is there, resume equals.

    Before it is resumed, what is there is also recovered as a whole log, which must be equal.
    """
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole.stream")
        _child(whole).communicate()
        wanted = _content(whole)
        kept, checked = [], 0
        for number in range(kills):
            log = Path(folder, f"killed-{number}.stream")
            said = _kill(log, after=rng.randrange(STEPS), delay=rng.random() * 0.004)
            boundary = said // 4 * 4
            if log.exists() and log.stat().st_size:
                with actstore.open_stream(log) as reader:
                    steps = len(reader.tokens)
                    packets = [oracle.as_fired(one) for one in reader.packets()]
                assert steps >= boundary, f"{steps} tokens read back, {boundary} were promised"
                assert packets == wanted[0][: len(packets)]
                report = actstore.recover(log)
                assert report.whole
                with actstore.open_stream(report.recovered) as reader:
                    assert [oracle.as_fired(one) for one in reader.packets()] == packets
                checked += len(packets)
                kept.append(steps)
            _child(log).communicate()
            assert _content(log) == wanted, f"resumed run {number} differs"
    return (
        f"{kills} kills at 0 to {STEPS} tokens; {checked} packets read back and recovered equal; "
        f"tokens kept {min(kept)} to {max(kept)}; every resumed run equals the whole one"
    )


def _child(log: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("resumable.py")), str(log), str(STEPS)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def _kill(log: Path, after: int, delay: float) -> int:
    """Kill a child some time after a token; give how many tokens it said were recorded."""
    child = _child(log)
    assert child.stdout is not None
    said = 0
    for line in child.stdout:
        word, number = line.split()
        said = int(number)
        if said >= after:
            time.sleep(delay)  # the random point itself, not a way to wait for something
            child.send_signal(signal.SIGKILL)
            break
        assert word in ("begun", "token")
    rest = child.stdout.read().split()
    child.wait()
    return int(rest[-1]) if rest else said


def _content(log: Path) -> tuple[Any, ...]:
    with actstore.open_stream(log) as reader:
        assert reader.complete
        packets = [oracle.as_fired(one) for one in reader.packets()]
        calls = [(one.seq, one.pass_index, one.call) for one in reader.packets()]
        tokens = [(one.step, one.token_id, one.token_text) for one in reader.tokens]
        passes = [one.axes[0].token_ids.tolist() for one in reader.passes]
    return packets, calls, tokens, passes
