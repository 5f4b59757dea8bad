"""Owns reading rows and elements of a dataset out of a log, given where they come from.

Which packets are which rows is planned elsewhere; here they are only fetched, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.dtypes import DType
from actstore.stream.joined import JoinedReader
from actstore.stream.reader import StreamReader
from actstore.stream.united import UnitedReader

__all__ = ["ElementReader", "RowReader", "widen"]

Integers = NDArray[np.int64]


def widen(values: NDArray[Any], source: DType) -> NDArray[Any]:
    """Give values in the dtype of datasets: bfloat16 and float8 as float32, exactly.

    bfloat16 is widened by its bits, so that NaNs keep their payloads.
    """
    if source.name == "bfloat16":
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values if source.array == source.numpy else values.astype(source.array)


class RowReader:
    """The rows of one layer of a variable, in a log.

    Parameters
    ----------
    reader : StreamReader, JoinedReader or UnitedReader
        The log, or several.
    packet, source, start, count : numpy.ndarray
        int64 columns sorted by ``start``: rows ``start`` to ``start + count`` are rows ``source``
        on of that packet (a row of the reader's table).
    row_shape : tuple of int
        The shape of a row.
    dtype : DType
        The packets' dtype.
    """

    def __init__(
        self,
        reader: StreamReader | JoinedReader | UnitedReader,
        columns: tuple[Integers, Integers, Integers, Integers],
        row_shape: tuple[int, ...],
        dtype: DType,
    ) -> None:
        self._reader = reader
        self._row_shape = row_shape
        self._dtype = dtype
        self._row_bytes = int(np.prod(row_shape, dtype=np.int64)) * dtype.itemsize
        self._merge(*columns)

    def read(self, first: int, last: int, fill: Any) -> NDArray[Any]:
        """Read rows ``first`` to ``last``, the latter not included.

        Returns
        -------
        numpy.ndarray
            [last - first, *row_shape] in the dtype of datasets; missing rows hold ``fill``.
        """
        out = np.full((last - first, *self._row_shape), fill, self._dtype.array)
        for low, high, values in self._parts(first, last):
            out[low - first : high - first] = widen(values, self._dtype)
        return out

    def read_into(self, out: NDArray[Any], first: int, last: int) -> None:
        """Read rows as the log has them; missing ones are left as they are.

        Parameters
        ----------
        out : numpy.ndarray
            [last - first, *row_shape] in the packets' dtype.
        first, last : int
            The rows, the latter not included.
        """
        for low, high, values in self._parts(first, last):
            out[low - first : high - first] = values

    def cuts(self) -> Integers:
        """Give the rows, ascending, at which another block begins: read to there, it is done."""
        new = np.ones(self._start.size, np.bool_)
        new[1:] = (self._block[1:] != self._block[:-1]) | (self._block[1:] < 0)
        return self._start[new]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        return self._row_shape

    @property
    def dtype(self) -> DType:
        """The packets' dtype."""
        return self._dtype

    def _parts(self, first: int, last: int) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """Give the rows that are there, of a segment each, and their values."""
        begin = int(np.searchsorted(self._start + self._count, first, side="right"))
        end = int(np.searchsorted(self._start, last, side="left"))
        for segment in range(begin, end):
            start, count = int(self._start[segment]), int(self._count[segment])
            low, high = max(first, start), min(last, start + count)
            yield low, high, self._values(segment, low - start, high - low)

    def _values(self, segment: int, skip: int, count: int) -> NDArray[Any]:
        size = count * self._row_bytes
        if self._block[segment] >= 0:
            begin = int(self._offset[segment]) + skip * self._row_bytes
            data = self._reader.block(int(self._block[segment]))[begin : begin + size]
        else:
            begin = (int(self._source[segment]) + skip) * self._row_bytes
            data = self._reader.piece(int(self._packet[segment]), begin, begin + size)
        rows = data.view(self._dtype.numpy)
        return rows.reshape(count, *self._row_shape)

    def _merge(self, packet: Integers, source: Integers, start: Integers, count: Integers) -> None:
        """Join segments that stand one behind the other in one block, as decoded tokens do."""
        table = self._reader.table
        target = self._reader.resolve(packet)
        whole = table.parts[target] == 1
        block = np.where(whole, table.block[target], -1)
        offset = table.offset[target] + source * self._row_bytes
        joined = np.zeros(start.size, np.bool_)
        if start.size:
            joined[1:] = (
                (block[1:] >= 0)
                & (block[1:] == block[:-1])
                & (offset[1:] == offset[:-1] + count[:-1] * self._row_bytes)
                & (start[1:] == start[:-1] + count[:-1])
            )
        heads = np.flatnonzero(~joined)
        self._packet, self._source = target[heads], source[heads]
        self._block, self._offset, self._start = block[heads], offset[heads], start[heads]
        self._count = np.add.reduceat(count, heads) if heads.size else count


class ElementReader:
    """Packets one after the other, flat, in a log.

    Parameters
    ----------
    reader : StreamReader, JoinedReader or UnitedReader
        The log, or several.
    packets : numpy.ndarray
        int64: rows of the reader's table.
    offsets : numpy.ndarray
        int64: the first element of each.
    size : int
        Elements in all.
    dtype : DType
        The packets' dtype.
    """

    def __init__(
        self,
        reader: StreamReader | JoinedReader | UnitedReader,
        packets: Integers,
        offsets: Integers,
        size: int,
        dtype: DType,
    ) -> None:
        self._reader = reader
        self._packets = packets
        self._bounds = np.append(offsets, size)
        self._dtype = dtype

    def read(self, first: int, last: int) -> NDArray[Any]:
        """Read elements ``first`` to ``last``, the latter not included, in datasets' dtype."""
        out = np.empty(last - first, self._dtype.array)
        begin = max(int(np.searchsorted(self._bounds, first, side="right")) - 1, 0)
        end = int(np.searchsorted(self._bounds, last, side="left"))
        size = self._dtype.itemsize
        targets = self._reader.resolve(self._packets[begin:end]).tolist()
        for index, target in enumerate(targets, start=begin):
            start, stop = int(self._bounds[index]), int(self._bounds[index + 1])
            low, high = max(first, start), min(last, stop)
            if low < high:
                place = (low - start) * size, (high - start) * size
                data = self._reader.piece(target, *place)
                inside = data.view(self._dtype.numpy)
                out[low - first : high - first] = widen(inside, self._dtype)
        return out
