"""Owns in which order rows are trained on: epochs, windows, batches, ranks; pure, without torch.

The rows of an epoch are a stream: units (chunks) in an order drawn anew, of each the rows that are
kept. Each rank has a part of the stream; windows are cut from that at multiples of the batch, and
rows are mixed within them. So what a batch holds is known by its number alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actstore.arguments import check_count
from actstore.errors import ConfigError

__all__ = ["Epoch", "Order", "Piece"]

Integers = NDArray[np.int64]
_UNITS, _ROWS = 0, 1  # what a generator draws
_SEED: Final = 1 << 63


class Piece(NamedTuple):
    """Kept rows of a unit, from the first to before the last, and their places in a window."""

    unit: int
    first: int
    last: int
    slots: Integers


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """How the rows of all epochs are ordered, for one rank.

    Attributes
    ----------
    counts : numpy.ndarray
        int64 [units]: the kept rows of each.
    batch_size, window : int
        Rows of a batch, and batches of a window.
    seed : int
        What is drawn, is drawn by it.
    shuffle : bool
        Whether anything is; else rows are as they stand.
    drop_last : bool
        Whether batches that are not full are left out.
    rank, world_size : int
        Whose rows these are.
    """

    counts: Integers
    batch_size: int
    window: int
    seed: int
    shuffle: bool
    drop_last: bool
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        """Refuse what gives no batches, or some ranks fewer."""
        for name in ("batch_size", "window", "world_size"):
            check_count(name, getattr(self, name), 1)
        check_count("rank", self.rank, 0, self.world_size)
        check_count("seed", self.seed, 0, _SEED)
        if self.rows < self.world_size:
            msg = f"there are {self.rows} rows, and {self.world_size} ranks want one each"
            raise ConfigError(msg)
        if not self.drop_last and self.batch_size == 1 and self.rows % self.world_size:
            msg = (
                f"{self.rows} batches of one row can't be as many on each of {self.world_size} "
                "ranks; give drop_last=True"
            )
            raise ConfigError(msg)
        if not self.batches:
            msg = (
                f"{self.rows} rows of {self.world_size} ranks fill no batch of {self.batch_size}, "
                "and drop_last leaves out what isn't full: give a smaller batch_size, or "
                "drop_last=False"
            )
            raise ConfigError(msg)

    @property
    def rows(self) -> int:
        """Kept rows, of all ranks."""
        return int(self.counts.sum())

    @property
    def batches(self) -> int:
        """Batches of an epoch: as many on each rank."""
        if self.drop_last:
            return self.rows // self.world_size // self.batch_size
        most = (self.rows + self.world_size - 1) // self.world_size
        return (most + self.batch_size - 1) // self.batch_size

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.batches // self.window)

    def epoch(self, number: int) -> Epoch:
        """Give one of the epochs, from 0."""
        units = np.arange(self.counts.size)
        if self.shuffle:  # the same on all ranks
            units = np.random.default_rng([self.seed, _UNITS, number]).permutation(units)
        return Epoch(self, number, units, np.cumsum(np.append(0, self.counts[units])))

    def bounds(self, batch: int) -> tuple[int, int]:
        """Give the rows of a batch in the stream, the latter not included."""
        start = self.rows * self.rank // self.world_size
        end = self.rows * (self.rank + 1) // self.world_size
        size, last = self.batch_size, self.batches - 1
        low, high = start + batch * size, start + (batch + 1) * size
        if not self.drop_last and end - start <= last * size:
            # other ranks have a row more, and a batch for it: the last full one gives one up
            low -= batch == last
            high -= batch == last - 1
        return low, min(high, end)


@dataclass(frozen=True, slots=True, eq=False)
class Epoch:
    """The order of an epoch.

    Attributes
    ----------
    order : Order
        Of all epochs.
    number : int
        Which it is.
    units : numpy.ndarray
        int64: the units, as they come.
    ends : numpy.ndarray
        int64 [units + 1]: where each begins in the stream, and where the last ends.
    """

    order: Order
    number: int
    units: Integers
    ends: Integers

    def sizes(self, window: int) -> list[int]:
        """Give the rows of each batch of a window."""
        bounds = [self.order.bounds(one) for one in self._batches(window)]
        return [high - low for low, high in bounds]

    def pieces(self, window: int) -> Iterator[Piece]:
        """Give what a window is made of, in the order of the stream."""
        batches = self._batches(window)
        low, high = self.order.bounds(batches[0])[0], self.order.bounds(batches[-1])[1]
        slots = np.arange(high - low)
        if self.order.shuffle:
            drawn = [self.order.seed, _ROWS, self.number, low, high]
            slots = np.random.default_rng(drawn).permutation(slots)
        first = int(np.searchsorted(self.ends, low, side="right")) - 1
        last = int(np.searchsorted(self.ends, high, side="left"))
        for place in range(first, last):
            begin, end = self.ends[place : place + 2].tolist()
            start, stop = max(low, begin), min(high, end)
            if start < stop:
                mine = slots[start - low : stop - low]
                yield Piece(int(self.units[place]), start - begin, stop - begin, mine)

    def _batches(self, window: int) -> range:
        each = self.order.window
        return range(window * each, min((window + 1) * each, self.order.batches))
