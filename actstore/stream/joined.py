"""Owns several logs read as one: their tables one behind the other, in the order given.

What a log counts by itself (packets, passes, blocks, layer ids) is renumbered here; which log a
pass is of, and its index there, is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actstore.buckets import RemotePath
from actstore.errors import ConfigError
from actstore.packet import LayerInfo
from actstore.stream.reader import StreamReader
from actstore.stream.table import COLUMNS, PacketTable
from actstore.stream.united import UnitedReader, features_of, passes_of, texts_of

__all__ = ["JoinedReader"]

Integers = NDArray[np.int64]


class JoinedReader:
    """Logs read as one; whoever opened them closes them.

    Parameters
    ----------
    readers : sequence of StreamReader or UnitedReader
        At least one, each of another run, or another replica of one.

    Attributes
    ----------
    readers : tuple of StreamReader or UnitedReader
        The logs.
    layers, passes, tokens, features, token_texts, table
        As a `StreamReader` has them, of all logs: passes, packets and blocks go on counting where
        the log before ended; layers of one name are one layer.
    starts : numpy.ndarray
        int64: the first pass of each log.

    Raises
    ------
    ConfigError
        Two of them say different things of one layer or sample.
    """

    def __init__(self, readers: Sequence[StreamReader | UnitedReader]) -> None:
        self.readers = tuple(readers)
        self.layers = self._layers()
        self.features = features_of(self.readers)
        self.token_texts = texts_of(self.readers)
        counts = [passes_of(one) for one in self.readers]
        self.starts: Integers = np.cumsum([0, *counts], dtype=np.int64)[:-1]
        self.passes = tuple(
            replace(info, index=info.index + start)
            for one, start in zip(self.readers, self.starts.tolist(), strict=True)
            for info in one.passes
        )
        self.tokens = tuple(
            replace(token, pass_index=token.pass_index + start if token.pass_index >= 0 else -1)
            for one, start in zip(self.readers, self.starts.tolist(), strict=True)
            for token in one.tokens
        )
        self.table = self._table()

    @property
    def path(self) -> Path | RemotePath:
        """The first log."""
        return self.readers[0].path

    def check(self) -> None:
        """Raise the damage that was found on opening a log, unless it is to be skipped."""
        for one in self.readers:
            one.check()

    # -- what rows are read by ------------------------------------------------------------------

    def block(self, index: int) -> NDArray[np.uint8]:
        """Give the decoded bytes of a block of the table."""
        log = int(np.searchsorted(self._blocks, index, side="right")) - 1
        return self.readers[log].block(index - int(self._blocks[log]))

    def piece(self, row: int, first: int, last: int) -> NDArray[np.uint8]:
        """Give some bytes of a packet; see `StreamReader.piece`."""
        log = int(np.searchsorted(self._rows, row, side="right")) - 1
        return self.readers[log].piece(row - int(self._rows[log]), first, last)

    def resolve(self, packets: Integers) -> Integers:
        """Give, for rows of the table, those that hold the bytes; see `StreamReader.resolve`."""
        found = np.empty_like(packets)
        logs = np.searchsorted(self._rows, packets, side="right") - 1
        for log in np.unique(logs).tolist():
            mine, start = logs == log, self._rows[log]
            found[mine] = self.readers[log].resolve(packets[mine] - start) + start
        return found

    # -- putting together -----------------------------------------------------------------------

    def _layers(self) -> dict[str, LayerInfo]:
        found: dict[str, LayerInfo] = {}
        for one in self.readers:
            for name, info in one.layers.items():
                known = found.setdefault(name, replace(info, id=len(found)))
                if (known.site, known.block) != (info.site, info.block):
                    msg = (
                        f"layer {name!r} is site {known.site!r} of block {known.block} in "
                        f"{self.path}, and {info.site!r} of {info.block} in {one.path}: these are "
                        "different models; compact each by itself"
                    )
                    raise ConfigError(msg)
        return found

    def _table(self) -> PacketTable:
        shapes: dict[tuple[int, ...], int] = {}
        parts: list[dict[str, Integers]] = []
        seq = block = row = 0
        blocks: list[int] = []
        rows: list[int] = []
        for one, start in zip(self.readers, self.starts.tolist(), strict=True):
            table = one.table
            ids = {info.id: self.layers[name].id for name, info in one.layers.items()}
            number = np.array([shapes.setdefault(s, len(shapes)) for s in table.shapes], np.int64)
            layer = np.full(max(ids, default=-1) + 1, -1, np.int64)
            layer[list(ids)] = list(ids.values())
            columns = {name: getattr(table, name) for name in COLUMNS}
            columns |= {
                "seq": table.seq + seq,
                "pass_index": table.pass_index + start,
                "layer": layer[table.layer],
                "shape": number[table.shape],
                "alias_of": np.where(table.alias_of >= 0, table.alias_of + seq, -1),
                "block": np.where(table.block >= 0, table.block + block, -1),
            }
            blocks.append(block)
            rows.append(row)
            parts.append(columns)
            seq += int(table.seq.max(initial=-1)) + 1
            block += one.block_count if isinstance(one, UnitedReader) else len(table.blocks)
            row += len(table)
        self._blocks: Integers = np.array(blocks, np.int64)
        self._rows: Integers = np.array(rows, np.int64)
        joined = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
        places = tuple(place for one in self.readers for place in one.table.blocks)
        return PacketTable(**joined, shapes=tuple(shapes), blocks=places)
