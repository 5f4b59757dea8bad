"""Owns the values that reading a log yields: frozen dataclasses over NumPy.

How they are framed in a file is ``actstore.stream``'s; how they are made from a running model,
``actstore.capture``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.parallel import Shard

__all__ = [
    "MAIN_AXES",
    "Axis",
    "LayerInfo",
    "Packet",
    "PassInfo",
    "TokenRecord",
    "axis_of_site",
    "is_weights",
]

_EMPTY: Mapping[str, Any] = MappingProxyType({})
#: The axes whose rows predict tokens, which heads are over.
MAIN_AXES = ("decoder_token", "token")
_HEADS = ("logits", "output")
_WEIGHTS_NDIM = 4


def axis_of_site(site: str, axes: Iterable[str]) -> str | None:
    """Give which of several token axes a site's rows are of, as far as its name says.

    Parameters
    ----------
    site : str
        ``"decoder_resid"``, ``"model.encoder.layers.fc1"``, ``"logits"``, …
    axes : iterable of str
        Names of axes.

    Returns
    -------
    str or None
        One of them; None where there is doubt.
    """
    names = list(axes)
    parts = site.partition("@")[0].partition("#")[0].split(".")
    for name in names:
        side = name.removesuffix("_token")
        if any(part == side or part.startswith(f"{side}_") for part in parts):
            return name
    if parts[-1] in _HEADS:
        return next((name for name in MAIN_AXES if name in names), None)
    return None


def is_weights(site: str, ndim: int) -> bool:
    """Whether a tensor is attention weights [batch, heads, queries, keys]: over no token axis."""
    return ndim == _WEIGHTS_NDIM and ("attn_weights" in site or "attn#" in site)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A hooked module.

    Attributes
    ----------
    id : int
        Its number in the log, from 0.
    name : str
        Its qualified name as ``named_modules()`` gives it, without wrapper prefixes.
    site : str
        The variable of a dataset that it belongs to (``"mlp"``, ``"resid"``, a dotted path).
    block : int
        The index of its block in the stack of decoder blocks, or -1.
    kind : str
        The class of the module, for people.
    shard : Shard or None
        What this process has of its output, where others have the rest.
    """

    id: int
    name: str
    site: str
    block: int = -1
    kind: str = ""
    shard: Shard | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Packet:
    """One hook firing: the tensor that one layer produced.

    Attributes
    ----------
    layer : str
        The layer's name.
    pass_index : int
        The pass it fired in.
    values : numpy.ndarray
        The tensor, in the model's own dtype; bfloat16 as ``ml_dtypes.bfloat16``.
    seq : int
        Run-wide sequence number, from 0, in the order of firing.
    call : int
        The how-manieth firing of that layer in its pass, from 0.
    """

    layer: str
    pass_index: int
    values: NDArray[Any]
    seq: int
    call: int = 0

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.values.shape


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """A token axis of a pass: ``batch`` × ``sequence`` rows, in C order.

    Attributes
    ----------
    name : str
        ``"token"``; ``"encoder_token"`` and ``"decoder_token"``; of a further stack its own, such
        as ``"vision_token"``.
    batch, sequence : int
        Rows are numbered batch item first, then place in the sequence.
    token_ids, positions : numpy.ndarray
        int64 [batch, sequence]; ids are -1 where the model was fed no ids, positions where it
        went on from a state that doesn't say how much it has seen.
    mask : numpy.ndarray
        bool [batch, sequence]; False is padding.
    flat : bool
        The model's input had one leading dimension of batch × sequence rows, not two.
    """

    name: str
    batch: int
    sequence: int
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    mask: NDArray[np.bool_]
    flat: bool = False

    @property
    def rows(self) -> int:
        """Number of rows: batch × sequence."""
        return self.batch * self.sequence


@dataclass(frozen=True, slots=True, eq=False)
class PassInfo:
    """A pass: one outermost call of an entry module.

    Attributes
    ----------
    index : int
        From 0 in a run.
    axes : tuple of Axis
        The token axes of its inputs.
    annotations : mapping
        Labels of its batch items, as given to ``framework.annotate``: name -> list of ``batch``.
    aborted : bool
        The pass raised, or the log ends before its end.
    entry : str
        The name of the module that was called.
    logits_to_keep : int
        How many last positions the head computed; 0 is all of them.
    """

    index: int
    axes: tuple[Axis, ...] = ()
    annotations: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    aborted: bool = False
    entry: str = ""
    logits_to_keep: int = 0


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What ``record_token`` was told.

    Attributes
    ----------
    step : int
        The count of tokens recorded before it.
    token_id : int
        The id in the vocabulary.
    token_text : str
        The decoded text.
    position : int or None
        The position that was given, if one was.
    pass_index : int
        The last pass before it, which made it; -1 where there was none.
    time : float
        When it was recorded, in seconds since the epoch.
    """

    step: int
    token_id: int
    token_text: str
    position: int | None = None
    pass_index: int = -1
    time: float = 0.0
