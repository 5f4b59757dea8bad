"""Owns what is flushed together: packets in an arena, and what else was staged beside them.

A packet is staged as one integer, its place in the arena and its kind: what it shares with all
packets of its layer that look like it. The rest of its description follows from where it stands
among the others, and is worked out for whole groups at a time by ``encoding.py``.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.packet import LayerInfo, PassInfo, TokenRecord
from actstore.stream.records import Features, Pass
from actstore.stream.writer import CommitPoint

__all__ = [
    "ALIAS",
    "ALIGN",
    "KIND_BITS",
    "PACKET_OVERHEAD",
    "PARTS",
    "WHOLE",
    "Group",
    "Inputs",
    "Kind",
    "Part",
    "StagedPass",
]

#: Offsets of packets in an arena are multiples of it.
ALIGN: Final = 64
#: A packet is ``place << KIND_BITS | kind``.
KIND_BITS: Final = 32
WHOLE, ALIAS, PARTS = range(3)
#: Bytes that one packet's place in the tables of its group costs, at most.
PACKET_OVERHEAD: Final = 128


class Kind(NamedTuple):
    """What packets of one layer that look alike share.

    Attributes
    ----------
    layer : int
        The layer's id.
    dtype : int
        dtype code.
    shape : tuple of int
        Of the tensor.
    nbytes : int
        Of the tensor; 0 where it is an alias.
    width : int
        The width before sampling, or 0.
    form : int
        `WHOLE`, `ALIAS` of an earlier packet, or in `PARTS`.
    """

    layer: int
    dtype: int
    shape: tuple[int, ...]
    nbytes: int
    width: int = 0
    form: int = WHOLE


class Part(NamedTuple):
    """A part of a packet that is too large for one block."""

    kind: int
    seq: int
    part: int
    parts: int
    offset: int
    nbytes: int
    pass_index: int


class Inputs(Protocol):
    """What a pass was fed, before it is worked out."""

    index: int

    def info(self) -> PassInfo:
        """Work it out; the encoder asks, when everything of its group has arrived."""


@dataclass(slots=True, eq=False)
class StagedPass:
    """A pass, as far as its group knows it.

    Attributes
    ----------
    index : int
        Of the pass.
    inputs : Inputs, PassInfo or None
        What it was fed; None where an earlier group has that.
    closed, aborted : bool
        It has ended; by an error.
    """

    index: int
    inputs: Inputs | PassInfo | None
    closed: bool = False
    aborted: bool = False

    def record(self) -> Pass:
        """Give the record of it."""
        given = self.inputs
        if given is None:
            info = PassInfo(self.index, aborted=self.aborted)
            return Pass(info, self.closed, status_only=True)
        info = given if isinstance(given, PassInfo) else given.info()
        return Pass(replace(info, aborted=True) if self.aborted else info, self.closed)


@dataclass(slots=True, eq=False)
class Group:
    """What is flushed together. Its life: open, sealed, encoded, written, free.

    Attributes
    ----------
    arena : numpy.ndarray
        uint8: the bytes of its packets.
    address : int
        Where the arena begins in memory.
    opened : float
        When, by the stage's clock.
    limit : int
        Bytes of the arena that may be used.
    base : int
        The seq of its first packet; each further one's is one more.
    kinds : list of Kind
        What the packets' kinds are; only grows.
    used : int
        How many bytes of the arena.
    packets : list of int
        In the order of capture: place << 32 | kind. The place of a whole one is its offset in
        the arena, that of an alias how much lower the seq of the packet is whose values it has.
    parts : list of Part
        The bytes of packets in parts, which may begin in an earlier group.
    starts : list of (int, int)
        Index of a packet -> the pass that it and those behind it are of.
    layers, features, passes, texts, tokens
        What else was staged.
    point : CommitPoint
        Where the run stands at its end; set when it is sealed.
    sealed : float
        When, by the stage's clock.
    crossing : object or None
        What of it is on devices, as ``device.py`` has it: ``send()`` when it is sealed,
        ``arrive()`` before it is encoded.
    durable : threading.Event or None
        Set by the writer when the group is on the disk; None where nobody waits for that.
    """

    arena: NDArray[np.uint8]
    address: int
    opened: float
    limit: int
    base: int
    kinds: list[Kind]
    used: int = 0
    packets: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)
    layers: list[LayerInfo] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)
    passes: dict[int, StagedPass] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    tokens: list[TokenRecord] = field(default_factory=list)
    point: CommitPoint = field(default_factory=CommitPoint)
    sealed: float = 0.0
    crossing: Any = None
    durable: threading.Event | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self.packets or self.parts or self.passes or self.tokens or self.texts)

    @property
    def charge(self) -> int:
        """Bytes that it counts for, with the objects that describe its packets."""
        return self.used + PACKET_OVERHEAD * (len(self.packets) + len(self.parts))
