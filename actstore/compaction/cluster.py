"""Owns spreading the shards of an archive over the workers of a dask cluster.

What a worker does is ``worker``'s. The client alone brings what workers wrote into the archive.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final
from uuid import uuid4

from actstore.archive import grid
from actstore.archive.jobs import Job, Written
from actstore.archive.journal import attempts_of
from actstore.buckets import RemotePath
from actstore.compaction.content import Content
from actstore.compaction.executing import Executor, Threads, fitting
from actstore.compaction.recipe import Recipe
from actstore.compaction.shuffling import Scattering
from actstore.compaction.worker import Making, WorkerError, stamps_of, write
from actstore.errors import ConfigError

__all__ = ["Cluster", "batches", "chosen"]

_TICK: Final = 0.5  # seconds between looks at the workers
#: Seconds that may pass without any worker; those of a cluster that grows take a while.
PATIENCE: Final = 60.0
_AHEAD: Final = 2  # tasks that are given out, for each thread of the cluster


def chosen(
    client: Any,
    recipe: Recipe,
    content: Content,
    jobs: Sequence[Job],
    workers: int,
    gigabytes: float,
    beside: int = 0,
) -> Executor:
    """Give what writes the shards: threads of this process, or the workers of a cluster.

    This process needs so many bytes ``beside`` its threads.

    Raises
    ------
    ConfigError
        Not even one shard fits into memory; or a cluster is to write shuffled rows, or those of
        a log in a bucket.
    """
    count = fitting(jobs, workers, gigabytes, beside + content.shuffling_bytes(jobs))
    if client is None:
        threads = Threads(count)
        return threads if content.captured is None else Scattering(threads, count)
    if content.captured is not None:
        msg = "layout='shuffled' is written by this process alone; leave client out"
        raise ConfigError(msg)
    for one in recipe.paths:
        if isinstance(one, RemotePath):
            msg = (
                f"a cluster wants logs on a file system that all workers see; {one} is in a bucket"
            )
            raise ConfigError(msg)
    return Cluster(client, recipe, content.fingerprint(jobs), gigabytes)


def batches(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Put small shards that follow each other together, up to the bytes of a full one."""
    batch: list[Job] = []
    size = 0
    for job in jobs:
        nbytes = int(job.shard.present.sum()) * job.chunk_bytes(job.dtype)
        if batch and size + nbytes > grid.SHARD_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += nbytes
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Cluster:
    """Writes shards by the workers of a cluster; an `Executor`.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster.
    recipe : Recipe
        Makes the shards.
    fingerprint : str
        Of the content and all of its shards.
    gigabytes : float
        Memory of each worker.
    """

    client: Any
    recipe: Recipe
    fingerprint: str
    gigabytes: float

    def written(
        self, jobs: Sequence[Job], folder: Path, profile: str
    ) -> Generator[tuple[Job, Written], None, None]:
        """Write shards; see `Executor`.

        Raises
        ------
        WorkerError
            No worker is left, one can't go on, or the scheduler is gone.
        """
        if not jobs:
            return
        attempts = attempts_of(folder.absolute())
        making = Making(
            self.recipe,
            stamps_of(self.recipe.paths),
            self.fingerprint,
            profile,
            attempts / uuid4().hex,
            self.gigabytes,
        )
        making.folder.mkdir(parents=True)
        making.token.touch()
        try:
            for mine, attempt, found in _Tasks(self.client, making).run(batches(jobs)):
                for job, written in zip(mine, found, strict=True):
                    for file in written.files:
                        (folder / file).parent.mkdir(parents=True, exist_ok=True)
                        (making.folder / attempt / file).rename(folder / file)
                    yield job, written
                shutil.rmtree(making.folder / attempt)
        finally:
            # a worker that still writes sees that, and removes its attempt itself
            making.token.unlink(missing_ok=True)
            shutil.rmtree(attempts, ignore_errors=True)


class _Tasks:
    """The tasks of a compaction: some are given out, and more as these end."""

    def __init__(self, client: Any, making: Making) -> None:
        self._client = client
        self._making = making
        self._ended: SimpleQueue[Any] = SimpleQueue()
        self._running: dict[Any, list[Job]] = {}
        self._threads = 1
        self._looked = self._alive = time.monotonic()

    def run(
        self, waiting: Iterator[list[Job]]
    ) -> Generator[tuple[list[Job], str, list[Written]], None, None]:
        """Give each batch that a worker has written, with its attempt."""
        self._look()
        try:
            while self._give(waiting):
                try:
                    future = self._ended.get(timeout=_TICK)
                except Empty:
                    self._look()
                    continue
                if time.monotonic() - self._looked > _TICK:
                    self._look()
                found = self._result(future)
                if found is None:
                    self._ended.put(future)
                    continue
                batch = self._running.pop(future)
                future.release()
                yield batch, *found
        finally:
            for future in self._running:
                future.release()

    def _give(self, waiting: Iterator[list[Job]]) -> bool:
        """Give out what the cluster has room for; tell whether anything runs."""
        while len(self._running) < _AHEAD * self._threads:
            batch = next(waiting, None)
            if batch is None:
                break
            self._check_client()
            files = [job.file for job in batch]
            future = self._client.submit(
                write, self._making, files, pure=False, key=f"actstore-compact-{uuid4().hex}"
            )
            self._running[future] = batch
            future.add_done_callback(self._ended.put)
        return bool(self._running)

    def _look(self) -> None:
        """Count the cluster's threads; give up when there have been none for long."""
        self._check_client()
        threads = sum(self._client.nthreads().values())
        self._looked = now = time.monotonic()
        if threads:
            self._threads, self._alive = threads, now
        elif now - self._alive > PATIENCE:
            msg = f"the cluster has had no worker for {PATIENCE:.0f} seconds; start some"
            raise WorkerError(msg)

    def _check_client(self) -> None:
        if self._client.status not in ("running", "connecting"):
            msg = f"the scheduler is gone, or the client was closed: it is {self._client.status}"
            raise WorkerError(msg)

    def _result(self, future: Any) -> tuple[str, list[Written]] | None:
        """Give what a task has written; None where its worker was lost, and another does it."""
        from distributed.scheduler import KilledWorker

        try:
            found: tuple[str, list[Written]] = future.result(timeout=_TICK)
        except KilledWorker as error:
            msg = f"workers died again and again of the same shards, perhaps of memory: {error}"
            raise WorkerError(msg) from error
        except CancelledError as error:
            msg = f"the cluster gave up its tasks: {error}"
            raise WorkerError(msg) from error
        except TimeoutError:
            if future.status == "error":
                raise
            return None
        return found
