"""Owns how arrays are cut into inner chunks and shards, and which of them hold anything; pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Segments", "Shard", "chunk_rows", "cut", "shard_rows"]

CHUNK_BYTES: Final = 1 << 20
SHARD_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Where the rows of one layer of a variable come from; int64 columns, sorted by ``start``.

    No two of them overlap.

    Attributes
    ----------
    packet : numpy.ndarray
        Row of the packet table.
    source : numpy.ndarray
        First row within the packet.
    start : numpy.ndarray
        First row of the variable.
    count : numpy.ndarray
        Number of rows, at least 1.
    """

    packet: NDArray[np.int64]
    source: NDArray[np.int64]
    start: NDArray[np.int64]
    count: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """How many rows they fill."""
        return int(self.count.sum())

    def has(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which of some rows of the variable are there."""
        place = np.searchsorted(self.start, rows, side="right") - 1
        inside: NDArray[np.bool_] = rows < self.start[place] + self.count[place]
        return (place >= 0) & inside

    def filled(self, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the rows that are there between each two consecutive bounds."""
        ends = np.cumsum(self.count)
        place = np.searchsorted(self.start, bounds, side="right") - 1
        inside = np.clip(bounds - self.start[place], 0, self.count[place])
        before = np.where(place >= 0, ends[place] - self.count[place] + inside, 0)
        return np.diff(before)


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A shard to write: consecutive rows of one layer of an array, or elements of a ragged one.

    Attributes
    ----------
    first, last : int
        Its rows, the latter not included, within the array.
    number : int
        Its place in the grid of shards, along the rows.
    chunk_rows : int
        Rows of an inner chunk.
    present : numpy.ndarray
        bool: which of its inner chunks hold any row that is there.
    rows : int
        How many rows are there.
    """

    first: int
    last: int
    number: int
    chunk_rows: int
    present: NDArray[np.bool_]
    rows: int


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Give the rows of an inner chunk: a power of two, about 1 MiB, no more than there are."""
    fitting = max(1, CHUNK_BYTES // max(row_bytes, 1))
    return max(1, min(1 << (fitting.bit_length() - 1), rows))


def shard_rows(rows: int, row_bytes: int) -> int:
    """Give the rows of a shard: whole chunks, about 64 MiB, no more than are needed."""
    chunk = chunk_rows(rows, row_bytes)
    most = max(1, SHARD_BYTES // max(chunk * row_bytes, 1))
    return chunk * min(most, max(1, -(-rows // chunk)))


def cut(rows: int, chunk: int, shard: int, segments: Segments | None = None) -> Iterator[Shard]:
    """Give the shards that hold anything.

    Parameters
    ----------
    rows : int
        Of the array.
    chunk, shard : int
        Rows of an inner chunk, and of a shard.
    segments : Segments, optional
        Which rows are there; all, where they are not given.
    """
    for number, first in enumerate(range(0, rows, shard)):
        last = min(first + shard, rows)
        bounds = np.minimum(np.arange(first, first + shard + 1, chunk), last)
        counts = np.diff(bounds) if segments is None else segments.filled(bounds)
        if counts.any():
            yield Shard(first, last, number, chunk, counts > 0, int(counts.sum()))
