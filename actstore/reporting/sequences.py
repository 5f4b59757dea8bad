"""Owns which rows of a token axis follow each other: its sequences, in the order of their rows.

A sequence is one batch item, through the passes while its positions go on; padding is in none.
What is held grows with the passes and their items, not with the rows, unless those are shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.accessor import TokenAxis
from actstore.archive.coordinates import SOURCE_ROW

__all__ = ["Sequences"]

Ints = NDArray[np.int64]

_NAMES: Final = ("pass_index", "batch_item", "position")
_PIECE: Final = 1 << 20  # rows that labels are read of at once
#: Columns of the table of runs: rows of one item of one pass, one behind the other.
_START, _LENGTH, _RUN, _ITEM, _PASS, _POSITION, _CAPTURED = range(7)


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """The sequences of a token axis.

    Attributes
    ----------
    runs : numpy.ndarray
        int64 [runs, 7]: first row, rows, run, batch item, pass, first position, and which row the
        first was as captured.
    first : numpy.ndarray
        int64 [sequences + 1]: the place in ``runs`` with which each begins.
    """

    runs: Ints
    first: Ints

    @classmethod
    def of(cls, axis: TokenAxis) -> Sequences:
        """Find the sequences of an axis; where rows don't say their position, all are one."""
        if any(one not in axis for one in _NAMES):
            runs = np.array([[0, axis.rows, 0, -1, -1, 0, 0]], np.int64)[: int(axis.rows > 0)]
            return cls(runs, np.arange(len(runs) + 1))
        parts = [_runs(axis, first) for first in range(0, axis.rows, _PIECE)]
        runs = np.concatenate([np.zeros((0, 7), np.int64), *parts])
        runs = runs[
            np.lexsort((runs[:, _CAPTURED], runs[:, _PASS], runs[:, _ITEM], runs[:, _RUN]))
        ]
        cut = np.ones(len(runs), np.bool_)
        same = (runs[1:, [_RUN, _ITEM]] == runs[:-1, [_RUN, _ITEM]]).all(axis=1)
        cut[1:] = ~same | (runs[1:, _POSITION] != runs[:-1, _POSITION] + runs[:-1, _LENGTH])
        starts = np.flatnonzero(cut)
        ends = np.append(starts[1:], len(runs))
        order = np.argsort(runs[starts, _CAPTURED], kind="stable")
        counts = (ends - starts)[order]
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        picked = np.repeat(starts[order] - first[:-1], counts) + np.arange(len(runs))
        return cls(runs[picked], first)

    def __len__(self) -> int:
        return len(self.first) - 1

    def tokens(self, number: int) -> int:
        """Say how many rows a sequence has."""
        return int(self._of(number)[:, _LENGTH].sum())

    def longest(self) -> int | None:
        """Give the first of the longest; None where there are none."""
        if not len(self):
            return None
        return int(np.argmax(np.add.reduceat(self.runs[:, _LENGTH], self.first[:-1])))

    def find(self, pass_index: int, item: int) -> tuple[int, int] | None:
        """Give the sequence that a batch item of a pass is in, and the place of its first row."""
        there = (self.runs[:, _PASS] == pass_index) & (self.runs[:, _ITEM] == item)
        places = np.flatnonzero(there)
        if not places.size:
            return None
        place = int(places[np.lexsort((self.runs[places, _CAPTURED], self.runs[places, _RUN]))[0]])
        number = int(np.searchsorted(self.first, place, side="right")) - 1
        return number, int(self.runs[self.first[number] : place, _LENGTH].sum())

    def rows(self, number: int, first: int, count: int) -> Ints:
        """Give rows of a sequence, in its order: ``count`` at most, from its ``first`` on."""
        runs = self._of(number)
        ends = np.cumsum(runs[:, _LENGTH])
        begins = ends - runs[:, _LENGTH]
        low, high = np.maximum(begins, first), np.minimum(ends, first + count)
        kept = high > low
        low, high, shift = low[kept], high[kept], (runs[:, _START] - begins)[kept]
        parts = [np.arange(a, b) + by for a, b, by in zip(low, high, shift, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def about(self, number: int) -> dict[str, Any]:
        """Say what a sequence is: its number, rows, first row, and the pass and item of that."""
        runs = self._of(number)
        return {
            "number": number,
            "tokens": int(runs[:, _LENGTH].sum()),
            "row": int(runs[0, _START]),
            "pass": int(runs[0, _PASS]),
            "item": int(runs[0, _ITEM]),
            "passes": len(np.unique(runs[:, _PASS])),
        }

    def _of(self, number: int) -> Ints:
        return self.runs[self.first[number] : self.first[number + 1]]


def _runs(axis: TokenAxis, first: int) -> Ints:
    """Find the runs of a piece of the rows: int64 [n, 7]."""
    piece = slice(first, first + _PIECE)

    def read(label: str) -> NDArray[Any]:
        return np.asarray(axis.variable(label)[piece].values)

    passes, items, positions = (read(one).astype(np.int64) for one in _NAMES)
    run = read("run").astype(np.int64) if axis.run else np.zeros(passes.size, np.int64)
    real = np.ones(passes.size, np.bool_)
    if "is_padding" in axis:
        real = ~read("is_padding").astype(np.bool_)
    rows = np.flatnonzero(real)
    if not rows.size:
        return np.zeros((0, 7), np.int64)
    cut = np.ones(rows.size, np.bool_)
    cut[1:] = np.diff(rows) != 1
    for column in (passes, items, run):
        cut[1:] |= np.diff(column[rows]) != 0
    cut[1:] |= np.diff(positions[rows]) != 1
    starts = np.flatnonzero(cut)
    heads = rows[starts]
    lengths = np.diff(np.append(starts, rows.size))
    captured = read(SOURCE_ROW)[heads] if SOURCE_ROW in axis else heads + first
    labels = (run[heads], items[heads], passes[heads], positions[heads])
    return np.stack((heads + first, lengths, *labels, captured), axis=1).astype(np.int64)
