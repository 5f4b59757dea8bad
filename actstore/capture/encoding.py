"""Owns turning a sealed group into the records of a log: pure, for whole groups at a time.

What stands in a group is ``stage.py``'s, which threads do this ``pipeline.py``'s. Columns are
worked out with NumPy: what is done for each packet in Python is what its hook does, and no more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actstore import codecs, dtypes
from actstore.capture.group import ALIAS, ALIGN, KIND_BITS, PARTS, Group
from actstore.stream.direct import PAGE, PAGED_BYTES
from actstore.stream.records import (
    PACKETS_LIMIT,
    Block,
    Layer,
    Opcode,
    Record,
    Text,
    Token,
)

__all__ = ["Calls", "Encoded", "encode"]

Integers = NDArray[np.int64]
_ABOUT: Final = ("layer", "dtype", "width")
_TASK_BYTES: Final = 4 << 20
_local = threading.local()


@dataclass(slots=True)
class Calls:
    """How often each layer fired in the pass that the groups so far ended in.

    Attributes
    ----------
    pass_index : int
        The pass.
    counts : numpy.ndarray
        int64: by the layer's id.
    parted : dict of int to int
        seq -> call, of the last packets in parts: their parts may follow in a later group.
    """

    pass_index: int = -1
    counts: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    parted: dict[int, int] = field(default_factory=dict)


class Encoded(NamedTuple):
    """A group's records, how many packets begin in it, and their bytes before encoding."""

    records: list[Record]
    packets: int
    raw_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The packets of a group and their parts, sorted by layer, then seq, then part."""

    layer: Integers
    dtype: Integers
    width: Integers
    shape: Integers  # its number in shapes
    seq: Integers
    pass_index: Integers
    call: Integers
    back: Integers
    offset: Integers
    nbytes: Integers
    part: Integers
    parts: Integers
    shapes: list[tuple[int, ...]]

    def __len__(self) -> int:
        return int(self.seq.size)


def encode(
    group: Group,
    codec: int,
    block_bytes: int,
    calls: Calls,
    map_tasks: Callable[..., Any] = map,
    scratch: NDArray[np.uint8] | None = None,
) -> Encoded:
    """Turn a sealed group into records, ready to be written.

    Parameters
    ----------
    group : Group
        Sealed; the records may share its arena.
    codec : int
        The codec id of its blocks.
    block_bytes : int
        The most raw bytes of a block of several packets.
    calls : Calls
        Of the groups before; brought up to date.
    map_tasks : callable
        Maps a function over lists of blocks, in order: `map`, or an executor's.
    scratch : numpy.ndarray, optional
        uint8: memory for what is encoded, which the records then share, instead of fresh memory.

    Returns
    -------
    Encoded
        Records in the order layers, features, passes, texts, blocks, tokens.
    """
    columns = _columns(group, calls)
    starts = _block_starts(columns, block_bytes)
    plans = _plan(columns, starts, codec)
    needed = plans[-1].room.stop if plans else 0
    if scratch is None or scratch.nbytes < needed:
        scratch = np.empty(needed, np.uint8)

    memory = scratch

    def work(task: list[_Plan]) -> list[Record]:
        return [_block(group, columns, one, codec, memory[one.room]) for one in task]

    records = [
        *(Record(Opcode.LAYER, Layer(info).encode()) for info in group.layers),
        *(Record.of(Opcode.FEATURES, *kept.encode()) for kept in group.features),
        *(Record.of(Opcode.PASS, *one.record().encode()) for one in group.passes.values()),
        *(Record(Opcode.TEXT, one.encode()) for one in Text.split(group.texts)),
        *chain.from_iterable(map_tasks(work, _tasks(plans))),
        *(Record(Opcode.TOKEN, Token(record).encode()) for record in group.tokens),
    ]
    return Encoded(records, len(group.packets), int(columns.nbytes.sum()))


# -- columns ------------------------------------------------------------------------------------


def _columns(group: Group, calls: Calls) -> _Columns:
    shapes: dict[tuple[int, ...], int] = {}
    packets = np.array(group.packets, np.int64)
    kind, place = packets & ((1 << KIND_BITS) - 1), packets >> KIND_BITS
    of_parts = np.array([part.kind for part in group.parts], np.int64)
    # a run whose shapes change makes ever more kinds: only those that are here are looked at
    here = np.bincount(np.append(kind, of_parts)) > 0
    kinds = _kind_columns(group, np.flatnonzero(here).tolist(), shapes)
    number = np.cumsum(here) - 1
    kind, of_parts = number[kind], number[of_parts]
    starts = np.array(group.starts, np.int64).reshape(-1, 2)
    before = np.searchsorted(starts[:, 0], np.arange(packets.size), side="right") - 1
    seq, pass_index = group.base + np.arange(packets.size), starts[before, 1]
    form = kinds["form"][kind]
    call = _calls(kinds["layer"][kind], pass_index, calls)
    whole = form != PARTS
    calls.parted |= zip(seq[~whole].tolist(), call[~whole].tolist(), strict=True)
    alias = form[whole] == ALIAS
    columns = {
        "kind": kind[whole],
        "seq": seq[whole],
        "pass_index": pass_index[whole],
        "call": call[whole],
        "back": np.where(alias, place[whole], 0),
        "offset": place[whole],
        "nbytes": kinds["nbytes"][kind[whole]],
        "part": np.zeros(alias.size, np.int64),
        "parts": np.ones(alias.size, np.int64),
    }
    if group.parts:
        parts = _part_columns(group, calls) | {"kind": of_parts}
        columns = {name: np.append(column, parts[name]) for name, column in columns.items()}
    kind = columns.pop("kind")
    columns |= {name: kinds[name][kind] for name in ("layer", "dtype", "width", "shape")}
    order = _order(columns)
    return _Columns(
        **{name: column[order] for name, column in columns.items()}, shapes=list(shapes)
    )


def _kind_columns(
    group: Group, numbers: list[int], shapes: dict[tuple[int, ...], int]
) -> dict[str, Integers]:
    rows = [
        (one.layer, one.dtype, one.width, shapes.setdefault(one.shape, len(shapes)), *one[3:])
        for one in map(group.kinds.__getitem__, numbers)
    ]
    names = ("layer", "dtype", "width", "shape", "nbytes", "_", "form")
    columns = np.array(rows, np.int64).reshape(-1, len(names)).T
    return dict(zip(names, columns, strict=True))


def _calls(layer: Integers, pass_index: Integers, calls: Calls) -> Integers:
    """Count each packet among those of its layer in its pass, going on from earlier groups."""
    if not layer.size:
        return layer
    most = max(int(layer.max()) + 1, calls.counts.size)
    known = np.zeros(most, np.int64)
    known[: calls.counts.size] = calls.counts
    order = np.lexsort((pass_index, layer))  # stable
    of_layer, of_pass = layer[order], pass_index[order]
    first = np.ones(layer.size, np.bool_)
    first[1:] = (of_layer[1:] != of_layer[:-1]) | (of_pass[1:] != of_pass[:-1])
    places = np.flatnonzero(first)
    found = np.empty_like(layer)
    found[order] = np.arange(layer.size) - np.repeat(places, np.diff(places, append=layer.size))
    found += np.where(pass_index == calls.pass_index, known[layer], 0)
    last = int(pass_index[-1])
    counts = np.bincount(layer[pass_index == last], minlength=most)
    calls.counts = counts + known if last == calls.pass_index else counts
    calls.pass_index = last
    return found


def _part_columns(group: Group, calls: Calls) -> dict[str, Integers]:
    names = ("kind", "seq", "part", "parts", "offset", "nbytes", "pass_index")
    rows = np.array(group.parts, np.int64).reshape(-1, len(names))
    columns = dict(zip(names, rows.T, strict=True))
    calls.parted = {seq: call for seq, call in calls.parted.items() if seq >= rows[0, 1]}
    columns["call"] = np.array([calls.parted[seq] for seq in columns["seq"].tolist()], np.int64)
    return columns | {"back": np.zeros_like(columns["seq"])}


def _order(columns: dict[str, Integers]) -> Integers:
    """Give the order by layer, that which fired first before others, then seq, then part."""
    layer = columns["layer"]
    index = np.arange(layer.size)
    first = np.zeros(int(layer.max(initial=-1)) + 1, np.int64)
    first[layer[::-1]] = index[::-1]  # of several assignments the last one counts
    key = first[layer]
    if (columns["parts"] > 1).any():
        return np.lexsort((columns["part"], columns["seq"], key))
    few = layer.size <= np.iinfo(np.uint16).max  # for which there is a radix sort
    return np.argsort(key.astype(np.uint16) if few else key, kind="stable")


# -- blocks -------------------------------------------------------------------------------------


def _block_starts(columns: _Columns, block_bytes: int) -> Integers:
    """Give where blocks begin: of one layer, dtype and width, bounded; parts stand alone."""
    if not len(columns):
        return np.zeros(0, np.int64)
    apart = columns.parts > 1
    first = np.ones(len(columns), np.bool_)
    first[1:] = apart[1:] | apart[:-1]
    for column in (columns.layer, columns.dtype, columns.width):
        first[1:] |= column[1:] != column[:-1]
    starts = np.flatnonzero(first)
    before = np.cumsum(columns.nbytes) - columns.nbytes
    ends = np.append(starts[1:], len(columns))
    sizes = np.append(before, before[-1] + columns.nbytes[-1])
    large = (sizes[ends] - sizes[starts] > block_bytes) | (ends - starts > PACKETS_LIMIT)
    more: list[int] = []
    for start, end in zip(starts[large].tolist(), ends[large].tolist(), strict=True):
        while True:  # as many as fit, at least one
            fit = int(
                np.searchsorted(sizes[start + 1 : end + 1], sizes[start] + block_bytes, "right")
            )
            start += min(max(fit, 1), PACKETS_LIMIT)
            if start >= end:
                break
            more.append(start)
    return np.sort(np.append(starts, np.array(more, np.int64)))


def _run_starts(columns: _Columns, blocks: Integers) -> Integers:
    """Give where runs begin: packets that look alike, at regular steps that aren't negative."""
    count = len(columns)
    hard = np.zeros(count, np.bool_)
    hard[blocks] = True
    hard[1:] |= columns.shape[1:] != columns.shape[:-1]
    hard[1:] |= columns.back[1:] != columns.back[:-1]
    hard[1:] |= columns.call[1:] < columns.call[:-1]
    soft = np.zeros(count, np.bool_)
    for column in (columns.seq, columns.pass_index, columns.call):
        step = np.diff(column)
        soft[2:] |= step[1:] != step[:-1]
    starts: list[int] = []
    for place in np.flatnonzero(hard | soft).tolist():
        # the second of a run says what its step is: it is none that differs
        if hard[place] or place - starts[-1] > 1:
            starts.append(place)
    return np.array(starts, np.int64)


class _Plan(NamedTuple):
    """A block before it is encoded: what it is of, its rows of the columns, its memory."""

    about: tuple[int, int, int]  # layer, dtype, width
    shapes: list[tuple[int, ...]]
    runs: NDArray[np.void]
    rows: slice
    raw_length: int
    room: slice


def _plan(columns: _Columns, starts: Integers, codec: int) -> list[_Plan]:
    places = _run_starts(columns, starts)
    runs = _runs(columns, places)
    bounds = np.append(starts, len(columns))
    sizes = np.append(0, np.cumsum(columns.nbytes))[bounds]
    of_runs = np.searchsorted(places, bounds).tolist()
    about = zip(*(getattr(columns, name)[starts].tolist() for name in _ABOUT), strict=True)
    plans, end = [], 0
    for index, (what, nbytes) in enumerate(zip(about, np.diff(sizes).tolist(), strict=True)):
        first, last = int(bounds[index]), int(bounds[index + 1])
        step = PAGE if nbytes >= PAGED_BYTES else ALIGN
        start = -(-end // step) * step
        gathers = last - first > 1 and codec == 0
        end = start + (nbytes + codecs.FRAME_BYTES if codec else nbytes * gathers)
        mine = runs[of_runs[index] : of_runs[index + 1]]
        shapes = _renumber(mine, columns.shapes)
        plans.append(_Plan(what, shapes, mine, slice(first, last), nbytes, slice(start, end)))
    return plans


def _runs(columns: _Columns, starts: Integers) -> NDArray[np.void]:
    """Give the runs that begin at some packets, as the log has them."""
    counts = np.diff(starts, append=len(columns))
    runs = np.zeros(starts.size, Block.RUN)
    runs["count"] = counts
    several = np.minimum(starts + 1, len(columns) - 1)
    for name in ("seq", "pass_index", "call"):
        column = getattr(columns, name)
        runs[name] = column[starts]
        step = "pass_step" if name == "pass_index" else f"{name}_step"
        runs[step] = np.where(counts > 1, column[several] - column[starts], 0)
    for name in ("back", "shape", "part", "parts"):
        runs[name] = getattr(columns, name)[starts]
    return runs


def _renumber(runs: NDArray[np.void], shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Let runs name shapes by their place among those of their block, and give these."""
    first = runs["shape"][0]
    if (runs["shape"] == first).all():  # mostly
        runs["shape"] = 0
        return [shapes[first]]
    numbers, places = np.unique(runs["shape"], return_inverse=True)
    runs["shape"] = places
    return [shapes[number] for number in numbers.tolist()]


def _tasks(plans: list[_Plan]) -> list[list[_Plan]]:
    """Join blocks to what is worth handing to a thread."""
    tasks: list[list[_Plan]] = []
    nbytes = _TASK_BYTES
    for plan in plans:
        if nbytes >= _TASK_BYTES:
            tasks.append([])
            nbytes = 0
        tasks[-1].append(plan)
        nbytes += plan.raw_length
    return tasks


def _block(
    group: Group, columns: _Columns, plan: _Plan, codec: int, room: NDArray[np.uint8]
) -> Record:
    layer, dtype, width = plan.about
    memory = room if codec == 0 else _gathered(plan.raw_length)
    data = _gather(group, columns.offset[plan.rows], columns.nbytes[plan.rows], memory)
    used, encoded = codecs.encode(codec, data, dtypes.from_code(dtype).itemsize, room)
    if not used and codec:
        encoded = room[: data.nbytes]  # the gathered is this thread's next block's, too
        encoded[:] = data
    about = (layer, used, dtype, width, data.nbytes)
    return Record.of(Opcode.BLOCK, Block.encode_runs(about, plan.shapes, plan.runs), encoded)


def _gathered(nbytes: int) -> NDArray[np.uint8]:
    """Give this thread's memory for what is to be encoded."""
    found: NDArray[np.uint8] | None = getattr(_local, "gathered", None)
    if found is None or found.nbytes < nbytes:
        found = _local.gathered = np.empty(nbytes, np.uint8)
    return found


def _gather(
    group: Group, offset: Integers, nbytes: Integers, memory: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Give the bytes of packets one after the other: of one alone as a view of the arena."""
    if offset.size > 1 and not nbytes.all():  # aliases have none
        held = nbytes > 0
        offset, nbytes = offset[held], nbytes[held]
    if not offset.size:
        return group.arena[:0]
    start, size = int(offset[0]), int(nbytes[0])
    if offset.size == 1:
        return group.arena[start : start + size]
    step = int(offset[1]) - start
    out = memory[: int(nbytes.sum())]
    if (nbytes == size).all() and (np.diff(offset) == step).all():  # as in generation
        shape = (offset.size, size)
        rows = np.ndarray(shape, np.uint8, group.arena, start, (step, 1))
        np.copyto(out.reshape(shape), rows)
        return out
    at = 0
    for start, size in zip(offset.tolist(), nbytes.tolist(), strict=True):
        out[at : at + size] = group.arena[start : start + size]
        at += size
    return out
