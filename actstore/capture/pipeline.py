"""Owns the way of a sealed group into the log: encoded in threads, appended in order by one.

Knows nothing of torch, nor of when a group is due.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from actstore import codecs, dtypes
from actstore.capture.stage import Group, Stage, Staged
from actstore.stream.records import (
    PACKETS_LIMIT,
    Block,
    Layer,
    Opcode,
    Record,
    Run,
    Text,
    Token,
)
from actstore.stream.writer import StreamWriter

__all__ = ["Pipeline", "encode"]

ENCODERS: Final = 2
_ENCODED_AHEAD: Final = 1


def encode(
    group: Group, codec: int, block_bytes: int, map_blocks: Callable[..., Any] = map
) -> list[Record]:
    """Turn a sealed group into records, ready to be written.

    Parameters
    ----------
    group : Group
        Sealed; with codec 0 the records share its arena.
    codec : int
        The codec id of its blocks.
    block_bytes : int
        The most raw bytes of a block.
    map_blocks : callable
        Maps a function over the blocks, in order: `map`, or an executor's.

    Returns
    -------
    list of Record
        Layers, features, passes, texts, blocks, tokens.
    """
    blocks = list(_blocks(group.packets, block_bytes))
    return [
        *(Record(Opcode.LAYER, Layer(info).encode()) for info in group.layers),
        *(Record.of(Opcode.FEATURES, *kept.encode()) for kept in group.features),
        *(Record.of(Opcode.PASS, *one.encode()) for one in group.passes.values()),
        *(Record(Opcode.TEXT, one.encode()) for one in Text.split(group.texts)),
        *map_blocks(lambda packets: _block(group, packets, codec), blocks),
        *(Record(Opcode.TOKEN, Token(record).encode()) for record in group.tokens),
    ]


def _blocks(packets: Sequence[Staged], block_bytes: int) -> Iterator[list[Staged]]:
    """Cut a group's packets into blocks: of one layer, dtype and width, consecutive, bounded."""
    by_layer: dict[int, list[Staged]] = {}
    for packet in packets:
        by_layer.setdefault(packet.layer, []).append(packet)
    for mine in by_layer.values():
        block: list[Staged] = []
        nbytes = 0
        for packet in mine:
            full = nbytes + packet.nbytes > block_bytes or len(block) == PACKETS_LIMIT
            if block and (full or not _fits(block[-1], packet)):
                yield block
                block, nbytes = [], 0
            block.append(packet)
            nbytes += packet.nbytes
        yield block


def _fits(before: Staged, packet: Staged) -> bool:
    whole = before.parts == packet.parts == 1
    return whole and before.dtype == packet.dtype and before.width == packet.width


def _block(group: Group, packets: list[Staged], codec: int) -> Record:
    first = packets[0]
    shapes: dict[tuple[int, ...], int] = {}
    runs = tuple(_runs(packets, shapes))
    pieces: list[Any] = [group.bytes_of(packet) for packet in packets if packet.nbytes]
    raw_length = sum(piece.nbytes for piece in pieces)
    used = 0
    if codec and pieces:
        data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        used, encoded = codecs.encode(codec, data, dtypes.from_code(first.dtype).itemsize)
        pieces = [encoded] if used else pieces
    block = Block(first.layer, used, first.dtype, first.width, raw_length, tuple(shapes), runs)
    return Record.of(Opcode.BLOCK, block.encode(), *pieces)


def _runs(packets: list[Staged], shapes: dict[tuple[int, ...], int]) -> Iterator[Run]:
    """Find the runs of packets at regular steps."""
    start = 0
    while start < len(packets):
        first = packets[start]
        end = start + 1
        steps = (0, 0, 0)
        if end < len(packets) and _alike(first, packets[end]):
            steps = _step(first, packets[end])
            while (
                end < len(packets)
                and _alike(first, packets[end])
                and _step(packets[end - 1], packets[end]) == steps
            ):
                end += 1
        yield Run(
            seq=first.seq,
            pass_index=first.pass_index,
            alias_back=first.alias_back,
            count=end - start,
            seq_step=steps[0],
            pass_step=steps[1],
            call=first.call,
            call_step=steps[2],
            shape=shapes.setdefault(first.shape, len(shapes)),
            part=first.part,
            parts=first.parts,
        )
        start = end


def _alike(first: Staged, packet: Staged) -> bool:
    """Whether a packet may be in the run of another: steps are never negative."""
    return (
        packet.shape == first.shape
        and packet.alias_back == first.alias_back
        and packet.call >= first.call
    )


def _step(before: Staged, packet: Staged) -> tuple[int, int, int]:
    return (
        packet.seq - before.seq,
        packet.pass_index - before.pass_index,
        packet.call - before.call,
    )


class Pipeline:
    """Encode and write the groups of a stage, in threads of their own.

    Parameters
    ----------
    stage : Stage
        Where the groups come from.
    writer : StreamWriter
        Open, started or resumed.
    codec : int
        The codec id of the blocks.

    Attributes
    ----------
    encoded_bytes : int
        Bytes of encoded payload that were written.
    """

    def __init__(self, stage: Stage, writer: StreamWriter, codec: int) -> None:
        self.encoded_bytes = 0
        self._stage = stage
        self._writer = writer
        self._codec = codec
        self._ready: queue.Queue[tuple[Group, list[Record]] | None] = queue.Queue(_ENCODED_AHEAD)
        self._ended = threading.Event(), threading.Event()
        work = zip(("encode", "write"), (self._encode, self._write), self._ended, strict=True)
        self._threads = [
            threading.Thread(target=self._run, args=one, name=f"actstore-{name}", daemon=True)
            for name, *one in work
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until everything that was sealed is written; the stage must have been closed."""
        for thread, ended in zip(self._threads, self._ended, strict=True):
            if thread.ident is not None:
                ended.wait()  # until Python 3.13, a join that was interrupted never waits again
                thread.join()

    def stop(self) -> None:
        """Close the stage and end the threads, in whatever state they are."""
        if not self._stage.forked:  # a fork has none of them, and its locks may be held for ever
            self._stage.close()
            self.join()

    def _run(self, work: Callable[[], None], ended: threading.Event) -> None:
        try:
            work()
        except BaseException as error:
            self._stage.fail(error)
        finally:
            ended.set()

    def _encode(self) -> None:
        try:
            with ThreadPoolExecutor(ENCODERS, "actstore-codec") as pool:
                while (group := self._stage.take()) is not None:
                    if self._stage.failure is None:
                        # once the interpreter exits, a pool takes nothing more
                        ends = not threading.main_thread().is_alive()
                        each = map if ends else pool.map
                        records = encode(group, self._codec, self._stage.part_bytes, each)
                        self._ready.put((group, records))
                    else:
                        self._stage.release(group)
        finally:
            self._ready.put(None)

    def _write(self) -> None:
        while (item := self._ready.get()) is not None:
            group, records = item
            try:
                if self._stage.failure is None:
                    self._append(group, records)
            except BaseException as error:
                self._stage.fail(error)
            self._stage.release(group)

    def _append(self, group: Group, records: list[Record]) -> None:
        self._writer.append(records, group.point)
        self.encoded_bytes += sum(
            record.payload_length for record in records if record.opcode == Opcode.BLOCK
        )
        if group.durable is not None:
            self._writer.sync()
            group.durable.set()
