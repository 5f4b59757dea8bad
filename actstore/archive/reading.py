"""Owns reading rows of an archive's arrays of values, straight from the files of their shards.

Only the chunks that are needed are read, and decoded to where they are wanted, by threads. An
array of another form than compaction writes is none of its business: zarr-python reads that.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from actstore import codecs, machine
from actstore.archive.precision import EXACT, SCALE, decoded
from actstore.archive.shards import EMPTY, index_bytes, is_sealed, shard_path
from actstore.archive.zipped import Place, read_at
from actstore.buckets import RemotePath
from actstore.errors import ArchiveError, FormatError

__all__ = ["CodedRows", "Rows", "ShardedRows", "Storage", "fill_of", "value_rows"]

Integers = NDArray[np.int64]
_INDICES: Final = 4096  # shards whose index is kept
_ALONE: Final = 4  # chunks that are not worth threads
_REQUESTS: Final = 8  # to a bucket, at a time
_GAP: Final = 1 << 20  # bytes that are read with what is around them, rather than asked for twice
_FRAME: Final = 1 << 16  # bytes that a chunk's encoded ones can't exceed it by
_MOST: Final = 64 << 20  # bytes that are asked for at once


_PIECE: Final = 1 << 20  # values that are decoded at a time

#: Threads that the reads of this process may have, all together. None is left running between
#: reads: a process may be forked then.
_helpers = threading.Semaphore(machine.cores())


def _forked() -> None:
    """Begin anew: threads that hold some of them, or are about to, aren't in a fork."""
    global _helpers
    _helpers = threading.Semaphore(machine.cores())


os.register_at_fork(after_in_child=_forked)


class Rows(Protocol):
    """The rows of an array of values, of whatever container."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""

    @property
    def axis(self) -> int:
        """The place of the rows among its dimensions: 0, or 1 behind ``layer``."""

    def read(self, layer: int, rows: Integers) -> NDArray[Any]:
        """Read rows of a layer, in the order given: [n, *row_shape]."""


class _Wanted(NamedTuple):
    """Rows of one chunk, and where they go."""

    chunk: int
    within: Integers
    target: Integers


@dataclass(frozen=True, slots=True)
class Storage:
    """How an array is stored, by its metadata; rows are cut, layers stand apart."""

    shape: tuple[int, ...]
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype
    fill: Any
    order: tuple[int, ...] | None
    config: Mapping[str, Any] | None
    axis: int

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> Self | None:
        """Read metadata; None where it is not of the form that compaction writes."""
        try:
            (sharding,) = said["codecs"]
            inner = sharding["configuration"]
            names = [one["name"] for one in inner["codecs"]]
            order = None
            if names[0] == "transpose":
                order = tuple(inner["codecs"][0]["configuration"]["order"])
                names = names[1:]
            plain = names in (["bytes", "crc32c"], ["bytes", "blosc", "crc32c"])
            ends = inner.get("index_location", "end") == "end"
            index = [one["name"] for one in inner["index_codecs"]]
            if sharding["name"] != "sharding_indexed" or not plain or not ends:
                return None
            if index != ["bytes", "crc32c"]:
                return None
            dtype = np.dtype(said["data_type"])
            found = cls(
                tuple(said["shape"]),
                tuple(said["chunk_grid"]["configuration"]["chunk_shape"]),
                tuple(inner["chunk_shape"]),
                dtype,
                fill_of(said["fill_value"], dtype),
                order,
                {"id": "blosc"} if "blosc" in names else None,
                int(said["dimension_names"][0] == "layer"),
            )
            return found if found._regular() else None
        except (KeyError, IndexError, TypeError, ValueError):
            return None

    def _regular(self) -> bool:
        axis = self.axis
        whole = all(
            cut[axis + 1 :] == self.shape[axis + 1 :] and cut[:axis] == (1,) * axis
            for cut in (self.shard, self.chunk)
        )
        known = self.order is None or sorted(self.order) == list(range(len(self.shape)))
        return whole and known and min(self.shape) > 0 and self.shard[axis] % self.chunk[axis] == 0

    def without_order(self) -> Self:
        """Give the same, with chunks that are not transposed."""
        return replace(self, order=None)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        return self.shape[self.axis + 1 :]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a whole chunk."""
        return int(np.prod(self.chunk, dtype=np.int64)) * self.dtype.itemsize


def fill_of(said: Any, dtype: np.dtype) -> Any:
    """Give an array's fill value, of what its metadata says."""
    if dtype.kind == "c":
        return complex(float(said[0]), float(said[1]))
    return dtype.type(float(said) if dtype.kind == "f" else said)


def _spread(work: Callable[[Any], None], given: Sequence[Any]) -> None:
    """Call a function on each, by as many threads as other reads of this process leave."""
    lent = 0
    while lent < len(given) and _helpers.acquire(blocking=False):
        lent += 1
    try:
        if lent > 1:
            with ThreadPoolExecutor(lent) as pool:
                for _ in pool.map(work, given):
                    pass
        else:
            for one in given:
                work(one)
    finally:
        if lent:
            _helpers.release(lent)


class ShardedRows:
    """The rows of a sharded array. Safe to use from several threads.

    Parameters
    ----------
    folder : Path or ZipPath
        The array's.
    storage : Storage
        How it is stored.

    Attributes
    ----------
    shape : tuple of int
        Of the array.
    dtype : numpy.dtype
        Of the array.
    axis : int
        The place of the rows among its dimensions: 0, or 1 behind ``layer``.
    """

    def __init__(self, folder: Place, storage: Storage) -> None:
        self.folder = folder
        self.shape, self.dtype, self.axis = storage.shape, storage.dtype, storage.axis
        self._storage = storage
        self._lock = threading.Lock()
        self._indices: OrderedDict[tuple[int, int], NDArray[np.uint64] | None] = OrderedDict()

    @classmethod
    def of(cls, folder: Place, said: Mapping[str, Any]) -> Self | None:
        """Give what reads an array of this metadata; None where it has another form."""
        storage = Storage.parse(said)
        return None if storage is None else cls(folder, storage)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self._storage)

    def read(self, layer: int, rows: Integers) -> NDArray[Any]:
        """Read rows of a layer, in the order given.

        Parameters
        ----------
        layer : int
            The place on ``layer``; 0 where there is none.
        rows : numpy.ndarray
            int64 [n]: rows, each of those that there are.

        Returns
        -------
        numpy.ndarray
            [n, *row_shape]; rows that were never written hold the fill value.

        Raises
        ------
        ArchiveError
            A chunk is damaged, or can't be read.
        """
        out = np.empty((rows.size, *self._storage.row_shape), self.dtype)
        wanted = self._wanted(rows)
        if isinstance(self.folder, RemotePath):
            self._read_objects(layer, wanted, out)
        elif len(wanted) < _ALONE:
            for one in wanted:
                self._read(layer, one, out)
        else:
            _spread(lambda one: self._read(layer, one, out), wanted)
        return out

    def _read_objects(self, layer: int, wanted: list[_Wanted], out: NDArray[Any]) -> None:
        """Read from a bucket: of each shard what is wanted, in as few requests as can be."""
        shards: dict[int, list[_Wanted]] = {}
        for one in wanted:
            shards.setdefault(one.chunk // self._per_shard, []).append(one)

        def read(shard: int) -> None:
            found = self._fetched(layer, shard, [one.chunk for one in shards[shard]])
            for one in shards[shard]:
                self._place(layer, one, found[one.chunk], out)

        if len(shards) == 1:
            read(*shards)
        elif shards:
            with ThreadPoolExecutor(min(_REQUESTS, len(shards))) as pool:
                for _ in pool.map(read, shards):
                    pass

    def _fetched(
        self, layer: int, shard: int, chunks: Sequence[int]
    ) -> dict[int, memoryview | None]:
        """Give the bytes of ascending chunks of a shard in a bucket.

        All of it where half of its chunks are wanted; else its index, and the ranges of bytes.
        """
        first, path = shard * self._per_shard, self._path(layer, shard)
        there = -(-self.shape[self.axis] // self._storage.chunk[self.axis]) - first
        with self._lock:
            known = (layer, shard) in self._indices
        data = None
        if not known and 2 * len(chunks) >= min(there, self._per_shard):
            try:
                data = self._whole(path)
            except FileNotFoundError:
                data = b""
            tail = data[-index_bytes(self._per_shard) :] if data else None
            self._remember(layer, shard, tail)
        index = self._index(layer, shard, self._per_shard)
        found: dict[int, memoryview | None] = dict.fromkeys(chunks)
        places = []
        for chunk in chunks if index is not None else ():
            place = self._chunk_place(layer, chunk, index)
            if place is not None:
                places.append((*place, chunk))
        for run in [places] if data is not None else _near(sorted(places)):
            start = 0 if data is not None else run[0][0]
            end = max((offset + length for offset, length, _ in run), default=0)
            bytes_ = data if data is not None else self._part(path, start, end - start)
            view = memoryview(bytes_)
            for offset, length, chunk in run:
                found[chunk] = self._unsealed(
                    layer, chunk, view[offset - start : offset - start + length], length
                )
        return found

    def _whole(self, path: Place) -> bytes:
        """Read a shard, unless it has more bytes than its chunks can have."""
        count = self._per_shard
        most = count * (self._storage.chunk_bytes + _FRAME) + index_bytes(count)
        if not isinstance(path, RemotePath):
            return path.read_bytes()
        try:
            return path.read_bytes(most)
        except ValueError as error:
            msg = f"{path} is damaged: {error}, which is the most that its chunks can have"
            raise ArchiveError(msg) from error

    def _part(self, path: Place, offset: int, length: int) -> bytes:
        if isinstance(path, RemotePath):
            return path.bucket.part(path.inside, offset, length)
        with path.open("rb", buffering=0) as file:
            return read_at(file, length, offset)

    def _wanted(self, rows: Integers) -> list[_Wanted]:
        if not rows.size:
            return []
        size = self._storage.chunk[self.axis]
        chunks = rows // size
        order = np.argsort(chunks, kind="stable")
        starts = np.flatnonzero(np.diff(chunks[order], prepend=-1))
        return [
            _Wanted(int(chunks[mine[0]]), rows[mine] % size, mine)
            for mine in np.split(order, starts[1:])
        ]

    def _read(self, layer: int, wanted: _Wanted, out: NDArray[Any]) -> None:
        """Decode a chunk to where its rows go: at once, where they are all of it, in order."""
        self._place(layer, wanted, self._encoded(layer, wanted.chunk), out)

    def _place(
        self, layer: int, wanted: _Wanted, encoded: memoryview | None, out: NDArray[Any]
    ) -> None:
        storage, target = self._storage, wanted.target
        if encoded is None:
            out[target] = storage.fill
            return
        count, first = target.size, int(target[0])
        here = out[first : first + count]
        run = target[-1] - first == count - 1 and wanted.within[-1] - wanted.within[0] == count - 1
        direct = run and here.nbytes == storage.chunk_bytes and storage.order is None
        place = here if direct else np.empty(storage.chunk, self.dtype)
        self._decode_chunk(layer, wanted.chunk, encoded, place)
        if not direct:
            rows = self._turned(place)
            low = int(wanted.within[0])
            if run:
                here[...] = rows[low : low + count]
            else:
                out[target] = rows[wanted.within]

    def _decode_chunk(
        self, layer: int, chunk: int, encoded: memoryview, place: NDArray[Any]
    ) -> None:
        try:
            self._decode(encoded, place.reshape(-1).view(np.uint8))
        except FormatError as error:
            raise self._damaged(layer, chunk, str(error)) from error

    def _turned(self, place: NDArray[Any]) -> NDArray[Any]:
        """Give the rows of a chunk as it is stored, without its layer."""
        storage = self._storage
        if storage.order is not None:
            turned = place.reshape([storage.chunk[axis] for axis in storage.order])
            place = turned.transpose(np.argsort(storage.order))
        return place.reshape(storage.chunk[self.axis :])

    def _decode(self, encoded: memoryview, out: NDArray[np.uint8]) -> None:
        codecs.decode_into(self._storage.config, encoded, out)

    def is_written(self, layer: int, chunk: int) -> bool:
        """Whether a chunk of a layer is there; the others hold the fill value."""
        shard, number = divmod(chunk, self._per_shard)
        index = self._index(layer, shard, self._per_shard)
        return index is not None and int(index[number, 0]) != EMPTY

    def chunk(self, layer: int, chunk: int) -> NDArray[Any] | None:
        """Read a whole chunk, with what stands in it behind the end of the array.

        Returns
        -------
        numpy.ndarray or None
            [chunk_rows, *row_shape]; None where it was not written.
        """
        encoded = self._encoded(layer, chunk)
        if encoded is None:
            return None
        place = np.empty(self._storage.chunk, self.dtype)
        self._decode_chunk(layer, chunk, encoded, place)
        return self._turned(place)

    @property
    def _per_shard(self) -> int:
        return self._storage.shard[self.axis] // self._storage.chunk[self.axis]

    def _encoded(self, layer: int, chunk: int) -> memoryview | None:
        """Read a chunk's bytes, checked against their checksum; None where it was not written."""
        shard = chunk // self._per_shard
        path = self._path(layer, shard)
        try:
            place = self._chunk_place(layer, chunk, self._index(layer, shard, self._per_shard))
            if place is None:
                return None
            data = self._part(path, *place)
        except OSError as error:
            msg = f"{path} can't be read: {error}; see actstore.verify"
            raise ArchiveError(msg) from error
        return self._unsealed(layer, chunk, memoryview(data), place[1])

    def _chunk_place(
        self, layer: int, chunk: int, index: NDArray[np.uint64] | None
    ) -> tuple[int, int] | None:
        """Give where a chunk is in its shard, and its bytes; None where it was not written."""
        if index is None:
            return None
        offset, length = map(int, index[chunk % self._per_shard])
        if offset == length == EMPTY:
            return None
        if length > self._storage.chunk_bytes + _FRAME:
            raise self._damaged(layer, chunk, f"the index says that it has {length} bytes")
        return offset, length

    def _unsealed(self, layer: int, chunk: int, data: memoryview, length: int) -> memoryview:
        if len(data) < length or not is_sealed(data):
            raise self._damaged(layer, chunk, "its bytes don't match their checksum")
        return data[:-4]

    def _index(self, layer: int, shard: int, count: int) -> NDArray[np.uint64] | None:
        with self._lock:
            if (layer, shard) in self._indices:
                self._indices.move_to_end((layer, shard))
                return self._indices[layer, shard]
        size, path = index_bytes(count), self._path(layer, shard)
        try:
            if isinstance(path, RemotePath):
                data = path.bucket.tail(path.inside, size)
            else:
                with path.open("rb", buffering=0) as file:
                    file.seek(max(file.seek(0, os.SEEK_END) - size, 0))
                    data = file.read(size)
        except FileNotFoundError:
            return self._remember(layer, shard, None)
        return self._remember(layer, shard, data)

    def _remember(self, layer: int, shard: int, data: bytes | None) -> NDArray[np.uint64] | None:
        """Check the index of a shard, and have it from then on; None where there is no shard."""
        found = None
        if data is not None:
            if len(data) < index_bytes(self._per_shard) or not is_sealed(data):
                path = self._path(layer, shard)
                msg = f"{path}: the shard's index doesn't match its checksum; see actstore.verify"
                raise ArchiveError(msg)
            found = np.frombuffer(data[:-4], "<u8").reshape(-1, 2)
        with self._lock:
            self._indices[layer, shard] = found
            while len(self._indices) > _INDICES:
                self._indices.popitem(last=False)
        return found

    def _path(self, layer: int, shard: int) -> Place:
        place = (*(layer,) * self.axis, shard, *(0,) * len(self._storage.row_shape))
        return shard_path(self.folder.parent, self.folder.name, place)

    def _damaged(self, layer: int, chunk: int, reason: str) -> ArchiveError:
        place = f" of layer {layer}" if self.axis else ""
        msg = f"{self.folder}: chunk {chunk}{place} is damaged: {reason}; see actstore.verify"
        return ArchiveError(msg)


def _near(places: Sequence[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Put ascending ranges of bytes together that are one request's: near, and not too many."""
    runs: list[list[tuple[int, int, int]]] = []
    for one in places:
        end = sum(runs[-1][-1][:2]) if runs else 0
        if runs and one[0] - end <= _GAP and sum(one[:2]) - runs[-1][0][0] <= _MOST:
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs


class CodedRows:
    """The values of an array of codes.

    Parameters
    ----------
    codes : Rows
        Its own rows.
    scale : Rows or float
        Of each row, or of all.
    exact : Rows or None
        The rows that have no codes, where there are any.
    dtype : numpy.dtype
        Of the values.
    middle : int
        The code of 0.
    """

    def __init__(
        self, codes: Rows, scale: Rows | float, exact: Rows | None, dtype: np.dtype, middle: int
    ) -> None:
        self.shape, self.axis, self.dtype = codes.shape, codes.axis, dtype
        self._codes, self._scale, self._exact, self._middle = codes, scale, exact, middle

    def read(self, layer: int, rows: Integers) -> NDArray[Any]:
        """Read rows of a layer, in the order given; rows that were never written are NaN."""
        codes = self._codes.read(layer, rows)
        scale = (
            np.full(len(rows), self._scale, np.float32)
            if isinstance(self._scale, float)
            else self._scale.read(layer, rows)
        )
        values = np.empty(codes.shape, self.dtype)
        size = max(_PIECE // max(codes[:1].size, 1), 1)
        pieces = [slice(first, first + size) for first in range(0, len(rows), size)]

        def decode(piece: slice) -> None:
            values[piece] = decoded(codes[piece], scale[piece], self.dtype, self._middle)

        if len(pieces) < _ALONE:
            for piece in pieces:
                decode(piece)
        else:
            _spread(decode, pieces)
        if self._exact is not None and codes.size:
            without = np.flatnonzero(codes.reshape(len(codes), -1)[:, 0] == 0)
            if without.size:
                values[without] = self._exact.read(layer, rows[without])
        return values


def value_rows(
    arrays: Mapping[str, Mapping[str, Any]], opened: Callable[[str], Rows | None]
) -> tuple[dict[str, Rows], set[str]]:
    """Give what reads the values of each array, codes or not, and the arrays that are parts of it.

    Parameters
    ----------
    arrays : mapping of str to mapping
        The arrays of the root, and their attributes.
    opened : callable
        Gives what reads the rows of an array by its name; None where nothing of ours can.
    """
    found: dict[str, Rows] = {}
    parts: set[str] = set()
    for name, said in arrays.items():
        rows = opened(name) if "source_dtype" in said else None
        if rows is None:
            continue
        if "code_offset" in said or "scale_factor" in said:
            beside = [f"{name}{end}" for end in (SCALE, EXACT, f"{EXACT}_present")]
            parts.update(one for one in beside if one in arrays)
            scale = opened(beside[0]) if "code_offset" in said else float(said["scale_factor"])
            exact = opened(beside[1]) if beside[1] in arrays else None
            if scale is None:
                continue
            wide = said["source_dtype"] == "float64"
            middle = said.get("code_offset")
            if middle is None:
                middle = round(-float(said["add_offset"]) / float(said["scale_factor"]))
            kind = np.dtype("f8" if wide else "f4")
            rows = CodedRows(rows, scale, exact, kind, int(middle))
        found[name] = rows
    return found, parts
