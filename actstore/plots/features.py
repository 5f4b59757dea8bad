"""Owns figures of features: which are outliers, how values are distributed, one along a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore import analysis
from actstore.analysis.source import Source, blocks_of, source_of
from actstore.errors import ConfigError
from actstore.plots.chosen import chosen_rows, layer_names, sampled
from actstore.plots.style import (
    INK,
    SEQUENTIAL,
    SIGNED,
    SMALL,
    blank,
    drawn,
    hatched,
    needs_matplotlib,
    note,
    scale_bar,
    ticks_of_layers,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["distributions", "feature_on_text", "outliers", "place_of_layer"]

_FEATURES: Final = 40
_PITCH: Final = 0.094  # inches of a feature
_LINE: Final = 0.19  # inches
_QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@needs_matplotlib
def outliers(
    dataset: xr.Dataset,
    variable: str = "resid",
    *,
    factor: float = 6.0,
    threshold: float = 6.0,
    sample: int | None = None,
    width: float = 7.0,
) -> Figure:
    """Draw the features that are largest against the others of their layer.

    Left: of the 40 with the largest ratio in any layer (fewer in a narrow figure), the rms in
    each, divided by the median of the layer's features, marked ● where that is over ``factor``; ▲
    above features that LLM.int8() calls outliers. Right: how many features of each layer are over
    ``factor``.

    Parameters
    ----------
    dataset : xarray.Dataset
        As for `norm_map`.
    variable : str, optional
        Which.
    factor, threshold : float, optional
        As for `actstore.analysis.outlier_features`.
    sample : int, optional
        As for `layer_correlation`.
    width : float, optional
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        As `norm_map` gives it.

    Raises
    ------
    ConfigError
        As for `norm_map`, and for `actstore.analysis.outlier_features`.
    """
    from matplotlib.colors import LogNorm

    mine, about = sampled(dataset, variable, sample)
    names = layer_names(mine, variable)
    found = analysis.outlier_features(mine, variable, factor=factor, threshold=threshold)
    ratio = found[f"{variable}_rms_ratio"].values.reshape(len(names), -1)
    over = ratio > factor
    highest = np.where(np.isfinite(ratio), ratio, -1).max(axis=0, initial=-1)
    most = min(_FEATURES, int((width - 1.5) / _PITCH), int((highest >= 0).sum()))
    top = np.argsort(-highest, kind="stable")[: max(most, 0)]
    if not top.size:
        return blank(width, f"no finite values of {variable} in these rows", about)
    often = found[f"{variable}_llm_int8"].values.ravel()[top]
    texts = [str(one) for one in _features(mine, variable)[top]]
    values = ratio[:, top]
    high = float(np.nanmax(values))
    with drawn(width, float(np.clip(0.16 * len(names), 0.6, 3.5)) + 0.95) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(8, 1 if width > 5 else 1.6), sharey=True)
        hatched(left)
        image = left.imshow(
            np.ma.masked_where(~(values > 0), values),
            aspect="auto",
            origin="lower",
            cmap=SEQUENTIAL,
            norm=LogNorm(1.0, max(high, 1.001)),
            interpolation="nearest",
        )
        for row, column in zip(*np.nonzero(over[:, top]), strict=True):
            bright = image.norm(values[row, column]) > 0.55
            left.plot(column, row, "o", ms=1.8, color="black" if bright else "white")
        left.set_xticks(range(top.size), texts, rotation=90)
        left.plot(
            np.flatnonzero(often), np.full(int(often.sum()), 1.03), "^", ms=3, color=INK,
            transform=left.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip
        left.tick_params(axis="x", length=0)
        left.set_xlabel(wrapped(f"feature of {variable}, by its largest ratio", width * 0.6))
        left.set_ylabel("layer" if len(names) > 1 else "")
        counts = over.sum(axis=1)
        right.barh(range(len(names)), counts, color="0.45", height=0.7)
        right.set_xlim(0, max(float(counts.max()), 1) * 1.35)
        right.set_xlabel(f"> {factor:g}×")
        right.xaxis.get_major_locator().set_params(integer=True, nbins=3)
        for place, count in enumerate(counts.tolist()):
            if len(names) <= 40:
                right.annotate(
                    str(count), (count, place), (2, 0), textcoords="offset points",
                    va="center", fontsize=SMALL, color=INK,
                )  # fmt: skip
        right.spines[["top", "right"]].set_visible(False)
        ticks_of_layers(left, names)
        scale_bar(figure, image, [left, right], "rms / median rms (log)", extend="min")
        marks = f"● over {factor:g}×; ▲ LLM.int8() outlier (≥ {threshold:g})"
        note(figure, f"{about}; {marks}")
        return figure


def _features(dataset: xr.Dataset, variable: str) -> NDArray[Any]:
    """Give the labels of features: their own, or places."""
    source = source_of(dataset, variable)
    if len(source.trailing) == 1 and source.trailing[0] in source.array.coords:
        return np.asarray(source.array[source.trailing[0]].values)
    return np.arange(source.width)


@needs_matplotlib
def distributions(
    dataset: xr.Dataset,
    variable: str = "resid",
    *,
    sample: int | None = None,
    width: float = 3.4,
) -> Figure:
    """Draw how the values of each layer are distributed: quantiles, and the extremes.

    Of each layer the median, the middle half, and from 1 to 99 and from 5 to 95 %; the extremes
    are crosses. Values grow linearly around 0, and by their logarithm where they are far larger
    than the middle half.

    Parameters
    ----------
    dataset : xarray.Dataset
        As for `norm_map`.
    variable : str, optional
        Which.
    sample : int, optional
        As for `layer_correlation`.
    width : float, optional
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        As `norm_map` gives it.

    Raises
    ------
    ConfigError
        As for `norm_map`.
    """
    from matplotlib.ticker import FuncFormatter

    mine, about = sampled(dataset, variable, sample)
    names = layer_names(mine, variable)
    found = analysis.statistics(mine, variable, quantiles=_QUANTILES, sample=1 << 20)
    bounds = found[f"{variable}_quantile"].values.reshape(len(names), -1)
    if not np.isfinite(bounds).any():
        return blank(width, f"no finite values of {variable} in these rows", about)
    lows, highs = (
        found[f"{variable}_{end}"].values.reshape(len(names), -1) for end in ("minimum", "maximum")
    )
    least = np.where(np.isnan(lows), np.inf, lows).min(axis=1)
    most = np.where(np.isnan(highs), -np.inf, highs).max(axis=1)
    places = np.flatnonzero(np.isfinite(bounds).all(axis=1))
    with drawn(width, 2.3) as figure:
        axes = figure.add_subplot()
        for low, high, half, shade, told in (
            (0, 6, 0.4, "0.85", "1–99 %"),
            (1, 5, 0.4, "0.68", "5–95 %"),
            (2, 4, 0.4, "0.42", "25–75 %"),
        ):
            axes.bar(
                places,
                bounds[places, high] - bounds[places, low],
                2 * half,
                bottom=bounds[places, low],
                color=shade,
                label=told,
            )
        axes.hlines(bounds[places, 3], places - 0.4, places + 0.4, color="white", lw=2.2, zorder=3)
        axes.hlines(
            bounds[places, 3], places - 0.4, places + 0.4, color="black", lw=1.0, zorder=4,
            label="median",
        )  # fmt: skip
        axes.plot(
            [*places, *places], [*least[places], *most[places]], "x",
            color="#0072B2", ms=2.5, mew=0.7, label="extremes",
        )  # fmt: skip
        spread = float(np.median(bounds[places, 4] - bounds[places, 2]))
        extreme = float(max(np.abs(least[places]).max(), np.abs(most[places]).max()))
        if spread > 0 and extreme > 10 * spread:
            axes.set_yscale("symlog", linthresh=spread)
            locator: Any = axes.yaxis.get_major_locator()
            locator.set_params(numticks=9)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.axhline(0, color="0.5", lw=0.4, zorder=0)
        axes.set_xlim(-0.7, len(names) - 0.3)
        ticks_of_layers(axes, names, "x")
        axes.set_xlabel("layer" if len(names) > 1 else "")
        log = " (symlog)" if axes.get_yscale() == "symlog" else ""
        axes.set_ylabel(wrapped(f"value of {variable}{log}", 1.7))
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper center", ncols=5,
            handlelength=1.0, columnspacing=1.0, handletextpad=0.4,
        )  # fmt: skip
        note(figure, about)
        return figure


def place_of_layer(source: Source, layer: int | None) -> tuple[int, str]:
    """Give the place of a layer among those of a variable, and its name.

    Raises
    ------
    ConfigError
        There is no such layer, or it has to be told.
    """
    if not source.layer_dims:
        if layer is not None:
            msg = f"{source.name!r} has no dimension 'layer'; leave layer out, not {layer!r}"
            raise ConfigError(msg)
        return 0, source.name
    there = (
        [int(one) for one in source.array["layer"].values]
        if "layer" in source.array.coords
        else list(range(len(source.places)))
    )
    if layer is None and len(there) == 1:
        return 0, f"{source.name}, layer {there[0]}"
    if isinstance(layer, bool) or layer not in there:
        msg = f"{source.name!r} has the layers {there}; say which with layer=, not {layer!r}"
        raise ConfigError(msg)
    return there.index(layer), f"{source.name}, layer {layer}"


@needs_matplotlib
def feature_on_text(
    dataset: xr.Dataset,
    variable: str,
    feature: int,
    *,
    layer: int | None = None,
    rows: slice | None = None,
    pass_index: int | None = None,
    item: int | None = None,
    width: float = 7.0,
) -> Figure:
    """Draw a text, each token on the colour of one feature's value.

    Tokens run from left to right, and on from line to line, in their own order, those of scripts
    that are written from right to left too; within a token matplotlib orders and joins letters
    (from its version 3.11 on). Values below 0 are underlined, so that the sign is seen in grey.

    Parameters
    ----------
    dataset : xarray.Dataset
        As for `norm_map`.
    variable : str
        Which: one with a single dimension behind the token axis.
    feature : int
        Its label where features have any, as those of a sampled capture; else its place.
    layer : int, optional
        Which, by its label, if the variable has several.
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
        As for `norm_map`; or there is no such feature or layer.
    """
    shown = chosen_rows(dataset, variable, rows, pass_index, item)
    source = source_of(shown.dataset, variable, padding=True)
    number, name = place_of_layer(source, layer)
    if len(source.trailing) != 1:
        msg = f"{variable!r} has dimensions {source.array.dims}: no one of them is features"
        raise ConfigError(msg)
    known = _features(shown.dataset, variable)
    place = np.flatnonzero(known == feature) if not isinstance(feature, bool) else known[:0]
    if not place.size:
        span = f"from {known.min()} to {known.max()}" if known.size else "none"
        msg = f"{variable!r} has features {span}; got {feature!r}"
        raise ConfigError(msg)
    if not shown.count:
        return blank(width, "no rows to show", shown.about)
    values = np.full(shown.count, np.nan)
    (part,) = source.parts(source.places[number], shown.count)
    for at, block in blocks_of(part, source.keep[number], shown.count):
        values[at] = block[:, int(place[0])]
    return _on_text(values, shown, f"feature {feature} of {name}", width)


def _on_text(values: NDArray[np.float64], shown: Any, what: str, width: float) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    finite = values[np.isfinite(values)]
    most = float(np.abs(finite).max(initial=0.0)) or 1.0
    signed = bool((finite < 0).any())
    scale = Normalize(-most if signed else 0.0, most)
    mapped = ScalarMappable(scale, SIGNED if signed else SEQUENTIAL)
    about = shown.about + ("; underlined: below 0" if signed else "")
    about += "" if finite.size == values.size else "; hatched: no value"
    with drawn(width, 1.0) as figure:
        widths = _widths(figure, shown.texts)
        lines, _ = _lines(widths, shown, width - 0.75)
        figure.set_size_inches(width, max((lines + 1) * _LINE + 0.25, 1.2))
        axes = figure.add_subplot()
        axes.set_axis_off()
        scale_bar(figure, mapped, axes, what)
        note(figure, about)
        figure.draw_without_rendering()  # what the scale leaves to the text
        room = axes.get_window_extent().width / figure.dpi
        lines, at = _lines(widths, shown, room)
        height = max((lines + 1) * _LINE, 0.95)
        figure.set_size_inches(width, max(height + 0.25, 1.2))
        axes.set_xlim(0, room)
        axes.set_ylim(height, -0.02)
        for text, value, wide, (x, line) in zip(shown.texts, values, widths, at, strict=True):
            _token(axes, text, float(value), wide, (x, line * _LINE), mapped)
        return figure


def _widths(figure: Figure, texts: list[str]) -> list[float]:
    """Measure texts, in inches."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    found: dict[str, float] = {}
    for text in texts:
        if text not in found:
            one = Text(0, 0, text, fontsize=7.0)
            one.set_figure(figure)
            found[text] = one.get_window_extent(renderer).width / figure.dpi + 0.055
    return [found[text] for text in texts]


def _lines(widths: list[float], shown: Any, room: float) -> tuple[int, list[tuple[float, int]]]:
    """Place tokens on lines; a line ends where a token has a line break, or a sequence ends."""
    at, x, line = [], 0.0, 0
    ends = set(shown.ends.tolist())
    for place, wide in enumerate(widths):
        if x and x + wide > room:
            x, line = 0.0, line + 1
        at.append((x, line))
        x += wide
        if place in ends or shown.texts[place].endswith("⏎"):
            x, line = 0.0, line + 1
    return max(one for _, one in at) + 1, at


def _token(
    axes: Axes, text: str, value: float, wide: float, at: tuple[float, float], mapped: Any
) -> None:
    from matplotlib.patches import Rectangle

    x, y = at
    there = bool(np.isfinite(value))
    color = mapped.to_rgba(value) if there else (1.0, 1.0, 1.0, 1.0)
    light = float(np.dot(color[:3], (0.2126, 0.7152, 0.0722)))
    box = Rectangle((x + 0.004, y), wide - 0.008, _LINE * 0.86)
    box.set(facecolor=color, edgecolor="0.75", linewidth=0.3, hatch="" if there else "//////")
    axes.add_patch(box)
    ink = "black" if light > 0.45 else "white"
    middle, base = x + wide / 2, y + _LINE * 0.64
    axes.text(middle, base, text, ha="center", va="baseline", fontsize=7.0, color=ink)
    if there and value < 0:
        under = y + _LINE * 0.78
        axes.plot((x + 0.015, x + wide - 0.015), (under, under), color=ink, lw=0.5)
