"""Owns the small HTML tables that notebooks show of what actstore returns; escapes everything.

The page of a run is ``reporting``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as _escape
from typing import Any, Final

__all__ = ["Page", "amount", "attribute", "bytes_of", "escape", "facts", "table"]

_LONGEST: Final = 300  # characters of a cell
_LONG: Final = 20  # characters, from which on a text is long
_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")


def escape(value: Any) -> str:
    """Give a value as text that is only text in HTML, in an element or an attribute; cut."""
    text = str(value)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return _escape(text.encode("utf-8", "backslashreplace").decode())


def attribute(text: str) -> str:
    """Escape text of any length for an attribute in double quotes."""
    whole = text.encode("utf-8", "backslashreplace").decode()
    return whole.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def bytes_of(count: float) -> str:
    """Say bytes in the unit that suits them.

    >>> bytes_of(1), bytes_of(1234), bytes_of(5_600_000)
    ('1 B', '1.23 kB', '5.6 MB')
    """
    place = 0
    while abs(count) >= 999.5 and place < len(_UNITS) - 1:
        count /= 1000
        place += 1
    return f"{count:.3g} {_UNITS[place]}"


def amount(value: Any) -> str:
    """Say a value: numbers briefly, lists by their members, None as a dash.

    >>> amount(1234567), amount(0.123456), amount(None), amount(True), amount(["a", "b"])
    ('1,234,567', '0.1235', '–', 'yes', 'a, b')
    """
    if value is None or value == "":
        return "–"
    match value:
        case bool():
            found = "yes" if value else "no"
        case int():
            found = f"{value:,}"
        case float():
            found = f"{value:.4g}"
        case Mapping():
            found = ", ".join(f"{name} {amount(one)}" for name, one in value.items())
        case list() | tuple():
            found = ", ".join(map(amount, value))
        case _:
            found = str(value)
    return found or "–"


def facts(caption: str, pairs: Iterable[tuple[str, Any]]) -> str:
    """Give a table of two columns, what and how much; the first are headings of their rows."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(amount(value))}</td></tr>'
        for name, value in pairs
    )
    return f'<table class="f"><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table>'


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Give a table with headings; the first cell of each row is the heading of it."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f"<tr>{_cell('th', row[0])}{''.join(_cell('td', one) for one in row[1:])}</tr>"
        for row in rows
    )
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _cell(tag: str, value: Any) -> str:
    """Give a cell: of class n what is a number, of class t what is a long text."""
    text = amount(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = "n" if number else "t" if len(text) > _LONG else ""
    scope = ' scope="row"' if tag == "th" else ""
    return f"<{tag}{scope}{f' class={kind}' if kind else ''}>{escape(text)}</{tag}>"


@dataclass(frozen=True, slots=True)
class Page:
    """The page of a run, as a notebook shows it.

    Attributes
    ----------
    title : str
        What it is of.
    html : str
        The whole page, which needs no network.
    """

    title: str
    html: str

    def __repr__(self) -> str:
        return f"<Page of {self.title}: {bytes_of(len(self.html))}>"

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="Report of {escape(self.title)}" sandbox="allow-scripts" '
            'style="box-sizing:border-box;width:100%;height:46rem;border:1px solid #8886" '
            f'srcdoc="{attribute(self.html)}"></iframe>'
        )
