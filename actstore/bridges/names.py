"""Owns which site and block a layer of another tool is, by its name alone.

TransformerLens' names are ``hook_names``'s; a captured model's layers are found by their
structure, in ``capture.select``. The rules by name here give the same for the families that
``schemas/sites.md`` lists, where they have one stack of blocks.
"""

from __future__ import annotations

import re
from typing import Final

from actstore import hook_names

__all__ = ["place_of"]

#: What stands between the index of a block and the end of a name, and the site that it is.
_INSIDE: Final = {
    "": "resid",
    "attn": "attn",
    "attention": "attn",
    "self_attn": "attn",
    "self_attention": "attn",
    "mlp": "mlp",
}
_OUTSIDE: Final = {
    "": "output",
    "embed": "embed",
    "embed_tokens": "embed",
    "embed_in": "embed",
    "wte": "embed",
    "word_embeddings": "embed",
    "final_norm": "final_norm",
    "final_layernorm": "final_norm",
    "final_layer_norm": "final_norm",
    "ln_f": "final_norm",
    "norm": "final_norm",
    "lm_head": "logits",
    "embed_out": "logits",
    "logits": "logits",
}
#: Folders of blocks, and what may stand before them, in a model of one stack.
_BLOCK: Final = re.compile(
    r"(?:models?\.|transformer\.|gpt_neox\.|backbone\.)*(?:layers|layer|h|blocks|block)\.(\d{1,6})"
    r"(?:\.(.+))?"
)
_OUTER: Final = re.compile(r"(?:model\.|transformer\.|gpt_neox\.|backbone\.)*([a-z_]*)")
_MANY_BLOCKS: Final = 1 << 20


def place_of(name: str) -> tuple[str, int]:
    """Give the site and block of a layer.

    Parameters
    ----------
    name : str
        ``"blocks.3.hook_resid_post"``, ``"model.layers.3.mlp"``, ``"layers.3.mlp@in"``, …

    Returns
    -------
    (str, int)
        The site, which is the name without the block's index where no rule knows it; the block,
        or -1.
    """
    stem, mark, tap = name.partition("@")
    found = _place(stem)
    return found[0] + mark + tap, found[1]


def _place(name: str) -> tuple[str, int]:
    meant = hook_names.parse(name)
    if meant is not None and meant[1] is not None:
        return meant[0], meant[1]
    inside = _BLOCK.fullmatch(name)
    if inside is not None:
        rest = inside[2] or ""
        if rest in ("attn.hook_attn_scores",):  # like the pattern, over no token axis
            return "attn_weights_scores", int(inside[1])
        known = _INSIDE.get(rest)
        if known is not None:
            return known, int(inside[1])
    outside = _OUTER.fullmatch(name)
    if outside is not None and outside[1] in _OUTSIDE:
        return _OUTSIDE[outside[1]], -1
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isascii() and part.isdecimal() and len(parts) > 1 and int(part) < _MANY_BLOCKS:
            return ".".join(parts[:place] + parts[place + 1 :]), int(part)
    return name, -1
