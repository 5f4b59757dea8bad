"""Owns what all figures share: the style that they are drawn in, their widths, notes and scales.

Figures are made without pyplot, and matplotlib's settings are as before when a call is over.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, ParamSpec

from actstore.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "DASHES",
    "INK",
    "SEQUENTIAL",
    "SIGNED",
    "SMALL",
    "blank",
    "drawn",
    "hatched",
    "needs_matplotlib",
    "note",
    "scale_bar",
    "ticks_of_layers",
    "wrapped",
]

P = ParamSpec("P")

#: Lightness rises evenly from end to end, so that it reads the same in grey, and its hues run from
#: blue to yellow, which those who don't tell red from green see as everybody does (Nuñez,
#: Anderton and Renslow, 2018, doi:10.1371/journal.pone.0199239).
SEQUENTIAL: Final = "cividis"
#: Red and blue stay apart for all common kinds of colour blindness (ColorBrewer says "safe"; green
#: is in neither). In grey its ends are alike: what is drawn by it marks the sign otherwise too.
SIGNED: Final = "RdBu_r"
#: Okabe and Ito's colours, the darker ones; lines have dashes of their own as well.
COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9")
DASHES: Final = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (2, 1)), (0, (8, 2)))
INK: Final = "0.25"
SMALL: Final = 6.0  # points; nothing is smaller
_LAYERS_NAMED: Final = 14


def needs_matplotlib(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a function that draws say what to install, where matplotlib isn't."""

    @functools.wraps(draw)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Figure:
        if find_spec("matplotlib") is None:
            msg = "figures are drawn by matplotlib, which isn't here: pip install 'actstore[plot]'"
            raise ConfigError(msg)
        return draw(*args, **kwargs)

    return checked


@contextmanager
def drawn(width: float, height: float) -> Iterator[Figure]:
    """Give a figure to draw into, in inches, in the style; it keeps to it when it is saved.

    Raises
    ------
    ConfigError
        The width is none.
    """
    if isinstance(width, bool) or not isinstance(width, int | float) or not 1 <= width <= 60:
        msg = (
            f"width must be inches from 1 to 60: 3.4 is a column of a paper, 7 two; got {width!r}"
        )
        raise ConfigError(msg)
    from actstore.plots.canvas import Drawn, styled

    with styled():
        yield Drawn.of(width, height)


def note(figure: Figure, text: str) -> None:
    """Say below a figure what it is of."""
    if text:
        figure.supxlabel(text, x=0.995, ha="right", fontsize=SMALL, color="0.35")


def blank(width: float, why: str, about: str = "") -> Figure:
    """Give a figure that says why there is nothing in it."""
    with drawn(width, 1.0) as figure:
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.text(0.5, 0.5, why, ha="center", va="center", color=INK, wrap=True)
        note(figure, about)
        return figure


def hatched(axes: Axes) -> None:
    """Let what has no value show hatching."""
    axes.patch.set_facecolor("white")
    axes.patch.set_hatch("//////")
    axes.patch.set_edgecolor("0.6")


def ticks_of_layers(axes: Axes, layers: Sequence[Any], axis: str = "y") -> None:
    """Name layers, at most so many, evenly."""
    step = -(-max(len(layers), 1) // _LAYERS_NAMED)
    places = list(range(0, len(layers), step))
    names = [str(layers[one]) for one in places]
    (axes.set_yticks if axis == "y" else axes.set_xticks)(places, names)


def wrapped(text: str, inches: float) -> str:
    """Break a label where it is longer than its axis."""
    most, lines = max(int(inches * 72 / 3.9), 12), [""]
    for part in re.split(r"(?<=[\s._])", text):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > most:
            lines.append("")
        lines[-1] += part
    return "\n".join(one.rstrip() for one in lines)


def scale_bar(
    figure: Figure, image: Any, axes: Any, label: str, *, extend: str = "neither"
) -> None:
    """Draw the scale of colours beside axes: 0.12 inches wide, numbers without powers of ten."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    aspect = max((figure.get_figheight() - 0.6) / 0.12, 5)
    bar = figure.colorbar(
        image,
        ax=axes,
        label=wrapped(label, figure.get_figheight() - 1.0),
        pad=0.012,
        fraction=0.12,
        aspect=aspect,
        extend=extend,
    )
    outline: Any = bar.outline
    outline.set_linewidth(0.5)
    if isinstance(image.norm, LogNorm):
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        bar.ax.yaxis.set_major_formatter(plain)
        span = (image.norm.vmax or 1.0) / (image.norm.vmin or 1.0)
        bar.ax.yaxis.set_minor_formatter(plain if span < 12 else "")
