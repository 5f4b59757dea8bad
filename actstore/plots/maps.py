"""Owns maps of layers × tokens, of layers × layers, and of what tokens attend to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore import analysis
from actstore.analysis.source import blocks_of, source_of
from actstore.errors import ConfigError
from actstore.plots.chosen import Shown, chosen_rows, layer_names, sampled
from actstore.plots.style import (
    INK,
    SEQUENTIAL,
    SMALL,
    blank,
    drawn,
    hatched,
    needs_matplotlib,
    note,
    scale_bar,
    ticks_of_layers,
)

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

__all__ = ["draw_map", "layer_change", "layer_correlation", "norm_map", "root_scale"]

_PITCH: Final = 0.094  # inches a token takes: 6 pt letters, upright, and a gap
_SIDES: Final = 1.15  # inches beside the cells: names of layers, the scale
_WIDE: Final = 8.0  # the largest over the median, from which on a scale is logarithmic
_LOG: Final = " (log scale)"
_WRITTEN: Final = 12  # layers whose correlations are written as numbers

Floats = NDArray[np.float64]


@needs_matplotlib
def norm_map(
    dataset: xr.Dataset,
    variable: str = "resid",
    *,
    rows: slice | None = None,
    pass_index: int | None = None,
    item: int | None = None,
    width: float = 7.0,
) -> Figure:
    """Draw the L2 norm of each row of each layer, below it the token.

    The scale is logarithmic where the largest norm is over 8 times the median, as that of a
    first token often is. What has no value (missing rows, NaNs) is hatched.

    Parameters
    ----------
    dataset : xarray.Dataset
        As `actstore.open_dataset` gave it, or chosen from that.
    variable : str, optional
        Which.
    rows : slice, optional
        These rows of the dataset, at most 400.
    pass_index, item : int, optional
        Of a pass's or a batch item's rows the first 200. If nothing is told: the first sequence,
        which is all rows of the first batch item whose positions follow each other, or, where
        that is a single row, all rows; of these the first 200.
    width : float, optional
        Inches: 3.4 is a column of a paper, 7 two. Tokens that don't fit go below, in a further
        panel.

    Returns
    -------
    matplotlib.figure.Figure
        Not registered with pyplot; ``savefig`` writes text as text into PDF and SVG.

    Raises
    ------
    ConfigError
        There is no such variable, or there are no such rows; matplotlib is missing.
    """
    shown = chosen_rows(dataset, variable, rows, pass_index, item)
    if not shown.count:
        return blank(width, "no rows to show", shown.about)
    norms = analysis.token_norms(shown.dataset, variable, padding=True)[f"{variable}_norm"]
    values = np.atleast_2d(norms.values)
    return draw_map(values, layer_names(dataset, variable), shown, f"L2 norm of {variable}", width)


@needs_matplotlib
def layer_change(
    dataset: xr.Dataset,
    variable: str = "resid",
    *,
    rows: slice | None = None,
    pass_index: int | None = None,
    item: int | None = None,
    width: float = 7.0,
) -> Figure:
    """Draw how far each layer turns each row from the layer before it: 1 − cosine, from 0 to 2.

    Parameters, result and errors are as for `norm_map`; a variable of fewer than two layers raises
    `ConfigError` too.
    """
    shown = chosen_rows(dataset, variable, rows, pass_index, item)
    if not shown.count:
        return blank(width, "no rows to show", shown.about)
    found = analysis.layer_change(shown.dataset, variable, padding=True)
    names = layer_names(shown.dataset, variable)
    pairs = [f"{before}→{after}" for before, after in pairwise(names)]
    values = np.maximum(1 - found.values, 0)
    return draw_map(values, pairs, shown, f"change of {variable}: 1 − cosine", width, zero=True)


def draw_map(
    values: Floats,
    names: Sequence[str],
    shown: Shown,
    what: str,
    width: float,
    *,
    zero: bool = False,
    root: bool = False,
    side: str = "layer",
) -> Figure:
    """Draw values [layers, tokens] in as many panels as their tokens need."""
    scale, said = (
        (root_scale(values), " (square-root scale)") if root else _scale(values, zero=zero)
    )
    fit = max(int((width - _SIDES) / _PITCH), 8)
    panels = max(-(-shown.count // fit), 1)
    most = -(-shown.count // panels)
    height = float(np.clip(0.085 * len(values), 0.5, 1.9)) + 0.72
    empty = not np.isfinite(values).all()
    about = shown.about + ("; hatched: no value" if empty else "")
    with drawn(width, max(height * panels + 0.3, 1.3)) as figure:
        grid = figure.subplots(panels, 1, squeeze=False)[:, 0]
        image = None
        for panel, axes in enumerate(grid):
            part = slice(panel * most, min((panel + 1) * most, shown.count))
            mine = np.ma.masked_invalid(values[:, part])
            if said == _LOG:  # 0 has no logarithm, and is less than all others
                mine = np.ma.maximum(mine, scale.vmin or 0.0)
            hatched(axes)
            image = axes.imshow(
                mine,
                aspect="auto",
                origin="lower",
                cmap=SEQUENTIAL,
                norm=scale,
                interpolation="nearest",
                extent=(part.start - 0.5, part.stop - 0.5, -0.5, len(values) - 0.5),
            )
            axes.set_xlim(part.start - 0.5, part.start + most - 0.5)
            axes.set_xticks(range(part.start, part.stop), shown.texts[part], rotation=90)
            axes.tick_params(axis="x", length=0, pad=1.5)
            ticks_of_layers(axes, names)
            _separate(axes, shown, part)
            if part.stop - part.start < most:  # what is beside the last panel is nothing
                axes.fill_between(
                    (part.stop - 0.5, part.start + most - 0.5),
                    -0.5,
                    len(values) - 0.5,
                    facecolor="white",
                    linewidth=0,
                )
                axes.spines[["top", "right", "bottom"]].set_visible(False)
            axes.set_ylabel(side if len(names) > 1 else "")
        end = "max" if root else "neither"
        scale_bar(figure, image, list(grid), what + said, extend=end)
        note(figure, about)
        return figure


def root_scale(values: Floats) -> Normalize:
    """Give a scale by the square root, from 0 to what 99 % of all above 0 stay below."""
    from matplotlib.colors import PowerNorm

    above = values[np.isfinite(values) & (values > 0)]
    return PowerNorm(0.5, 0.0, float(np.quantile(above, 0.99)) if above.size else 1.0)


def _scale(values: Floats, *, zero: bool) -> tuple[Normalize, str]:
    """Give a scale for values: from the least or 0 on, or of logarithms."""
    from matplotlib.colors import LogNorm, Normalize

    there = values[np.isfinite(values)]
    if not there.size:
        return Normalize(0, 1), " (no values)"
    low, high = float(there.min()), float(there.max())
    above = there[there > 0]
    if not zero and above.size and high > _WIDE * float(np.median(above)):
        return LogNorm(float(above.min()), high), _LOG
    low = 0.0 if zero or low > 0.0 == high else low
    if high <= low:
        return Normalize(low, low + max(abs(low) * 0.01, 1e-12)), f" (all {low:.4g})"
    return Normalize(low, high), ""


def _separate(axes: Any, shown: Shown, part: slice) -> None:
    """Draw lines where one sequence ends, and a dashed one where generation begins."""
    ends = shown.ends[(shown.ends >= part.start) & (shown.ends < part.stop - 1)] + 0.5
    if 3 * shown.ends.size <= shown.count:  # else each token stands by itself
        for color, wide in (("white", 2.4), ("black", 0.8)):
            across = axes.get_xaxis_transform()
            axes.vlines(ends, 0, 1, color=color, linewidth=wide, transform=across)
    if shown.generated is not None and part.start < shown.generated < part.stop:
        at = shown.generated - 0.5
        axes.axvline(at, color="white", linewidth=1.8)
        axes.axvline(at, color="black", linewidth=0.8, linestyle=(0, (3, 2)))
        axes.annotate(
            "generated →",
            (at, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(2, 1.5),
            textcoords="offset points",
            fontsize=SMALL,
            color=INK,
        )


@needs_matplotlib
def layer_correlation(
    dataset: xr.Dataset,
    variable: str = "resid",
    *,
    sample: int | None = None,
    width: float = 3.4,
) -> Figure:
    """Draw how far layers hold the same: the correlation of their values, over rows and features.

    Of each layer the mean of each feature is taken off; then each pair of layers has the cosine
    of all that is left, from −1 to 1. Only rows that every layer has, finite, are counted.

    Parameters
    ----------
    dataset : xarray.Dataset
        As for `norm_map`.
    variable : str, optional
        Which: one with two layers or more.
    sample : int, optional
        How many rows it is computed from, spread evenly; 20,000 if it isn't given, or as many as
        have 128 MiB.
    width : float, optional
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        As `norm_map` gives it.

    Raises
    ------
    ConfigError
        As for `norm_map`; or the variable has fewer than two layers.
    """
    mine, about = sampled(dataset, variable, sample)
    names = layer_names(mine, variable)
    if len(names) < 2:
        msg = f"{variable!r} has dimensions {mine[variable].dims}, and no two layers to compare"
        raise ConfigError(msg)
    found, count = _correlations(mine, variable)
    if not count:
        return blank(width, "no rows that every layer has", about)
    about += f"; {count:,} in every layer" if not about.startswith(f"all {count:,}") else ""
    start = 0.0 if np.nanmin(found, initial=1.0) >= 0 else -1.0
    with drawn(width, width * 0.86) as figure:
        axes = figure.add_subplot()
        hatched(axes)
        image = axes.imshow(
            np.ma.masked_invalid(found),
            cmap=SEQUENTIAL,
            vmin=start,
            vmax=1.0,
            origin="lower",
            interpolation="nearest",
        )
        ticks_of_layers(axes, names)
        ticks_of_layers(axes, names, "x")
        axes.set_xlabel("layer")
        axes.set_ylabel("layer")
        if len(names) <= _WRITTEN:
            for (row, column), value in np.ndenumerate(found):
                dark = np.isfinite(value) and (value - start) / (1 - start) < 0.55
                axes.text(
                    column,
                    row,
                    f"{value:.2f}" if np.isfinite(value) else "–",
                    ha="center",
                    va="center",
                    fontsize=SMALL,
                    color="white" if dark else "black",
                )
        scale_bar(figure, image, axes, f"correlation of {variable}")
        note(figure, about)
        return figure


def _correlations(dataset: xr.Dataset, variable: str) -> tuple[Floats, int]:
    """Give correlations of layers [layers, layers], and the rows that they are of."""
    source = source_of(dataset, variable)
    keep: NDArray[np.bool_] = np.asarray(source.keep.all(axis=0))
    layers, step = len(source.places), max((16 << 20) // source.row_bytes // 8, 1)
    shift: Floats | None = None
    products, sums, count = np.zeros((layers, layers)), np.zeros((layers, source.width)), 0
    for first in range(0, source.rows, step):
        kept = keep[first : first + step]
        if not kept.any():
            continue
        blocks = [
            np.concatenate([block for _, block in blocks_of(part, kept, step)])
            for part in (source.variable[place, first : first + step] for place in range(layers))
        ]
        values = np.stack(blocks).astype(np.float64)
        values = values[:, np.isfinite(values).all(axis=(0, 2))]
        if not values.shape[1]:
            continue
        shift = values.mean(axis=1) if shift is None else shift
        values -= shift[:, np.newaxis]
        count += values.shape[1]
        sums += values.sum(axis=1)
        wide = values.reshape(layers, -1)
        products += wide @ wide.T
    products -= sums @ sums.T / max(count, 1)
    scale = np.sqrt(np.maximum(products.diagonal(), 0))
    with np.errstate(all="ignore"):
        return np.clip(products / np.outer(scale, scale), -1, 1), count
