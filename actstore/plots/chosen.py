"""Owns which rows a figure shows, and which of many it is computed from; it says so in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.accessor import TokenAxis, token_axes
from actstore.analysis.source import source_of
from actstore.errors import ConfigError
from actstore.plots.text import labels

__all__ = ["Shown", "chosen_rows", "layer_names", "sampled"]

_MOST: Final = 200  # tokens that are shown unless rows are told
_MOST_TOLD: Final = 400
_SAMPLE: Final = 20_000  # rows
_SAMPLE_BYTES: Final = 128 << 20
_PIECES: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """Rows that are shown.

    Attributes
    ----------
    dataset : xarray.Dataset
        The variable's rows, and no other variable but what tells which are present.
    dim : str
        The token axis.
    texts : list of str
        Their tokens, as they can be drawn.
    ends : numpy.ndarray
        The places after which a new sequence begins.
    generated : int or None
        The place of the first row that was fed by itself, behind a prompt.
    about : str
        Which rows these are.
    """

    dataset: xr.Dataset
    dim: str
    texts: list[str]
    ends: NDArray[np.intp]
    generated: int | None
    about: str

    @property
    def count(self) -> int:
        """How many rows these are."""
        return self.dataset.sizes[self.dim]


def chosen_rows(
    dataset: xr.Dataset,
    variable: str,
    rows: slice | None = None,
    pass_index: int | None = None,
    item: int | None = None,
) -> Shown:
    """Choose the rows of a variable that a figure shows.

    Parameters
    ----------
    dataset : xarray.Dataset
        As it was opened, or chosen from that.
    variable : str
        Which.
    rows : slice, optional
        These rows of the dataset; of more than 400 the first.
    pass_index, item : int, optional
        A pass's, or its batch item's. If nothing is told: the first sequence, which are the rows
        of the first batch item whose positions follow each other, through the passes of a cached
        generation; where it is a single row, all. Of more than 200 the first; no padding.

    Raises
    ------
    ConfigError
        There is no such variable, it has no rows, there are no such rows.
    """
    source = source_of(dataset, variable, padding=True)
    axis = token_axes(dataset)[source.dim]
    if rows is not None:
        if not isinstance(rows, slice) or pass_index is not None or item is not None:
            msg = (
                "rows must be a slice, without pass_index and item beside it; choose others with "
                f"dataset.actstore; got {rows!r}"
            )
            raise ConfigError(msg)
        found, most = np.arange(axis.rows)[rows], _MOST_TOLD
    elif pass_index is not None or item is not None:
        found, most = _of_pass(axis, pass_index, item), _MOST
    else:
        found, most = _first_sequence(axis), _MOST
    kept = found[:most]
    mine = _narrow(dataset, variable)
    taken = token_axes(mine)[axis.dim].take(kept)
    return _shown(taken, axis.dim, kept, len(found), axis.rows)


def _narrow(dataset: xr.Dataset, variable: str) -> xr.Dataset:
    """Leave out all variables but one, and with them the labels of other dimensions."""
    return dataset[[one for one in (variable, f"{variable}_present") if one in dataset]]


def _of_pass(axis: TokenAxis, pass_index: int | None, item: int | None) -> NDArray[np.int64]:
    passes = axis.label("pass_index").to_numpy()
    items = axis.label("batch_item").to_numpy()
    mask = np.ones(axis.rows, np.bool_)
    for column, wanted in ((passes, pass_index), (items, item)):
        if wanted is not None:
            mask &= column == wanted
    found = axis.as_captured(mask & ~_padding(axis))
    if not found.size:
        said = f"passes {passes.min()} to {passes.max()}" if axis.rows else "no rows"
        msg = f"there are no rows of pass {pass_index!r}, batch item {item!r}; there are {said}"
        raise ConfigError(msg)
    return found


def _padding(axis: TokenAxis) -> NDArray[np.bool_]:
    if "is_padding" not in axis:
        return np.zeros(axis.rows, np.bool_)
    return np.asarray(axis.label("is_padding").to_numpy(), np.bool_)


def _first_sequence(axis: TokenAxis) -> NDArray[np.int64]:
    """Give the rows of the first batch item, as long as their positions follow each other."""
    real = axis.as_captured(~_padding(axis))
    if real.size < 2 or "batch_item" not in axis or "position" not in axis:
        return real
    mask = axis.label("batch_item").to_numpy()[real] == axis.label("batch_item")[real[0]]
    if axis.run:
        mask &= axis.label("run").to_numpy()[real] == axis.label("run")[real[0]]
    mine = real[mask]
    apart = np.flatnonzero(np.diff(axis.label("position").to_numpy()[mine]) != 1)
    first = mine[: apart[0] + 1] if apart.size else mine
    return first if first.size > 1 else real


def _shown(taken: xr.Dataset, dim: str, kept: NDArray[np.int64], wanted: int, total: int) -> Shown:
    axis = token_axes(taken).get(dim)
    count = taken.sizes[dim]
    none = np.full(count, -1)
    column = {
        name: axis.label(name).to_numpy() if axis is not None and name in axis else none
        for name in ("pass_index", "batch_item", "position", "token_id", "token_text")
    }
    texts = column["token_text"] if column["token_text"] is not none else [""] * count
    ids = column["token_id"]
    follows = (np.diff(column["batch_item"]) == 0) & (np.diff(column["position"]) == 1)
    ends = np.flatnonzero(~follows)
    passes = column["pass_index"]
    sizes = np.bincount(np.unique(passes, return_inverse=True)[1]) if count else np.zeros(0)
    later = None
    if len(sizes) > 1 and sizes[0] > 1 and (sizes[1:] == 1).all() and not ends.size:
        later = int(sizes[0])
    return Shown(
        taken,
        dim,
        labels(texts, ids),
        ends,
        later,
        _told(kept, wanted, total, passes, column["batch_item"]),
    )


def _told(
    kept: NDArray[np.int64],
    wanted: int,
    total: int,
    passes: NDArray[Any],
    items: NDArray[Any],
) -> str:
    if not kept.size:
        return f"no rows of {total:,}"
    straight = kept.size == 1 or (np.diff(kept) == 1).all()
    where = f"rows {kept[0]:,}–{kept[-1]:,}" if straight else f"{kept.size:,} rows"
    parts = [f"{where} of {total:,}"]
    if kept.size < wanted:
        parts.append(f"the first {kept.size} of {wanted:,} chosen")
    low, high = int(passes.min()), int(passes.max())
    parts.append(f"pass {low}" if low == high else f"passes {low}–{high}")
    alike = np.unique(items)
    parts.append(f"item {alike[0]}" if alike.size == 1 else f"{alike.size} items")
    return ", ".join(parts)


def layer_names(dataset: xr.Dataset, variable: str) -> list[str]:
    """Name the places on ``layer``; of a variable without, its site."""
    array = dataset[variable]
    if "layer" not in array.dims:
        return [variable]
    if "layer" in array.coords:
        return [str(one) for one in array["layer"].values.tolist()]
    return [str(one) for one in range(array.sizes["layer"])]


def sampled(dataset: xr.Dataset, variable: str, sample: int | None) -> tuple[xr.Dataset, str]:
    """Take some of the rows of a variable, spread evenly, in runs of rows that follow each other.

    Reading rows costs reading the chunks that they are in, so runs are as long as chunks where
    there are at least 16 of them then.

    Parameters
    ----------
    dataset : xarray.Dataset
        As it was opened, or chosen from that.
    variable : str
        Which.
    sample : int, optional
        How many rows; 20,000 if it isn't given, or as many as have 128 MiB.

    Returns
    -------
    dataset : xarray.Dataset
        The rows.
    about : str
        How many of how many.

    Raises
    ------
    ConfigError
        There is no such variable, or the sample is none.
    """
    if sample is not None and (
        isinstance(sample, bool) or not isinstance(sample, int) or sample < 1
    ):
        msg = f"sample must be a positive number of rows; got {sample!r}"
        raise ConfigError(msg)
    source = source_of(dataset, variable, padding=True)
    mine, total = _narrow(dataset, variable), source.rows
    each = source.row_bytes * len(source.places)
    wanted = sample or max(min(_SAMPLE, _SAMPLE_BYTES // each), _PIECES)
    if total <= wanted:
        return mine, f"all {total:,} rows"
    axis = source.variable.dims.index(source.dim)
    stored = source.variable.encoding.get("chunks")
    chunk = int(stored[axis]) if stored else 1
    piece = max(min(chunk, wanted // _PIECES), 1)
    starts = (
        np.linspace(0, max(total // piece - 1, 0), -(-wanted // piece)).astype(np.int64) * piece
    )
    rows = np.unique((starts[:, np.newaxis] + np.arange(piece)).ravel())[:wanted]
    taken = token_axes(mine)[source.dim].take(rows)
    return taken, f"{rows.size:,} of {total:,} rows, spread evenly"
