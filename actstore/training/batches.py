"""Owns batches of rows as tensors: read ahead by threads, mixed, and gone on with exactly.

In which order rows come is ``order``'s; which rows there are, ``selection``'s.
"""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from actstore.arguments import check_count, check_positive
from actstore.errors import ConfigError
from actstore.training.order import Epoch, Order, Piece
from actstore.training.selection import Choice, Selection

__all__ = ["Batch", "Batches"]

#: Values, or values and labels by their names.
Batch = torch.Tensor | dict[str, torch.Tensor]
_VERSION: Final = 1
_THREADS: Final = 2
#: Integers of the same size stand for dtypes that NumPy lacks.
_STAND_INS: Final = {1: torch.uint8, 2: torch.int16}


class Batches(IterableDataset[Batch]):
    """Batches of the rows of a layer, or of several, of a log or an archive: an epoch at a time.

    ``for batch in batches`` reads what is left of an epoch, by threads of this process, and then
    stands at the next. Every row that is chosen is in an epoch once; padding, and rows that a
    layer lacks, are in none. With ``shuffle``, chunks come in a new order in each epoch, and rows
    are mixed among those of a buffer: of an archive that was compacted with
    ``layout="shuffled"`` that is a random order, of others it is as random as the buffer is large.

    The batches of an epoch, and their order, depend on the data, the options, ``seed``, ``rank``
    and ``world_size`` alone, not on ``threads`` or ``prefetch``. A `torch.utils.data.DataLoader`
    (with ``batch_size=None``) may read them by worker processes, forked or spawned: the batches
    are the same, each read by one of the workers, in an order that depends on how many these are.
    Threads are usually faster, as nothing has to go from process to process.

    Parameters
    ----------
    path : path
        An archive's folder, a ``.zarr.zip`` or ``.h5`` of one, or a ``.stream`` log; or the URL
        of an archive or a log in a bucket.
    layers : str or sequence of str
        A layer's name as ``dataset.actstore.layer`` takes it; the name of a site, such as
        ``"resid"``, for all of its layers; or several layers, whose rows have one shape.
    batch_size : int
        Rows of a batch.
    dtype : torch.dtype, optional
        What values are converted to; the dataset's, float32 of a bfloat16 model, if not given.
    labels : sequence of str
        Labels of the rows to give with them, ``"token_id"`` say; numbers or bools.
    rows : array, optional
        Which rows of the token axis: a bool for each, or integers. All if it isn't given.
    padding : bool
        Whether padding is among them.
    dim : str, optional
        The token axis, of a layer that has rows on several.
    shuffle : bool
        Whether rows are mixed; else they come as they stand.
    seed : int
        What is drawn, is drawn by it.
    drop_last : bool
        Whether an epoch leaves out the batch that isn't full. If not, its last batch of each rank
        has the rest, and where a rank has a row less than others the one before lacks one.
    buffer_mb : float
        MB of rows, in ``dtype``, that are mixed; at least a batch. ``prefetch`` + 2 of them, or
        more where batches are kept, are in memory.
    prefetch : int
        Buffers that are read ahead.
    threads : int
        That read.
    rank, world_size : int, optional
        Whose rows these are, and of how many: those of `torch.distributed` where it is
        initialised, else 0 of 1. Ranks have disjoint rows, and equally many batches.
    pin_memory : bool
        Whether tensors are in pinned memory, for copies to a GPU; with a `DataLoader`, its own.
    storage_options : mapping, optional
        Of a bucket, as for `actstore.open_dataset`. Worker processes that read from one are to
        be spawned.

    Raises
    ------
    ConfigError
        There is no such layer, label or row, or an argument can't be honoured.
    MissingFileError, FormatError, StreamCorruptError, BucketError
        As for `actstore.open_dataset`.

    Notes
    -----
    A batch is a tensor [rows, *row_shape], or [rows, layers, *row_shape] of several layers or a
    site; with labels, a dict of it, ``"values"``, and of each label by its name. Batches are
    views of a buffer that is used again when no one holds a batch of it any more; a pinned one,
    when the copies of it that devices were told to do are done, too.
    """

    def __init__(  # noqa: PLR0913 - each is its own choice, by name
        self,
        path: str | os.PathLike[str],
        layers: str | Sequence[str],
        *,
        batch_size: int = 4096,
        dtype: torch.dtype | None = None,
        labels: Sequence[str] = (),
        rows: Any = None,
        padding: bool = False,
        dim: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        buffer_mb: float = 64,
        prefetch: int = 1,
        threads: int = _THREADS,
        rank: int | None = None,
        world_size: int | None = None,
        pin_memory: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        choice = Choice.of(
            path, layers, labels, rows, padding=padding, dim=dim, storage_options=storage_options
        )
        check_count("batch_size", batch_size)
        check_count("prefetch", prefetch, 0)
        check_count("threads", threads)
        check_positive("buffer_mb", buffer_mb, "MB, such as 64")
        if pin_memory:
            _check_pinning()
        self._selection = selection = Selection(choice)
        self._kind = kind_of(selection.dtype, dtype)
        row = max(math.prod(selection.shape) * self._kind.itemsize, 1)
        mine, others = _ranks(rank, world_size)
        window = max(int(buffer_mb * 1e6) // (row * batch_size), 1)
        self._order = Order(
            selection.counts(), batch_size, window, seed, shuffle, drop_last, mine, others
        )
        self._threads, self._prefetch, self._pin = threads, prefetch, pin_memory
        self._epoch = self._batch = 0
        self._workers: int | None = None
        self._memory = _Memory()

    def __len__(self) -> int:
        """Batches of an epoch, of this rank."""
        return self._order.batches

    @property
    def rows(self) -> int:
        """Rows of an epoch, of all ranks; ``drop_last`` leaves out some."""
        return self._order.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        return self._selection.shape

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row of one layer; with several, `shape` has their number before it."""
        return self._selection.row_shape

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers' names."""
        return self._selection.names

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self._kind

    @property
    def labels(self) -> tuple[str, ...]:
        """What the rows come with."""
        return tuple(self._selection.labels)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of, from 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch.

        A `DataLoader` whose workers are not persistent begins with this one each time: set it
        before each epoch.
        """
        check_count("epoch", epoch, 0)
        self._epoch, self._batch, self._workers = epoch, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Give where this is: behind the batches that were given, whatever was read ahead."""
        return {
            "version": _VERSION,
            "epoch": self._epoch,
            "batch": self._batch,
            "workers": self._workers,
            "of": self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another was, with the same rows of the same runs, and the same options.

        Raises
        ------
        ConfigError
            It was of other runs or rows, in another order, or of other options.
        """
        try:
            version, of = state["version"], dict(state["of"])
            epoch, batch, workers = int(state["epoch"]), int(state["batch"]), state["workers"]
        except (KeyError, TypeError, ValueError) as error:
            msg = f"wanted what state_dict() gave; got {state!r:.200}"
            raise ConfigError(msg) from error
        mine = self._identity()
        if version != _VERSION or of != mine:
            odd = [name for name in mine if of.get(name) != mine[name]]
            said = ", ".join(f"{name} {of.get(name)!r}, not {mine[name]!r}" for name in odd)
            msg = f"this state is of other batches: {said or f'version {version!r}'}"
            raise ConfigError(msg)
        self._epoch, self._batch, self._workers = epoch, batch, workers

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches that are left of the epoch."""
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if self._batch and self._workers != parts:
            msg = (
                f"the state is of {self._workers} readers, and here are {parts}: go on with as "
                "many workers, or set_epoch"
            )
            raise ConfigError(msg)
        self._workers = parts
        epoch, order = self._order.epoch(self._epoch), self._order
        windows = range(part, order.windows, parts)
        skipped = self._batch // order.window  # all but the last window have as many batches
        begun = self._batch - skipped * order.window
        for batches in self._read_ahead(epoch, windows[skipped:]):
            left = batches[begun:][::-1]
            batches.clear()
            while left:  # nothing here holds a batch that was given
                self._batch += 1
                yield left.pop()
            begun = 0
        self._epoch, self._batch = self._epoch + 1, 0

    def forever(self) -> Iterator[Batch]:
        """Give batches, epoch after epoch.

        Raises
        ------
        ConfigError
            A worker of a `DataLoader` would wait for ever: there are more than buffers.
        """
        worker = get_worker_info()
        if worker is not None and worker.id >= self._order.windows:
            msg = (
                f"an epoch is {self._order.windows} buffers, too few for {worker.num_workers} "
                "workers: give fewer workers, or a smaller buffer_mb"
            )
            raise ConfigError(msg)
        while True:
            yield from self

    def close(self) -> None:
        """Close the log or the archive; leaving the context does so, too."""
        self._selection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the buffers behind."""
        return self.__dict__ | {"_memory": _Memory()}

    def _identity(self) -> dict[str, Any]:
        order = self._order
        return {
            "rows": order.rows,
            **self._selection.identity,
            "dtype": str(self._kind),
            "batch_size": order.batch_size,
            "batches_of_a_buffer": order.window,
            "seed": order.seed,
            "shuffle": order.shuffle,
            "drop_last": order.drop_last,
            "rank": order.rank,
            "world_size": order.world_size,
        }

    def _read_ahead(self, epoch: Epoch, windows: range) -> Iterator[list[Batch]]:
        """Give the batches of each window, while the next are read; the list is for the taker."""
        pool = ThreadPoolExecutor(self._threads, "actstore-training")
        finalizing = sys.is_finalizing  # a local, as globals are gone by then
        reading: deque[_Reading] = deque()
        left = iter(windows)
        try:
            for number in left:
                reading.append(self._begin(epoch, number, pool))
                if len(reading) > self._prefetch:
                    break
            while reading:
                done = reading.popleft().wait()
                number = next(left, -1)
                if self._prefetch and number >= 0:
                    reading.append(self._begin(epoch, number, pool))
                yield done
                if not self._prefetch and number >= 0:
                    reading.append(self._begin(epoch, number, pool))
        finally:
            if not finalizing():  # its threads have ended, and what it would use is gone
                pool.shutdown(cancel_futures=True)

    def _begin(self, epoch: Epoch, number: int, pool: ThreadPoolExecutor) -> _Reading:
        """Have a window read."""
        sizes = epoch.sizes(number)
        count, kind = sum(sizes), self._kind
        shape = (count, *self._selection.shape)
        if self._pin:
            tensor = torch.empty(shape, dtype=kind, pin_memory=True)
        else:
            memory = self._memory.take(math.prod(shape) * kind.itemsize)
            tensor = torch.from_numpy(memory).view(kind).reshape(shape)
        labels = {
            name: torch.empty(count, dtype=kind_of(one.dtype, None), pin_memory=self._pin)
            for name, one in self._selection.labels.items()
        }
        values = tensor.view(_held_as(kind)).numpy()
        columns = {name: one.numpy() for name, one in labels.items()}
        futures = [
            pool.submit(self._read, piece, values, columns) for piece in epoch.pieces(number)
        ]
        return _Reading(futures, sizes, tensor, labels)

    def _read(
        self, piece: Piece, values: NDArray[Any], labels: Mapping[str, NDArray[Any]]
    ) -> None:
        """Read rows to their places in a window."""
        selection = self._selection
        several = selection.shape != selection.row_shape
        for place in range(len(selection.names)):
            found = selection.read_unit(place, piece.unit, piece.first, piece.last)
            found = _converted(found, self._kind)
            values[(piece.slots, place) if several else piece.slots] = found
        if labels:
            rows = selection.of_unit(piece.unit, piece.first, piece.last)
            for name, column in labels.items():
                column[piece.slots] = selection.labels[name][rows]


class _Reading(NamedTuple):
    """A window that is being read."""

    futures: list[Future[None]]
    sizes: list[int]
    values: torch.Tensor
    labels: dict[str, torch.Tensor]

    def wait(self) -> list[Batch]:
        """Give its batches when they are there."""
        for future in self.futures:
            future.result()
        parts = torch.split(self.values, self.sizes)
        if not self.labels:
            return list(parts)
        labels = {name: torch.split(one, self.sizes) for name, one in self.labels.items()}
        return [
            {"values": values, **{name: one[place] for name, one in labels.items()}}
            for place, values in enumerate(parts)
        ]


class _Memory:
    """Buffers that are used again when nothing refers to them: fresh memory costs its pages.

    Not for pinned memory: a copy that a device has yet to do refers to nothing. PyTorch's own
    allocator knows of it, and keeps what it gave until then.
    """

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.uint8]] = []
        self._alone = _references([np.empty(0, np.uint8)])[0]

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Give a buffer that no tensor is a view of."""
        for place, count in enumerate(_references(self._buffers)):
            if count == self._alone and self._buffers[place].nbytes >= nbytes:
                return self._buffers[place][:nbytes]
        self._buffers = [
            one
            for one, count in zip(self._buffers, _references(self._buffers), strict=True)
            if count > self._alone
        ]
        made = np.empty(nbytes, np.uint8)
        self._buffers.append(made)
        return made[:]


def _references(buffers: list[NDArray[np.uint8]]) -> list[int]:
    return [sys.getrefcount(one) for one in buffers]


def kind_of(source: np.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Give the dtype of tensors."""
    if wanted is not None and not isinstance(wanted, torch.dtype):
        msg = f"dtype must be a torch.dtype; got {wanted!r}"
        raise ConfigError(msg)
    return wanted or torch.from_numpy(np.empty(0, source)).dtype


def _held_as(kind: torch.dtype) -> torch.dtype:
    """Give the dtype that NumPy has a tensor's memory as."""
    try:
        torch.empty(0, dtype=kind).numpy()
    except TypeError:
        return _STAND_INS[kind.itemsize]
    return kind


def _converted(values: NDArray[Any], kind: torch.dtype) -> NDArray[Any]:
    """Give values in a tensor's dtype, or what stands for that."""
    tensor = torch.from_numpy(values)
    if tensor.dtype == kind:
        return values
    return tensor.to(kind).view(_held_as(kind)).numpy()


def _check_pinning() -> None:
    """Refuse to pin memory where nothing wants it pinned."""
    try:
        torch.empty(1, pin_memory=True)
    except RuntimeError as error:
        msg = f"pin_memory=True needs a GPU, and PyTorch finds none: leave it out ({error})"
        raise ConfigError(msg) from error


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Give this process' rank, and how many there are."""
    if (rank is None) != (world_size is None):
        msg = f"rank and world_size belong together; got {rank!r} and {world_size!r}"
        raise ConfigError(msg)
    if rank is not None and world_size is not None:
        return rank, world_size
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
