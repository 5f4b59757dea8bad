"""The faults that a capture is put through, and what must hold after each of them.

Each happens in a fork of a child process. After it, the error is the one that is wanted; no hook,
thread or descriptor is left; the model can be captured again; the log reads back bit for bit up to
the fault; and the run, resumed, ends at the log of one that was not disturbed.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from actstore.capture import stage
from actstore.errors import FormatError, MissingFileError
from actstore.stream.reader import open_stream

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
import faults
import refeed
from faults import INTERVAL, STEPS
from forks import Child
from oracle import quiet

__all__ = ["CASES", "MORE", "Case", "Sufferer", "small_disk", "undisturbed"]

# How often each call is made in an undisturbed run: the HEADER and the first COMMIT, a group a
# token and one a checkpoint, the end; and a sync at the start, at checkpoints and at the end.
WRITES, SYNCS = 2 + STEPS + STEPS // INTERVAL + 1, 4
LINES = STEPS * 6  # what a run says a step: forward, 3 blocks, recording, recorded


@dataclass(frozen=True)
class Case:
    """A fault, and how the capture must end.

    ``error`` is what comes out of the ``with``: "" where the run must go on as if nothing had
    happened. ``cause`` and ``text`` are those of a `CaptureError`. ``late``: the fault may come
    when the run has ended, or while the log is closed. ``taken``: it is the log itself that is
    struck, so that there may be nothing to go on with.
    """

    name: str
    fault: str
    how: dict[str, Any] = field(default_factory=dict)
    error: str = "CaptureError"
    cause: str = "OSError"
    text: str = ""
    codec: str = "lz4"
    late: bool = False
    taken: bool = False

    def __str__(self) -> str:
        return self.name


def writes(kinds: list[tuple[int, bool, bool]], places: range = range(WRITES)) -> Iterator[Case]:
    """Let a write fail: once or from then on, and some of it may have come."""
    for at in places:
        for number, lasting, torn in kinds:
            name = (
                f"write {at}, {errno.errorcode[number]}{', torn' * torn}{', once' * (not lasting)}"
            )
            how = {"call": "writev", "at": at, "errno": number, "lasting": lasting, "torn": torn}
            codec = ("lz4", "none", "zstd")[at % 3]
            yield Case(name, "failing_call", how, text=os.strerror(number), codec=codec)


def syncs() -> Iterator[Case]:
    """Let a sync fail: what the kernel threw away then, a later sync would not tell of."""
    for at in range(SYNCS):
        for lasting in (False, True):
            how = {"call": "fdatasync", "at": at, "errno": errno.EIO, "lasting": lasting}
            how["torn"] = False
            name = f"sync {at}{', once' * (not lasting)}"
            yield Case(name, "failing_call", how, text=os.strerror(errno.EIO))


def sidecars() -> Iterator[Case]:
    """Let a file beside the log not be written."""
    for at in (1, 2, 3):
        yield Case(f"sidecar {at}", "failing_sidecar", {"at": at}, text=os.strerror(errno.EIO))


def encoders(places: range) -> Iterator[Case]:
    """Let a thread that encodes raise."""
    for at in places:
        for kind in ("RuntimeError", "MemoryError", "SystemExit"):
            how = {"at": at, "kind": kind}
            yield Case(
                f"block {at}, {kind}", "failing_encoder", how, cause=kind, text="the encoder broke"
            )


def limits() -> Iterator[Case]:
    """Let the file grow to some size only."""
    for size in (10, 700, 20_000, 60_000, 100_000):
        text = os.strerror(errno.EFBIG)
        yield Case(f"{size} bytes and no more", "limited_files", {"bytes": size}, text=text)


def disks(sizes: range) -> Iterator[Case]:
    """Let a small file system be full."""
    for size in sizes:
        text = os.strerror(errno.ENOSPC)
        yield Case(f"a disk of {size} KiB", "none", {"kib": size}, text=text)


def taken() -> Iterator[Case]:
    """Let something else remove, cut, replace or write the log."""
    for line in ("recorded 1", "block 1", f"recorded {STEPS}"):
        for how, share, cause in (
            ("remove", 0.0, "FileNotFoundError"),
            ("replace", 0.0, "FileNotFoundError"),
            ("truncate", 0.0, "OSError"),
            ("truncate", 0.6, "OSError"),
            ("truncate", 2.0, "OSError"),
            ("append", 0.0, "OSError"),
        ):
            job = {"how": how, "share": share, "line": line}
            name = f"{how} {share or ''} at {line}"
            yield Case(name, "interfering", job, cause=cause, taken=True)


def raised(lines: list[int]) -> Iterator[Case]:
    """Let the user's code raise, in the forward and between the forwards."""
    for line in lines:
        for kind, error in (
            ("MineError", "MineError"),
            ("KeyboardInterrupt", "KeyboardInterrupt"),
            ("exit", "SystemExit"),
        ):
            yield Case(f"{error} at line {line}", "raising", {"line": line, "kind": kind}, error)


def signals(seeds: range) -> Iterator[Case]:
    """Let a signal's handler raise at a random moment, of a fast disk or a slow one."""
    for seed in seeds:
        rng = random.Random(seed)
        kind, disk = rng.choice(("MineError", "KeyboardInterrupt")), rng.choice((0, 0, 0.005))
        seconds = 1e-5 + rng.random() * (0.03 + disk * 20)
        how = {"kind": kind, "seconds": seconds, "disk": disk, "begins": seed % 3 == 0}
        name = f"{kind} {seconds * 1e3:.2f} ms after the {'begin' if seed % 3 == 0 else 'forward'}"
        yield Case(name, "signalled", how, kind, late=True)


def harmless() -> Iterator[Case]:
    """What the capture must not mind."""
    yield Case("short writes", "short_writes", {"seed": 1}, "")
    yield Case("slow disk", "slow_disk", {"seconds": 0.03}, "")
    for kind in ("raise", "forward"):
        yield Case(f"another thread: {kind}", "threads", {"kind": kind}, "")


def forks(lines: list[int]) -> Iterator[Case]:
    """Let the process fork, and the child leave by the ``with``."""
    for line in lines:
        yield Case(f"fork at line {line}", "forking", {"line": line}, "")


def _kinds(numbers: list[int]) -> list[tuple[int, bool, bool]]:
    flags = (False, True)
    return [(number, lasting, torn) for number in numbers for lasting in flags for torn in flags]


#: By what must hold: the short form, and what the long form tries besides.
CASES: dict[str, list[Case]] = {
    "a write fails": [
        *writes([(errno.EIO, True, True)], range(0, WRITES, 2)),
        *writes([(errno.ENOSPC, False, False)], range(1, WRITES, 2)),
    ],
    "a sync fails": [*syncs()],
    "a sidecar can't be written": [*sidecars()],
    "an encoder raises": [*encoders(range(1, 42, 40))],
    "the log may not grow": [*limits()],
    "the disk is full": [*disks(range(4, 132, 31))],
    "the log is taken away": [*taken()],
    "the user's code raises": [*raised([1, 5, 21, 48])],
    "a signal handler raises": [*signals(range(12))],
    "nothing fails": [*harmless()],
    "the process forks": [*forks([1, 5, 6, 48])],
}
MORE: dict[str, list[Case]] = {
    "a write fails": [*writes(_kinds([errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS]))],
    "an encoder raises": [*encoders(range(2, 86, 7))],
    "the disk is full": [*disks(range(8, 132, 8))],
    "the user's code raises": [*raised([*range(2, LINES + 1, 3)])],
    "a signal handler raises": [*signals(range(1000, 1300))],
    "the process forks": [*forks([*range(1, LINES + 1, 2)])],
}


# -- what must hold -------------------------------------------------------------------------------


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run captures here as in the child: a group a token, one core, and no warnings of speed."""
    threads, often = torch.get_num_threads(), stage.FLUSH_SECONDS
    torch.set_num_threads(1)
    stage.FLUSH_SECONDS = 0.0
    try:
        with quiet():
            yield
    finally:
        torch.set_num_threads(threads)
        stage.FLUSH_SECONDS = often


class Sufferer(Child):
    """The child process that forks, with what an undisturbed run's log says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(faults.__file__)
        whole = folder / "whole.stream"
        with undisturbed():
            refeed.run(whole, STEPS, INTERVAL)
        self.wanted = contents(whole)

    def survive(self, case: Case, folder: Path) -> None:
        """Let a capture into a folder, which must be new, suffer; check all that must hold."""
        folder.mkdir()
        if "kib" in case.how:
            with small_disk(folder) as resize:
                resize(case.how["kib"])
                self._survive(case, folder / "gen.stream", make_room=lambda: resize(8192))
        else:
            self._survive(case, folder / "gen.stream", make_room=lambda: None)

    def _survive(self, case: Case, log: Path, make_room: Callable[[], None]) -> None:
        again = str(log.parent.parent / f"{log.parent.name}-again.stream")
        job = {"log": str(log), "fault": case.fault, "codec": case.codec, "again": again}
        found = self.ask(job | case.how)
        assert found["error"] not in ("lost", "hung or died"), found
        assert found["status"] == 0, found
        left = {name: found[name] for name in ("hooks", "threads", "descriptors")}
        if case.late:  # Python has no way to keep what is opened when a handler raises just then
            left["descriptors"] = [one for one in left["descriptors"] if one.endswith(".stream")]
        assert left == {"hooks": [], "threads": [], "descriptors": []}, found
        make_room()
        if case.late:
            assert found["error"] in (case.error, "NoneType"), found
        else:
            self._check_error(case, log, found)
        if case.taken:
            self._check_taken(log, found)
        else:
            self._check_log(log, found)

    def _check_error(self, case: Case, log: Path, found: dict[str, Any]) -> None:
        assert found["error"] == (case.error or "NoneType"), found
        if case.error == "CaptureError":
            assert found["cause"] == case.cause, found
            assert case.text in found["text"], found
            assert str(log) in found["text"], found
            return
        with open_stream(log) as reader:
            assert reader.complete, found
            assert reader.summary["ended_by"] == (case.error or None), found
            recorded = sum(one.startswith("recorded") for one in found["said"])
            assert recorded <= len(reader.tokens) <= recorded + 1, found
        if not case.error:
            assert contents(log) == self.wanted, found

    def _check_taken(self, log: Path, found: dict[str, Any]) -> None:
        """Read what is left of a log that something else has changed, if it is one still."""
        if not log.exists():
            return
        try:
            left = contents(log)
        except FormatError:
            return
        assert all(mine == self.wanted[kind][: len(mine)] for kind, mine in left.items()), found

    def _check_log(self, log: Path, found: dict[str, Any]) -> None:
        """Read what a fault left: a part of what was captured, with all that was promised."""
        counts = [int(one.split()[1]) for one in found["said"] if one.startswith("recorded")]
        saved = counts[-1] // INTERVAL * INTERVAL if counts else 0
        try:
            left = contents(log)
        except (FormatError, MissingFileError):
            assert saved == 0, found
        else:
            for kind, mine in left.items():
                assert mine == self.wanted[kind][: len(mine)], (kind, found)
            assert len(left["tokens"]) >= saved, found
            passes = [one[2] for one in self.wanted["packets"]]
            assert len(left["packets"]) >= sum(one < saved for one in passes), found
        with undisturbed():
            refeed.run(log, STEPS, INTERVAL, resume=True)
        assert contents(log) == self.wanted, found


def contents(log: Path) -> dict[str, Any]:
    """Give all that a run's log says, but for times and how its passes ended."""
    with open_stream(log) as reader:
        return {
            "packets": [
                (one.seq, one.layer, one.pass_index, one.call, one.shape, one.values.tobytes())
                for one in reader.packets()
            ],
            "tokens": [(one.step, one.token_id, one.token_text) for one in reader.tokens],
            "passes": [
                [(axis.token_ids.tolist(), axis.positions.tolist()) for axis in one.axes]
                for one in reader.passes
            ],
        }


class NoMountError(Exception):
    """No file system can be mounted here."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int], None]]:
    """Give what mounts a file system of so many KiB on a folder, or makes it larger."""
    mounted = False

    def resize(size: int) -> None:
        nonlocal mounted
        options = f"size={size}k" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoMountError(str(error)) from error
        mounted = True

    try:
        yield resize
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True, capture_output=True)
