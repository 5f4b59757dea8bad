"""Owns what one pass over values keeps of them: sums, extremes, counts, norms, and a histogram.

Pure: arrays in, a `State` out; states merge. Which rows they are of, and what is told of them, is
the business of others.

Values of float32 are worked on as float32 in pieces that stay in the cache, about a shift near
each feature's mean, and summed over pieces as float64. A feature of which that could overflow,
underflow or meet a NaN is done again in float64. States are merged by the formulas of Chan et al.
(1979) and Pébay (2008, Sandia SAND2008-6212), for any number of states at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Final, Self

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.analysis import sketch
from actstore.analysis.source import blocks_of

__all__ = ["Moments", "Norms", "State", "cosines", "merge_states", "row_squares", "state_of"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Elements: few enough to stay in the cache; many, since each call of NumPy gives up the GIL, and
#: a thread that must wait for it takes 40 µs to wake.
_PIECE: Final = 1 << 19
_MOST_ROWS: Final = 65535  # of a piece, so that two bytes count them
_MERGED: Final = 1 << 14  # features of blocks that are merged at once
#: A shift is the mean of every so manieth row, and so no farther from the mean than 2.7 standard
#: deviations: |shift - mean|² <= variance · (1 - f) / f for the mean of a fraction f.
_SHIFT_STRIDE: Final = 8
#: Rows from which on a sample tells how far means are from 0; the share of columns that may be.
_LEAST_SAMPLE, _FEW = 16, 1 / 32
#: Fourth powers of values with these ranges are normal float32 numbers, and so are their sums.
_WIDEST, _NARROWEST = np.float32(2.0**29), np.float32(2.0**-24)
#: Squares of rows with these sums are.
_LARGEST, _SMALLEST = 2.0**120, 2.0**-80


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Of each feature: float64 or int64 [width].

    Attributes
    ----------
    count : numpy.ndarray
        Finite values.
    mean : numpy.ndarray
        Their mean; 0 of none.
    second, third, fourth : numpy.ndarray
        The sums of their powers about the mean.
    minimum, maximum : numpy.ndarray
        inf and -inf of none.
    zeros : numpy.ndarray
        Values that are 0 or -0.
    nonfinite : numpy.ndarray
        NaNs and infinities, of which all else knows nothing.
    large : numpy.ndarray
        Values that are at least as large as a threshold.
    """

    count: Integers
    mean: Floats
    second: Floats
    third: Floats
    fourth: Floats
    minimum: Floats
    maximum: Floats
    zeros: Integers
    nonfinite: Integers
    large: Integers

    @classmethod
    def none(cls, width: int) -> Self:
        """Give those of no rows."""
        empty, counts = np.zeros(width), np.zeros(width, np.int64)
        low, high = np.full(width, np.inf), np.full(width, -np.inf)
        return cls(counts, *(empty,) * 4, low, high, *(counts,) * 3)

    @classmethod
    def merge(cls, parts: Iterable[Moments]) -> Self:
        """Give those of all rows together."""
        parts = list(parts)
        by = {
            one.name: np.stack([getattr(part, one.name) for part in parts]) for one in fields(cls)
        }
        powers = _central(*(by[one] for one in ("count", "mean", "second", "third", "fourth")))
        low, high = by["minimum"].min(axis=0), by["maximum"].max(axis=0)
        counts = (by[one].sum(axis=0) for one in ("zeros", "nonfinite", "large"))
        return cls(by["count"].sum(axis=0), *powers, low, high, *counts)

    def replace(self, places: NDArray[np.intp], others: Moments) -> None:
        """Put others in the place of some features, here."""
        for one in fields(self):
            getattr(self, one.name)[places] = getattr(others, one.name)


def _central(
    counts: Integers, means: Floats, second: Floats, third: Floats, fourth: Floats
) -> tuple[Floats, Floats, Floats, Floats]:
    """Give the mean of all, and the sums of powers about it, of parts' [parts, width]."""
    total = np.maximum(counts.sum(axis=0), 1)
    first = means[np.argmax(counts > 0, axis=0), np.arange(means.shape[1])]
    away = np.where(counts > 0, means - first, 0)
    offset = (counts * away).sum(axis=0) / total
    mean = first + offset
    by = np.where(counts > 0, away - offset, 0)  # each part's mean, from that of all
    square = by * by
    return (
        mean,
        (second + counts * square).sum(axis=0),
        (third + 3 * by * second + counts * square * by).sum(axis=0),
        (fourth + 4 * by * third + 6 * square * second + counts * square * square).sum(axis=0),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Norms:
    """Of the L2 norms of rows that are finite: how many, their sum, and the largest."""

    count: int = 0
    total: float = 0.0
    largest: float = -np.inf

    @classmethod
    def of(cls, norms: Floats) -> Self:
        """Sum some up."""
        norms = norms[np.isfinite(norms)]
        return cls(norms.size, float(norms.sum()), float(norms.max(initial=-np.inf)))

    @classmethod
    def merge(cls, parts: Iterable[Norms]) -> Self:
        """Give those of all together."""
        parts = list(parts)
        largest = max(one.largest for one in parts)
        return cls(sum(one.count for one in parts), sum(one.total for one in parts), largest)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What is kept of some rows of a layer."""

    moments: Moments
    norms: Norms
    histogram: Integers


def merge_states(states: list[State]) -> State:
    """Give the state of all rows together."""
    return State(
        Moments.merge(one.moments for one in states),
        Norms.merge(one.norms for one in states),
        np.sum([one.histogram for one in states], axis=0),
    )


def state_of(
    values: xr.Variable,
    keep: NDArray[np.bool_],
    step: int,
    *,
    every: int = 0,
    threshold: float = np.inf,
) -> State:
    """Read rows of one layer, and give their state.

    Parameters
    ----------
    values : xarray.Variable
        (token, …).
    keep : numpy.ndarray
        bool [rows]: those to look at.
    step : int
        Rows to read at once.
    every : int, optional
        Every so manieth value is in the histogram; 0: none are.
    threshold : float, optional
        From what magnitude on a value is large.
    """
    width = int(np.prod(values.shape[1:], dtype=np.int64))
    moments, norms, passes = [Moments.none(width)], Norms(), _Pass(width, every, threshold)
    with np.errstate(all="ignore"):
        for _, block in blocks_of(values, keep, step):
            found, squares = passes(block)
            moments.append(found)
            if len(moments) * width >= _MERGED:
                moments = [Moments.merge(moments)]
            norms = Norms.merge([norms, Norms.of(np.sqrt(squares))])
        return State(Moments.merge(moments), norms, passes.histogram)


class _Pass:
    """Goes over blocks of rows in pieces, with the same memory each time.

    Parameters
    ----------
    width : int
        The elements of a row.
    every : int
        Every so manieth value is counted in the histogram; 0: none are.
    threshold : float
        From what magnitude on a value is large.

    Attributes
    ----------
    histogram : numpy.ndarray
        int64: of the values so far; empty if none are counted.
    """

    def __init__(self, width: int, every: int, threshold: float) -> None:
        self.histogram = np.zeros(sketch.BINS if every else 0, np.int64)
        self._every, self._threshold = every, threshold
        self._left = 0  # values until the next that is counted
        self._columns = max(min(width, sketch.PIECE), 1)
        self._rows = min(max(_PIECE // self._columns, 1), _MOST_ROWS)
        size = self._rows * self._columns
        self._zero = np.empty(size, np.bool_)
        # the keys take the place of the powers, so that all of it stays in the cache
        self._keys = np.empty(size, np.int64)
        self._apart, self._square = self._keys.view(np.float32).reshape(2, size)

    def __call__(self, block: NDArray[Any]) -> tuple[Moments, Floats]:
        """Give the moments of a block, and the sum of squares of each of its rows."""
        if block.dtype != np.float32:
            return self._exactly(block)
        squares = np.zeros(len(block))
        parts = [
            self._columns_of(block[:, at : at + self._columns], squares)
            for at in range(0, block.shape[1], self._columns)
        ]
        moments = parts[0] if len(parts) == 1 else _beside(parts)
        odd = ~_safe(squares)
        if odd.any():
            squares[odd] = _squares(block[odd])
        return moments, squares

    def _columns_of(self, block: NDArray[np.float32], squares: Floats) -> Moments:
        """Give the moments of some columns; add to the squares, and to the histogram."""
        rows, width = block.shape
        shift, far = _shift(block)
        count = -(-rows // self._rows)
        sums = np.empty((count, 4, width), np.float32)
        ends = np.empty((2, count, width), np.float32)
        zeros = np.zeros(width, np.int64)
        for number in range(count):
            first = number * self._rows
            piece = block[first : first + self._rows]
            self._sum(piece, shift, sums[number])
            np.minimum.reduce(piece, axis=0, out=ends[0, number])
            np.maximum.reduce(piece, axis=0, out=ends[1, number])
            squares[first : first + len(piece)] += np.vecdot(piece, piece)
            zero = np.equal(piece, 0, out=_like(self._zero, piece))
            if zero.any():
                zeros += np.add.reduce(zero.view(np.uint8), axis=0, dtype=np.uint16)
            if self._every:
                self._count(piece)
        low, high = ends[0].min(axis=0), ends[1].max(axis=0)
        first, second, third, fourth = sums.sum(axis=0, dtype=np.float64)
        by = first / rows
        moments = Moments(
            np.full(width, rows),
            shift + by,
            np.maximum(second - by * first, 0),
            third - 3 * by * second + 2 * by * by * first,
            fourth - 4 * by * third + 6 * by * by * second - 3 * by * by * by * first,
            low.astype(np.float64),
            high.astype(np.float64),
            zeros,
            np.zeros(width, np.int64),
            np.zeros(width, np.int64),
        )
        spread = high - low
        odd = far | ~((spread <= _WIDEST) & ((spread >= _NARROWEST) | (spread == 0)))
        if odd.any():
            places = np.flatnonzero(odd)
            moments.replace(places, _moments(block[:, places]))
        wide = np.flatnonzero(np.maximum(-moments.minimum, moments.maximum) >= self._threshold)
        if wide.size:
            moments.large[wide] = _large(block[:, wide], self._threshold)
        return moments

    def _sum(self, piece: NDArray[np.float32], shift: NDArray[np.float32], out: Any) -> None:
        """Sum the first four powers about the shift."""
        apart, square = piece, _like(self._square, piece)
        if shift.any():
            apart = np.subtract(piece, shift, out=_like(self._apart, piece))
        np.add.reduce(apart, axis=0, out=out[0])
        np.multiply(apart, apart, out=square)
        np.add.reduce(square, axis=0, out=out[1])
        np.einsum("ij,ij->j", apart, square, out=out[2])
        np.einsum("ij,ij->j", square, square, out=out[3])

    def _count(self, piece: NDArray[np.float32]) -> None:
        """Count values in the histogram."""
        values = piece.reshape(-1)[self._left :]
        sketch.count(values, self._every, self._keys, self.histogram)
        self._left = -values.size % self._every if values.size else self._left - piece.size

    def _exactly(self, block: NDArray[Any]) -> tuple[Moments, Floats]:
        """Do as much in float64: of float64, integers and booleans."""
        block = block.astype(np.float64, copy=False)
        pieces = [
            block[:, at : at + sketch.PIECE]
            for at in range(0, max(block.shape[1], 1), sketch.PIECE)
        ]
        moments = _beside([_moments(one) for one in pieces])
        wide = np.maximum(-moments.minimum, moments.maximum) >= self._threshold
        moments.large[wide] = _large(block[:, wide], self._threshold)
        for piece in pieces if self._every else ():
            for first in range(0, len(piece), self._rows):
                self._count(sketch.narrowed(piece[first : first + self._rows]))
        return moments, _squares(block)


def _shift(block: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Give about what the powers of columns are summed, and the columns that are too far from it.

    It is near their means, by some of the rows. Where most means are within a deviation of 0 it is
    0, which takes no subtraction; the few that aren't are summed by themselves.
    """
    some = block[::_SHIFT_STRIDE]
    apart = some - block[0]
    means = block[0] + np.add.reduce(apart, axis=0) / np.float32(len(some))
    np.subtract(some, means, out=apart)
    deviations = np.sqrt(np.add.reduce(apart * apart, axis=0) / np.float32(len(some)))
    far = ~(np.abs(means) <= deviations)
    if len(some) >= _LEAST_SAMPLE and np.count_nonzero(far) <= far.size * _FEW:
        return np.zeros_like(means), far
    return means, np.zeros_like(far)


def _like(buffer: NDArray[Any], piece: NDArray[Any]) -> NDArray[Any]:
    """Give the beginning of a buffer the shape of a piece."""
    return buffer[: piece.size].reshape(piece.shape)


def _beside(parts: list[Moments]) -> Moments:
    """Put moments of columns beside each other."""
    return Moments(
        *(np.concatenate([getattr(one, name.name) for one in parts]) for name in fields(Moments))
    )


def _moments(values: NDArray[Any]) -> Moments:
    """Give the moments of columns in float64, by two passes."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    safe = np.where(finite, values, 0)
    total = np.maximum(count, 1)
    mean = (safe / total).sum(axis=0)  # a sum could overflow
    apart = np.where(finite, values - mean, 0)
    rest = apart.sum(axis=0) / total
    mean = mean + rest
    apart = np.where(finite, apart - rest, 0)
    square = apart * apart
    return Moments(
        count,
        mean,
        square.sum(axis=0),
        (square * apart).sum(axis=0),
        (square * square).sum(axis=0),
        np.where(finite, values, np.inf).min(axis=0, initial=np.inf),
        np.where(finite, values, -np.inf).max(axis=0, initial=-np.inf),
        (values == 0).sum(axis=0),
        len(values) - count,
        np.zeros(values.shape[1], np.int64),
    )


def _large(values: NDArray[Any], threshold: float) -> Integers:
    found: Integers = ((np.abs(values) >= threshold) & np.isfinite(values)).sum(axis=0)
    return found


def _squares(values: NDArray[Any]) -> Floats:
    wide = values.astype(np.float64)
    return np.asarray(np.vecdot(wide, wide))


def row_squares(rows: NDArray[Any]) -> Floats:
    """Give the sum of squares of each row, float64 [n]; NaN and inf where the row has such."""
    if rows.dtype != np.float32:
        return _squares(rows)
    found = _products(rows, rows)
    odd = ~_safe(found)
    if odd.any():
        found[odd] = _squares(rows[odd])
    return found


def cosines(one: NDArray[Any], other: NDArray[Any]) -> Floats:
    """Give the cosine between each row and its counterpart; NaN where one is 0 or not finite.

    Parameters
    ----------
    one, other : numpy.ndarray
        [n, width] of the same dtype.

    Returns
    -------
    numpy.ndarray
        float64 [n].
    """
    squares = row_squares(one), row_squares(other)
    if one.dtype == np.float32:
        found = _products(one, other)
        odd = ~(_safe(squares[0]) & _safe(squares[1]))
        found[odd] = _exact_products(one[odd], other[odd])
    else:
        found = _exact_products(one, other)
    return np.asarray(np.clip(found / (np.sqrt(squares[0]) * np.sqrt(squares[1])), -1, 1))


def _safe(squares: Floats) -> NDArray[np.bool_]:
    """Tell of which rows the squares are sums of normal float32 numbers, but for small ones."""
    return (squares < _LARGEST) & (squares > _SMALLEST)


def _products(one: NDArray[np.float32], other: NDArray[np.float32]) -> Floats:
    found = np.zeros(len(one))
    for at in range(0, one.shape[1], sketch.PIECE):
        found += np.vecdot(one[:, at : at + sketch.PIECE], other[:, at : at + sketch.PIECE])
    return found


def _exact_products(one: NDArray[Any], other: NDArray[Any]) -> Floats:
    return np.asarray(np.vecdot(one.astype(np.float64), other.astype(np.float64)))
