"""Owns what is told of features together: their covariance, and its principal components."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.analysis.engine import Budget, Mask, compute, later
from actstore.analysis.source import Source, blocks_of, labelled, source_of
from actstore.arguments import check_count, enough_gb
from actstore.errors import ConfigError

__all__ = ["covariance", "pca"]

Floats = NDArray[np.float64]
_SQUARES: Final = 5  # of width × width float64: the sum, a block's, and what merging them makes
_SOLVED: Final = 8  # with what finding eigenvectors takes
#: Products of float32 numbers whose squares have these sums are normal numbers, or don't matter.
_LARGEST, _SMALLEST = 2.0**100, 2.0**-80


@dataclass(frozen=True, slots=True, eq=False)
class _Spread:
    """How rows are spread: their count, their mean, and their covariance [width, width]."""

    count: int
    mean: Floats
    covariance: Floats


@dataclass(frozen=True, slots=True, eq=False)
class _Axes:
    """The principal components of rows [components, width], and the variance along each."""

    count: int
    mean: Floats
    components: Floats
    variances: Floats
    total: float


def covariance(
    dataset: xr.Dataset,
    variable: str,
    *,
    padding: bool = False,
    max_memory_gb: float = 1.0,
    workers: int = 2,
) -> xr.DataArray:
    """Give the covariance of features, for each layer, in one pass over the values.

    Choose layers by ``dataset.sel(layer=[...])``: the result has width² values for each.

    Parameters
    ----------
    dataset : xarray.Dataset
        As `actstore.open_dataset` or `xarray.open_zarr` gave it, or chosen from that.
    variable : str
        Which: one with a single dimension behind the token axis.
    padding : bool, optional
        Whether padding counts.
    max_memory_gb : float, optional
        What may be held, in 10^9 bytes, the result included. If it isn't enough for all workers,
        fewer are used.
    workers : int, optional
        Layers at once; the linear algebra has threads of its own.

    Returns
    -------
    xarray.DataArray
        float64 (layer, feature, feature_other), divided by the count of rows; NaN of none. Rows
        that hold a NaN or an infinity are left out: ``nonfinite_left_out`` says how many.

    Raises
    ------
    ConfigError
        As for `actstore.analysis.statistics`; the variable has not one dimension of features; or
        width² values don't fit in the memory: the message says how much is needed.
    """
    source = source_of(dataset, variable, padding=padding)
    dim = _feature(source)
    results = len(source.places) * source.width**2 * 8
    budget = _fitting(source, Budget(workers, max_memory_gb), _SQUARES, results)
    spreads: list[_Spread] = _over_layers(source, budget, None)
    dims = (*source.layer_dims, dim, f"{dim}_other")
    values = np.stack([one.covariance for one in spreads])
    about = _about(source, [one.count for one in spreads])
    found = labelled(source, dims, values if source.layer_dims else values[0], about)
    if dim in found.coords:
        found = found.assign_coords({f"{dim}_other": found[dim].values})
    return found.rename(f"{variable}_covariance")


def pca(
    dataset: xr.Dataset,
    variable: str,
    *,
    components: int = 16,
    padding: bool = False,
    max_memory_gb: float = 1.0,
    workers: int = 2,
) -> xr.Dataset:
    """Find the directions along which rows vary most, for each layer, in one pass.

    Parameters
    ----------
    dataset : xarray.Dataset
        As for `covariance`.
    variable : str
        Which.
    components : int, optional
        How many directions; at most as many as there are features.
    padding : bool, optional
        Whether padding counts.
    max_memory_gb : float, optional
        What may be held, in 10^9 bytes. If it isn't enough for all workers, fewer are used.
    workers : int, optional
        Layers at once.

    Returns
    -------
    xarray.Dataset
        Of variable ``v``: ``v_component`` (layer, component, feature), of length 1, the entry of
        largest magnitude positive; ``v_explained_variance`` (layer, component), divided by the
        count of rows, and ``v_explained_variance_ratio``, of the variance of all features;
        ``v_mean`` (layer, feature). NaN of no rows.

    Raises
    ------
    ConfigError
        As for `covariance`.
    """
    check_count("components", components)
    source = source_of(dataset, variable, padding=padding)
    dim = _feature(source)
    results = len(source.places) * source.width * (components + 2) * 8
    budget = _fitting(source, Budget(workers, max_memory_gb), _SOLVED, results)
    found: list[_Axes] = _over_layers(source, budget, components)
    layer, about = source.layer_dims, _about(source, [one.count for one in found])

    def array(dims: tuple[Any, ...], values: list[Any]) -> xr.DataArray:
        stacked = np.stack(values)
        return labelled(source, (*layer, *dims), stacked if layer else stacked[0], about)

    with np.errstate(all="ignore"):
        ratios = [one.variances / np.float64(one.total) for one in found]
    arrays = {
        "component": array(("component", dim), [one.components for one in found]),
        "explained_variance": array(("component",), [one.variances for one in found]),
        "explained_variance_ratio": array(("component",), ratios),
        "mean": array((dim,), [one.mean for one in found]),
    }
    named = xr.Dataset({f"{variable}_{name}": one for name, one in arrays.items()})
    return named.assign_coords(component=np.arange(named.sizes["component"]))


def _feature(source: Source) -> str:
    if len(source.trailing) != 1:
        msg = f"{source.name!r} has dimensions {source.array.dims}: no one of them is features"
        raise ConfigError(msg)
    return str(source.trailing[0])


def _fitting(source: Source, budget: Budget, squares: int, results: int) -> Budget:
    """Give the budget with as many workers as fit."""
    each = squares * source.width**2 * 8
    total = int(budget.gigabytes * 1e9)
    if results + 1.25 * each > total:
        layers = len(source.places)
        msg = (
            f"max_memory_gb={budget.gigabytes!r} is too little: {source.name!r} has "
            f"{source.width} features, {layers} layers; that many squared take "
            f"{enough_gb(results + 1.25 * each)} GB: give that much, or choose fewer layers with "
            "dataset.sel(layer=[...])"
        )
        raise ConfigError(msg)
    left = int((total - results) // (1.25 * each)) if each else budget.workers
    return replace(budget, workers=max(min(left, budget.workers), 1))


def _about(source: Source, counts: list[int]) -> dict[str, Any]:
    looked = int(source.keep.sum())
    return source.about() | {"nonfinite_left_out": looked - sum(counts)}


def _over_layers(source: Source, budget: Budget, components: int | None) -> list[Any]:
    """Go over each layer in one task, since what it holds is larger than what it reads."""
    block, task = source.grid(budget, rows=2 * source.width)
    work, finish = later(_summed), later(_spread if components is None else _components)
    layers = []
    for number, place in enumerate(source.places):
        sums = None
        for piece, part in enumerate(source.parts(place, task)):
            mask = Mask(source.keep[number, task * piece :][:task])
            sums = work(sums, part, mask, block)
        layers.append(finish(sums, *(() if components is None else (components,))))
    found: list[Any] = compute(layers, budget)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """What is kept of blocks of rows, each about a shift c near its mean.

    Of a block with n rows, s = Σ(x-c) and G = Σ(x-c)(x-c)ᵀ, the part of the covariance about a
    mean m is G - ssᵀ/n + n(c+s/n-m)(c+s/n-m)ᵀ. The sum of all G is kept, and of each block n,
    c+s/n and s/√n: the outer products are summed at the end, as two products of matrices.
    """

    products: Floats
    counts: tuple[int, ...]
    means: tuple[Floats, ...]
    rests: tuple[Floats, ...]


def _summed(
    before: _Sums | None, values: xr.Variable, keep: NDArray[np.bool_], step: int
) -> _Sums:
    """Add the rows of a piece of a layer to what is kept of those before it."""
    width = int(np.prod(values.shape[1:], dtype=np.int64))
    before = before or _Sums(np.zeros((width, width)), (), (), ())
    total = before.products.copy()
    counts, means, rests = list(before.counts), list(before.means), list(before.rests)
    with np.errstate(all="ignore"):
        for _, rows in blocks_of(values, keep, step):
            block = rows if rows.dtype.kind == "f" else rows.astype(np.float64)
            shift = np.asarray(block.mean(axis=0, dtype=np.float64), block.dtype)
            apart = block - shift
            products = _products(apart)
            if products is None:
                block = block[np.isfinite(block).all(axis=1)].astype(np.float64)
                if not len(block):
                    continue
                shift = block.mean(axis=0)
                apart = block - shift
                products = apart.T @ apart
            total += products
            rest = apart.sum(axis=0, dtype=np.float64)
            counts.append(len(apart))
            means.append(shift + rest / len(apart))
            rests.append(rest / np.sqrt(len(apart)))
    return _Sums(total, tuple(counts), tuple(means), tuple(rests))


def _spread(sums: _Sums) -> _Spread:
    """Give the covariance of all rows."""
    width = len(sums.products)
    if not sums.counts:
        return _Spread(0, np.full(width, np.nan), np.full((width, width), np.nan))
    weights, means = np.array(sums.counts, np.float64), np.array(sums.means)
    mean = means[0] + weights @ (means - means[0]) / weights.sum()
    between = (means - mean) * np.sqrt(weights)[:, np.newaxis]
    within = np.array(sums.rests)
    total = sums.products + between.T @ between
    total -= within.T @ within
    total /= weights.sum()
    return _Spread(sum(sums.counts), mean, total)


def _components(sums: _Sums, components: int) -> _Axes:
    return _axes(_spread(sums), components)


def _products(apart: NDArray[Any]) -> NDArray[Any] | None:
    """Give the products of features, or None where their dtype can't, or rows are odd."""
    found: NDArray[Any] = apart.T @ apart
    diagonal = found.diagonal()
    if apart.dtype == np.float64:
        return found if np.isfinite(diagonal).all() else None
    fine = (diagonal < _LARGEST) & ((diagonal > _SMALLEST) | (diagonal == 0))
    return found if fine.all() and not _vanished(apart, diagonal) else None


def _vanished(apart: NDArray[Any], diagonal: NDArray[Any]) -> bool:
    """Tell whether a square is 0 since it is too small to be told."""
    return bool(apart[:, diagonal == 0].any())


def _axes(spread: _Spread, components: int) -> _Axes:
    """Find the principal components of a covariance; ties and signs don't go by chance."""
    width = spread.mean.size
    kept = min(components, width)
    if not spread.count:
        shape = (kept, width)
        return _Axes(0, spread.mean, np.full(shape, np.nan), np.full(kept, np.nan), np.nan)
    variances, vectors = np.linalg.eigh(spread.covariance)
    chosen = vectors[:, ::-1][:, :kept].T
    largest = np.take_along_axis(chosen, np.abs(chosen).argmax(axis=1)[:, np.newaxis], axis=1)
    chosen = chosen * np.where(largest < 0, -1, 1)
    total = float(spread.covariance.trace())
    return _Axes(spread.count, spread.mean, chosen, np.maximum(variances[::-1][:kept], 0), total)
