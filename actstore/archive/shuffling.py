"""Owns the order of a shuffled archive's rows: a permutation of each token axis, and its plan.

Pure. How rows get from the logs' order into this one, is ``compaction.shuffling``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.archive.coordinates import SOURCE_ROW, Coordinate, prefix_of
from actstore.archive.grid import Segments
from actstore.archive.layout import Plan, Variable
from actstore.errors import ArchiveError, ConfigError

__all__ = ["LAYOUTS", "SEED", "Shuffle", "check_layout", "is_shuffled", "reordered"]

Integers = NDArray[np.int64]
LAYOUTS: Final = ("captured", "shuffled")
#: The root attribute that has the seed; ``layout`` says that there is one.
SEED: Final = "shuffle_seed"
_MOST: Final = 1 << 63


@dataclass(frozen=True, slots=True, eq=False)
class Shuffle:
    """The rows' order in a shuffled archive.

    Attributes
    ----------
    seed : int
        What it was drawn by.
    orders : mapping of str to numpy.ndarray
        Token dimension -> int64 [rows]: of each row of the archive, which it was as captured.
    """

    seed: int
    orders: Mapping[str, Integers]

    @classmethod
    def drawn(cls, rows: Mapping[str, int], seed: int) -> Shuffle:
        """Draw the order of each axis: rows go by random 64-bit keys.

        The streams of NumPy's bit generators are the same in all its versions, and so is this.
        """
        orders = {}
        for number, (dim, count) in enumerate(rows.items()):
            keys = np.random.PCG64(np.random.SeedSequence([seed, number])).random_raw(count)
            orders[dim] = np.argsort(keys, kind="stable")
        return cls(seed, orders)

    def check(self, rows: Mapping[str, int]) -> None:
        """Refuse orders that are no permutations of these rows.

        Raises
        ------
        ArchiveError
            They aren't.
        """
        for dim, count in rows.items():
            order = self.orders.get(dim, np.zeros(0, np.int64))
            fits = order.shape == (count,) and order.dtype.kind == "i"
            inside = fits and (not count or (order.min() >= 0 and order.max() < count))
            if not inside or (np.bincount(order, minlength=count) != 1).any():
                msg = f"{SOURCE_ROW} of {dim!r} is no permutation of the {count} rows of the logs"
                raise ArchiveError(msg)

    @property
    def nbytes(self) -> int:
        """Bytes of the orders."""
        return sum(one.nbytes for one in self.orders.values())


def check_layout(layout: object, seed: object) -> int | None:
    """Give the seed of a shuffled layout; None of the captured one.

    Raises
    ------
    ConfigError
        They are none.
    """
    if layout not in LAYOUTS:
        msg = f"layout must be one of {', '.join(map(repr, LAYOUTS))}; got {layout!r}"
        raise ConfigError(msg)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _MOST:
        msg = f"seed must be an int from 0 to 2^63 − 1; got {seed!r}"
        raise ConfigError(msg)
    return seed if layout == "shuffled" else None


def is_shuffled(attributes: Mapping[Any, Any]) -> bool:
    """Whether a root's attributes say that the rows are shuffled."""
    return attributes.get("layout") == "shuffled"


def reordered(plan: Plan, shuffle: Shuffle) -> Plan:
    """Give a plan whose rows are in another order; each row knows which it was."""
    labels = [
        replace(one, values=one.values[shuffle.orders[one.dims[0]]])
        if one.dims[0] in shuffle.orders
        else one
        for one in plan.coordinates
    ]
    for dim, order in shuffle.orders.items():
        prefix = prefix_of([one.name for one in labels if one.dims == (dim,)]) or ""
        labels.append(Coordinate(f"{prefix}{SOURCE_ROW}", (dim,), order))
    variables = tuple(
        _moved(one, shuffle.orders[one.dims[one.token_axis]]) for one in plan.variables
    )
    return replace(plan, variables=variables, coordinates=tuple(labels))


def _moved(variable: Variable, order: Integers) -> Variable:
    """Say which rows of a variable are there, in another order."""
    whole = _runs(np.zeros(1, np.int64), np.full(1, variable.rows))
    segments = []
    for one in variable.segments:
        if one is None or one.rows == variable.rows:
            segments.append(one and whole)
            continue
        edges = np.flatnonzero(np.diff(one.has(order), prepend=False, append=False))
        segments.append(_runs(edges[::2], edges[1::2]))
    return replace(variable, segments=tuple(segments))


def _runs(start: Integers, stop: Integers) -> Segments:
    """Give rows that are there, wherever they come from."""
    nowhere = np.full_like(start, -1)
    return Segments(nowhere, np.zeros_like(start), start, stop - start)
