"""Owns what is told of each feature and layer: moments, extremes, quantiles, norms, outliers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.analysis import sketch
from actstore.analysis.engine import Budget, Mask, compute, later, reduced
from actstore.analysis.moments import State, merge_states, state_of
from actstore.analysis.source import Source, labelled, source_of, sources
from actstore.errors import ConfigError

__all__ = ["outlier_features", "statistics"]

#: LLM.int8() (Dettmers et al., 2022, arXiv:2208.07339): a feature is an outlier whose magnitude
#: is at least 6 in at least 6 % of the tokens, in at least 25 % of the layers.
_MAGNITUDE: Final = 6.0
_TOKENS: Final = 0.06
_LAYERS: Final = 0.25
_SAMPLE: Final = 1 << 22
_QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def statistics(
    dataset: xr.Dataset,
    variables: str | Iterable[str] | None = None,
    *,
    quantiles: Sequence[float] = _QUANTILES,
    sample: int | None = _SAMPLE,
    padding: bool = False,
    max_memory_gb: float = 1.0,
    workers: int = 2,
) -> xr.Dataset:
    """Summarise every feature of every layer, in one pass over the values.

    NaNs and infinities are counted and otherwise left out; so are rows that are padding, or
    missing. float16 is worked on as float32, which has its values; float64, integers and booleans
    (only if they are named) as float64.

    Parameters
    ----------
    dataset : xarray.Dataset
        As `actstore.open_dataset` or `xarray.open_zarr` gave it, or chosen from that.
    variables : str or iterable of str, optional
        Which; all floating ones with a token axis, if it isn't given.
    quantiles : sequence of float, optional
        Which quantiles, from 0 to 1; () leaves them out.
    sample : int, optional
        How many values of a layer the quantiles are of, at least: every so manieth, the same
        number of each row and feature. None: of all, which takes a third longer.
    padding : bool, optional
        Whether padding counts.
    max_memory_gb : float, optional
        What may be held, in 10^9 bytes.
    workers : int, optional
        Threads.

    Returns
    -------
    xarray.Dataset
        Of each variable ``v``, for each layer and feature: ``v_count`` of finite values and
        ``v_nonfinite`` of others; ``v_mean``, ``v_variance`` (of the population: divided by the
        count), ``v_rms``, ``v_kurtosis`` (the fourth standardised moment: 3 of a normal
        distribution, NaN of a constant), ``v_minimum``, ``v_maximum``; ``v_sparsity``, the share
        of exact zeros. For each layer: ``v_norm_mean`` and ``v_norm_max`` of the L2 norms of its
        rows, and ``v_quantile`` along ``quantile``, of all of its values: within 2^-8, relatively,
        of ``numpy.quantile(..., method="inverted_cdf")`` of the sample, for magnitudes from 2^-126
        to 3.4e38; the attribute ``every`` says that it is of every so manieth value (1: of all).
        The rank of a quantile of as many values drawn at random is off by 0.024 % (a standard
        deviation), or less.
        NaN where there is nothing. The attributes say how many rows were looked at, and left out.

    Raises
    ------
    ConfigError
        An option is none, a variable isn't there, or what must be read at once doesn't fit.
    """
    wanted = _checked(quantiles)
    if sample is not None and (
        isinstance(sample, bool) or not isinstance(sample, int) or sample < 1
    ):
        msg = f"sample must be a positive int, or None for all values; got {sample!r}"
        raise ConfigError(msg)
    budget = Budget(workers, max_memory_gb)
    chosen = sources(dataset, variables, padding=padding)
    every = [_every(source, sample) if wanted.size else 0 for source in chosen]
    states = _states(chosen, budget, every)
    found: dict[Hashable, xr.DataArray] = {}
    for source, layers, stride in zip(chosen, states, every, strict=True):
        found |= _described(source, layers, wanted, stride)
    return xr.Dataset(found)


def outlier_features(
    dataset: xr.Dataset,
    variable: str,
    *,
    factor: float = 6.0,
    threshold: float = _MAGNITUDE,
    padding: bool = False,
    max_memory_gb: float = 1.0,
    workers: int = 2,
) -> xr.Dataset:
    """Tell which features are far larger than the others of their layer.

    Parameters
    ----------
    dataset : xarray.Dataset
        As for `statistics`.
    variable : str
        Which.
    factor : float, optional
        How many times the median rms of the layer's features an outlier's is over.
    threshold : float, optional
        From what magnitude on a value is large.
    padding : bool, optional
        Whether padding counts.
    max_memory_gb : float, optional
        What may be held, in 10^9 bytes.
    workers : int, optional
        Threads.

    Returns
    -------
    xarray.Dataset
        Of variable ``v``, for each layer and feature: ``v_rms``; ``v_rms_ratio``, divided by the
        median of the layer; ``v_outlier``, whether that is over ``factor``; ``v_large``, the share
        of the rows where its magnitude is at least ``threshold``. For each feature,
        ``v_llm_int8``: whether that share is at least 6 % in at least 25 % of the layers, the
        criterion of LLM.int8() (Dettmers et al., 2022, arXiv:2208.07339) with its threshold of 6.

    Raises
    ------
    ConfigError
        As for `statistics`.
    """
    for name, value in (("factor", factor), ("threshold", threshold)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            msg = f"{name} must be a positive number; got {value!r}"
            raise ConfigError(msg)
    budget = Budget(workers, max_memory_gb)
    source = source_of(dataset, variable, padding=padding)
    (states,) = _states([source], budget, [0], float(threshold))
    count, large = (np.stack([getattr(s.moments, n) for s in states]) for n in ("count", "large"))
    with np.errstate(all="ignore"):
        rms = np.stack([_rms(one) for one in states])
        share = large / np.where(count, count, np.nan)
        seen = rms[:, ~np.isnan(rms).all(axis=0)]
        median = np.median(seen, axis=1, keepdims=True) if seen.size else np.nan
        ratio = rms / median
    often = (share >= _TOKENS).mean(axis=0) >= _LAYERS
    about = source.about()
    criterion = {"threshold": float(threshold), "share_of_rows": _TOKENS}
    features = _features(source)
    arrays = {
        "rms": (rms, about),
        "rms_ratio": (ratio, about),
        "outlier": (ratio > factor, about | {"factor": float(factor)}),
        "large": (share, about | {"threshold": float(threshold)}),
    }
    found = {name: features(name, values, extra) for name, (values, extra) in arrays.items()}
    shape = [source.variable.sizes[dim] for dim in source.trailing]
    found["llm_int8"] = labelled(
        source,
        source.trailing,
        often.reshape(shape),
        about | criterion | {"share_of_layers": _LAYERS},
    )
    return xr.Dataset({f"{source.name}_{name}": array for name, array in found.items()})


def _checked(quantiles: Sequence[float]) -> NDArray[np.float64]:
    try:
        wanted = np.asarray(quantiles, np.float64)
    except (TypeError, ValueError):
        wanted = np.full(1, np.nan)
    if wanted.ndim != 1 or not ((wanted >= 0) & (wanted <= 1)).all():
        msg = f"quantiles must be numbers from 0 to 1, such as (0.05, 0.95); got {quantiles!r}"
        raise ConfigError(msg)
    return wanted


def _every(source: Source, sample: int | None) -> int:
    """Give the stride of the values that quantiles are of, which goes by the fullest layer."""
    values = int(source.keep.sum(axis=1).max(initial=0)) * source.width
    return 1 if sample is None else sketch.every(values, source.width, sample)


def _states(
    chosen: list[Source],
    budget: Budget,
    every: list[int],
    threshold: float = np.inf,
) -> list[list[State]]:
    """Go over the rows once, and give the state of each layer of each variable."""
    trees = []
    for source, stride in zip(chosen, every, strict=True):
        work = later(partial(state_of, every=stride, threshold=threshold))
        block, task = source.grid(budget)
        layers = []
        for number, place in enumerate(source.places):
            keep = source.keep[number]
            parts = (
                work(part, Mask(keep[task * piece :][:task]), block)
                for piece, part in enumerate(source.parts(place, task))
            )
            layers.append(reduced(parts, merge_states))
        trees.append(layers)
    found: list[list[State]] = compute(trees, budget)
    return found


def _described(
    source: Source, states: list[State], wanted: NDArray[np.float64], every: int
) -> dict[Hashable, xr.DataArray]:
    """Give the arrays of one variable."""
    about = source.about()
    features = _features(source)
    columns = [_columns(one) for one in states]
    found = {name: features(name, np.stack([one[name] for one in columns]), about)
             for name in (columns[0] if columns else ())}  # fmt: skip
    with np.errstate(all="ignore"):
        means = np.array([one.norms.total / np.float64(one.norms.count) for one in states])
    most = np.array([one.norms.largest if one.norms.count else np.nan for one in states])
    dims = source.layer_dims
    for name, values in (("norm_mean", means), ("norm_max", most)):
        found[name] = labelled(source, dims, values if dims else values[0], about)
    if wanted.size:
        rows = np.stack([_quantiles(one, wanted) for one in states])
        array = labelled(source, (*dims, "quantile"), rows if dims else rows[0], about)
        found["quantile"] = array.assign_coords(quantile=wanted)
        found["quantile"].attrs |= {"relative_error": 2.0**-8, "every": every}
    return {f"{source.name}_{name}": array for name, array in found.items()}


def _features(source: Source) -> Any:
    """Give what labels values of [layers, width]."""
    dims = (*source.layer_dims, *source.trailing)
    shape = [source.variable.sizes[dim] for dim in dims]

    def array(_: str, values: NDArray[Any], about: dict[str, Any]) -> xr.DataArray:
        return labelled(source, dims, values.reshape(shape), about)

    return array


def _columns(state: State) -> dict[str, NDArray[Any]]:
    """Give what is told of each feature."""
    moments = state.moments
    there = moments.count > 0
    total = np.where(there, moments.count, 1)
    empty = np.where(there, 0.0, np.nan)
    with np.errstate(all="ignore"):
        fourth, square = moments.fourth / total, (moments.second / total) ** 2
        kurtosis = np.where(moments.second > 0, fourth / square, np.nan)
    return {
        "count": moments.count,
        "nonfinite": moments.nonfinite,
        "mean": moments.mean + empty,
        "variance": moments.second / total + empty,
        "rms": _rms(state),
        "kurtosis": kurtosis,
        "minimum": np.where(there, moments.minimum, np.nan),
        "maximum": np.where(there, moments.maximum, np.nan),
        "sparsity": moments.zeros / total + empty,
    }


def _rms(state: State) -> NDArray[np.float64]:
    moments = state.moments
    total = np.maximum(moments.count, 1)
    rms = np.sqrt(moments.second / total + moments.mean**2)
    return np.where(moments.count > 0, rms, np.nan)


def _quantiles(state: State, wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    moments = state.moments
    low, high = moments.minimum.min(initial=np.inf), moments.maximum.max(initial=-np.inf)
    return sketch.quantiles(state.histogram, wanted, float(low), float(high))
