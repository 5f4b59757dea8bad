"""Owns names that a Zarr store, a file system and a dataset can all have; none is given twice."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["GROUPS", "STATISTICS", "Names", "clean", "plain_json", "plain_text"]

#: The archive's groups of further tables.
GROUPS: Final = ("text", "tokens", "passes")
#: The group of what was computed from the archive, there once something was.
STATISTICS: Final = "statistics"
_ODD: Final = re.compile(r"[^\w.\-]+")
_MOST_BYTES: Final = 160  # a file's name has at most 255, and endings follow


class Names:
    """Gives each array and dimension a name of its own, also where case doesn't count.

    Parameters
    ----------
    taken : iterable of str
        Names that are never given.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = {name.casefold() for name in ("zarr.json", *GROUPS, STATISTICS, *taken)}

    def __contains__(self, name: str) -> bool:
        return name.casefold() in self._taken

    def reserve(self, *names: str) -> None:
        """Never give these."""
        self._taken.update(name.casefold() for name in names)

    def give(self, wanted: str, ends: tuple[str, ...] = ("",)) -> str:
        """Give the stem nearest to the one wanted with which no ending makes a name that is taken.

        Parameters
        ----------
        wanted : str
            Anything: what can't stand in a name becomes ``_``.
        ends : tuple of str
            What is put behind the stem; all of these names are then taken.
        """
        wanted = clean(wanted)
        name, number = wanted, 1
        while any(name + end in self for end in ends):
            number += 1
            name = f"{wanted}_{number}"
        self.reserve(*(name + end for end in ends))
        return name


def clean(wanted: str) -> str:
    """Give a name without leading dots and underscores, which mean something to a store."""
    name = _ODD.sub("_", wanted).lstrip("._").rstrip(".")
    short = name.encode()[:_MOST_BYTES].decode(errors="ignore")
    return short or "unnamed"


def leads_out(name: str) -> bool:
    """Whether the name of an array or a group, with slashes, is of nothing within an archive."""
    return not set(name.split("/")).isdisjoint(("", ".", ".."))


def plain_text(text: str) -> str:
    """Give text that UTF-8 can hold: lone surrogates become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def plain_json(value: Any) -> Any:
    """Give a JSON value that every parser reads: without lone surrogates, NaN and infinities."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, Mapping):
        return {plain_text(str(key)): plain_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(one) for one in value]
    return value
