"""Owns how things are drawn in a terminal: numbers, tables that fit it, facts below each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

__all__ = [
    "count",
    "duration",
    "facts",
    "fold",
    "lines",
    "many",
    "number",
    "rate",
    "ratio",
    "rounded",
    "size",
    "table",
]

_LEAST: Final = 8  # columns that are left of a name
_GAP: Final = 2
_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_MINUTE, _HOUR = 60, 3600


def size(nbytes: float) -> str:
    """Give bytes with a decimal unit and three digits."""
    value, power = float(nbytes), 0
    while value >= 999.5 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.0f} B" if not power else f"{_digits(value)} {_UNITS[power]}"


def _digits(value: float) -> str:
    places = max(2 - int(math.log10(value)) if value >= 1 else 2, 0)
    return f"{value:.{places}f}"


def count(many: int) -> str:
    """Give a whole number."""
    return f"{many:,}"


def many(number_of: int, what: str, more: str | None = None) -> str:
    """Give a number of things."""
    return f"{count(number_of)} {what if number_of == 1 else more or what + 's'}"


def ratio(value: float | None) -> str:
    """Give a ratio; nothing where there is none."""
    return "" if value is None else f"{value:.2f}x"


def number(value: float | None) -> str:
    """Give a number of any magnitude with four digits."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Give a length of time."""
    if seconds < _MINUTE:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < _HOUR:
        return f"{int(seconds // _MINUTE)} min {int(seconds % _MINUTE):02d} s"
    return f"{int(seconds // _HOUR):,} h {int(seconds % _HOUR // _MINUTE):02d} min"


def rate(a_second: float, unit: str) -> str:
    """Give a rate."""
    return f"{size(a_second)}/s" if unit == "bytes" else f"{rounded(a_second)} {unit}/s"


def rounded(value: float) -> str:
    """Give a number without decimals, unless it is small."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def fold(text: str, width: int) -> str:
    """Give a text in so many columns: what is too long has … in its middle."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    if width < 1:
        return ""
    tail = width // 2
    head = width - tail - 1
    start = set_cell_size(text, head).rstrip()
    end = text
    while cell_len(end) > tail:
        end = end[1:]
    return f"{start}…{end}"


def table(
    console: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    folds: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> Table:
    """Give a table that fits.

    Parameters
    ----------
    console : Console
        Where it is drawn.
    columns : sequence of str
        Titles; what is folded keeps at least its title's width.
    rows : iterable of sequence of str
        Cells.
    folds : sequence of str
        Columns that are folded where there is no room.
    numbers : sequence of str
        Columns that are aligned to the right.
    """
    from rich.cells import cell_len
    from rich.table import Table

    cells = [list(row) for row in rows]
    widths = [
        max([cell_len(title), *(cell_len(row[place]) for row in cells)])
        for place, title in enumerate(columns)
    ]
    over = sum(widths) + _GAP * (len(columns) - 1) - console.width
    places = [place for place, title in enumerate(columns) if title in folds]
    least = {place: max(_LEAST, cell_len(columns[place])) for place in places}
    while over > 0 and (wide := [place for place in places if widths[place] > least[place]]):
        widths[max(wide, key=lambda place: widths[place])] -= 1
        over -= 1
    found = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), collapse_padding=True)
    for place, title in enumerate(columns):
        found.add_column(
            title,
            justify="right" if title in numbers else "left",
            no_wrap=True,
            width=widths[place],
            header_style="bold",
        )
    for row in cells:
        found.add_row(
            *(fold(cell, widths[place]) for place, cell in enumerate(row))
        )  # fmt: skip
    return found


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Give names and what they are, below each other; long texts go on in the next line."""
    from rich.table import Table
    from rich.text import Text

    found = Table.grid(padding=(0, _GAP, 0, 0))
    found.add_column(style="bold", no_wrap=True)
    found.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            found.add_row(name, Text(value))
    return found


def lines(*parts: Any) -> Group:
    """Give things below each other."""
    from rich.console import Group

    return Group(*parts)
