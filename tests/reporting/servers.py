"""Starts `actstore serve` as a process of its own, and asks it by its printed address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Server", "environment", "served"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Server:
    """A running server: its process, its page's address, and the lines that it said before it."""

    process: subprocess.Popen[str]
    url: str
    said: list[str]

    @property
    def port(self) -> int:
        return int(self.url.split("/")[2].rpartition(":")[2])

    @property
    def token(self) -> str:
        return self.url.split("/")[3]

    def end(self, by: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """End it as Ctrl-C does; give its exit code, and all that it wrote after the address."""
        self.process.send_signal(by)
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out


def environment() -> dict[str, str]:
    """Give what a process finds this checkout by."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextmanager
def served(path: Path, *options: Any) -> Iterator[Server]:
    """Serve a log or an archive; what the process says on stderr is among what it says."""
    process = subprocess.Popen(
        [sys.executable, "-m", "actstore", "serve", str(path), *map(str, options)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    try:
        said: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.rstrip("\n"))
            if line.startswith("http://"):
                break
        assert said, "it ended without a word"
        assert said[-1].startswith("http://"), said
        yield Server(process, said[-1], said)
    finally:
        process.kill()
        process.communicate()
