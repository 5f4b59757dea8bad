"""Owns what is told of single rows: norms, how layers turn them, which activate a feature."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.accessor import TokenAxis, token_axes
from actstore.analysis.engine import Budget, Mask, compute, later, reduced
from actstore.analysis.moments import cosines, row_squares
from actstore.analysis.source import Source, blocks_of, flat, labelled, source_of, sources
from actstore.arguments import check_count
from actstore.errors import ConfigError

__all__ = ["layer_change", "token_norms", "top_activations"]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def token_norms(
    dataset: xr.Dataset,
    variables: str | Iterable[str] | None = None,
    *,
    padding: bool = False,
    max_memory_gb: float = 1.0,
    workers: int = 2,
) -> xr.Dataset:
    """Give the L2 norm of every row of every layer.

    Parameters
    ----------
    dataset : xarray.Dataset
        As `actstore.open_dataset` or `xarray.open_zarr` gave it, or chosen from that.
    variables : str or iterable of str, optional
        Which; all floating ones with a token axis, if it isn't given.
    padding : bool, optional
        Whether padding has norms.
    max_memory_gb : float, optional
        What may be held, in 10^9 bytes, besides the result.
    workers : int, optional
        Threads.

    Returns
    -------
    xarray.Dataset
        Of each variable ``v``, ``v_norm``: float64 (layer, token), NaN for padding, missing rows,
        and rows that hold a NaN.

    Raises
    ------
    ConfigError
        As for `actstore.analysis.statistics`.
    """
    budget = Budget(workers, max_memory_gb)
    chosen = sources(dataset, variables, padding=padding)
    work = later(_norms)
    layers = []
    for source in chosen:
        block, task = source.grid(budget)
        layers.append(
            [
                [
                    work(part, Mask(source.keep[number, task * piece :][:task]), block)
                    for piece, part in enumerate(source.parts(place, task))
                ]
                for number, place in enumerate(source.places)
            ]
        )
    found = {}
    for source, pieces in zip(chosen, compute(layers, budget), strict=True):
        rows = np.stack([np.concatenate(one) for one in pieces])
        dims = (*source.layer_dims, source.dim)
        values = rows if source.layer_dims else rows[0]
        found[f"{source.name}_norm"] = labelled(source, dims, values, source.about())
    return xr.Dataset(found)


def _norms(values: xr.Variable, keep: NDArray[np.bool_], step: int) -> Floats:
    """Give the norms of the rows of a piece of one layer."""
    found = np.full(keep.size, np.nan)
    with np.errstate(all="ignore"):
        for rows, block in blocks_of(values, keep, step):
            found[rows] = np.sqrt(row_squares(block))
    return found


def layer_change(
    dataset: xr.Dataset,
    variable: str = "resid",
    *,
    padding: bool = False,
    max_memory_gb: float = 1.0,
    workers: int = 2,
) -> xr.DataArray:
    """Give the cosine between each layer's rows and those of the layer before it.

    Parameters
    ----------
    dataset : xarray.Dataset
        As for `token_norms`.
    variable : str, optional
        Which: one with the dimension ``layer``.
    padding : bool, optional
        Whether padding has cosines.
    max_memory_gb : float, optional
        What may be held, in 10^9 bytes, besides the result.
    workers : int, optional
        Threads.

    Returns
    -------
    xarray.DataArray
        float64 (layer, token), labelled by the later layer of the two; NaN for padding, and where
        one of the two rows is missing, 0 or not finite.

    Raises
    ------
    ConfigError
        As for `token_norms`; or the variable has fewer than two layers.
    """
    budget = Budget(workers, max_memory_gb)
    source = source_of(dataset, variable, padding=padding)
    if len(source.places) < 2:
        msg = f"{variable!r} has dimensions {source.array.dims}, and no two layers to compare"
        raise ConfigError(msg)
    block, task = source.grid(budget)
    work = later(_changes)
    pieces = [
        work(part, Mask(source.keep[:, task * piece :][:, :task]), block)
        for piece, part in enumerate(source.parts(slice(None), task))
    ]
    values = np.concatenate(compute(pieces, budget), axis=1)
    labels = source.array.isel(layer=slice(1, None))
    found = labelled(source, ("layer", source.dim), values, source.about(), labels)
    return found.rename(f"{variable}_cosine")


def _changes(values: xr.Variable, keep: NDArray[np.bool_], step: int) -> Floats:
    """Give the cosines of the rows of a piece of all layers; two layers are held at once."""
    layers, count = keep.shape
    found = np.full((layers - 1, count), np.nan)
    with np.errstate(all="ignore"):
        for first in range(0, count, step):
            rows = slice(first, first + step)
            if not keep[:, rows].any():
                continue
            before = flat(values[0, rows])
            for place in range(1, layers):
                after = flat(values[place, rows])
                both = keep[place - 1, rows] & keep[place, rows]
                found[place - 1, rows] = np.where(both, cosines(before, after), np.nan)
                before = after
    return found


# -- what activates a feature -------------------------------------------------------------------


class _Top(NamedTuple):
    """The largest values of some features, [features, ranks], and their rows; -1 for none."""

    values: Floats
    rows: Integers


def top_activations(
    dataset: xr.Dataset,
    variable: str,
    features: int | Iterable[int],
    *,
    layer: int | None = None,
    k: int = 10,
    context: int = 8,
    max_memory_gb: float = 1.0,
    workers: int = 2,
) -> xr.Dataset:
    """Find the tokens on which features are largest, and what stands around them.

    Padding and NaNs are left out. Of equal values the earlier row comes first.

    Parameters
    ----------
    dataset : xarray.Dataset
        As `actstore.open_dataset` or `xarray.open_zarr` gave it, or chosen from that.
    variable : str
        Which: one with a single dimension behind the token axis.
    features : int or iterable of int
        Labels on that dimension where it has any, as that of a sampled capture; else places.
    layer : int, optional
        Which layer, by its label, if the variable has the dimension ``layer``.
    k : int, optional
        How many tokens of each feature; fewer if there are fewer rows.
    context : int, optional
        How many tokens before and behind are told.
    max_memory_gb : float, optional
        What may be held, in 10^9 bytes.
    workers : int, optional
        Threads.

    Returns
    -------
    xarray.Dataset
        ``value`` and ``row``, the place on the token axis, for each feature and ``rank`` (from 0);
        the row's labels (``token_text``, ``position``, ``pass_index``, …); and along ``offset``,
        from ``-context`` to ``context``, ``context_text``, ``context_id`` and ``context_row`` of
        the tokens around it: rows of the dataset of the same batch item whose positions follow
        each other, through the passes of a cached generation. Where there is none, text is empty,
        an integer −1, and a value NaN.

    Raises
    ------
    ConfigError
        As for `token_norms`; or there is no such feature or layer.
    """
    check_count("k", k)
    check_count("context", context, 0)
    budget = Budget(workers, max_memory_gb)
    source = source_of(dataset, variable)
    number = _layer_of(source, layer)
    places, labels = _places_of(source, features)
    block, task = source.grid(budget)
    keep = source.keep[number]
    ranks = min(k, max(int(keep.sum()), 1))
    work = later(partial(_top, columns=places, ranks=ranks))
    parts = (
        work(part, Mask(keep[task * piece :][:task]), block, task * piece)
        for piece, part in enumerate(source.parts(source.places[number], task))
    )
    top: _Top = compute(reduced(parts, _merge_top), budget)
    found = _around(token_axes(dataset)[source.dim], top, context, str(source.trailing[0]))
    about = source.about() | {"variable": variable}
    if source.layer_dims:
        about["layer"] = source.array["layer"].values[number].item()
    return found.assign_coords({source.trailing[0]: labels}).assign_attrs(about)


def _layer_of(source: Source, layer: Any) -> int:
    """Give the place of a layer among those of a source."""
    if not source.layer_dims:
        if layer is not None:
            msg = f"{source.name!r} has no dimension 'layer'; leave layer out, not {layer!r}"
            raise ConfigError(msg)
        return 0
    there = np.asarray(source.array["layer"].values).tolist()
    if isinstance(layer, bool) or layer not in there:
        msg = f"{source.name!r} has the layers {there}; say which with layer=, not {layer!r}"
        raise ConfigError(msg)
    return int(there.index(layer))


def _places_of(source: Source, features: Any) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """Give the places of features, and their labels."""
    if len(source.trailing) != 1:
        msg = f"{source.name!r} has dimensions {source.array.dims}: no one of them is features"
        raise ConfigError(msg)
    (dim,) = source.trailing
    labels = source.array[dim].values if dim in source.array.coords else np.arange(source.width)
    try:
        wanted = np.atleast_1d(np.asarray(features))
    except ValueError:
        wanted = np.zeros(0)
    where = {one: place for place, one in reversed(list(enumerate(labels.tolist())))}
    odd = [one for one in wanted.ravel().tolist() if one not in where]
    if wanted.ndim != 1 or not wanted.size or wanted.dtype.kind not in "iu" or odd:
        msg = (
            f"features must be integers from {labels.min()} to {labels.max()}, labels of {dim!r}; "
            f"got {features!r}"
        )
        raise ConfigError(msg)
    places = np.array([where[one] for one in wanted.tolist()], np.intp)
    return places, labels[places]


def _top(
    values: xr.Variable,
    keep: NDArray[np.bool_],
    step: int,
    first: int,
    *,
    columns: NDArray[np.intp],
    ranks: int,
) -> _Top:
    """Give the largest values of some columns of a piece of one layer, which begins at a row."""
    shape = (columns.size, ranks)
    found = _Top(np.full(shape, np.nan), np.full(shape, -1, np.int64))
    for rows, block in blocks_of(values, keep, step):
        mine = block[:, columns].T.astype(np.float64)
        numbers = np.broadcast_to(rows + first, mine.shape)
        found = _merge_top([found, _Top(mine, np.where(np.isnan(mine), -1, numbers))], ranks)
    return found


def _merge_top(parts: list[_Top], ranks: int | None = None) -> _Top:
    """Give the largest of all; of equal ones the earlier. Parts come in the order of rows."""
    values = np.concatenate([one.values for one in parts], axis=1)
    rows = np.concatenate([one.rows for one in parts], axis=1)
    order = np.lexsort((rows, -values, rows < 0), axis=1)[:, : ranks or parts[0].rows.shape[1]]
    return _Top(*(np.take_along_axis(one, order, axis=1) for one in (values, rows)))


def _around(axis: TokenAxis, top: _Top, context: int, dim: str) -> xr.Dataset:
    """Give what is known of the rows that were found, and of those around them."""
    offsets = np.arange(-context, context + 1)
    rows = _neighbours(axis, top.rows, offsets)
    values = np.where(top.rows < 0, np.nan, top.values)
    variables: dict[str, Any] = {
        "value": ((dim, "rank"), values),
        "row": ((dim, "rank"), top.rows),
    }
    for name in axis.names:
        label = name.removeprefix(axis.prefix)
        if label not in variables:
            variables[label] = ((dim, "rank"), _at(axis, name, top.rows))
    dims = (dim, "rank", "offset")
    for name, label in (("context_text", "token_text"), ("context_id", "token_id")):
        if label in axis:
            variables[name] = (dims, _at(axis, label, rows))
    variables["context_row"] = (dims, rows)
    ranks = np.arange(top.rows.shape[1])
    return xr.Dataset(variables, {"rank": ranks, "offset": offsets})


def _at(axis: TokenAxis, label: str, rows: Integers) -> NDArray[Any]:
    """Give a label of rows; of row -1, what says that there is none."""
    column = axis.label(label).to_numpy()
    none: Any = {"i": -1, "u": 0, "b": False, "f": np.nan}.get(column.dtype.kind, "")
    if not column.size:
        return np.full(rows.shape, none, column.dtype)
    return np.asarray(np.where(rows < 0, none, column[rows]), column.dtype)


def _neighbours(axis: TokenAxis, rows: Integers, offsets: Integers) -> Integers:
    """Give the rows at offsets from others in their sequences: [*rows.shape, offsets].

    A sequence is rows of one batch item of one log, that are not padding, in the order of passes,
    as long as their positions follow each other.
    """
    columns = ["batch_item", "pass_index", "position"]
    table = {one: axis.label(one).to_numpy() for one in columns}
    run = axis.label("run").to_numpy() if axis.run else np.zeros(axis.rows, np.int64)
    real = ~axis.label("is_padding").to_numpy().astype(np.bool_)
    order = np.lexsort((axis.source, table["pass_index"], table["batch_item"], run))
    order = order[real[order]]
    same = np.ones(max(order.size - 1, 0), np.bool_)
    for column in (run, table["batch_item"]):
        same &= np.diff(column[order]) == 0
    same &= np.diff(table["position"][order]) == 1
    sequence = np.cumsum(np.r_[0, ~same]) if order.size else np.zeros(0, np.int64)
    place = np.full(axis.rows + 1, -1)
    place[order] = np.arange(order.size)
    here = place[rows][..., np.newaxis]
    there = here + offsets
    inside = (here >= 0) & (there >= 0) & (there < order.size)
    there = np.where(inside, there, 0)
    if not order.size:
        return np.full(there.shape, -1, np.int64)
    inside &= sequence[there] == sequence[here]
    return np.where(inside, order[there], -1)
