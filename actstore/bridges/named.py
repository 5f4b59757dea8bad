"""Owns passes of arrays that have names, and nothing that says what their dimensions are.

The token axis is told by the ids, where there are some; else it is what most arrays begin with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.bridges.foreign import Array, Firing, ForeignPass, axis_of, integers, pieces
from actstore.errors import FormatError

__all__ = ["IDS", "Labels", "labels_among", "passes_of"]

#: What arrays of token ids, masks and positions are called in folders and caches.
IDS: Final = ("token_ids", "token_id", "tokens", "input_ids", "ids")
_MASKS: Final = ("attention_mask", "mask")
_POSITIONS: Final = ("position_ids", "positions", "position")
_LABELS_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """What is known of rows: int64 ids and positions, a bool mask, labels of batch items."""

    ids: NDArray[np.int64] | None = None
    mask: NDArray[np.bool_] | None = None
    positions: NDArray[np.int64] | None = None
    annotations: Mapping[str, Any] = field(default_factory=dict)


def labels_among(arrays: dict[str, Array], ids: NDArray[np.int64] | None, where: str) -> Labels:
    """Take the arrays that are labels out of named ones; ``ids`` that were told come first.

    Raises
    ------
    FormatError
        One is no label: its dtype or its shape is another.
    """
    found: dict[str, Any] = {}
    for what, names in (("ids", IDS), ("mask", _MASKS), ("positions", _POSITIONS)):
        name = next((one for one in names if one in arrays), None)
        if name is not None:
            array = arrays.pop(name)
            nbytes = int(np.prod(array.shape, dtype=object)) * array.dtype.itemsize
            if len(array.shape) not in (1, 2) or nbytes > _LABELS_BYTES:
                msg = (
                    f"{where}: {name!r} must be [rows] or [batch, sequence]; found "
                    f"{array.dtype} of shape {array.shape}"
                )
                raise FormatError(msg)
            values = np.asarray(array[...])
            found[what] = values != 0 if what == "mask" else integers(values, name, where)
    if ids is not None:
        found["ids"] = ids
    return Labels(**found)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Batch, sequence, and whether rows are flat: one leading dimension."""

    batch: int
    sequence: int
    flat: bool

    def begins(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape is over these rows."""
        if self.flat:
            return bool(shape) and shape[0] == self.sequence
        return tuple(shape[:2]) == (self.batch, self.sequence)


def passes_of(
    arrays: Mapping[str, Array],
    labels: Labels,
    where: str,
    *,
    start: int = 0,
    cut: bool = True,
    memory: Mapping[str, Any] | None = None,
) -> Iterator[ForeignPass]:
    """Yield passes of named arrays.

    Parameters
    ----------
    arrays : mapping of str to array
        Layer -> values, [batch, sequence, …] or [rows, …].
    labels : Labels
        Of the rows.
    where : str
        Names the source in messages.
    start : int
        The first position, where none are given.
    cut : bool
        Several passes where the arrays are large, else one.
    memory : mapping, optional
        Layer -> what is equal for arrays of the same memory.

    Raises
    ------
    FormatError
        Labels and arrays don't fit.
    """
    if not arrays:
        return
    rows = _rows(arrays, labels, where)
    if rows is None or not cut:
        axis = None if rows is None else _axis(rows, labels, slice(None), slice(None), start)
        yield ForeignPass(
            axis,
            (
                Firing(name, array[...], same_as=(memory or {}).get(name))
                for name, array in arrays.items()
            ),
            labels.annotations,
        )
        return
    over = {name: array for name, array in arrays.items() if rows.begins(array.shape)}
    whole = {name: array for name, array in arrays.items() if name not in over}
    for items, places in pieces(rows.batch, rows.sequence, _row_bytes(over, rows)):
        key = (places,) if rows.flat else (items, places)
        numbers = list(range(items.start, items.stop))
        yield ForeignPass(
            _axis(rows, labels, items, places, start),
            _firings(whole, over, key, memory or {}),
            {name: [one[n] for n in numbers] for name, one in labels.annotations.items()}
            | ({} if rows.flat else {"sequence": numbers}),
        )
        whole = {}


def _firings(
    whole: Mapping[str, Array],
    over: Mapping[str, Array],
    key: tuple[slice, ...],
    memory: Mapping[str, Any],
) -> Iterator[Firing]:
    """Yield what is over no rows, then a piece of each of the others, read when it is taken."""
    for name, array in whole.items():
        yield Firing(name, array[...], same_as=memory.get(name))
    for name, array in over.items():
        yield Firing(name, array[key], same_as=memory.get(name))


def _rows(arrays: Mapping[str, Array], labels: Labels, where: str) -> _Rows | None:
    """Tell which rows most arrays are over; None where none are."""
    shapes = [array.shape for array in arrays.values()]
    told = next(
        (one for one in (labels.ids, labels.mask, labels.positions) if one is not None), None
    )
    if told is None:
        pairs = Counter(tuple(shape[:2]) for shape in shapes if len(shape) > 2)
        lengths = Counter(shape[0] for shape in shapes if len(shape) == 2)
        if pairs:
            batch, sequence = pairs.most_common(1)[0][0]
            return _Rows(batch, sequence, flat=False)
        return _Rows(1, lengths.most_common(1)[0][0], flat=True) if lengths else None
    if told.ndim == 2:
        rows = _Rows(len(told), told.shape[1], flat=False)
    else:
        # without a batch dimension they are those of one item, if arrays begin with such a one
        item = _Rows(1, told.size, flat=False)
        rows = item if any(map(item.begins, shapes)) else _Rows(1, told.size, flat=True)
    if not any(map(rows.begins, shapes)):
        name, array = next(iter(arrays.items()))
        msg = (
            f"{where}: no array is over the {told.shape} token ids; {name!r} has the shape "
            f"{array.shape}: give tokens that fit"
        )
        raise FormatError(msg)
    for one in (labels.mask, labels.positions):
        if one is not None and one.shape != told.shape:
            msg = f"{where}: labels of the shapes {told.shape} and {one.shape} are of other rows"
            raise FormatError(msg)
    return rows


def _row_bytes(arrays: Mapping[str, Array], rows: _Rows) -> int:
    leading = 1 if rows.flat else 2
    return max(
        (
            int(np.prod(array.shape[leading:], dtype=np.int64)) * array.dtype.itemsize
            for array in arrays.values()
        ),
        default=1,
    )


def _axis(rows: _Rows, labels: Labels, items: slice, places: slice, start: int) -> Any:
    shape = rows.batch, rows.sequence

    def piece(values: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if values is None else values.reshape(shape)[items, places]

    first, last, _ = places.indices(rows.sequence)
    top, bottom, _ = items.indices(rows.batch)
    return axis_of(
        (bottom - top, last - first),
        ids=piece(labels.ids),
        mask=piece(labels.mask),
        positions=piece(labels.positions),
        start=start + first,
        flat=rows.flat,
    )
