"""Owns quantiles of very many values, by a histogram that merges by adding.

A bin is all float32 numbers with the same upper 16 bits: a sign, an exponent, 7 bits of mantissa.
Its middle is within 2^-8 of each of its values, relatively; of numbers under 2^-126, within
2^-133. So is a quantile taken from it, as in DDSketch (Masson et al., 2019, arXiv:1908.10693).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "PIECE", "count", "every", "narrowed", "quantiles"]

BINS: Final = 1 << 16
#: Features of a piece of rows: all, or this many.
PIECE: Final = 4096
_HALF: Final = 1 << 15
#: The bins of finite numbers, in the order of their values.
_ORDER: Final = np.r_[0xFF7F:0x7FFF:-1, 0:0x7F80]


def count(
    values: NDArray[np.float32],
    every: int,
    keys: NDArray[np.int64],
    histogram: NDArray[np.int64],
) -> None:
    """Add values to a histogram; NaNs and infinities come to bins that nobody reads.

    Parameters
    ----------
    values : numpy.ndarray
        float32 [n], contiguous.
    every : int
        The first is counted, and every so manieth from there.
    keys : numpy.ndarray
        int64 [n or more]: written over.
    histogram : numpy.ndarray
        int64 [65536].
    """
    if every > 1 or values.size % 2:
        upper = values.view(np.uint16)[int(np.little_endian) :: 2][::every]
        keys = keys[: upper.size]
        np.copyto(keys, upper)
    else:  # two at a time, which takes two thirds of that
        keys = keys[: values.size]
        pairs = values.view(np.uint64)
        one, other = keys.view(np.uint64).reshape(2, pairs.size)
        np.right_shift(pairs, 48, out=one)
        np.right_shift(pairs, 16, out=other)
        np.bitwise_and(other, 0xFFFF, out=other)
    np.add.at(histogram, keys, 1)


def every(values: int, width: int, wanted: int) -> int:
    """Give a stride that leaves at least so many values, and favours no feature.

    It has no divisor in common with the width of a row, or of the pieces that rows are cut into:
    so of as many rows each feature is counted once.

    Parameters
    ----------
    values : int
        How many there are.
    width : int
        Of a row.
    wanted : int
        How many are to be left.
    """
    pieces = width * PIECE * (width % PIECE or 1)
    return next(s for s in range(max(values // wanted, 1), 0, -1) if math.gcd(s, pieces) == 1)


def narrowed(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Give float64 as float32; what is beyond its range becomes its largest number."""
    found = values.astype(np.float32)
    beyond = np.isinf(found) & np.isfinite(values)
    found[beyond] = np.copysign(np.finfo(np.float32).max, values[beyond])
    return found


def quantiles(
    histogram: NDArray[np.int64], wanted: NDArray[np.float64], low: float, high: float
) -> NDArray[np.float64]:
    """Give quantiles: of each, the middle of the bin that the value is in.

    Parameters
    ----------
    histogram : numpy.ndarray
        int64 [65536].
    wanted : numpy.ndarray
        float64: from 0 to 1.
    low, high : float
        The extremes of the values; 0 and 1 give these.

    Returns
    -------
    numpy.ndarray
        float64: near the smallest value of which at least that share is no larger
        (``numpy.quantile`` with ``method="inverted_cdf"``); NaN of no values.
    """
    reached = np.cumsum(histogram[_ORDER])
    if not reached[-1]:
        return np.full(wanted.shape, np.nan)
    ranks = np.clip(np.ceil(wanted * reached[-1]), 1, reached[-1])
    keys = _ORDER[np.searchsorted(reached, ranks)].astype(np.uint32)
    middle = ((keys << 16) | np.where(keys % _HALF, _HALF, 0).astype(np.uint32)).view(np.float32)
    return np.asarray(np.clip(middle.astype(np.float64), low, high))
