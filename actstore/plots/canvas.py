"""Owns the figure that is drawn and saved in the style that it was made in, and that style.

It imports matplotlib, so it is imported when something is drawn. Colours are ``style.py``'s.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from actstore.plots.style import INK, SMALL
from actstore.plots.text import families

__all__ = ["Drawn", "styled"]

_STYLE: Final[dict[str, Any]] = {
    "axes.edgecolor": INK,
    "axes.formatter.use_mathtext": False,
    "axes.labelsize": 7.0,
    "axes.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.titlesize": 7.0,
    "axes.titlepad": 3.0,
    "axes.unicode_minus": True,
    "figure.dpi": 100.0,
    "figure.facecolor": "white",
    "font.size": 7.0,
    "hatch.color": "0.6",
    "hatch.linewidth": 0.4,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text, as publishers ask for
    "ps.fonttype": 42,
    "savefig.dpi": 300.0,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "actstore",
    "text.parse_math": False,  # tokens have dollar signs
    "text.usetex": False,
    "xtick.labelsize": SMALL,
    "xtick.major.size": 2.0,
    "xtick.major.width": 0.5,
    "xtick.minor.size": 0.0,
    "ytick.labelsize": SMALL,
    "ytick.major.size": 2.0,
    "ytick.major.width": 0.5,
    "ytick.minor.size": 0.0,
}


@contextmanager
def styled() -> Iterator[None]:
    """Let matplotlib's settings be ours, whatever its user's are; then these again."""
    with mpl.rc_context():
        mpl.rcdefaults()
        settings: Any = mpl.rcParams  # it has more names than a dict of ours is known to have
        settings.update({**_STYLE, "font.family": list(families())})
        yield


class Drawn(Figure):
    """A figure that keeps to its style, without pyplot."""

    @classmethod
    def of(cls, width: float, height: float) -> Drawn:
        """Make one, in inches; to be called in the style."""
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
        figure = cls(figsize=(width, height), layout=layout)
        FigureCanvasAgg(figure)
        return figure

    def draw(self, renderer: Any) -> None:
        """Draw it in its style."""
        with styled(), warnings.catch_warnings():
            # too narrow for its labels: still better than nothing
            warnings.filterwarnings("ignore", "constrained_layout not applied")
            super().draw(renderer)

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        """Save it in its style: text stays text in PDF and SVG."""
        with styled():
            super().savefig(*args, **kwargs)

    def _repr_png_(self) -> bytes:
        """Show it in a notebook."""
        found = io.BytesIO()
        self.savefig(found, format="png", dpi=150)
        return found.getvalue()
