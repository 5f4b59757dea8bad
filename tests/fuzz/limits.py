"""One run of what is fuzzed, under its limits: no error but ours, a second, and 64 MiB.

The second is one of the process's own time, all threads together, and of each MiB where a file is
larger. A log that declares many packets may take as much longer as each of them does; the memory
of values that are validly declared comes on top of the 64 MiB.
"""

from __future__ import annotations

import atexit
import ctypes
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from actstore.errors import ActstoreError, ActstoreWarning

SECONDS: Final = 1.0  # and of each MiB
A_PACKET: Final = 60e-6  # seconds
HANGS_AFTER: Final = 60  # seconds, when a target is interrupted
MEMORY: Final = 64 << 20
_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of malloc.h
_LARGE: Final = 1 << 20


def _nothing(data: bytes) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Target:
    """Something to fuzz.

    Attributes
    ----------
    name : str
        What it is.
    run : callable
        Takes the bytes; gives what they were found to be, in a word, so that inputs that are
        something new are kept to go on from.
    mutate : callable
        Gives other bytes, from bytes and a `random.Random`.
    corpus : sequence of bytes
        Where to begin.
    allowance : callable
        Gives the bytes of memory that an input may cost beyond `MEMORY`.
    packets : callable
        Gives the packets that an input declares: each may take `A_PACKET` longer.
    """

    name: str
    run: Callable[[bytes], str]
    mutate: Callable[[bytes, Random], bytes]
    corpus: Sequence[bytes]
    allowance: Callable[[bytes], int] = _nothing
    packets: Callable[[bytes], int] = _nothing


class Finding(AssertionError):  # noqa: N818 - named for what a fuzzer makes
    """What must not happen, happened."""

    @property
    def place(self) -> str:
        """What it says without what is different in each: numbers, and what was quoted."""
        return re.sub(r"\d+\.\d+ s|\d+ (bytes|MiB)|'.*'", "", str(self))


class _TooLong(BaseException):
    """Raised in the middle of a target that doesn't end."""


def folder() -> Path:
    """Give a folder in memory, where there is such a place; it goes when the process ends."""
    memory = Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="actstore-fuzz-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def steady_heap() -> None:
    """Have malloc give back what is large, and take one heap for all threads.

    Address space is what is limited: what malloc keeps for later would hide what is taken, and
    each further heap reserves 64 MiB. Elsewhere than in glibc this changes nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, _LARGE)


def warm_up(target: Target, data: bytes) -> None:
    """Run a target without limits: an import fails in odd ways where memory is short."""
    with suppress(ActstoreError), _quiet():
        target.run(data)


def check(target: Target, data: bytes) -> str:
    """Run a target on an input; give what was made of it.

    Raises
    ------
    Finding
        Another error than an `ActstoreError`, over a second of this process's time, or memory
        beyond the limit.
    """
    allowed = MEMORY + target.allowance(data)
    begun = time.process_time()
    try:
        with memory_limit(allowed), _alarm(), _quiet():
            found = target.run(data)
    except ActstoreError as error:
        found = f"{type(error).__name__} {_at(error)}"
    except _TooLong:
        msg = f"{target.name}: no end after {HANGS_AFTER} s, with {len(data)} bytes"
        raise Finding(msg) from None
    except MemoryError as error:
        msg = f"{target.name}: wants over {allowed >> 20} MiB for {len(data)} bytes: {_at(error)}"
        raise Finding(msg) from error
    except Exception as error:
        msg = f"{target.name}: {type(error).__name__}: {error!s:.300}: {_at(error)}"
        raise Finding(msg) from error
    taken = time.process_time() - begun
    may = SECONDS * max(len(data) / (1 << 20), 1)
    if taken > may and taken > may + A_PACKET * target.packets(data):
        msg = f"{target.name}: takes {taken:.2f} s, with {len(data)} bytes; found {found:.200}"
        raise Finding(msg)
    return found


def _at(error: BaseException) -> str:
    """Give the innermost lines of actstore that an error came through."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "actstore" in one[0]]
    return " < ".join(f"{Path(one[0]).name}:{one[1]}" for one in reversed(frames[-4:]))


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Refuse the process more than so many further bytes."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActstoreWarning)
        yield


@contextmanager
def _alarm() -> Iterator[None]:
    """Interrupt what takes far too long."""

    def interrupt(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(HANGS_AFTER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
