"""Owns the packet table: every packet of a log as a row of NumPy columns, sorted by capture order.

Built from BLOCK headers alone; no payload is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore import dtypes
from actstore.stream.records import Block, Entry

__all__ = ["COLUMNS", "BlockPlace", "PacketTable", "build", "conflicts"]

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """A BLOCK and where it stands."""

    entry: Entry
    block: Block
    group: int


@dataclass(frozen=True, slots=True, eq=False)
class PacketTable:
    """Columns of int64 [rows]: a row a packet, or a part of one; sorted by ``seq``, then ``part``.

    Attributes
    ----------
    seq, pass_index, call, layer : numpy.ndarray
        As in `Packet`; the layer by its id.
    dtype : numpy.ndarray
        dtype codes.
    shape : numpy.ndarray
        Index into ``shapes``.
    width : numpy.ndarray
        The width before sampling, or 0.
    alias_of : numpy.ndarray
        seq of the packet whose values it has, or -1.
    block, offset, nbytes : numpy.ndarray
        Where its bytes are: index into ``blocks``, place in the decoded block, and how many.
    part, parts : numpy.ndarray
        0 of 1 for a packet that is whole.
    encoded : numpy.ndarray
        Its share of its block's encoded bytes; a block's shares sum to them exactly.
    shapes : tuple of tuple of int
        The distinct shapes.
    blocks : tuple of BlockPlace
        The blocks, in file order.
    """

    seq: Integers
    pass_index: Integers
    call: Integers
    layer: Integers
    dtype: Integers
    shape: Integers
    width: Integers
    alias_of: Integers
    block: Integers
    offset: Integers
    nbytes: Integers
    part: Integers
    parts: Integers
    encoded: Integers
    shapes: tuple[tuple[int, ...], ...]
    blocks: tuple[BlockPlace, ...]

    def __len__(self) -> int:
        return int(self.seq.size)

    def whole(self) -> NDArray[np.bool_]:
        """Give a mask of the rows that begin a packet: one for each packet."""
        return np.equal(self.part, 0)

    def select(self, rows: NDArray[np.bool_]) -> PacketTable:
        """Give the table of the rows where a mask is true."""
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS})

    def row_of(self, seq: int) -> int:
        """Give the first row of a packet, or -1."""
        row = int(np.searchsorted(self.seq, seq))
        return row if row < len(self) and self.seq[row] == seq else -1


#: The names of the table's columns.
COLUMNS: Final = (
    *("seq", "pass_index", "call", "layer", "dtype", "shape", "width", "alias_of"),
    *("block", "offset", "nbytes", "part", "parts", "encoded"),
)
_RUN_COLUMNS: Final = (
    *("seq", "pass_index", "call", "layer", "dtype", "shape", "width", "alias_back"),
    *("block", "offset", "nbytes", "part", "parts"),
    *("count", "seq_step", "pass_step", "call_step"),
)


def build(blocks: Sequence[BlockPlace], before: PacketTable | None = None) -> PacketTable:
    """Expand the runs of blocks, behind the rows of those that stand before them."""
    known = () if before is None else before.shapes
    shapes = {shape: number for number, shape in enumerate(known)}
    runs = [row for index, place in enumerate(blocks) for row in _runs(place.block, index, shapes)]
    columns = np.array(runs, np.int64).reshape(-1, len(_RUN_COLUMNS))
    table = dict(zip(_RUN_COLUMNS, columns.T, strict=True))
    count = table.pop("count")
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    table = {name: np.repeat(column, count) for name, column in table.items()}
    for name, step in (("seq", "seq_step"), ("pass_index", "pass_step"), ("call", "call_step")):
        table[name] += within * table.pop(step)
    table["offset"] += within * table["nbytes"]
    back = table.pop("alias_back")
    table["alias_of"] = np.where(back > 0, table["seq"] - back, -1)
    table["encoded"] = _shares(table["block"], table["nbytes"], blocks)
    table = _sorted(table)
    places = tuple(blocks)
    if before is not None:
        table["block"] += len(before.blocks)
        places = (*before.blocks, *places)
        later = not len(before) or not count.size or before.seq[-1] < table["seq"][0]
        table = {name: np.concatenate([getattr(before, name), table[name]]) for name in COLUMNS}
        table = table if later else _sorted(table)
    return PacketTable(**table, shapes=tuple(shapes), blocks=places)


def _sorted(table: Mapping[str, Integers]) -> dict[str, Integers]:
    order = np.lexsort((table["part"], table["seq"]))
    return {name: np.ascontiguousarray(column[order]) for name, column in table.items()}


def conflicts(rows: PacketTable) -> list[int]:
    """Give the blocks that contradict an earlier one: a sequence number twice, parts that differ.

    Returns
    -------
    list of int
        Indices into ``rows.blocks``, ascending.
    """
    again = np.flatnonzero(rows.seq[1:] == rows.seq[:-1]) + 1
    first = np.searchsorted(rows.seq, rows.seq[again])  # the others are compared with it
    differs = rows.part[again] == rows.part[again - 1]
    for column in (rows.pass_index, rows.call, rows.layer, rows.dtype, rows.shape, rows.parts):
        differs |= column[again] != column[first]
    return [int(block) for block in np.unique(rows.block[again[differs]])]


def _runs(block: Block, index: int, shapes: dict[tuple[int, ...], int]) -> list[tuple[int, ...]]:
    itemsize = dtypes.from_code(block.dtype).itemsize
    rows: list[tuple[int, ...]] = []
    offset = 0
    for run in block.runs:
        nbytes = block.packet_bytes(run, itemsize)
        shape = shapes.setdefault(block.shapes[run.shape], len(shapes))
        rows.append(
            (
                *(run.seq, run.pass_index, run.call, block.layer, block.dtype, shape),
                *(block.width, run.alias_back, index, offset, nbytes, run.part, run.parts),
                *(run.count, run.seq_step, run.pass_step, run.call_step),
            )
        )
        offset += nbytes * run.count
    return rows


def _shares(block: Integers, nbytes: Integers, blocks: Sequence[BlockPlace]) -> Integers:
    """Divide each block's encoded bytes among its packets by raw size, summing exactly."""
    if not block.size:
        return np.zeros(0, np.int64)
    before = np.cumsum(nbytes) - nbytes
    starts = before[np.searchsorted(block, np.arange(len(blocks)))]
    inside = before - starts[block]
    encoded = np.array([place.entry.payload_length for place in blocks], np.int64)[block]
    raw = np.array([max(place.block.raw_length, 1) for place in blocks], np.int64)[block]
    # both factors are under 2**25 (a block's limits), so that the products fit
    return (inside + nbytes) * encoded // raw - inside * encoded // raw
