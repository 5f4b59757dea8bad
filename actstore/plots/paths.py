"""Owns figures of how a layer's rows change along a text: PCA trajectories, norms and turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.analysis.source import Source, blocks_of, source_of
from actstore.plots.chosen import Shown, chosen_rows, layer_names
from actstore.plots.features import place_of_layer
from actstore.plots.style import (
    COLORS,
    DASHES,
    INK,
    SEQUENTIAL,
    SMALL,
    blank,
    drawn,
    needs_matplotlib,
    note,
    scale_bar,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["token_progression", "trajectory"]

_PANELS: Final = 6
_LINES: Final = 5
_PITCH: Final = 0.094  # inches of a token
_NARROW: Final = 5.0  # inches; below it a figure has a column of a paper
_NAMED: Final = 24  # tokens of a panel that are named, at most

Floats = NDArray[np.float64]


@needs_matplotlib
def trajectory(
    dataset: xr.Dataset,
    variable: str = "resid",
    *,
    layer: int | None = None,
    rows: slice | None = None,
    pass_index: int | None = None,
    item: int | None = None,
    width: float = 7.0,
) -> Figure:
    """Draw the path of a text through a layer: its rows on their first two principal components.

    Each panel is a layer, with components of the rows that are shown there (by a singular value
    decomposition, so that a few rows of many features take no time), of which the entry of the
    largest magnitude is positive. Some tokens are named, as many as don't cover each other. A
    first token far from all others takes the first component for itself: leave it out by
    ``rows=slice(1, None)``.

    Parameters
    ----------
    dataset : xarray.Dataset
        As for `norm_map`.
    variable : str, optional
        Which.
    layer : int, optional
        A layer, by its label. If it isn't given: six of them, evenly spread.
    rows, pass_index, item
        As for `norm_map`.
    width : float, optional
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        As `norm_map` gives it.

    Raises
    ------
    ConfigError
        As for `norm_map`; or there is no such layer.
    """
    shown = chosen_rows(dataset, variable, rows, pass_index, item)
    source = source_of(shown.dataset, variable, padding=True)
    names = layer_names(shown.dataset, variable)
    told = layer is not None
    most = _PANELS if width > _NARROW else _PANELS - 2
    places = [place_of_layer(source, layer)[0]] if told else _spread(len(names), most)
    if not shown.count:
        return blank(width, "no rows to show", shown.about)
    columns = min(len(places), most // 2)
    lines = -(-len(places) // columns)
    size = (width - 0.6) / columns * (0.8 if len(places) > 1 else 0.75)
    with drawn(width, size * lines + 0.45) as figure:
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        image, paths = None, []
        for axes, place in zip(grid, places, strict=False):
            points, shares = components(_rows_of(source, place))
            title = f"layer {names[place]}" if source.layer_dims else variable
            image = _path(axes, points, shares, title) or image
            paths.append((axes, points))
        for axes in grid[len(places) :]:
            axes.set_axis_off()
        if image is not None:
            scale_bar(figure, image, list(grid), "place in the text")
        note(figure, f"{shown.about}; ▶ first, ■ last")
        figure.draw_without_rendering()
        for axes, points in paths:
            _name_points(axes, points, shown.texts)
        return figure


def components(values: Floats) -> tuple[Floats, Floats]:
    """Give rows on their first two principal components [rows, 2], and these' share of variance.

    Rows that aren't finite are NaN there; components that rows don't have are 0.
    """
    points, shares = np.full((len(values), 2), np.nan), np.zeros(2)
    there = np.isfinite(values).all(axis=1)
    if not there.any():
        return points, shares
    apart = values[there] - values[there].mean(axis=0)
    left, sizes, right = np.linalg.svd(apart, full_matrices=False)
    kept = min(2, sizes.size)
    largest = np.abs(right[:kept]).argmax(axis=1) if right.size else np.zeros(0, np.intp)
    signs = np.where(right[np.arange(kept), largest] < 0, -1.0, 1.0)
    found = np.zeros((len(apart), 2))
    found[:, :kept] = left[:, :kept] * sizes[:kept] * signs
    points[there] = found
    total = float((sizes**2).sum())
    shares[:kept] = sizes[:kept] ** 2 / total if total else 0.0
    return points, shares


def _path(axes: Axes, points: Floats, shares: Floats, title: str) -> Any:
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    for name, share, put in (
        ("PC 1", shares[0], axes.set_xlabel),
        ("PC 2", shares[1], axes.set_ylabel),
    ):
        put(f"{name} ({share:.0%})", labelpad=1.5)
    there = np.flatnonzero(np.isfinite(points[:, 0]))
    if not there.size:
        axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes)
        return None
    axes.plot(*points.T, color="0.75", lw=0.6, zorder=1)
    image = axes.scatter(
        points[there, 0], points[there, 1], c=there, s=9, cmap=SEQUENTIAL, zorder=2,
        linewidths=0.3, edgecolors="black", vmin=0, vmax=max(len(points) - 1, 1),
    )  # fmt: skip
    for place, marker in ((there[-1], "s"), (there[0], ">")):
        color = tuple(image.to_rgba(np.array([place]))[0])
        axes.plot(*points[place], marker, ms=5, mfc=color, mec="black", mew=0.7, zorder=3)
    axes.margins(0.12)
    axes.locator_params(nbins=4)
    return image


def _name_points(axes: Axes, points: Floats, texts: Sequence[str]) -> None:
    """Name points where there is room: the ends first, then as they come, spread evenly."""
    scale = axes.figure.dpi / 72
    where = axes.transData.transform(np.nan_to_num(points))
    inside = axes.get_window_extent()
    dots = where[np.isfinite(points[:, 0])]
    taken: list[tuple[float, float, float, float]] = []
    for place in _even_order(len(texts)):
        if not np.isfinite(points[place, 0]) or len(taken) >= _NAMED:
            continue
        wide, high = (len(texts[place]) * 0.62 * SMALL + 1) * scale, (SMALL + 1) * scale
        for side, up in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            x, y = where[place] + np.array([side * 3, up * 3]) * scale
            west, south = float(min(x, x + side * wide)), float(min(y, y + up * high))
            box = (west, south, west + wide, south + high)
            within = box[0] > inside.x0 and box[2] < inside.x1
            within &= box[1] > inside.y0 and box[3] < inside.y1
            over = ((dots > box[:2]) & (dots < box[2:])).all(axis=1).any()
            if within and not over and not any(_meet(box, one) for one in taken):
                taken.append(box)
                axes.annotate(
                    texts[place], points[place], (side * 3, up * 3),
                    textcoords="offset points", fontsize=SMALL, color=INK, zorder=4,
                    ha="left" if side > 0 else "right", va="bottom" if up > 0 else "top",
                ).set_in_layout(False)  # fmt: skip
                break


def _even_order(count: int) -> list[int]:
    """Give places from coarse to fine: the ends, the middle, the quarters, …."""
    found, step = dict.fromkeys([0, count - 1] if count else []), count
    while step > 1:
        step = -(-step // 2)
        found |= dict.fromkeys(range(0, count, step))
    return list(found)


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@needs_matplotlib
def token_progression(
    dataset: xr.Dataset,
    variable: str = "resid",
    *,
    rows: slice | None = None,
    pass_index: int | None = None,
    item: int | None = None,
    width: float = 7.0,
) -> Figure:
    """Draw how layers go on from token to token: the norm of each row, and how far it turns.

    Above the L2 norm, below 1 − cosine between each row and the row before it in its sequence, of
    five layers, evenly spread.

    Parameters, result and errors are as for `norm_map`.
    """
    shown = chosen_rows(dataset, variable, rows, pass_index, item)
    if not shown.count:
        return blank(width, "no rows to show", shown.about)
    source = source_of(shown.dataset, variable, padding=True)
    names = layer_names(shown.dataset, variable)
    places = _spread(len(names), _LINES if width > _NARROW else _LINES - 2)
    with drawn(width, 3.4) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for number, place in enumerate(places):
            values = _rows_of(source, place)
            norms, turns = progression(values)
            turns[shown.ends + 1] = np.nan
            told: dict[str, Any] = {
                "color": COLORS[number], "linestyle": DASHES[number],
                "lw": 1.0 if width > _NARROW else 0.7,
                "label": f"layer {names[place]}" if source.layer_dims else variable,
                "marker": "." if shown.count < 3 else "", "ms": 4,
            }  # fmt: skip
            upper.plot(*_broken(norms, shown), **told)
            lower.plot(*_broken(turns, shown), **told)
        finite = [one.get_ydata() for one in upper.lines]
        _progression_axes(upper, lower, np.concatenate(finite), variable)
        _name_tokens(lower, shown, width)
        for axes in (upper, lower):
            if shown.generated is not None:
                axes.axvline(shown.generated - 0.5, color=INK, lw=0.8, linestyle=(0, (3, 2)))
        if shown.generated is not None:
            upper.annotate(
                "generated →", (shown.generated - 0.5, 1.0), (2, -7),
                xycoords=upper.get_xaxis_transform(), textcoords="offset points",
                fontsize=SMALL, color=INK,
            )  # fmt: skip
        figure.legend(
            *upper.get_legend_handles_labels(), loc="outside upper center", ncols=_LINES,
            handlelength=2.6,
        )  # fmt: skip
        note(figure, shown.about)
        return figure


def progression(values: Floats) -> tuple[Floats, Floats]:
    """Give the norm of rows, and 1 − cosine between each and the one before; NaN of the first."""
    with np.errstate(all="ignore"):
        norms = np.sqrt((values**2).sum(axis=1))
        lengths = norms[1:] * norms[:-1]
        cosines = (values[1:] * values[:-1]).sum(axis=1) / np.where(lengths > 0, lengths, np.nan)
    turns = np.full(len(values), np.nan)
    turns[1:] = 1 - np.clip(cosines, -1, 1)
    return norms, turns


def _broken(values: Floats, shown: Shown) -> Any:
    """Break a line where a sequence ends: matplotlib leaves out what is NaN."""
    x = np.arange(len(values), dtype=np.float64)
    return np.insert(x, shown.ends + 1, np.nan), np.insert(values, shown.ends + 1, np.nan)


def _progression_axes(upper: Axes, lower: Axes, norms: Floats, variable: str) -> None:
    from matplotlib.ticker import FuncFormatter

    there = norms[np.isfinite(norms) & (norms > 0)]
    if there.size and there.max() > 8 * np.median(there):
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        upper.set_ylabel(wrapped(f"L2 norm of {variable} (log)", 1.3))
    else:
        upper.set_ylabel(wrapped(f"L2 norm of {variable}", 1.3))
        upper.set_ylim(bottom=0)
    lower.set_ylabel("1 − cosine with\nthe token before")
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        if not any(np.isfinite(one.get_ydata()).any() for one in axes.lines):
            axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes)


def _name_tokens(axes: Axes, shown: Shown, width: float) -> None:
    """Name as many tokens below an axis as there is room for, evenly."""
    step = max(-(-shown.count * _PITCH // (width - 0.7)), 1)
    places = list(range(0, shown.count, int(step)))
    axes.set_xticks(places, [shown.texts[one] for one in places], rotation=90)
    axes.set_xlim(-0.7, shown.count - 0.3)


def _spread(count: int, most: int) -> list[int]:
    """Give at most so many places, evenly, with both ends."""
    return [int(one) for one in np.unique(np.linspace(0, count - 1, min(count, most)).round())]


def _rows_of(source: Source, place: int) -> Floats:
    """Read the rows of one layer, [rows, width]; NaN where there is none."""
    found = np.full((source.rows, source.width), np.nan)
    (part,) = source.parts(source.places[place], max(source.rows, 1))
    for at, block in blocks_of(part, source.keep[place], max(source.rows, 1)):
        found[at] = block
    return found
