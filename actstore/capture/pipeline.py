"""Owns the way of a sealed group into the log: encoded in threads, appended in order by one.

Knows nothing of torch, nor of when a group is due, nor of what its records are.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.capture.encoding import Calls, Encoded, encode
from actstore.capture.group import Group
from actstore.capture.meter import Meter
from actstore.capture.stage import Stage
from actstore.stream.records import Opcode
from actstore.stream.writer import StreamWriter

__all__ = ["Pipeline"]

#: Blocks of several packets are cut at so many bytes: they fit the caches, and a reader that wants
#: one token decodes no more.
BLOCK_BYTES: Final = 1 << 20
#: Bytes of a group that one thread encodes alone.
_LITTLE: Final = 8 << 20


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
    meter : Meter
        Counts what is written.
    """

    def __init__(
        self, stage: Stage, writer: StreamWriter, codec: int, meter: Meter | None = None
    ) -> None:
        self.meter = meter or Meter("the log")
        self._stage = stage
        self._writer = writer
        self._codec = codec
        self._block = min(BLOCK_BYTES, stage.part_bytes)
        self._memory = stage.memory
        self._ready: queue.Queue[tuple[Group, Encoded, NDArray[np.uint8]] | None]
        self._ready = queue.Queue(stage.encoded_ahead)
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
        self._stage.let_go()

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
        calls = Calls()
        try:
            with ThreadPoolExecutor(self._stage.encoders, "actstore-codec") as pool:
                while (group := self._stage.take()) is not None:
                    if self._stage.failure is None:
                        # to copy takes no more than one thread, and others would only take the
                        # interpreter's lock from the model's; for little they wait longer for
                        # cores, where the model's threads spin for a while, than it takes; once
                        # the interpreter exits, a pool takes nothing more
                        little = not self._codec or group.used < _LITTLE
                        alone = little or not threading.main_thread().is_alive()
                        each = map if alone else pool.map
                        if group.crossing is not None:
                            group.crossing.arrive()
                        scratch = self._memory.take(self._stage.group_bytes)
                        encoded = encode(group, self._codec, self._block, calls, each, scratch)
                        if self._ready.full():
                            self._stage.encoder_waits()
                        self._ready.put((group, encoded, scratch))
                    else:
                        self._stage.release(group)
        finally:
            self._ready.put(None)

    def _write(self) -> None:
        while (item := self._ready.get()) is not None:
            group, encoded, scratch = item
            try:
                if self._stage.failure is None:
                    self._append(group, encoded)
            except BaseException as error:
                self._stage.fail(error)
            self._memory.give_back(scratch)
            self._stage.release(group)

    def _append(self, group: Group, encoded: Encoded) -> None:
        began = time.monotonic()
        self._writer.append(encoded.records, group.point)
        took = time.monotonic() - began
        nbytes = sum(one.payload_length for one in encoded.records if one.opcode == Opcode.BLOCK)
        self.meter.written(encoded.packets, encoded.raw_bytes, nbytes, took)
        if group.durable is not None:
            self._writer.sync()
            group.durable.set()
