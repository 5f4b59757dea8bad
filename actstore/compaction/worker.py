"""Owns what a worker process of a cluster does of a compaction: it plans once, and writes shards.

What it writes lies in a folder of that attempt alone. The archive and its journal are the
client's: a worker that was lost, and writes on, touches neither.
"""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import uuid4

from actstore.archive.jobs import Job, Written
from actstore.buckets import RemotePath
from actstore.clusters import memory_of
from actstore.compaction.executing import fitting, write_shard
from actstore.compaction.recipe import Recipe
from actstore.errors import ActstoreError, ConfigError

__all__ = ["Making", "Stamp", "WorkerError", "stamps_of", "write"]

#: What tells a file from another, or from itself later: its path, bytes and time in ns.
Stamp = tuple[str, int, int]

_IDLE_SECONDS: Final = 30.0  # after which a worker that is given nothing closes the logs


class WorkerError(OSError):
    """The cluster, or one of its workers, can't go on; what is finished is as good as it was."""


@dataclass(frozen=True, slots=True)
class Making:
    """What all tasks of a compaction have in common.

    Attributes
    ----------
    recipe : Recipe
        Makes the shards.
    stamps : tuple of Stamp
        Of the logs, as the client sees them.
    fingerprint : str
        Of the content and the shards, as the client planned them.
    profile : str
        Of their chunks.
    folder : Path
        Where attempts lie: of this call alone.
    gigabytes : float
        Memory that each process may take over what it had.
    """

    recipe: Recipe
    stamps: tuple[Stamp, ...]
    fingerprint: str
    profile: str
    folder: Path
    gigabytes: float

    @property
    def token(self) -> Path:
        """A file that is there as long as the client wants what is written."""
        return self.folder / "wanted"


def stamps_of(paths: Sequence[Path | RemotePath]) -> tuple[Stamp, ...]:
    """Give what tells logs from others."""
    found = [(str(path), path.stat()) for path in paths]
    return tuple((name, one.st_size, one.st_mtime_ns) for name, one in found)


def write(making: Making, wanted: Sequence[str]) -> tuple[str, list[Written]]:
    """Write shards, given by their files; the task of a worker.

    Returns
    -------
    str
        The folder of this attempt, within that of the making.
    list of Written
        What was written of each.

    Raises
    ------
    WorkerError
        This worker doesn't see the logs and the folder that the client sees, plans other shards,
        has too little memory, or can't write.
    ArchiveError
        What was written doesn't read back.
    """
    attempt = making.folder / uuid4().hex
    try:
        _check_files(making)
        with _held(making) as held:
            attempt.mkdir()
            return attempt.name, held.pool.submit(_write, held, making, wanted, attempt).result()
    except BaseException as error:
        _remove(attempt, making)
        if isinstance(error, OSError) and not isinstance(error, ActstoreError | WorkerError):
            raise _refused(str(error)) from error
        raise


def _write(held: _Held, making: Making, wanted: Sequence[str], attempt: Path) -> list[Written]:
    found = []
    for file in wanted:
        found.append(write_shard(held.jobs[file], attempt, making.profile))
        if not making.token.exists():
            raise _refused("the compaction was ended")
    return found


def _remove(attempt: Path, making: Making) -> None:
    """Remove an attempt, and the folders around it if the client has done so too."""
    shutil.rmtree(attempt, ignore_errors=True)
    with suppress(OSError):  # as long as the client is there, they aren't empty
        making.folder.rmdir()
        making.folder.parent.rmdir()


def _refused(why: str) -> WorkerError:
    return WorkerError(f"a worker on host {socket.gethostname()} can't go on: {why}")


def _check_files(making: Making) -> None:
    """Refuse where the files here aren't those that the client sees."""
    shared = "logs and archive must be on a file system that all workers see by the same paths"
    if not making.token.exists():
        raise _refused(f"it doesn't see the client's folder {making.folder}; {shared}")
    for stamp in making.stamps:
        try:
            (found,) = stamps_of([Path(stamp[0])])
        except FileNotFoundError as error:
            raise _refused(f"it doesn't see the log {stamp[0]}; {shared}") from error
        if found != stamp:
            msg = (
                f"{stamp[0]} has {found[1]} bytes there, of time {found[2]} ns; the client sees "
                f"{stamp[1]}, of {stamp[2]}: it changes, or is another file; {shared}"
            )
            raise _refused(msg)


# -- what is planned once -----------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Held:
    """The planned shards of a making, by their files, and the threads that write them."""

    jobs: dict[str, Job]
    pool: ThreadPoolExecutor
    stack: ExitStack
    users: int = 0
    timer: threading.Timer | None = None

    def close(self) -> None:
        self.pool.shutdown()
        self.stack.close()


@dataclass(slots=True)
class _Shelf:
    """What this process holds, by the folder of the making."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    held: dict[Path, _Held] = field(default_factory=dict)


_SHELF: Final = _Shelf()


@contextmanager
def _held(making: Making) -> Iterator[_Held]:
    """Give the planned shards; they stay planned for a while, for the next task."""
    with _SHELF.lock:
        held = _SHELF.held.get(making.folder)
        if held is None:
            held = _SHELF.held[making.folder] = _planned(making)
        held.users += 1
        if held.timer is not None:
            held.timer.cancel()
            held.timer = None
    try:
        yield held
    finally:
        with _SHELF.lock:
            held.users -= 1
            if not held.users:
                held.timer = threading.Timer(_IDLE_SECONDS, _close_idle, (making.folder, held))
                held.timer.daemon = True
                held.timer.start()


def _close_idle(folder: Path, held: _Held) -> None:
    """Close what no task has used since; threads end, and their memory with them."""
    with _SHELF.lock:
        if held.users or _SHELF.held.get(folder) is not held:
            return
        del _SHELF.held[folder]
    held.close()


def _planned(making: Making) -> _Held:
    """Open and plan the logs, and let as many threads write as fit into memory."""
    from distributed import get_worker

    memory = memory_of(get_worker())
    free = memory.free / 1e9
    with ExitStack() as stack:
        content, jobs = stack.enter_context(making.recipe.made())
        if content.fingerprint(jobs) != making.fingerprint:
            raise _refused("it plans other shards; is another version of actstore there?")
        try:
            threads = fitting(jobs, memory.threads, min(making.gigabytes, free))
        except ConfigError as error:
            msg = (
                f"its memory limit of {memory.limit / 1e9:.2f} GB leaves "
                f"{max(free, 0):.2f} GB beside what the process has; {error}, or "
                "start workers with more"
            )
            raise _refused(msg) from error
        pool = ThreadPoolExecutor(threads, "actstore-compact")
        return _Held({job.file: job for job in jobs}, pool, stack.pop_all())
