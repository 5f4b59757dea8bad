"""Owns the figure of a run: bytes and compression by layer, rates, what the model waited for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from actstore.errors import ConfigError
from actstore.overview import analysis_of
from actstore.plots.style import COLORS, INK, SMALL, blank, drawn, needs_matplotlib, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["run_rates"]

_BARS: Final = 40
_NAME: Final = 34
_UNITS: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


@needs_matplotlib
def run_rates(
    run: str | os.PathLike[str] | Mapping[str, Any],
    *,
    width: float = 7.0,
    storage_options: Mapping[str, Any] | None = None,
) -> Figure:
    """Draw what a run wrote, how fast, and what the model waited for.

    Left: the model's bytes (light) and those stored (dark), with their ratio, of each layer, or,
    of more than 40 layers, of each site. Right: throughput sustained, at best, and aimed at; the
    seconds of waiting by cause, where the log was closed.

    Parameters
    ----------
    run : path or mapping
        A log or an archive, also by its URL; or what ``analyze_activations`` gives of one. No
        values are read.
    width : float, optional
        Inches.
    storage_options : mapping, optional
        Of a bucket, as for `actstore.open_dataset`.

    Returns
    -------
    matplotlib.figure.Figure
        As `norm_map` gives it.

    Raises
    ------
    ConfigError
        It is neither.
    MissingFileError, FormatError, StreamCorruptError
        As for `actstore.open_stream`.
    """
    found = run if isinstance(run, Mapping) else analysis_of(run, "run_rates", storage_options)
    layers = found.get("per_layer")
    if not isinstance(layers, Mapping):
        msg = (
            "wanted what analyze_activations gives, with per_layer; got a mapping of "
            f"{', '.join(map(str, found)) or 'nothing'}"
        )
        raise ConfigError(msg)
    bars, of = _bars(layers)
    if not bars:
        return blank(width, "no packets in this run")
    with drawn(width, float(np.clip(0.145 * len(bars), 1.6, 7.5)) + 0.75) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
        _draw_bytes(left, bars, of)
        right.set_axis_off()
        grid = right.get_subplotspec().subgridspec(2, 1, height_ratios=(1, 1.3))
        right.remove()
        _draw_rates(figure.add_subplot(grid[0]), found)
        _draw_waits(figure.add_subplot(grid[1]), found)
        note(figure, _about(found))
        return figure


def _bars(layers: Mapping[str, Any]) -> tuple[list[tuple[str, int, int]], str]:
    """Give names, the model's bytes and those stored, of layers, or of sites if those are many."""
    found: dict[str, list[int]] = {}
    several = len(layers) > _BARS
    for name, one in layers.items():
        site = str(one.get("site") or name) if several else name
        mine = found.setdefault(site or "output", [0, 0])
        mine[0] += int(one.get("raw_bytes") or 0)
        mine[1] += int(one.get("bytes") or 0)
    bars = [(name, raw, stored) for name, (raw, stored) in found.items()]
    if len(bars) <= _BARS:
        return bars, "site" if several else "layer"
    bars.sort(key=lambda one: -one[1])
    rest = bars[_BARS - 1 :]
    more = (f"{len(rest)} others", sum(one[1] for one in rest), sum(one[2] for one in rest))
    return [*bars[: _BARS - 1], more], "site"


def _unit(most: float) -> tuple[float, str]:
    return next((one for one in _UNITS if most >= one[0]), _UNITS[-1])


def _draw_bytes(axes: Axes, bars: list[tuple[str, int, int]], of: str) -> None:
    most = float(max(max(raw, stored) for _, raw, stored in bars))
    unit, name = _unit(most)
    places = np.arange(len(bars))
    raw, stored = (np.array([one[column] for one in bars], np.float64) / unit for column in (1, 2))
    axes.barh(places, raw, height=0.78, color="0.82", label="of the model")
    axes.barh(places, stored, height=0.5, color=COLORS[0], label="stored")
    for place, (model, kept) in enumerate(zip(raw, stored, strict=True)):
        said = f"{model / kept:.2f}×" if kept and model else "alias" if not model else "–"
        axes.annotate(
            said, (max(model, kept), place), (2, 0), textcoords="offset points",
            va="center", fontsize=SMALL, color=INK,
        )  # fmt: skip
    axes.set_yticks(places, [_short(one[0]) for one in bars])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, max(most / unit, 1e-9) * 1.13)
    axes.set_xlabel(f"{name}, and the ratio, of each {of}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, handlelength=1.0, borderpad=0)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else "…" + name[-_NAME + 1 :]


def _draw_rates(axes: Axes, found: Mapping[str, Any]) -> None:
    summary = found.get("summary") or {}
    rates = {
        "sustained": found.get("sustained_gbps"),
        "at best": summary.get("peak_gbps"),
        "aimed at": summary.get("target_throughput_gbps"),
    }
    _few(axes, {name: one for name, one in rates.items() if one is not None}, "GB/s")


def _draw_waits(axes: Axes, found: Mapping[str, Any]) -> None:
    summary = found.get("summary") or {}
    waits = dict(summary.get("waited_by_cause") or {})
    if not waits and found.get("waited_seconds") is not None:
        waits = {"waited": found["waited_seconds"]}
    named = {f"waited: {name}" if name != "waited" else name: one for name, one in waits.items()}
    if named and found.get("duration_seconds") is not None:
        named = {"run": found["duration_seconds"], **named}
    _few(axes, named, "seconds")


def _few(axes: Axes, values: Mapping[str, Any], what: str) -> None:
    """Draw a few bars with their numbers, or say that there are none."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(what)
    if not values:
        axes.set_yticks([])
        axes.set_xticks([])
        axes.text(0.5, 0.5, "not told", ha="center", va="center", transform=axes.transAxes,
                  color=INK)  # fmt: skip
        return
    numbers = [float(one) for one in values.values()]
    axes.barh(range(len(numbers)), numbers, height=0.6, color="0.45")
    for place, one in enumerate(numbers):
        axes.annotate(f"{one:.3g}", (one, place), (2, 0), textcoords="offset points",
                      va="center", fontsize=SMALL, color=INK)  # fmt: skip
    axes.set_yticks(range(len(numbers)), list(values))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_ylim(len(numbers) - 0.4, -0.6)
    axes.set_xlim(0, max(*numbers, 1e-9) * 1.3)


def _about(found: Mapping[str, Any]) -> str:
    raw, stored = found.get("total_raw_bytes"), found.get("total_compressed_bytes")
    counts = [one for one in ("packets", "passes", "tokens") if isinstance(found.get(one), int)]
    parts = [f"{found[name]:,} {name}" for name in counts]
    if raw and stored:
        (one, first), (other, second) = _unit(raw), _unit(stored)
        parts.append(f"{raw / one:.3g} {first} in {stored / other:.3g} {second}, "
                     f"{raw / stored:.2f}×")  # fmt: skip
    if found.get("compression"):
        parts.append(f"codec {found['compression']}")
    if found.get("complete") is False:
        parts.append("not closed")
    return "; ".join(parts)
