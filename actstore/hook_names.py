"""Owns TransformerLens' names of activations, as sites and blocks of ours; no torch here."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["KNOWN", "name_of", "parse"]

_OF_BLOCK: Final = {
    "hook_resid_pre": "resid@in",
    "hook_resid_post": "resid",
    "hook_attn_out": "attn",
    "hook_mlp_out": "mlp",
    "attn.hook_pattern": "attn_weights",
}
_OF_MODEL: Final = {
    "hook_embed": "embed",
    "ln_final.hook_normalized": "final_norm",
}
_BLOCK: Final = re.compile(r"blocks\.(\d+|\*)\.(.+)")
#: The names that are known, for messages.
KNOWN: Final = (*(f"blocks.{{i}}.{name}" for name in _OF_BLOCK), *_OF_MODEL)


def parse(name: str) -> tuple[str, int | None] | None:
    """Give the site and the block that one of TransformerLens' names means.

    Returns
    -------
    (str, int or None) or None
        The site, and the block: -1 outside of blocks, None for ``blocks.*``. None where the name
        is none of the known ones.
    """
    if name in _OF_MODEL:
        return _OF_MODEL[name], -1
    found = _BLOCK.fullmatch(name)
    if found is None or found[2] not in _OF_BLOCK:
        return None
    return _OF_BLOCK[found[2]], None if found[1] == "*" else int(found[1])


def name_of(site: str, block: int) -> str | None:
    """Give TransformerLens' name of a site and block of ours; None where there is none."""
    inside = next((name for name, one in _OF_BLOCK.items() if one == site), None)
    if block >= 0:
        return None if inside is None else f"blocks.{block}.{inside}"
    return next((name for name, one in _OF_MODEL.items() if one == site), None)
