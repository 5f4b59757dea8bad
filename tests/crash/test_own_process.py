"""Faults that end or leave a capturing process: real children, whose logs are read afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import actstore

ROOT = Path(actstore.__file__).parents[1]
#: A capture of five passes with a token each; ``fault`` is called before the fourth.
CHILD = """
import os, resource, signal, sys, threading, warnings
import torch, actstore
warnings.simplefilter("ignore")
log = sys.argv[1]
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).eval()
framework = actstore.InstrumentationFramework(
    actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR, "none")
)
framework.instrument_model(model)

def fault():
{fault}

error = None
try:
    with torch.no_grad(), framework.capture_activations(
        log, track_per_token=True, checkpoint_interval_tokens=1
    ) as tracker:
        for step in range(5):
            if step == 3:
                fault()
            model(torch.full((8, 64), float(step)))
            tracker.record_token(step, str(step))
except BaseException as caught:
    error = caught
print(type(error).__name__, error)
print("hooks", sum(len(one._forward_hooks) for one in model.modules()))
print("threads", threading.active_count())
"""


def run(log: Path, fault: str, *, status: int | None = 0) -> list[str]:
    """Run the capture with a fault; give what it prints."""
    body = "\n".join(f"    {line}" for line in fault.strip().splitlines())
    done = subprocess.run(
        [sys.executable, "-c", CHILD.replace("{fault}", body), str(log)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if status is not None:
        assert done.returncode == status, done.stderr
    return done.stdout.splitlines()


def kept(log: Path) -> tuple[int, int, bool]:
    """Give a log's tokens and packets, all of them readable, and whether it was closed."""
    with actstore.open_stream(log) as reader:
        values = [one.values for one in reader.packets("0")]
        for number, one in enumerate(values):
            assert one.shape == (8, 64)
            assert reader.passes[number].index == number
        return len(reader.tokens), reader.packet_count, reader.complete


FULL = (
    "limit = os.path.getsize(log) + 100\nresource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))"
)


def test_a_full_disk_is_one_clear_error_and_the_log_is_readable(tmp_path: Path) -> None:
    log = tmp_path / "run.stream"
    said = run(log, f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{FULL}")
    assert said[0].startswith("CaptureError")
    assert "File too large" in said[0]
    assert str(log) in said[0]
    assert said[1:] == ["hooks 0", "threads 1"]
    tokens, packets, complete = kept(log)
    assert tokens == 3
    assert packets >= 9
    assert not complete


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", "KeyboardInterrupt"),
        ("raise ZeroDivisionError('mine')", "ZeroDivisionError mine"),
        ("sys.exit(3)", "SystemExit 3"),
        (
            "def raises(*_):\n    raise TimeoutError('late')\n"
            "signal.signal(signal.SIGALRM, raises)\nos.kill(os.getpid(), signal.SIGALRM)",
            "TimeoutError late",
        ),
    ],
    ids=["interrupt", "error", "exit", "handler"],
)
def test_what_is_raised_inside_comes_out_and_the_log_is_closed(
    fault: str, wanted: str, tmp_path: Path
) -> None:
    said = run(tmp_path / "run.stream", fault)
    assert said[0].strip() == wanted
    assert said[1:] == ["hooks 0", "threads 1"]
    assert kept(tmp_path / "run.stream") == (3, 9, True)
    assert actstore.verify(tmp_path / "run.stream").ok


def test_a_process_that_is_gone_at_once_keeps_its_checkpoints(tmp_path: Path) -> None:
    run(tmp_path / "run.stream", "os._exit(7)", status=7)
    assert kept(tmp_path / "run.stream") == (3, 9, False)


def test_a_process_that_a_signal_ends_keeps_its_checkpoints(tmp_path: Path) -> None:
    run(tmp_path / "run.stream", "os.kill(os.getpid(), signal.SIGTERM)", status=-signal.SIGTERM)
    assert kept(tmp_path / "run.stream") == (3, 9, False)


@pytest.mark.parametrize(
    "leaves", ["os._exit(0)", "raise SystemExit(0)"], ids=["at once", "through"]
)
def test_a_fork_does_not_touch_the_log(leaves: str, tmp_path: Path) -> None:
    fault = (
        "child = os.fork()\n"
        "if not child:\n"
        "    model(torch.ones(8, 64))\n"
        "    try:\n"
        "        tracker.record_token(99, 'child')\n"
        "    except actstore.ActstoreError:\n"
        f"        {leaves}\n"
        "    os._exit(9)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    said = run(tmp_path / "run.stream", fault)
    assert said[-3:] == ["NoneType None", "hooks 0", "threads 1"]
    assert kept(tmp_path / "run.stream") == (5, 15, True)
    assert actstore.verify(tmp_path / "run.stream").ok


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("os.remove(log)", "the log was removed or replaced while it was written"),
        ("os.truncate(log, 1000)", "something else left 1000 of the"),
    ],
    ids=["removed", "truncated"],
)
def test_a_log_that_is_taken_from_under_the_writer_is_said_at_the_next_checkpoint(
    fault: str, wanted: str, tmp_path: Path
) -> None:
    said = run(tmp_path / "run.stream", fault)
    assert said[0].startswith("CaptureError")
    assert wanted in said[0]
    assert "run.stream" in said[0]
    assert said[1:] == ["hooks 0", "threads 1"]
