"""Owns how a token's text is written in a figure: fonts, visible white space, what no font has.

Shaping and the direction within one token are matplotlib's; tokens stand in their own order.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Final

__all__ = ["families", "label", "labels"]

#: What is tried, in this order; DejaVu Sans comes with matplotlib, and has Latin, Greek, Cyrillic,
#: Hebrew, Arabic, and symbols. None of them draws by colour bitmaps, which matplotlib can't.
_FAMILIES: Final = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK TC"),
    *("Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans TC", "Noto Sans KR"),
    *("Source Han Sans SC", "Source Han Sans JP", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Droid Sans Fallback", "IPAexGothic", "IPAGothic", "NanumGothic", "PingFang SC"),
    *("Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("SimHei", "Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari"),
    *("Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai", "Noto Sans Georgian"),
    *("Noto Sans Armenian", "Noto Sans Ethiopic", "Noto Sans Symbols", "Noto Sans Symbols 2"),
    *("Noto Emoji", "Symbola", "Arial Unicode MS"),
)
_SHOWN: Final = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
_MORE: Final = "…"


@cache
def families() -> tuple[str, ...]:
    """Give the installed fonts that texts are drawn by, in the order in which they are tried."""
    found = _there()
    if len(found) < 2:  # only matplotlib's own
        _learn()
        found = _there()
    return found or ("DejaVu Sans",)


def _there() -> tuple[str, ...]:
    from matplotlib import font_manager

    there = set(font_manager.fontManager.get_font_names())
    return tuple(one for one in _FAMILIES if one in there)


def _learn() -> None:
    """Tell matplotlib of fonts that were installed after it last looked, whose list it keeps."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {one.fname for one in manager.ttflist}
    for place in font_manager.findSystemFonts():
        if place not in known:
            # it says which it can't draw by: of bitmaps, or broken
            with suppress(NotImplementedError, RuntimeError, OSError):
                manager.addfont(place)


@cache
def covered() -> frozenset[int]:
    """Give the code points that one of the fonts has a glyph of."""
    from matplotlib import font_manager

    found: set[int] = set()
    for family in families():
        place = font_manager.findfont(family, fallback_to_default=True)
        found |= set(font_manager.get_font(place).get_charmap())
    return frozenset(found)


def label(text: str, token_id: int = -1, *, most: int = 12) -> str:
    """Give the text of a token as it can be drawn, on one line.

    Parameters
    ----------
    text : str
        The token's.
    token_id : int, optional
        Its id, or −1: it stands for a token without text, or of which no font has most letters.
    most : int, optional
        How long it may be.

    Returns
    -------
    str
        White space as ␣ ⏎ ⇥; what has no glyph, or none of its own (controls, marks of direction),
        as ``U+6F22``; a mark that combines with nothing on ◌; what is too long ends with ….
    """
    if not text:
        return f"#{token_id}" if token_id >= 0 else "·"
    parts = [_written(one) for one in text]
    strange = sum(one.startswith("U+") and len(one) > 1 for one in parts)
    if strange > 1 and 2 * strange > len(parts) and token_id >= 0:
        return f"#{token_id}"
    if unicodedata.combining(text[0]) and parts[0] == text[0] and ord("◌") in covered():
        parts[0] = "◌" + parts[0]
    return _shortened(parts, most)


def labels(texts: Iterable[Any], ids: Iterable[Any], *, most: int = 12) -> list[str]:
    """Give the texts of tokens as `label` does."""
    return [label(str(text), int(one), most=most) for text, one in zip(texts, ids, strict=True)]


def _written(letter: str) -> str:
    shown = _SHOWN.get(letter, letter)
    kind = unicodedata.category(shown)
    if kind[0] in "CZ" or ord(shown) not in covered():
        return f"U+{ord(letter):04X}"
    return shown


def _shortened(parts: Sequence[str], most: int) -> str:
    """Cut at a whole letter: marks that combine stay with theirs."""
    whole = "".join(parts)
    if len(whole) <= most:
        return whole
    found = ""
    for place, one in enumerate(parts):
        behind = parts[place + 1] if place + 1 < len(parts) else ""
        marks = len(behind) == 1 and unicodedata.combining(behind)
        if len(found) + len(one) + (1 if marks else 0) > most - 1:
            break
        found += one
    return (found or parts[0]) + _MORE
