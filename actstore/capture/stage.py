"""Owns what has been captured and is not yet sealed: the memory budget and the only lock.

Bytes are copied once, into the arena of the open group; the arena is sealed with everything that
was staged beside it, encoded, written and used again. How groups are encoded and written is
``pipeline.py``'s business. Knows nothing of torch: a packet comes as an address.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actstore.errors import CaptureError
from actstore.packet import LayerInfo, PassInfo, TokenRecord
from actstore.stream.records import BLOCK_LIMIT, Features, Pass
from actstore.stream.writer import CommitPoint

__all__ = ["Group", "Stage", "Staged"]

GROUP_BYTES: Final = 64 << 20
FLUSH_SECONDS: Final = 1.0
#: What the Python objects of a packet cost, counted against the group and so the budget.
PACKET_OVERHEAD: Final = 256
_ALIGN: Final = 64
_PARTS_LIMIT: Final = (1 << 16) - 1
#: Group-sized shares of the budget that are kept for encoded groups and the encoder's scratch.
_RESERVED: Final = 4
#: Into how many groups a small budget is cut: two arenas, as much again encoded, and the scratch.
_LEAST_SHARES: Final = 5


class Staged(NamedTuple):
    """A packet, or a part of one, in the arena of its group."""

    layer: int
    seq: int
    pass_index: int
    call: int
    dtype: int
    shape: tuple[int, ...]
    width: int
    alias_back: int
    part: int
    parts: int
    offset: int
    nbytes: int


@dataclass(slots=True)
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
    used : int
        How many bytes of the arena.
    packets : list of Staged
        In the order of capture.
    layers, features, passes, texts, tokens
        What else was staged.
    point : CommitPoint
        Where the run stands at its end; set when it is sealed.
    durable : threading.Event or None
        Set by the writer when the group is on the disk; None where nobody waits for that.
    """

    arena: NDArray[np.uint8]
    address: int
    opened: float
    used: int = 0
    packets: list[Staged] = field(default_factory=list)
    layers: list[LayerInfo] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)
    passes: dict[int, Pass] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    tokens: list[TokenRecord] = field(default_factory=list)
    point: CommitPoint = field(default_factory=CommitPoint)
    durable: threading.Event | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self.packets or self.passes or self.tokens or self.texts)

    @property
    def charge(self) -> int:
        """Bytes that it counts for, with the objects that describe its packets."""
        return self.used + PACKET_OVERHEAD * len(self.packets)

    def bytes_of(self, packet: Staged) -> NDArray[np.uint8]:
        """Give a staged packet's bytes, as a view of the arena."""
        return self.arena[packet.offset : packet.offset + packet.nbytes]


class Stage:
    """Stage packets within a budget; hand over groups when they are due.

    Parameters
    ----------
    budget : int
        Bytes, over everything staged, sealed and encoded. When it is used up, ``put`` waits.
    point : CommitPoint
        Where the run stands at its beginning: after a resume, not at 0.
    clock : callable
        Seconds, monotonic; tests inject their own.
    into : str
        What its errors call the log.

    Attributes
    ----------
    waits : int
        How often ``put`` waited for memory.
    waited_seconds : float
        How long, in all.
    high_water : int
        The most bytes that were staged and sealed at a time.
    raw_bytes : int
        Bytes that were staged in all.
    """

    def __init__(
        self,
        budget: int,
        point: CommitPoint | None = None,
        clock: Callable[[], float] = time.monotonic,
        into: str = "the log",
    ) -> None:
        self._into = into
        self.group_bytes = min(GROUP_BYTES, budget // _LEAST_SHARES)
        self.part_bytes = min(BLOCK_LIMIT, self.group_bytes // 4)
        self.waits = 0
        self.waited_seconds = 0.0
        self.high_water = 0
        self.raw_bytes = 0
        self._clock = clock
        self._changed = threading.Condition(threading.Lock())
        self._arenas_left = max(2, budget // self.group_bytes - _RESERVED)
        self._free: list[NDArray[np.uint8]] = []
        self._sealed: deque[Group] = deque()
        self._open: Group | None = None
        point = point or CommitPoint()
        self._next_seq, self._next_pass = point.next_seq, point.next_pass
        self._next_step, self._boundary = point.next_step, point.step_boundary
        self._used_at = clock()
        self._busy_bytes = 0
        self._process = os.getpid()
        self._failure: BaseException | None = None
        self._closed = False

    # -- the hooks' side ------------------------------------------------------------------------

    def put(  # noqa: PLR0913 - a packet's description, unpacked: this is the hot path
        self,
        seq: int,
        layer: int,
        address: int,
        nbytes: int,
        *,
        dtype: int,
        shape: tuple[int, ...],
        pass_index: int,
        call: int = 0,
        width: int = 0,
        alias_back: int = 0,
    ) -> None:
        """Copy a packet in; wait while the budget is used up.

        Parameters
        ----------
        seq, layer, pass_index, call
            As in `Packet`; the layer by its id.
        address, nbytes : int
            Where its values stand, C-contiguous; they are copied before this returns.
        dtype : int
            dtype code.
        shape : tuple of int
            Of the tensor.
        width : int
            The width before sampling, or 0.
        alias_back : int
            An alias of the packet whose seq is lower by this; it has 0 bytes.

        Raises
        ------
        CaptureError
            The pipeline has failed.
        """
        parts = max(1, -(-nbytes // self.part_bytes))
        if parts > _PARTS_LIMIT:
            msg = (
                f"a tensor of {nbytes} bytes (layer {layer}, pass {pass_index}) would be cut into "
                f"{parts} parts, over the limit of {_PARTS_LIMIT}; give more max_memory_gb"
            )
            raise CaptureError(msg)
        with self._changed:
            for part in range(parts):
                start = part * self.part_bytes
                length = min(self.part_bytes, nbytes - start)
                group = self._room(length)
                offset = -(-group.used // _ALIGN) * _ALIGN
                ctypes.memmove(group.address + offset, address + start, length)
                group.used = offset + length
                group.packets.append(
                    Staged(
                        layer, seq, pass_index, call, dtype, shape, width, alias_back,
                        part, parts, offset, length,
                    )
                )  # fmt: skip
            self.raw_bytes += nbytes
            self._next_seq = seq + 1
            self._used_at = self._clock()

    def same_bytes(self, seq: int, address: int, nbytes: int) -> bool:
        """Tell whether a packet staged whole in the open group has exactly these bytes."""
        with self._changed:
            group = self._open
            if group is None:
                return False
            found = next((one for one in reversed(group.packets) if one.seq == seq), None)
            if found is None or found.parts > 1 or found.nbytes != nbytes:
                return False
            given: Any = (ctypes.c_ubyte * nbytes).from_address(address)
            return bool(np.array_equal(group.bytes_of(found), np.frombuffer(given, np.uint8)))

    def add_layer(self, info: LayerInfo) -> None:
        """Stage a layer's description, before its first packet."""
        with self._changed:
            self._room(0).layers.append(info)

    def add_features(self, features: Features) -> None:
        """Stage which features of a width are kept, before the first packet of that width."""
        with self._changed:
            self._room(0).features.append(features)

    def begin_pass(self, info: PassInfo, texts: dict[int, str] | None = None) -> None:
        """Stage a pass's inputs."""
        with self._changed:
            group = self._room(0)
            group.passes[info.index] = Pass(info, closed=False)
            group.texts.update(texts or {})
            self._next_pass, self._boundary = info.index + 1, False
            self._used_at = self._clock()

    def update_pass(self, info: PassInfo, texts: dict[int, str] | None = None) -> None:
        """Stage a pass's inputs again, with axes that became known while it runs."""
        with self._changed:
            group = self._room(0)
            group.passes[info.index] = Pass(info, closed=False)
            group.texts.update(texts or {})

    def end_pass(self, index: int, *, aborted: bool, flush: bool) -> None:
        """Say how a pass ended; with ``flush``, seal the group if it is due."""
        with self._changed:
            group = self._room(0)
            known = group.passes.get(index)
            info = known.info if known else PassInfo(index)
            ended = Pass(replace(info, aborted=aborted), closed=True, status_only=known is None)
            group.passes[index] = ended
            if flush:
                self._seal_if_due()

    def add_token(self, record: TokenRecord) -> None:
        """Stage a recorded token, and seal the group if it is due."""
        self._check_process()
        with self._changed:
            self._room(0).tokens.append(record)
            self._next_step, self._boundary = record.step + 1, True
            self._seal_if_due()

    def flush(self) -> None:
        """Seal what is open; return when everything is on the disk.

        Raises
        ------
        CaptureError
            The pipeline has failed.
        """
        with self._changed:
            group = self._room(0)
            group.durable = threading.Event()
            self._seal()
        while not group.durable.wait(0.2):
            with self._changed:
                self._check()
        with self._changed:
            self._check()

    def close(self) -> None:
        """Seal what is open and tell the pipeline that nothing follows."""
        with self._changed:
            if self._failure is None and self._open is not None and not self._open.empty:
                self._seal()
            self._closed = True
            self._changed.notify_all()

    # -- the pipeline's side --------------------------------------------------------------------

    def take(self, timeout: float = FLUSH_SECONDS) -> Group | None:
        """Wait for the next sealed group; None when the stage is closed and none is left.

        While it waits it is the timer: a group that has been open for a second while the model
        idles is sealed.
        """
        with self._changed:
            while not self._sealed and not self._closed:
                if not self._changed.wait(timeout):
                    self._seal_if_idle()
            return self._sealed.popleft() if self._sealed else None

    def release(self, group: Group) -> None:
        """Take back the arena of a group whose bytes are no longer needed."""
        with self._changed:
            self._busy_bytes -= group.charge
            self._free.append(group.arena)
            group.packets = []
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let every later call, and everyone who waits, raise a `CaptureError`."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    @property
    def failure(self) -> BaseException | None:
        """What made the pipeline fail, if it has."""
        return self._failure

    @property
    def forked(self) -> bool:
        """Whether this is a fork of the process that captures."""
        return os.getpid() != self._process

    def told(self) -> CaptureError:
        """Give the error that says that the pipeline has failed."""
        cause = str(self._failure) or repr(self._failure)
        return CaptureError(
            f"the capture into {self._into} failed: {cause}; what was committed until then is in "
            "the log and can be read or resumed"
        )

    def _check_process(self) -> None:
        """Refuse a forked child, before the lock: who holds it may not exist here."""
        if self.forked:
            msg = "the capture belongs to the process that began it; this is a fork of that one"
            raise CaptureError(msg)

    # -- under the lock -------------------------------------------------------------------------

    def _room(self, nbytes: int) -> Group:
        """Give the open group, with room for so many bytes; open one where there is none."""
        self._check()
        group = self._open
        if group is not None:
            full = group.used + _ALIGN + nbytes > group.arena.nbytes
            if not full and group.charge < self.group_bytes:
                return group
            if group.empty:
                return group
            self._seal()
        arena = self._arena()
        self._open = Group(arena, arena.ctypes.data, self._clock())
        return self._open

    def _arena(self) -> NDArray[np.uint8]:
        if not self._free and not self._arenas_left:
            began = self._clock()
            self.waits += 1
            while not self._free:
                self._changed.wait()
                self._check()
            self.waited_seconds += self._clock() - began
        if self._free:
            return self._free.pop()
        self._arenas_left -= 1
        return np.empty(self.group_bytes + _ALIGN, np.uint8)

    def _seal(self) -> None:
        group, self._open = self._open, None
        if group is None:
            return
        group.point = CommitPoint(self._next_seq, self._next_pass, self._next_step, self._boundary)
        self._sealed.append(group)
        self._busy_bytes += group.charge
        self.high_water = max(self.high_water, self._busy_bytes)
        self._changed.notify_all()

    def _seal_if_due(self) -> None:
        group = self._open
        if group and not group.empty and self._clock() - group.opened >= FLUSH_SECONDS:
            self._seal()

    def _seal_if_idle(self) -> None:
        if self._clock() - self._used_at >= FLUSH_SECONDS:
            self._seal_if_due()

    def _check(self) -> None:
        if self._failure is not None:
            raise self.told() from self._failure
        if self._closed:
            msg = "the capture has ended; record tokens and run the model inside the with"
            raise CaptureError(msg)
