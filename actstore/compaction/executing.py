"""Owns who writes the shards of an archive: threads within a budget of memory.

An executor gives each shard as it is written; what is finished is noted by who asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

from actstore import machine
from actstore.archive import jobs, shards
from actstore.archive.grid import SHARD_BYTES
from actstore.archive.jobs import Job, Written
from actstore.arguments import check_count, count_fitting
from actstore.errors import ArchiveError

__all__ = [
    "SENT_BYTES",
    "Executor",
    "Sending",
    "Threads",
    "fitting",
    "unverified",
    "workers_of",
    "write_shard",
]

#: What a compaction holds beside its shards: the logs' tables, and what of them is decoded.
_BESIDE: Final = 64 << 20
#: Shards that are begun, for each thread: who asks for them later keeps no more on the disk.
_AHEAD: Final = 2
#: Shards that are uploaded at a time.
_SENDERS: Final = 2
#: Memory that these take.
SENT_BYTES: Final = _SENDERS * SHARD_BYTES


class Executor(Protocol):
    """Writes shards, each once, and few more than are asked for."""

    def written(
        self, jobs: Sequence[Job], folder: Path, profile: str
    ) -> Generator[tuple[Job, Written], None, None]:
        """Write shards into the folder of an archive that is being made.

        Yields
        ------
        (Job, Written)
            Each shard as it is on the disk, verified; in any order.

        Raises
        ------
        ArchiveError
            What was written doesn't read back.
        """
        ...


@dataclass(frozen=True, slots=True)
class Threads:
    """Writes shards by threads of this process.

    Parameters
    ----------
    count : int
        How many.
    """

    count: int

    def written(
        self, jobs: Sequence[Job], folder: Path, profile: str
    ) -> Generator[tuple[Job, Written], None, None]:
        """Write shards; see `Executor`."""
        waiting, running = iter(jobs), dict[Future[Written], Job]()
        with _threads(self.count) as pool:
            while True:
                for job in islice(waiting, _AHEAD * self.count - len(running)):
                    running[pool.submit(write_shard, job, folder, profile)] = job
                if not running:
                    return
                # an interrupt is not kept waiting
                for future in wait(running, return_when="FIRST_COMPLETED").done:
                    yield running.pop(future), future.result()


@dataclass(frozen=True, slots=True)
class Sending:
    """Has shards written by another executor, and uploads each; few of them wait for that.

    Parameters
    ----------
    executor : Executor
        Writes them.
    send : callable
        Uploads what was written of a shard; called in threads.
    """

    executor: Executor
    send: Callable[[Written], None]

    def written(
        self, jobs: Sequence[Job], folder: Path, profile: str
    ) -> Generator[tuple[Job, Written], None, None]:
        """Write and upload shards; see `Executor`."""
        sent: dict[Future[None], tuple[Job, Written]] = {}

        def ended(most: int) -> Iterator[tuple[Job, Written]]:
            while len(sent) > most:
                for future in wait(sent, return_when="FIRST_COMPLETED").done:
                    future.result()
                    yield sent.pop(future)

        with (
            _threads(_SENDERS) as pool,
            closing(self.executor.written(jobs, folder, profile)) as made,
        ):
            for job, written in made:
                sent[pool.submit(self.send, written)] = job, written
                yield from ended(_SENDERS)
            yield from ended(0)


def fitting(jobs: Sequence[Job], workers: int, max_memory_gb: float, beside: int = 0) -> int:
    """Give how many threads fit into memory, with so many bytes beside them.

    Raises
    ------
    ConfigError
        Not even one does.
    """
    needed = max((job.memory for job in jobs), default=0)
    if not needed:
        return workers
    return min(workers, count_fitting("shard", needed, max_memory_gb, _BESIDE + beside))


def workers_of(workers: int | None) -> int:
    """Give how many threads are meant: as many as there are cores, where nothing is said.

    Raises
    ------
    ConfigError
        It is no number of threads.
    """
    if workers is None:
        return machine.cores()
    check_count("workers", workers)
    return workers


def write_shard(job: Job, folder: Path, profile: str) -> Written:
    """Write a shard, compare what it decodes to with the log, and its files with what they are."""
    try:
        return jobs.write(job, folder, profile)
    except shards.MismatchError as error:
        raise unverified(job) from error


def unverified(job: Job) -> ArchiveError:
    """Give the error of a shard that differs from its log."""
    msg = (
        f"{job.name} at {job.place}, rows {job.shard.first} to {job.shard.last}, doesn't read "
        "back as the log has it; nothing was kept of this archive: check the disk, and compact "
        "again"
    )
    return ArchiveError(msg)


@contextmanager
def _threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads; where the context fails, what they have not begun is not begun."""
    pool = ThreadPoolExecutor(workers, "actstore-compact")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
