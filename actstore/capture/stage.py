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
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore import machine
from actstore.capture.group import (
    ALIGN,
    KIND_BITS,
    PACKET_OVERHEAD,
    PARTS,
    WHOLE,
    Group,
    Inputs,
    Kind,
    Part,
    StagedPass,
)
from actstore.capture.memory import Memory
from actstore.errors import CaptureError
from actstore.packet import LayerInfo, PassInfo, TokenRecord
from actstore.stream.direct import PAGE, PAGED_BYTES
from actstore.stream.records import BLOCK_LIMIT, Features
from actstore.stream.writer import CommitPoint

__all__ = ["Stage"]

GROUP_BYTES: Final = 64 << 20
FLUSH_SECONDS: Final = 1.0
#: Bytes of an arena for each packet that it may hold.
_ARENA_A_PACKET: Final = 1024
_PARTS_LIMIT: Final = (1 << 16) - 1
#: Group-sized shares of the budget that are kept for the encoder's scratch and the writer; and
#: the encoders that one more is kept for, each of which holds a block twice.
_RESERVED: Final = 2
_A_SHARE: Final = 2
#: The most threads that encode.
_ENCODERS: Final = 8
#: The most groups that are encoded and wait for the writer.
_ENCODED_AHEAD: Final = 16
#: Into how many groups a small budget is cut: two arenas, three encoded, and what threads work in.
_LEAST_SHARES: Final = 6
_IDLE, _ENCODING, _WAITING = range(3)

#: memmove that keeps the interpreter's lock: to let it go costs more than the copy.
_move_small: Any = ctypes.PyDLL(None).memmove
_move_small.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_move_small.restype = None
_SMALL: Final = 32 << 10


Copy = Callable[[Group, int, int, int], None]


def _from_memory(address: int) -> Copy:
    def copy(group: Group, offset: int, start: int, nbytes: int) -> None:
        ctypes.memmove(group.address + offset, address + start, nbytes)

    return copy


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
    memory : Memory
        Where arenas come from.
    into : str
        What its errors call the log.
    in_turn : bool
        The model runs on the cores that the pipeline needs: encode between its passes, not beside
        them, as far as memory allows and no group is older than a second.

    Attributes
    ----------
    kinds : list of Kind
        What packets' kinds are; only grows.
    encoded_ahead : int
        How many groups may be encoded and wait for the writer.
    encoders : int
        How many threads may encode: as many as there are cores, and memory within the budget.
    waits : int
        How often ``put`` waited for memory.
    waited_seconds : float
        How long, in all.
    encoding_seconds : float
        How long the model waited between passes for what they gave to be encoded.
    syncing_seconds : float
        How long ``flush`` waited until everything was on the disk.
    high_water : int
        The most bytes that were staged and sealed at a time.
    """

    def __init__(
        self,
        budget: int,
        point: CommitPoint | None = None,
        clock: Callable[[], float] = time.monotonic,
        memory: Memory | None = None,
        *,
        into: str = "the log",
        in_turn: bool = False,
    ) -> None:
        self._into = into
        self.group_bytes = min(GROUP_BYTES, budget // _LEAST_SHARES)
        self.part_bytes = min(BLOCK_LIMIT, self.group_bytes // 4)
        self._small = min(_SMALL, self.part_bytes)  # what is larger may be in parts
        self.kinds: list[Kind] = []
        self.waits = 0
        self.waited_seconds = 0.0
        self.encoding_seconds = 0.0
        self.syncing_seconds = 0.0
        self.high_water = 0
        self._numbers: dict[Kind, int] = {}
        self._clock = clock
        self.memory = memory or Memory()
        # with an RLock a condition's wait ends with the lock held, whatever a signal's handler
        # raises meanwhile; with a Lock it may end without, and release another thread's
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        #: of a group's share, what its packets' descriptions don't need
        self._arena_bytes = (
            self.group_bytes * _ARENA_A_PACKET // (_ARENA_A_PACKET + PACKET_OVERHEAD)
        )
        self._most_packets = self._arena_bytes // _ARENA_A_PACKET
        shares = budget // self.group_bytes
        self.encoded_ahead = min(max(shares // 4, 1), _ENCODED_AHEAD)
        self.encoders = min(machine.cores(), _ENCODERS, _A_SHARE * (shares // 4))
        reserved = _RESERVED + -(-self.encoders // _A_SHARE)
        self._arenas_left = max(2, shares - reserved - self.encoded_ahead)
        self._free: list[NDArray[np.uint8]] = []
        self._sealed: deque[Group] = deque()
        point = point or CommitPoint()
        self._nothing = Group(np.empty(0, np.uint8), 0, 0.0, -1, point.next_seq, self.kinds)
        self._open = self._nothing
        self._pass = point.next_pass - 1
        self._next_pass = point.next_pass
        self._next_step, self._boundary = point.next_step, point.step_boundary
        self._seen_packets = 0
        self._busy_bytes = 0
        self._in_turn = in_turn
        self._running = False  # a pass
        self._encoder = _WAITING  # for its thread to start
        self._process = os.getpid()
        self._failure: BaseException | None = None
        self._closed = False

    # -- the hooks' side ------------------------------------------------------------------------

    def kind(self, kind: Kind) -> int:
        """Give the number of a kind of packets.

        Raises
        ------
        CaptureError
            Its packets are too large for the budget.
        """
        given = kind
        number = self._numbers.get(kind)
        if number is None:
            parts = self._count_parts(kind.nbytes)
            if parts > _PARTS_LIMIT:
                msg = (
                    f"a tensor of {kind.nbytes} bytes (layer {kind.layer}) would be cut into "
                    f"{parts} parts, over the limit of {_PARTS_LIMIT}; give more max_memory_gb"
                )
                raise CaptureError(msg)
            if parts > 1:
                kind = kind._replace(form=PARTS)
            self.kinds.append(kind)
            number = self._numbers[given] = len(self.kinds) - 1
        return number

    def put(self, kind: int, nbytes: int, address: int) -> int:
        """Copy a packet in; wait while the budget is used up.

        Parameters
        ----------
        kind : int
            Number of its kind.
        nbytes : int
            Its size, as its kind has it.
        address : int
            Where its values stand, C-contiguous; they are copied before this returns.

        Returns
        -------
        int
            Its seq.

        Raises
        ------
        CaptureError
            The pipeline has failed.
        """
        with self._lock:
            group = self._open
            packets = group.packets
            offset = group.used
            count = len(packets)
            small = nbytes < self._small and offset + nbytes <= group.limit
            if not small or count >= self._most_packets:
                return self._put_large(kind, nbytes, _from_memory(address))
            _move_small(group.address + offset, address, nbytes)
            group.used = (offset + nbytes + ALIGN - 1) & -ALIGN
            packets.append(offset << KIND_BITS | kind)
            return group.base + count

    def put_from(self, kind: int, nbytes: int, copy: Copy) -> int:
        """Copy a packet in that is elsewhere than in the host's memory; like ``put``.

        Parameters
        ----------
        kind, nbytes : int
            As ``put`` has them.
        copy : callable
            Takes the group, an offset in its arena, and of the packet's bytes the first and how
            many; has copied them by the time that the group's ``crossing`` has arrived.
        """
        with self._lock:
            return self._put_large(kind, nbytes, copy)

    def put_alias(self, kind: int, seq: int) -> int:
        """Stage a packet that has the values of an earlier one of its pass; give its seq.

        Parameters
        ----------
        kind : int
            Number of its kind, which has no bytes.
        seq : int
            The earlier packet's.
        """
        with self._lock:
            group = self._room(0)
            mine = group.base + len(group.packets)
            group.packets.append((mine - seq) << KIND_BITS | kind)
            return mine

    def same_bytes(self, seq: int, address: int, nbytes: int) -> bool:
        """Tell whether a packet staged whole in the open group has exactly these bytes."""
        with self._lock:
            group = self._open
            index = seq - group.base
            if not 0 <= index < len(group.packets):
                return False
            offset, number = divmod(group.packets[index], 1 << KIND_BITS)
            kind = self.kinds[number]
            if kind.form != WHOLE or kind.nbytes != nbytes:
                return False
            given: Any = (ctypes.c_ubyte * nbytes).from_address(address)
            staged = group.arena[offset : offset + nbytes]
            return bool(np.array_equal(staged, np.frombuffer(given, np.uint8)))

    def add_layer(self, info: LayerInfo) -> None:
        """Stage a layer's description, before its first packet."""
        with self._lock:
            self._room(0).layers.append(info)

    def add_features(self, features: Features) -> None:
        """Stage which features of a width are kept, before the first packet of that width."""
        with self._lock:
            self._room(0).features.append(features)

    def begin_pass(
        self, inputs: Inputs | PassInfo, texts: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        """Stage a pass's inputs: the packets that follow are of it."""
        with self._lock:
            group = self._room(0)
            index = self._pass = inputs.index
            group.passes[index] = StagedPass(index, inputs)
            group.texts.update(texts)
            group.starts.append((len(group.packets), index))
            self._running = True
            self._next_pass, self._boundary = index + 1, False

    def update_pass(
        self, inputs: Inputs | PassInfo, texts: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        """Stage a pass's inputs again, with axes that became known while it runs."""
        with self._lock:
            group = self._room(0)
            group.passes[inputs.index] = StagedPass(inputs.index, inputs)
            group.texts.update(texts)

    def end_pass(self, index: int, *, aborted: bool, flush: bool) -> None:
        """Say how a pass ended; with ``flush``, seal the group if it is due."""
        with self._lock:
            group = self._room(0)
            known = group.passes.get(index)
            if known is None:
                known = group.passes[index] = StagedPass(index, None)
            known.closed, known.aborted = True, aborted
            self._running = False
            if flush:
                self._seal_if_due()
            if self._in_turn and (self._sealed or self._encoder == _ENCODING):
                self._let_encode()

    def add_texts(self, texts: Mapping[int, str]) -> None:
        """Stage the texts of token ids."""
        with self._lock:
            self._room(0).texts.update(texts)

    def add_token(self, record: TokenRecord) -> None:
        """Stage a recorded token, and seal the group if it is due."""
        self._check_process()
        with self._lock:
            self._room(0).tokens.append(record)
            self._next_step, self._boundary = record.step + 1, True
            self._seal_if_due()
            if self._in_turn and (self._sealed or self._encoder == _ENCODING):
                self._let_encode()

    def flush(self) -> None:
        """Seal what is open; return when everything is on the disk.

        Raises
        ------
        CaptureError
            The pipeline has failed.
        """
        with self._lock:
            group = self._room(0)
            group.durable = threading.Event()
            self._seal()
        began = self._clock()
        while not group.durable.wait(0.2):
            with self._lock:
                self._check()
        self.syncing_seconds += self._clock() - began
        with self._lock:
            self._check()

    def close(self) -> None:
        """Seal what is open and tell the pipeline that nothing follows."""
        with self._lock:
            if self._failure is None and not self._open.empty:
                self._seal()
            self._nothing.base = self.packets
            self._open = self._nothing
            self._closed = True
            self._changed.notify_all()

    # -- the pipeline's side --------------------------------------------------------------------

    def take(self, timeout: float = FLUSH_SECONDS) -> Group | None:
        """Wait for the next sealed group; None when the stage is closed and none is left.

        While it waits it is the timer: a group that has been open for a second while the model
        idles is sealed.
        """
        with self._lock:
            self._encoder = _IDLE
            self._changed.notify_all()
            while not self._closed and not self._may_encode():
                if not self._changed.wait(timeout):
                    self._seal_if_idle()
            self._encoder = _ENCODING
            return self._sealed.popleft() if self._sealed else None

    def encoder_waits(self) -> None:
        """Say that the group that was taken is encoded, and can't be handed on yet."""
        with self._lock:
            self._encoder = _WAITING
            self._changed.notify_all()

    def release(self, group: Group) -> None:
        """Take back the arena of a group whose bytes are no longer needed."""
        with self._lock:
            self._busy_bytes -= group.charge
            self._free.append(group.arena)
            group.packets = []
            group.parts = []
            self._changed.notify_all()

    def let_go(self) -> None:
        """Give the arenas back to where they came from; the pipeline must have ended."""
        with self._lock:
            while self._free:
                self.memory.give_back(self._free.pop())
        self.memory.trim()

    def fail(self, error: BaseException) -> None:
        """Let every later call, and everyone who waits, raise a `CaptureError`."""
        with self._lock:
            self._failure = self._failure or error
            if self._open is not self._nothing:  # the fast way of put looks at the group alone
                self._open.limit = -1
            self._changed.notify_all()

    @property
    def failure(self) -> BaseException | None:
        """What made the pipeline fail, if it has."""
        return self._failure

    @property
    def over(self) -> bool:
        """Whether nothing can be staged any more: it was closed, or has failed."""
        return self._closed or self._failure is not None

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

    @property
    def packets(self) -> int:
        """The seq that the next packet gets."""
        return self._open.base + len(self._open.packets)

    def _check_process(self) -> None:
        """Refuse a forked child, before the lock: who holds it may not exist here."""
        if self.forked:
            msg = "the capture belongs to the process that began it; this is a fork of that one"
            raise CaptureError(msg)

    # -- under the lock -------------------------------------------------------------------------

    def _count_parts(self, nbytes: int) -> int:
        return max(1, -(-nbytes // self.part_bytes))

    def _put_large(self, kind: int, nbytes: int, copy: Copy) -> int:
        parts = self._count_parts(nbytes)
        if parts == 1:
            group = self._room(nbytes)
            offset = self._copy(group, 0, nbytes, copy)
            group.packets.append(offset << KIND_BITS | kind)
            return group.base + len(group.packets) - 1
        group = self._room(0)
        seq = group.base + len(group.packets)
        group.packets.append(kind)  # from here on its seq is taken
        for part in range(parts):
            start = part * self.part_bytes
            length = min(self.part_bytes, nbytes - start)
            group = self._room(length)
            offset = self._copy(group, start, length, copy)
            group.parts.append(Part(kind, seq, part, parts, offset, length, self._pass))
        return seq

    def _copy(self, group: Group, start: int, nbytes: int, copy: Copy) -> int:
        """Copy bytes to the arena's next place; give its offset."""
        offset = group.used
        if nbytes >= PAGED_BYTES:
            offset = (offset + PAGE - 1) & -PAGE
        copy(group, offset, start, nbytes)
        group.used = (offset + nbytes + ALIGN - 1) & -ALIGN
        return offset

    def _room(self, nbytes: int) -> Group:
        """Give the open group, with room for so many bytes; open one where there is none."""
        self._check()
        group = self._open
        if group is not self._nothing:
            needed = nbytes + PAGE if nbytes >= PAGED_BYTES else nbytes
            described = len(group.packets) + len(group.parts)
            if group.used + needed <= group.limit and described < self._most_packets:
                return group
            if group.empty:
                return group
            self._seal()
        arena = self._arena()
        limit = arena.nbytes
        group = Group(
            arena, arena.ctypes.data, self._clock(), limit, self._nothing.base, self.kinds
        )
        group.starts.append((0, self._pass))
        self._open = group
        return group

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
        return self.memory.take(self._arena_bytes)

    def _may_encode(self) -> bool:
        if not self._sealed:
            return False
        scarce = not self._free and self._arenas_left <= 1
        waited = self._clock() - self._sealed[0].sealed >= FLUSH_SECONDS
        return not self._in_turn or not self._running or scarce or waited

    def _let_encode(self) -> None:
        """Wait until what is sealed is encoded, or the encoder waits for the disk."""
        began = self._clock()
        self._changed.notify_all()
        while self._failure is None and (
            self._encoder == _ENCODING or (self._encoder == _IDLE and self._sealed)
        ):
            self._changed.wait()
        self.encoding_seconds += self._clock() - began

    def _seal(self) -> None:
        group = self._open
        if group is self._nothing:
            return
        self._nothing.base = group.base + len(group.packets)
        self._open = self._nothing
        group.point = CommitPoint(
            self._nothing.base, self._next_pass, self._next_step, self._boundary
        )
        if group.crossing is not None:
            group.crossing.send()
        group.sealed = self._clock()
        self._sealed.append(group)
        self._busy_bytes += group.charge
        self.high_water = max(self.high_water, self._busy_bytes)
        self._changed.notify_all()

    def _seal_if_due(self) -> None:
        group = self._open
        if not group.empty and self._clock() - group.opened >= FLUSH_SECONDS:
            self._seal()

    def _seal_if_idle(self) -> None:
        """Seal a group that is due, where no packet came since this was asked before."""
        before, self._seen_packets = self._seen_packets, self.packets
        if before == self._seen_packets:
            self._seal_if_due()

    def _check(self) -> None:
        if self._failure is not None:
            raise self.told() from self._failure
        if self._closed:
            msg = "the capture has ended; record tokens and run the model inside the with"
            raise CaptureError(msg)
