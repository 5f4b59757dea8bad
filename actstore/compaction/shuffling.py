"""Owns bringing rows into a shuffled archive's order, out of core: scattered first, then gathered.

A layer is read as the log has it, each of its blocks once, and its rows are put into a file that
has a bucket for each shard, in the order of the log. Then each shard is read, its rows are put in
order in memory, and it is written as any other. What the order is, ``archive.shuffling`` knows.
"""

from __future__ import annotations

import mmap
import os
import shutil
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore import codecs
from actstore.archive.grid import Segments
from actstore.archive.jobs import Job, Written
from actstore.archive.journal import beside
from actstore.compaction.executing import Executor
from actstore.dtypes import DType
from actstore.stream.rows import RowReader, widen

__all__ = ["Gather", "Layer", "Scattering", "scattered"]

Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]
#: Bytes of rows that a thread scatters at a time; it holds them twice, and a block of the log.
_PIECE: Final = 16 << 20
#: Shards for each thread that are scattered together, so that no thread waits for a layer's last.
_TOGETHER: Final = 4
#: What of a row is beside its values while a shard is put in order: its place, and for sorting.
_PLACES: Final = 32

_held = threading.local()


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer of a variable whose rows are shuffled.

    Attributes
    ----------
    rows : RowReader
        Reads them as the log has them.
    segments : Segments
        Which of them are there, as captured.
    order : numpy.ndarray
        int64: of each row of the archive, which it was as captured.
    shard_rows : int
        Rows of a shard.
    fill : scalar
        What a missing row holds.
    """

    rows: RowReader
    segments: Segments
    order: Integers
    shard_rows: int
    fill: Any

    @property
    def whole(self) -> bool:
        """Whether no row is missing."""
        return self.segments.rows == self.order.size

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, as the log has it."""
        return int(np.prod(self.rows.row_shape, dtype=np.int64)) * self.rows.dtype.itemsize

    @property
    def beside(self) -> int:
        """Bytes that putting a shard in order takes, beside writing it."""
        return self.shard_rows * (self.row_bytes + _PLACES)


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """Reads rows of a shuffled layer from the log, one by one: slowly, and without a bucket."""

    layer: Layer

    def __call__(self, first: int, last: int) -> NDArray[Any]:
        """Read rows of the archive, in the dtype of datasets."""
        layer = self.layer
        sources = layer.order[first:last]
        by = np.argsort(sources)
        parts = [
            layer.rows.read(int(run[0]), int(run[-1]) + 1, layer.fill)
            for run in _runs(sources[by])
        ]
        out = np.empty_like(parts[0], shape=(last - first, *layer.rows.row_shape))
        out[by] = np.concatenate(parts)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class _Bucket:
    """Reads rows of a shard from the file that a layer was scattered to; can be pickled.

    Attributes
    ----------
    path : Path
        The file.
    start : int
        The shard's first row in it.
    first : int
        The shard's first row in the archive.
    sources : numpy.ndarray
        int64: of each row of the shard, which it was as captured.
    there : numpy.ndarray or None
        bool: which of them are there; None where all are.
    row_shape, dtype, fill
        Of the rows, as the log has them, and of missing ones.
    """

    path: Path
    start: int
    first: int
    sources: Integers
    there: NDArray[np.bool_] | None
    row_shape: tuple[int, ...]
    dtype: DType
    fill: Any

    def __call__(self, first: int, last: int) -> NDArray[Any]:
        """Read rows of the archive, in the dtype of datasets."""
        if getattr(_held, "bucket", None) is not self:
            _held.bucket = None  # what it has is written over
            _held.places = self._places()
            _held.rows = self._load(int(_held.places.max()) + 1)
            _held.bucket = self
        places = _held.places[first - self.first : last - self.first]
        if not len(_held.rows):
            return np.full((last - first, *self.row_shape), self.fill, self.dtype.array)
        out = widen(_held.rows[places], self.dtype)
        if self.there is not None:
            out[places < 0] = self.fill
        return out

    def _load(self, count: int) -> NDArray[Any]:
        """Read the bucket into memory that this thread uses again."""
        size = int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize
        memory = codecs.scratch("bucket", count * size)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start * size)
            view = memoryview(memory)
            while view.nbytes:
                length = file.readinto(view)
                if not length:
                    msg = f"{self.path} ends at {file.tell()}, before the rows that were put there"
                    raise OSError(msg)
                view = view[length:]
        return memory.view(self.dtype.numpy).reshape(count, *self.row_shape)

    def _places(self) -> Integers:
        """Give where in the bucket each row of the shard is, or −1: there they go as captured."""
        places = np.full(self.sources.size, -1)
        there = np.arange(self.sources.size) if self.there is None else np.flatnonzero(self.there)
        places[there[np.argsort(self.sources[there])]] = np.arange(there.size)
        return places


@dataclass(frozen=True, slots=True)
class Scattering:
    """Has the shards of shuffled layers written by another executor, their rows scattered before.

    Beside the archive there is a file of the size of a layer, or of some that are small, while
    that is at work.

    Parameters
    ----------
    inner : Executor
        Writes shards.
    threads : int
        How many scatter rows.
    """

    inner: Executor
    threads: int

    def written(
        self, jobs: Sequence[Job], folder: Path, profile: str
    ) -> Generator[tuple[Job, Written], None, None]:
        """Write shards; see `Executor`."""
        for batch in scattered(jobs, beside(folder), self.threads):
            yield from self.inner.written(batch, folder, profile)


def scattered(jobs: Sequence[Job], folder: Path, threads: int) -> Iterator[list[Job]]:
    """Give shards, some layers at a time, whose rows are read from buckets while they are used.

    Parameters
    ----------
    jobs : sequence of Job
        The shards; those that read by `Gather` are of shuffled layers.
    folder : Path
        Where the buckets are; it is made, and removed at the end. What a killed process left
        there is removed first.
    threads : int
        How many scatter rows.
    """
    for batch in _batches(jobs, _TOGETHER * threads):
        with _folder(folder):
            found: list[Job] = []
            for number, mine in enumerate(_layers(batch)):
                found += _scatter(mine, folder / f"{number}", threads)
            yield found
    _held.bucket = _held.rows = _held.places = None


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _layers(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Put the shards of each layer together."""
    by_layer: dict[tuple[str, tuple[int, ...]], list[Job]] = {}
    for job in jobs:
        by_layer.setdefault((job.name, job.place), []).append(job)
    yield from by_layer.values()


def _batches(jobs: Sequence[Job], least: int) -> Iterator[list[Job]]:
    """Give whole layers, so many that they have enough shards together."""
    batch: list[Job] = []
    for mine in _layers(jobs):
        batch += mine
        if len(batch) >= least:
            yield batch
            batch = []
    if batch:
        yield batch


def _scatter(jobs: list[Job], path: Path, threads: int) -> list[Job]:
    """Put the rows of a layer into the buckets of these shards; give the shards, to be read."""
    read = jobs[0].read
    if not isinstance(read, Gather):
        return jobs
    layer = read.layer
    slots, bounds = _slots(layer)
    wanted = np.zeros(bounds.size - 1, np.bool_)
    wanted[[job.shard.number for job in jobs]] = True
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, int(bounds[-1]) * layer.row_bytes)  # else its end may lack

        pieces = list(_pieces(layer))
        most = max((last - first for first, last in pieces), default=0) * layer.row_bytes

        def put(piece: tuple[int, int]) -> None:
            memory = free.get()
            try:
                _put(layer, piece, slots, bounds, wanted, descriptor, memory)
            finally:
                free.put(memory)

        free = SimpleQueue[Bytes]()
        for _ in range(threads):  # mapped: it goes back to the system when this is done
            free.put(np.frombuffer(mmap.mmap(-1, max(2 * most, 1)), np.uint8))
        with ThreadPoolExecutor(threads, "actstore-scatter") as pool:
            for _ in pool.map(put, pieces):
                pass
    finally:
        os.close(descriptor)
    found = []
    for job in jobs:
        start, first = int(bounds[job.shard.number]), job.shard.first
        sources = layer.order[first : job.shard.last]
        there = None if layer.whole else layer.segments.has(sources)
        mine = layer.rows.row_shape, layer.rows.dtype, layer.fill
        found.append(replace(job, read=_Bucket(path, start, first, sources, there, *mine)))
    return found


def _slots(layer: Layer) -> tuple[Integers, Integers]:
    """Give where rows go in the file, and the first row of each bucket there, and the last's end.

    Returns
    -------
    slots : numpy.ndarray
        int64: of each row as captured; −1 of missing ones.
    bounds : numpy.ndarray
        int64 [shards + 1].
    """
    rows = layer.order.size
    shards = (rows + layer.shard_rows - 1) // layer.shard_rows
    kind = np.uint16 if shards < 1 << 16 else np.uint32  # of 16 bits, sorting is linear
    shard = np.empty(rows, kind)
    shard[layer.order] = np.arange(rows) // layer.shard_rows
    there: Any = slice(None)
    if not layer.whole:
        there = np.flatnonzero(layer.segments.has(np.arange(rows)))
        shard = shard[there]
    slots, mine = np.full(rows, -1), np.empty(shard.size, np.int64)
    mine[np.argsort(shard, kind="stable")] = np.arange(shard.size)
    slots[there] = mine
    return slots, np.cumsum(np.append(0, np.bincount(shard, minlength=shards)))


def _pieces(layer: Layer) -> Iterator[tuple[int, int]]:
    """Give rows as captured, some at a time, the latter not included; a block is in one piece."""
    most = max(_PIECE // max(layer.row_bytes, 1), 1)
    cuts = np.append(layer.rows.cuts(), layer.order.size)
    first = int(cuts[0])
    while first < layer.order.size:
        place = int(np.searchsorted(cuts, first + most, side="right")) - 1
        last = int(cuts[place])
        if last <= first:  # one block, or packet, has more
            last = min(first + most, int(cuts[place + 1]))
        yield first, last
        first = last


def _put(
    layer: Layer,
    rows: tuple[int, int],
    slots: Integers,
    bounds: Integers,
    wanted: NDArray[np.bool_],
    descriptor: int,
    memory: Bytes,
) -> None:
    """Put some rows into their buckets, if those are wanted."""
    piece = np.arange(*rows)
    piece = piece[slots[piece] >= 0]
    mine = slots[piece]
    if not wanted.all():
        kept = wanted[np.searchsorted(bounds, mine, side="right") - 1]
        piece, mine = piece[kept], mine[kept]
    if not piece.size:
        return
    size = piece.size * layer.row_bytes
    found = memory[:size].view(layer.rows.dtype.numpy).reshape(-1, *layer.rows.row_shape)
    at = 0
    for run in _runs(piece):
        layer.rows.read_into(found[at : at + run.size], int(run[0]), int(run[-1]) + 1)
        at += run.size
    by = np.argsort(mine)
    places, ordered = mine[by], memory[size : 2 * size].reshape(piece.size, -1)
    np.take(memory[:size].reshape(piece.size, -1), by, axis=0, out=ordered, mode="clip")
    at = 0
    for run in _runs(places):
        data = memoryview(ordered[at : at + run.size].reshape(-1))
        place, at = int(run[0]) * layer.row_bytes, at + run.size
        while data.nbytes:
            done = os.pwrite(descriptor, data, place)
            data, place = data[done:], place + done


def _runs(rows: Integers) -> list[Integers]:
    """Cut rows where they don't go up by one."""
    return np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
