"""Owns the logs of the processes that ran one model, read as one: layers unite, parts are joined.

Whose packets a layer has is decided in ``parts.py``; here they become one table, whose rows are
fetched from the logs that have them. Packets of parts that stand one behind the other in every log
make a block, which is put together when it is asked for; any other is put together by itself.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore import dtypes
from actstore.buckets import RemotePath
from actstore.errors import ConfigError
from actstore.packet import MAIN_AXES, Axis, LayerInfo, PassInfo, TokenRecord
from actstore.stream.parts import Member, Part, decide
from actstore.stream.table import COLUMNS, PacketTable

__all__ = ["UnitedReader", "features_of", "passes_of", "texts_of"]

Integers = NDArray[np.int64]
_NAMED: Final = 8
#: Bytes of what is put together at once, and of what is kept of that.
_JOINED_BYTES: Final = 1 << 23
_KEPT_BYTES: Final = 1 << 26


def passes_of(reader: Any) -> int:
    """Give how many indices the passes of a log take."""
    last = max((info.index for info in reader.passes), default=-1)
    return max(last, int(reader.table.pass_index.max(initial=-1))) + 1


def features_of(readers: Sequence[Any]) -> dict[int, NDArray[np.uint32]]:
    """Give the features that sampled logs kept, by width.

    Raises
    ------
    ConfigError
        Two of them kept others.
    """
    found: dict[int, NDArray[np.uint32]] = {}
    for one in readers:
        for width, kept in one.features.items():
            if not np.array_equal(found.setdefault(width, kept), kept):
                msg = (
                    f"{one.path} sampled other features of width {width} than {readers[0].path}: "
                    "compact each by itself, or capture them with one sampling_seed"
                )
                raise ConfigError(msg)
    return found


def texts_of(readers: Sequence[Any]) -> dict[int, str]:
    """Give what token ids stand for; where logs differ, as the first one says."""
    return {number: text for one in reversed(readers) for number, text in one.token_texts.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Packets of the united table before they are put in order.

    Attributes
    ----------
    columns : mapping of str to numpy.ndarray
        As `PacketTable` has them; ``alias_of`` is the row of the leader's table, or -1, and
        ``block`` of packets of several parts which of the ``blocks``, or -1.
    rows : numpy.ndarray
        int64 [members, packets]: of each member the row of its table.
    part : Part
        The layer.
    blocks : numpy.ndarray
        int64: where runs of packets begin that stand one behind the other in every log, alike.
    """

    columns: Mapping[str, Integers]
    rows: Integers
    part: Part
    blocks: Integers


class UnitedReader:
    """The logs of one model's processes, read as one; whoever opened them closes them.

    Parameters
    ----------
    members : sequence of Member
        Pipeline stages and tensor-parallel processes of one replica.
    common : bool
        Keep the passes and packets that all have, where some have more.
    whole : bool
        There is one for every place of the mesh.

    Attributes
    ----------
    readers : tuple of StreamReader
        The logs, by stage, then by place on the tensor axis.
    header : mapping
        The first one's HEADER.
    layers, passes, tokens, features, token_texts, table
        As a `StreamReader` has them.

    Raises
    ------
    ConfigError
        Their passes, tokens or shapes contradict each other, or some have fewer passes.
    """

    def __init__(
        self, members: Sequence[Member], *, common: bool = False, whole: bool = True
    ) -> None:
        self._members = sorted(members, key=lambda one: one.parallel.places)
        self._common = common
        self.readers = tuple(one.reader for one in self._members)
        self.header: Mapping[str, Any] = self.readers[0].header
        self._limit = self._passes_kept()
        self.passes = tuple(self._pass_infos())
        self.tokens = self._tokens()
        self.features = features_of(self.readers)
        self.token_texts = texts_of(self.readers)
        parts = decide(self._members, whole=whole)
        infos = [replace(one.info, id=number, shard=None) for number, one in enumerate(parts)]
        self.layers: Mapping[str, LayerInfo] = MappingProxyType({one.name: one for one in infos})
        self._check_names(parts)
        self._shapes: dict[tuple[int, ...], int] = {}
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._kept = 0
        self.table = self._table([self._piece(number, one) for number, one in enumerate(parts)])

    def _check_names(self, parts: Sequence[Part]) -> None:
        """Refuse layers that would have one name: one of them was called as another is here."""
        known: dict[str, Part] = {}
        for one in parts:
            twin = known.setdefault(one.info.name, one)
            if twin is not one:
                told = " and ".join(
                    f"layer {part.own!r} of {self._members[part.members[0]]}"
                    for part in (twin, one)
                )
                msg = (
                    f"{told} would both be named {one.info.name!r} here; say how the layer is "
                    "divided at capture, with Parallel(sharded={...: -1}), or compact each log by "
                    "itself"
                )
                raise ConfigError(msg)

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
        if index >= self._own_blocks:
            return self._joined_block(index)
        log = int(np.searchsorted(self._blocks, index, side="right")) - 1
        return self.readers[log].block(index - int(self._blocks[log]))

    @property
    def block_count(self) -> int:
        """How many blocks the table names: the logs', and those that are put together."""
        return int(self._joined_blocks[-1])

    def _joined_block(self, index: int) -> NDArray[np.uint8]:
        """Put together packets that stand one behind the other in every log; kept for a while."""
        with self._lock:
            found = self._cache.get(index)
            if found is not None:
                self._cache.move_to_end(index)
                return found
        number = int(np.searchsorted(self._joined_blocks, index, side="right")) - 1
        piece, place = self._pieces[number], index - int(self._joined_blocks[number])
        begin = int(piece.blocks[place])
        end = (*piece.blocks.tolist(), piece.rows.shape[1])[place + 1]
        shape = self._shape_list[int(piece.columns["shape"][begin])]
        itemsize = dtypes.from_code(int(piece.columns["dtype"][begin])).itemsize
        axis = len(shape) + piece.part.dim
        inner = int(np.prod(shape[axis + 1 :], dtype=np.int64)) * itemsize
        lines = int(np.prod(shape[:axis], dtype=np.int64)) * (end - begin)
        out = np.empty((lines, shape[axis] * inner), np.uint8)
        at = 0
        for member, rows in zip(piece.part.members, piece.rows, strict=True):
            table, row = self.readers[member].table, int(rows[begin])
            width = table.shapes[int(table.shape[row])][axis] * inner
            offset = int(table.offset[row])
            data = self.readers[member].block(int(table.block[row]))
            mine = data[offset : offset + lines * width]
            out[:, at : at + width] = mine.reshape(lines, width)
            at += width
        joined = out.reshape(-1)
        joined.flags.writeable = False
        with self._lock:
            if index not in self._cache:
                self._cache[index] = joined
                self._kept += joined.nbytes
            while self._kept > _KEPT_BYTES and len(self._cache) > 1:
                self._kept -= self._cache.popitem(last=False)[1].nbytes
        return joined

    def resolve(self, packets: Integers) -> Integers:
        """Give, for rows of the table, those that hold the bytes, where these are in one log."""
        found = packets.copy()
        logs = self._owner[packets]
        for log in np.unique(logs[logs >= 0]).tolist():
            mine = logs == log
            targets = self.readers[log].resolve(self._row[packets[mine]])
            united = self._back[log][targets]
            found[mine] = np.where(united >= 0, united, packets[mine])
        return found

    def piece(self, row: int, first: int, last: int) -> NDArray[np.uint8]:
        """Give some bytes of a packet; of one in several logs' parts those are put together."""
        log = int(self._owner[row])
        if log >= 0:
            return self._own_piece(log, int(self._row[row]), first, last)
        number = int(self._group[row])
        piece = self._pieces[number]
        rows = piece.rows[:, int(self._row[row])]
        shape = self.table.shapes[int(self.table.shape[row])]
        itemsize = dtypes.from_code(int(self.table.dtype[row])).itemsize
        axis = len(shape) + piece.part.dim
        inner = int(np.prod(shape[axis + 1 :], dtype=np.int64)) * itemsize
        line = shape[axis] * inner
        begin, end = (first // line, -(-last // line)) if line else (0, 0)
        out = np.empty((end - begin, line), np.uint8)
        at = 0
        for member, mine in zip(piece.part.members, rows.tolist(), strict=True):
            table = self.readers[member].table
            width = table.shapes[int(table.shape[mine])][axis] * inner
            data = self._own_piece(member, mine, begin * width, end * width)
            out[:, at : at + width] = data.reshape(end - begin, width)
            at += width
        return out.reshape(-1)[first - begin * line : last - begin * line]

    def _own_piece(self, log: int, row: int, first: int, last: int) -> NDArray[np.uint8]:
        reader = self.readers[log]
        (target,) = reader.resolve(np.array([row], np.int64)).tolist()
        return reader.piece(target, first, last)

    # -- passes and tokens ----------------------------------------------------------------------

    def _passes_kept(self) -> int:
        """Give how many passes there are; where some have more, those that all have whole."""
        counts = [passes_of(one) for one in self.readers]
        if len(set(counts)) == 1 and not self._common:
            return counts[0]
        if not self._common:
            most = max(counts)
            fewer = [
                f"{one} has {count}"
                for one, count in zip(self._members, counts, strict=True)
                if count < most
            ]
            told = ", ".join(fewer[:_NAMED]) + (", …" if len(fewer) > _NAMED else "")
            told += f", of the {most} that {self._members[counts.index(most)]} has"
            msg = (
                f"the logs of one run have different numbers of passes: {told}; a process that "
                "died, or was resumed, has others than the rest. ranks='common' keeps those that "
                "all have"
            )
            raise ConfigError(msg)
        kept = min(counts)
        aborted = [{one.index: one.aborted for one in reader.passes} for reader in self.readers]
        while kept and len({one.get(kept - 1, True) for one in aborted}) > 1:
            kept -= 1
        return kept

    def _pass_infos(self) -> Iterator[PassInfo]:
        known = [{info.index: info for info in one.passes} for one in self.readers]
        for index in sorted(set().union(*known)):
            if index < self._limit:
                mine = [(n, one[index]) for n, one in enumerate(known) if index in one]
                yield self._pass_info(index, mine)

    def _pass_info(self, index: int, mine: Sequence[tuple[int, PassInfo]]) -> PassInfo:
        """Put a pass together: its tokens from the stage that was given them."""
        axes: dict[str, tuple[int, Axis]] = {}
        for number, info in mine:
            for axis in info.axes:
                known = axes.setdefault(axis.name, (number, axis))
                if known[1] is axis:
                    continue
                self._check_axes(index, known, (number, axis))
                if not _fed(known[1]) and _fed(axis):
                    axes[axis.name] = number, axis
        infos = [info for _, info in mine]
        labels: dict[str, tuple[int, Any]] = {}
        for number, info in mine:
            for label, given in info.annotations.items():
                first, known = labels.setdefault(label, (number, given))
                if repr(given) != repr(known):
                    msg = (
                        f"pass {index} of {self._members[first]} and of {self._members[number]} "
                        f"are not the same: they were annotated with other {label!r}; give the "
                        "logs of one run, in which every process annotates alike, or none but one"
                    )
                    raise ConfigError(msg)
        return PassInfo(
            index,
            tuple(sorted((axis for _, axis in axes.values()), key=_main)),
            MappingProxyType({label: given for label, (_, given) in labels.items()}),
            any(info.aborted for info in infos),
            infos[0].entry,
            max(info.logits_to_keep for info in infos),
        )

    def _check_axes(self, index: int, one: tuple[int, Axis], other: tuple[int, Axis]) -> None:
        (first, a), (second, b) = one, other
        where = f"pass {index} of {self._members[first]} and of {self._members[second]}"
        if (a.batch, a.sequence) != (b.batch, b.sequence):
            msg = (
                f"{where} are not the same: axis {a.name!r} has {a.batch} × {a.sequence} rows in "
                f"one, {b.batch} × {b.sequence} in the other; give the logs of one run, in which "
                "every process ran the same passes"
            )
            raise ConfigError(msg)
        if _fed(a) and _fed(b) and not np.array_equal(a.token_ids, b.token_ids):
            msg = (
                f"{where} are not the same: they were fed other tokens on axis {a.name!r}; give "
                "the logs of one run, in which every process ran the same passes"
            )
            raise ConfigError(msg)

    def _tokens(self) -> tuple[TokenRecord, ...]:
        """Give the recorded tokens: those who recorded any must agree."""
        given = [
            (one, [token for token in one.reader.tokens if token.pass_index < self._limit])
            for one in self._members
            if one.reader.tokens
        ]
        if not given:
            return ()
        longest, tokens = max(given, key=lambda pair: len(pair[1]))
        said = [(token.step, token.token_id, token.pass_index) for token in tokens]
        for one, others in given:
            theirs = [(token.step, token.token_id, token.pass_index) for token in others]
            if theirs != said[: len(theirs)] or (len(theirs) < len(said) and not self._common):
                same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(said, theirs))  # noqa: B905 - of different lengths
                msg = (
                    f"{longest} and {one} recorded different tokens from step "
                    f"{len(list(same))} on ({len(said)} and {len(theirs)} in all): they were not "
                    "resumed at the same step, or are not of one run; with ranks='common' they "
                    "may differ in number"
                )
                raise ConfigError(msg)
        return tuple(tokens)

    # -- the table ------------------------------------------------------------------------------

    def _piece(self, number: int, part: Part) -> _Piece:
        """Give a layer's packets, as far as all have them."""
        holders = (*part.members, *part.twins)
        rows = []
        for one in holders:
            mine = self._members[one].rows(part.own)
            rows.append(mine[self.readers[one].table.pass_index[mine] < self._limit])
        if len(holders) > 1:
            rows = self._matching(part.own, holders, rows)[: len(part.members)]
        tables = [self.readers[one].table for one in part.members]
        lead, table = rows[0], tables[0]
        columns = {name: getattr(table, name)[lead] for name in COLUMNS}
        columns["layer"] = np.full(lead.size, number, np.int64)
        columns["alias_of"] = np.where(
            columns["alias_of"] >= 0, np.searchsorted(table.seq, columns["alias_of"]), -1
        )
        if len(part.members) == 1:
            local = [self._shapes.setdefault(one, len(self._shapes)) for one in table.shapes]
            columns["shape"] = np.array(local, np.int64)[columns["shape"]]
            columns["block"] = np.where(columns["alias_of"] >= 0, -1, columns["block"])
        else:
            columns["shape"] = self._joined_shapes(part, tables, rows)
            columns["nbytes"] = _sum(tables, rows, "nbytes")
            columns["encoded"] = _sum(tables, rows, "encoded")
            aliases = np.all([t.alias_of[r] >= 0 for t, r in zip(tables, rows, strict=True)], 0)
            columns["alias_of"] = np.where(aliases, columns["alias_of"], -1)
            columns["block"], starts = _runs(tables, rows, columns["nbytes"])
            first = starts[columns["block"]] if starts.size else columns["block"]
            columns["offset"] = (np.arange(lead.size) - first) * columns["nbytes"]
            return _Piece(columns, np.stack(rows), part, starts)
        return _Piece(columns, np.stack(rows), part, np.zeros(0, np.int64))

    def _matching(
        self, name: str, holders: Sequence[int], rows: Sequence[Integers]
    ) -> list[Integers]:
        """Give of each the packets that all have: the same firings of the same passes."""
        fired = [self._members[one].firings(mine) for one, mine in zip(holders, rows, strict=True)]
        if all(one == fired[0] for one in fired):
            return list(rows)
        both = set(fired[0]).intersection(*fired)
        if not self._common:
            index, call = min(set().union(*fired) - both)
            lacking = [
                str(self._members[one])
                for one, mine in zip(holders, fired, strict=True)
                if (index, call) not in mine
            ]
            msg = (
                f"layer {name!r} fired in pass {index} (call {call}), but not in "
                f"{', '.join(lacking)}: a process died, or did something else. ranks='common' "
                "keeps what all have"
            )
            raise ConfigError(msg)
        return [mine[[one in both for one in own]] for mine, own in zip(rows, fired, strict=True)]

    def _joined_shapes(
        self, part: Part, tables: Sequence[PacketTable], rows: Sequence[Integers]
    ) -> Integers:
        """Give the shapes of the wholes, which parts must fit."""
        columns = [table.shape[mine] for table, mine in zip(tables, rows, strict=True)]
        columns += [table.dtype[mine] for table, mine in zip(tables, rows, strict=True)]
        columns += [table.width[mine] for table, mine in zip(tables, rows, strict=True)]
        unique, inverse = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
        count = len(tables)
        numbers = []
        for line in unique.tolist():
            shapes = [t.shapes[i] for t, i in zip(tables, line[:count], strict=True)]
            kinds, widths = line[count : 2 * count], line[2 * count :]
            whole = self._whole(part, shapes, kinds, widths)
            numbers.append(self._shapes.setdefault(whole, len(self._shapes)))
        return np.array(numbers, np.int64)[inverse.reshape(-1)]

    def _whole(
        self,
        part: Part,
        shapes: Sequence[tuple[int, ...]],
        kinds: Sequence[int],
        widths: Sequence[int],
    ) -> tuple[int, ...]:
        """Give the shape of a whole of parts."""
        where = " and ".join(str(self._members[one]) for one in part.members[:2])
        if any(widths):
            msg = (
                f"layer {part.own!r} of {where} is divided, and was sampled: of which features of "
                "the whole is not known. Capture it with FULL_TENSOR, leave it out of "
                "target_layers, or compact each log by itself with ranks='given'"
            )
            raise ConfigError(msg)
        dim, first = part.dim, shapes[0]
        fits = len(first) >= -dim and all(len(one) == len(first) for one in shapes)
        others = {(*one[:dim], *one[len(one) + dim + 1 :]) for one in shapes} if fits else set()
        if not fits or len(others) > 1 or len(set(kinds)) > 1:
            told = ", ".join(map(str, shapes))
            names = ", ".join(dict.fromkeys(dtypes.from_code(one).name for one in kinds))
            msg = (
                f"the parts of layer {part.own!r} in {where} don't fit: their shapes are {told}, "
                f"of {names}, divided along dimension {dim}; the logs are not of one run"
            )
            raise ConfigError(msg)
        lengths = [one[dim] for one in shapes]
        self._check_lengths(part, lengths, where)
        place = len(first) + dim
        return (*first[:place], sum(lengths), *first[place + 1 :])

    def _check_lengths(self, part: Part, lengths: Sequence[int], where: str) -> None:
        starts = np.cumsum([0, *lengths]).tolist()
        for one, start in zip(part.members, starts[:-1], strict=True):
            shard = self.readers[one].layers[part.own].shard
            if shard is not None and shard.size is not None:
                if (shard.offset, shard.size) == (start, starts[-1]):
                    continue
                msg = (
                    f"the parts of layer {part.own!r} in {where} and the others make {starts[-1]} "
                    f"features, with that of {self._members[one]} at {start}; it says itself that "
                    f"it is at {shard.offset} of {shard.size}"
                )
                raise ConfigError(msg)

    def _table(self, pieces: Sequence[_Piece]) -> PacketTable:
        """Put all packets in order: pass, stage, then as they were captured."""
        self._pieces = list(pieces)
        counts = np.cumsum([0, *(len(one.table.blocks) for one in self.readers)])
        self._blocks: Integers = counts[:-1].astype(np.int64)
        self._own_blocks = int(counts[-1])
        joined = [self._own_blocks, *(one.blocks.size for one in pieces)]
        self._joined_blocks: Integers = np.cumsum(joined, dtype=np.int64)
        self._shape_list = tuple(self._shapes)
        empty = np.zeros(0, np.int64)
        column = {
            name: np.concatenate([empty, *(one.columns[name] for one in pieces)])
            for name in COLUMNS
        }
        leads = [one.part.members[0] for one in pieces]
        sizes = [one.rows.shape[1] for one in pieces]
        group = np.repeat(np.arange(len(pieces)), sizes)
        lead = np.repeat(np.array(leads, np.int64), sizes)
        several = np.repeat([len(one.part.members) > 1 for one in pieces], sizes).astype(np.bool_)
        row = np.concatenate([empty, *(one.rows[0] for one in pieces)])
        places = np.concatenate([empty, *(np.arange(size) for size in sizes)])
        stage = np.array([one.parallel.pipeline[0] for one in self._members], np.int64)[lead]
        order = np.lexsort((column["seq"], lead, stage, column["pass_index"]))
        column = {name: values[order] for name, values in column.items()}
        lead, row, several = lead[order], row[order], several[order]
        self._group: Integers = group[order]
        self._owner: Integers = np.where(several, -1, lead)
        self._row: Integers = np.where(several, places[order], row)
        ever = [np.full(len(one.table), -1, np.int64) for one in self.readers]  # parts too
        self._back = [np.full(len(one.table), -1, np.int64) for one in self.readers]
        for log in range(len(self.readers)):
            mine = np.flatnonzero(lead == log)
            ever[log][row[mine]] = mine
            mine = mine[~several[mine]]
            self._back[log][row[mine]] = mine
        column["seq"] = np.arange(order.size, dtype=np.int64)
        base = np.where(several, self._joined_blocks[self._group], self._blocks[lead])
        column["block"] = np.where(column["block"] >= 0, column["block"] + base, -1)
        column["part"] = np.zeros(order.size, np.int64)
        column["alias_of"] = self._aliases(column, lead, ever)
        places_of = tuple(place for one in self.readers for place in one.table.blocks)
        return PacketTable(**column, shapes=tuple(self._shapes), blocks=places_of)

    def _aliases(
        self, column: Mapping[str, Integers], lead: Integers, ever: Sequence[Integers]
    ) -> Integers:
        """Give what packets are aliases of, where that is here and of the same form."""
        found = np.full(lead.size, -1, np.int64)
        for log in range(len(self.readers)):
            mine = np.flatnonzero((lead == log) & (column["alias_of"] >= 0))
            known = column["alias_of"][mine]
            mine = mine[known < ever[log].size]
            targets = ever[log][column["alias_of"][mine]]
            fits = targets >= 0
            for name in ("dtype", "shape", "pass_index"):
                fits &= column[name][targets] == column[name][mine]
            found[mine] = np.where(fits, targets, -1)
        return found


def _fed(axis: Axis) -> bool:
    """Whether a process was given the tokens of an axis."""
    return bool(np.any(axis.token_ids >= 0))


def _main(axis: Axis) -> bool:
    return axis.name in MAIN_AXES


def _sum(tables: Sequence[PacketTable], rows: Sequence[Integers], name: str) -> Integers:
    found = [getattr(table, name)[mine] for table, mine in zip(tables, rows, strict=True)]
    total: Integers = np.sum(found, axis=0, dtype=np.int64)
    return total


def _runs(
    tables: Sequence[PacketTable], rows: Sequence[Integers], nbytes: Integers
) -> tuple[Integers, Integers]:
    """Give the runs of packets that stand one behind the other in every log, alike.

    Returns
    -------
    (numpy.ndarray, numpy.ndarray)
        int64: of each packet its run, -1 for one of several parts and for an alias; and the
        first packet of each run.
    """
    count = nbytes.size
    single, joined = np.ones(count, np.bool_), np.ones(max(count - 1, 0), np.bool_)
    for table, mine in zip(tables, rows, strict=True):
        single &= (table.parts[mine] == 1) & (table.alias_of[mine] < 0)
        ends = table.offset[mine] + table.nbytes[mine]
        joined &= table.offset[mine][1:] == ends[:-1]
        for column in (table.block, table.shape, table.dtype):
            joined &= column[mine][1:] == column[mine][:-1]
    joined &= single[1:] & single[:-1]
    heads = np.flatnonzero(np.concatenate([np.ones(min(count, 1), np.bool_), ~joined]))
    sizes = np.diff(np.append(heads, count))
    within = np.arange(count) - np.repeat(heads, sizes)
    most = np.maximum(_JOINED_BYTES // np.maximum(nbytes, 1), 1)
    begins = single & (within % most == 0)
    starts = np.flatnonzero(begins).astype(np.int64)
    return np.where(single, np.cumsum(begins, dtype=np.int64) - 1, -1), starts
