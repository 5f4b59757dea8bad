"""Runs captures in forks of a child that has torch loaded: a fault, hang or kill costs little.

A script of this folder hands `serve` what it does with a job; a test starts that script as a
`Child`, and sends it jobs.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

import actstore

__all__ = [
    "TIMEOUT",
    "Child",
    "Job",
    "environment",
    "forked",
    "quick_folder",
    "serve",
    "wait_for",
]

TIMEOUT = 60.0
Job = dict[str, Any]


@contextmanager
def quick_folder() -> Iterator[Path]:
    """Give a new folder in memory, where there is such a place: its syncs cost nothing."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if usable else None) as name:
        yield Path(name)


def environment() -> dict[str, str]:
    """Give the environment of a child: it finds this checkout, and takes one core."""
    root = str(Path(actstore.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def forked(
    work: Callable[[Callable[[str], None]], None], kill_at: int | None = None, delay: float = 0.0
) -> dict[str, Any]:
    """Do something in a fork that says lines; kill it a little after it has said so many."""
    pipe, other = os.pipe()
    child = os.fork()
    if not child:
        os.close(pipe)
        status = 1
        try:
            work(lambda line: _write(other, f"{line}\n".encode()))
            status = 0
        finally:
            os._exit(status)
    os.close(other)
    heard, killed, deadline = b"", False, time.monotonic() + TIMEOUT
    while True:
        if not killed and kill_at is not None and heard.count(b"\n") >= kill_at:
            time.sleep(delay)  # the random moment itself, not a way to wait for something
            os.kill(child, signal.SIGKILL)
            killed = True
        if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
            os.kill(child, signal.SIGKILL)
            break
        part = os.read(pipe, 1 << 16)
        if not part:
            break
        heard += part
    os.close(pipe)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"said": heard.decode().splitlines(), "status": status, "killed": killed}


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def wait_for(child: int, seconds: float) -> bool:
    """Wait for a forked child; kill it, and give False, if it takes longer."""
    descriptor = os.pidfd_open(child)
    ended = bool(select.select([descriptor], [], [], seconds)[0])
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(descriptor)
    os.waitpid(child, 0)
    return ended


def serve(work: Callable[[Job], dict[str, Any]]) -> None:
    """Answer jobs, one a line, until there are no more."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        pass  # imports now what every fork would import for itself
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), flush=True)


class Child:
    """A process that runs a script which serves, while the context is open."""

    def __init__(self, script: str | Path) -> None:
        self._script = script

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def ask(self, job: Job) -> dict[str, Any]:
        """Send a job; give the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer
