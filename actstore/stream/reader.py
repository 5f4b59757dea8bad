"""Owns reading a log: its layers, passes and tokens, and the values of its packets.

Leaves finding the records to ``scan.py``, the table of packets to ``table.py``, and what rows of
a dataset the values are to ``actstore.archive.layout``.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from actstore import codecs, dtypes, files, hook_names, markup
from actstore.buckets import RemotePath, remote
from actstore.errors import ConfigError, FormatError, StreamCorruptError
from actstore.packet import LayerInfo, Packet, PassInfo, TokenRecord
from actstore.stream import table
from actstore.stream.records import (
    BLOCK_LIMIT,
    PACKETS_LIMIT,
    Block,
    Entry,
    Features,
    Layer,
    Opcode,
    Pass,
    Text,
    Token,
)
from actstore.stream.scan import Damage, LogFile, Scan, scan, scan_on
from actstore.stream.segments import log_file
from actstore.stream.table import BlockPlace, PacketTable

__all__ = ["StreamReader", "open_stream"]

#: Decoded bytes that a reader keeps: a group and the one being read.
CACHE_BYTES: Final = 128 << 20
_NOTHING: Final = np.zeros(0, np.uint8)
_CODEC_DIGITS: Final = 3  # a codec's id is one byte
_POLL_SECONDS: Final = 0.1
_SHOWN: Final = 50  # layers, in a notebook
_IDLE_SECONDS: Final = 1.0  # without growth, before the writer's lock is asked for
_ENCODED: Final = BLOCK_LIMIT + (1 << 16)  # bytes that a block's encoded ones can't exceed
_BARE: Final = (Opcode.LAYER, Opcode.TOKEN, Opcode.TEXT)


def open_stream(
    path: str | Path | RemotePath,
    errors: str = "raise",
    *,
    follow: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> StreamReader:
    """Open a ``.stream`` log, whole or torn, closed or still growing, or one of an older tool.

    Parameters
    ----------
    path : str or Path
        The log, or the URL that one was, or is being, uploaded to.
    errors : {"raise", "skip"}
        What damage does: ``"raise"`` reads everything intact before it, then raises
        `StreamCorruptError`; ``"skip"`` goes on behind it and lists it in ``.damage``.
    follow : bool
        Let ``packets()`` wait for what a running capture commits, until its log is closed or its
        writer is gone. Layers, passes and tokens are then those known so far.
    shapes : mapping of str to sequence of int, optional
        Of a log of ``llm-instrumentation``, which holds none: layer -> the shape of its packets,
        of which one length may be -1, such as ``(1, -1, 768)``. Those of a layer that is not
        named are flat.
    dtypes : mapping of str to str, optional
        Of such a log: layer -> the dtype of its packets, where that is not float16.
    storage_options : mapping, optional
        Of a bucket, as for `open_dataset`.

    Returns
    -------
    StreamReader
        Open; a context manager that closes it. A `LegacyReader` of a log of
        ``llm-instrumentation``.

    Raises
    ------
    ConfigError
        ``shapes`` or ``dtypes`` don't fit the log, or are given for one that has its own; a log
        of ``llm-instrumentation`` is to be followed; ``path`` is no path, or may not be read.
    MissingFileError
        There is no such file.
    FormatError
        It is no log.
    UnsupportedVersionError
        It is a log of another version of the format.
    StreamCorruptError
        Its HEADER is damaged; with ``"skip"``, only where nothing intact follows.
    """
    from actstore.stream.legacy import LegacyReader, is_legacy  # which is a StreamReader

    far = remote(path, storage_options)
    place = files.path_of(path) if far is None else far
    if isinstance(place, Path) and is_legacy(place):
        if follow:
            msg = f"{path} is a log of llm-instrumentation, which can't be followed"
            raise ConfigError(msg)
        return LegacyReader(place, errors, shapes=shapes, dtypes=dtypes)
    reader = StreamReader(place, errors, follow=follow)
    if shapes is not None or dtypes is not None:
        reader.close()
        msg = f"{path} says itself what shapes and dtypes its packets have; don't give any"
        raise ConfigError(msg)
    return reader


class StreamReader:
    """A log, open for reading. Safe to use from several threads.

    Parameters
    ----------
    path : str or Path
        The log.
    errors : {"raise", "skip"}
        As for `open_stream`.
    follow : bool
        As for `open_stream`.

    Attributes
    ----------
    path : Path or RemotePath
        The log.
    header : mapping
        The HEADER: run id, writer, models, capture settings, codecs (``schemas/stream.md``).
    layers : mapping of str to LayerInfo
        The layers that fired, by name.
    features : mapping of int to numpy.ndarray
        Width -> the feature indices that a sampled capture kept.
    token_texts : mapping of int to str
        Token id -> text, of the ids that were fed while a tokenizer was known.
    table : PacketTable
        Every packet, as columns.
    complete : bool
        The log was closed cleanly and nothing was found damaged.
    damage : list of Damage
        The damaged regions found so far.
    summary : mapping
        The run's own summary; empty where the log was not closed.
    """

    def __init__(
        self, path: str | Path | RemotePath, errors: str = "raise", *, follow: bool = False
    ) -> None:
        if errors not in ("raise", "skip"):
            msg = f"errors must be 'raise' or 'skip'; got {errors!r}"
            raise ConfigError(msg)
        self.path = path if isinstance(path, RemotePath) else Path(path)
        self._skip = errors == "skip"
        self._follow = follow
        if follow and isinstance(path, RemotePath):
            msg = (
                f"{path} is in a bucket, which doesn't tell when it grows; open it without follow"
            )
            raise ConfigError(msg)
        self._file = log_file(self.path)
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the log again, in whatever process a copy of this is made."""
        return type(self), (self.path.absolute(), "skip" if self._skip else "raise")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "complete" if self.complete else "not complete"
        return (
            f"<{type(self).__name__} {self.path}: {self.packet_count} packets of "
            f"{len(self.layers)} layers in {len(self._passes)} passes, {len(self.tokens)} tokens, "
            f"{state}>"
        )

    def _repr_html_(self) -> str:
        """Give what a notebook shows."""
        told = markup.facts(
            self.path.name,
            [
                ("complete", self.complete),
                ("packets", self.packet_count),
                ("layers", len(self.layers)),
                ("passes", len(self._passes)),
                ("recorded tokens", len(self.tokens)),
                ("file", markup.bytes_of(self.file_bytes)),
            ],
        )
        columns = ("layer", "site", "block")
        rows = [
            (name, one.site, one.block if one.block >= 0 else None)
            for name, one in list(self.layers.items())[:_SHOWN]
        ]
        more = len(self.layers) - len(rows)
        caption = f"Layers, and {more:,} more" if more else "Layers"
        return told + markup.table(caption, columns, rows)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()
        self._cache.clear()

    @property
    def local(self) -> Path:
        """The log, where it is a file of this machine.

        Raises
        ------
        ConfigError
            It is in a bucket.
        """
        if isinstance(self.path, RemotePath):
            msg = f"{self.path} is in a bucket; this is done with a log that is a file here"
            raise ConfigError(msg)
        return self.path

    # -- what the log says ----------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether the log was closed cleanly and nothing was found damaged."""
        return self._scan.complete and self._file.whole and not self.damage

    @property
    def packet_count(self) -> int:
        """Number of packets, aliases included."""
        return int(self.table.whole().sum())

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, framing included."""
        return self._file.size

    @property
    def scan(self) -> Scan:
        """The records that the log was found to hold."""
        return self._scan

    @cached_property
    def passes(self) -> tuple[PassInfo, ...]:
        """The passes, in order."""
        return tuple(self._pass_info(index) for index in sorted(self._passes))

    def go_back(self, size: int) -> None:
        """Take the log as it was when it had so many bytes: no more than it has now."""
        self._file.size = size
        self._open()

    def check(self) -> None:
        """Raise the damage that was found on opening, unless it is to be skipped."""
        if self._fault is not None and not self._skip:
            raise self._fault

    # -- values ---------------------------------------------------------------------------------

    def packets(self, layer: str | None = None) -> Iterator[Packet]:
        """Yield packets in the order of capture.

        Parameters
        ----------
        layer : str, optional
            Only this layer's.

        Raises
        ------
        ConfigError
            No layer of that name fired.
        StreamCorruptError
            The log is damaged, after everything intact before the damage.
        """
        last = -1
        for packet in self._packets(layer, last):
            last = packet.seq
            yield packet
        while self._follow and self._wait():
            for packet in self._packets(layer, last):
                last = packet.seq
                yield packet
        self.check()

    def _packets(self, layer: str | None, after: int) -> Iterator[Packet]:
        """Yield what is there behind a sequence number."""
        rows = np.flatnonzero(self.table.whole() & (self.table.seq > after))
        if layer is not None:
            if self._follow and layer not in self.layers:
                return
            rows = rows[self.table.layer[rows] == self.layer(layer).id]
        names = {info.id: name for name, info in self.layers.items()}
        for row in rows.tolist():
            try:
                values = self.values(row)
            except StreamCorruptError as error:
                if not self._skip:
                    raise
                self._note(error)
                continue
            yield Packet(
                names[int(self.table.layer[row])],
                int(self.table.pass_index[row]),
                values,
                int(self.table.seq[row]),
                int(self.table.call[row]),
            )

    def _wait(self) -> bool:
        """Wait until more is committed; False when nothing will be."""
        idle = 0.0
        while not self._scan.complete:
            ended = idle >= _IDLE_SECONDS and not files.is_locked(Path(self.path))
            if self._file.grow():
                self._go_on()
                self.__dict__.pop("passes", None)
                return True
            if ended:
                return False
            time.sleep(_POLL_SECONDS)
            idle += _POLL_SECONDS
        return False

    def layer(self, name: str) -> LayerInfo:
        """Give a layer by its name, or by TransformerLens' (``"blocks.3.hook_resid_post"``).

        Raises
        ------
        ConfigError
            No layer of that name fired.
        """
        try:
            return self.layers[name]
        except KeyError:
            meant = hook_names.parse(name)
            for info in self.layers.values():
                if meant == (info.site, info.block):
                    return info
            near = ", ".join(map(repr, list(self.layers)[:8]))
            msg = f"{self.path} has no layer {name!r}; it has {len(self.layers)}: {near}, …"
            raise ConfigError(msg) from None

    def values(self, row: int) -> NDArray[Any]:
        """Give the tensor of a packet.

        Parameters
        ----------
        row : int
            The packet's (first) row in ``table``.

        Returns
        -------
        numpy.ndarray
            Of the packet's shape, in the model's dtype; memory of its own.

        Raises
        ------
        StreamCorruptError
            A block that it needs is damaged, or it is an alias of what is not there.
        """
        rows = self.table
        kind = dtypes.from_code(int(rows.dtype[row])).numpy
        shape = rows.shapes[int(rows.shape[row])]
        if rows.alias_of[row] >= 0:
            row = self._alias_target(row)
        data = self._bytes(row)
        wanted = math.prod(shape) * kind.itemsize
        if data.nbytes != wanted:
            reason = f"the parts of packet {rows.seq[row]} have {data.nbytes} bytes, not {wanted}"
            raise self._file.corrupt(self._place(row), reason)
        return data.view(kind).reshape(shape)

    def raw(self, row: int) -> NDArray[np.uint8]:
        """Give the bytes of a packet, or of one part of it, as a read-only view of its block."""
        rows = self.table
        if rows.alias_of[row] >= 0:
            row = self._alias_target(row)
        start = int(rows.offset[row])
        block = self.block(int(rows.block[row]))
        return block[start : start + int(rows.nbytes[row])]

    def piece(self, row: int, first: int, last: int) -> NDArray[np.uint8]:
        """Give some bytes of a packet that is no alias, of one in parts too; read-only.

        Parameters
        ----------
        row : int
            The packet's (first) row in ``table``.
        first, last : int
            Which of its bytes, the latter not included.
        """
        rows = self.table
        end = row + int(rows.parts[row])
        bounds = np.concatenate(([0], np.cumsum(rows.nbytes[row:end])))
        if last > bounds[-1] or first < 0:
            reason = f"packet {rows.seq[row]} has {bounds[-1]} bytes, not the {last} of its shape"
            raise self._file.corrupt(self._place(row), reason)
        begin = max(int(np.searchsorted(bounds, first, side="right")) - 1, 0)
        pieces = [
            self.raw(row + part)[max(first - low, 0) : last - low]
            for part, low in enumerate(bounds[begin:-1].tolist(), start=begin)
            if low < last
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [_NOTHING])

    def resolve(self, packets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give, for rows of the table, those that hold the bytes: an alias's target's.

        Raises
        ------
        StreamCorruptError
            An alias's target is lost.
        """
        targets, found = self.targets(packets)
        for row in packets[~found][:1].tolist():
            raise self._dangling(row)
        return targets

    def targets(self, packets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Give, for rows of the table, those that hold the bytes, and which of them are there."""
        rows = self.table
        wanted = rows.alias_of[packets]
        targets = np.where(wanted < 0, packets, np.searchsorted(rows.seq, wanted))
        targets = targets.clip(max=max(len(rows) - 1, 0))
        found = (wanted < 0) | ((rows.seq[targets] == wanted) & (rows.alias_of[targets] < 0))
        for column in (rows.dtype, rows.shape, rows.pass_index):
            found &= column[packets] == column[targets]
        return targets, found

    def alias_faults(self) -> list[StreamCorruptError]:
        """Give, for each block that has aliases of what is lost, why the first can't be read."""
        rows = self.table
        aliases = np.flatnonzero(rows.alias_of >= 0)
        lost = aliases[~self.targets(aliases)[1]]
        _, firsts = np.unique(rows.block[lost], return_index=True)
        return [self._dangling(row) for row in lost[firsts].tolist()]

    def _bytes(self, row: int) -> NDArray[np.uint8]:
        end = row + int(self.table.parts[row])
        out = np.empty(int(self.table.nbytes[row:end].sum()), np.uint8)
        at = 0
        for part in range(row, end):
            alone = end - row > 1  # then the block has nothing that is asked for again
            piece = self.read_block(int(self.table.block[part])) if alone else self.raw(part)
            out[at : at + piece.size] = piece
            at += piece.size
        return out

    def _alias_target(self, row: int) -> int:
        rows = self.table
        target = rows.row_of(int(rows.alias_of[row]))
        same = target >= 0 and all(
            column[row] == column[target] for column in (rows.dtype, rows.shape, rows.pass_index)
        )
        if not same or rows.alias_of[target] >= 0:
            raise self._dangling(row)
        return target

    def _dangling(self, row: int) -> StreamCorruptError:
        rows = self.table
        reason = f"packet {rows.seq[row]} is an alias of {rows.alias_of[row]}, not found intact"
        return self._file.corrupt(self._place(row), reason)

    def _place(self, row: int) -> int:
        """Give the offset of the block of a row."""
        return self._block_offset(int(self.table.block[row]))

    def payload(self, entry: Entry) -> bytes:
        """Read the payload of a record.

        Raises
        ------
        FormatError
            It is damaged.
        """
        return self._file.payload(entry)

    def block(self, index: int) -> NDArray[np.uint8]:
        """Give the decoded bytes of a block of the table, read-only; kept for a while.

        Raises
        ------
        StreamCorruptError
            It is damaged.
        """
        with self._lock:
            found = self._cache.get(index)
            if found is not None:
                self._cache.move_to_end(index)
                return found
        decoded = self.read_block(index)
        with self._lock:
            if index not in self._cache:
                self._cache[index] = decoded
                self._cached += decoded.nbytes
            while self._cached > CACHE_BYTES and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return decoded

    def read_block(self, index: int) -> NDArray[np.uint8]:
        """Give what ``block`` gives, without keeping it."""
        if index in self._lost:  # not read again for each of its packets
            raise self._file.corrupt(self._block_offset(index), self._lost[index])
        try:
            decoded = self._decode(index)
        except FormatError as error:
            self._lost[index] = str(error)
            raise self._file.corrupt(self._block_offset(index), str(error)) from error
        decoded.flags.writeable = False
        return decoded

    def _block_offset(self, index: int) -> int:
        return self.table.blocks[index].entry.offset

    def _decode(self, index: int) -> NDArray[np.uint8]:
        """Read and decode a block; raises `FormatError` where it is damaged."""
        place = self.table.blocks[index]
        payload = self._file.payload(place.entry)
        return codecs.decode(self._codecs[place.block.codec], payload, place.block.raw_length)

    # -- loading --------------------------------------------------------------------------------

    def _open(self) -> None:
        """Take in what the file holds."""
        self._load(scan(self._file, lenient=self._skip))

    def _load(self, found: Scan) -> None:
        self._scan = found
        self.header: Mapping[str, Any] = MappingProxyType(dict(found.header))
        self.summary: Mapping[str, Any] = MappingProxyType(dict(found.summary))
        self.damage: list[Damage] = []
        self._noted: set[int] = set()
        self._fault: StreamCorruptError | None = None
        self._lock = threading.Lock()
        self._forget()
        self._codecs = _codec_table(found.header, self.path)
        self._parts = _Parts()
        self._committed = table.build([])  # with packets of which parts are to come
        self._believe(0, found.damage)

    def _go_on(self) -> None:
        """Take in what was appended; the log anew, where it doesn't go on from what was there."""
        found = self._scan
        groups, end = len(found.groups), found.groups[-1].end if found.groups else 0
        if not scan_on(self._file, found):
            self._open()
            return
        self.damage = [one for one in self.damage if one.offset < end]
        self._noted = {one.offset for one in self.damage}
        if self._fault is not None and self._fault.offset >= end:
            self._fault = None
        self._believe(groups, [one for one in found.damage if one.offset >= end])

    def _believe(self, group: int, damage: Sequence[Damage]) -> None:
        """Take in the committed records from a group on, and the damage among them."""
        for region in damage:
            self._noted.add(region.offset)
            self.damage.append(region)
            self._fault = self._fault or self._file.corrupt(region.offset, region.reason)
        parts = self._parts
        known = len(parts.blocks)
        for number, entry in self._believed(group):
            try:
                parts.add(entry, number, self._file, self._codecs)
            except FormatError as error:
                self._note(self._file.corrupt(entry.offset, str(error)), entry)
                if not self._skip:
                    break
        self._passes = parts.passes
        self.layers: Mapping[str, LayerInfo] = MappingProxyType(
            {info.name: info for info in parts.layers.values()}
        )
        self.features: Mapping[int, NDArray[np.uint32]] = MappingProxyType(parts.features)
        self.tokens = tuple(parts.tokens)
        self.token_texts: Mapping[int, str] = MappingProxyType(parts.texts)
        self._committed = self._consistent(table.build(parts.blocks[known:], self._committed))
        self.table: PacketTable = _whole(self._committed)

    def _believed(self, first_group: int) -> Iterator[tuple[int, Entry]]:
        """Yield the committed records of groups; where damage raises, only those before it."""
        first = self._file.size
        if not self._skip:
            first = min((one.offset for one in self.damage), default=first)
        for number, group in enumerate(self._scan.groups[first_group:], start=first_group):
            for entry in group.entries:
                if entry.offset >= first:
                    return
                yield number, entry

    def _consistent(self, rows: PacketTable) -> PacketTable:
        """Leave out the blocks that contradict those before them."""
        while doubted := set(table.conflicts(rows)):
            blocks, first = rows.blocks, min(doubted)
            for index in sorted(doubted) if self._skip else (first,):
                entry = blocks[index].entry
                reason = "BLOCK repeats a sequence number, or differs from the part before it"
                self._note(self._file.corrupt(entry.offset, reason), entry)
            end = len(blocks) if self._skip else first
            rows = table.build([one for i, one in enumerate(blocks[:end]) if i not in doubted])
            self._forget()  # blocks have other numbers now
        return rows

    def _forget(self) -> None:
        """Keep nothing that was decoded."""
        self._cache: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._cached = 0
        self._lost: dict[int, str] = {}

    def _pass_info(self, index: int) -> PassInfo:
        """Put a pass together from its records."""
        info, closed, aborted = PassInfo(index), False, False
        for entry in self._passes[index]:
            try:
                found = Pass.decode(entry.header, self._file.payload(entry))
            except FormatError as error:
                fault = self._file.corrupt(entry.offset, str(error))
                if not self._skip:
                    raise fault from error
                self._note(fault, entry)
                continue
            info = info if found.status_only else found.info
            closed, aborted = closed or found.closed, aborted or found.info.aborted
        return PassInfo(
            index,
            info.axes,
            MappingProxyType(dict(info.annotations)),
            aborted or not closed,
            info.entry,
            info.logits_to_keep,
        )

    def _note(self, error: StreamCorruptError, entry: Entry | None = None) -> None:
        length = entry.end - entry.offset if entry else 0
        if error.offset not in self._noted:
            self._noted.add(error.offset)
            self.damage.append(Damage(error.offset, length, str(error)))
        self._fault = self._fault or error


def _whole(rows: PacketTable) -> PacketTable:
    """Leave out packets whose last parts were not committed, or are lost."""
    if not np.any(rows.parts > 1):
        return rows
    _, inverse, counts = np.unique(rows.seq, return_inverse=True, return_counts=True)
    return rows.select(counts[inverse] == rows.parts)


@dataclass(slots=True)
class _Parts:
    """What the believed records of a log hold, kind by kind."""

    layers: dict[int, LayerInfo] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    features: dict[int, NDArray[np.uint32]] = field(default_factory=dict)
    passes: dict[int, list[Entry]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    tokens: list[TokenRecord] = field(default_factory=list)
    blocks: list[BlockPlace] = field(default_factory=list)
    packets: int = 0

    def add(self, entry: Entry, group: int, file: LogFile, codec_table: Mapping[int, Any]) -> None:
        """Take a record in; raises `FormatError` where it is malformed."""
        if entry.opcode in _BARE and entry.payload_length:
            msg = f"opcode {entry.opcode} has no payload; found {entry.payload_length} bytes"
            raise FormatError(msg)
        match entry.opcode:
            case Opcode.LAYER:
                info = Layer.decode(entry.header).info
                if info.id in self.layers or info.name in self.names:
                    msg = f"layer {info.id}, {info.name!r}, was declared before"
                    raise FormatError(msg)
                self.layers[info.id] = info
                self.names.add(info.name)
            case Opcode.FEATURES:
                kept = Features.decode(entry.header, file.payload(entry))
                self.features[kept.width] = kept.indices
            case Opcode.PASS:
                self.passes.setdefault(Pass.peek(entry.header), []).append(entry)
            case Opcode.TEXT:
                self.texts.update(Text.decode(entry.header).texts)
            case Opcode.TOKEN:
                self.tokens.append(Token.decode(entry.header).record)
            case Opcode.BLOCK:
                self._add_block(entry, group, file, codec_table)

    def _add_block(
        self, entry: Entry, group: int, file: LogFile, codec_table: Mapping[int, Any]
    ) -> None:
        block = Block.decode(entry.header)
        if block.layer not in self.layers or block.codec not in codec_table:
            msg = f"BLOCK names layer {block.layer} and codec {block.codec}; one is not declared"
            raise FormatError(msg)
        self.packets += sum(run.count for run in block.runs)
        if self.packets > PACKETS_LIMIT + file.size or entry.payload_length > _ENCODED:
            msg = (
                f"BLOCK makes it {self.packets} packets in {file.size} bytes, and has "
                f"{entry.payload_length} encoded ones; that is beyond the limits"
            )
            raise FormatError(msg)
        self.blocks.append(BlockPlace(entry, block, group))


def _codec_table(
    header: Mapping[str, Any], path: Path | RemotePath
) -> dict[int, Mapping[str, Any] | None]:
    declared = header.get("codecs")
    if not isinstance(declared, dict):
        msg = f"the HEADER of {path} declares no codecs; found {declared!r:.100}"
        raise FormatError(msg)
    table: dict[int, Mapping[str, Any] | None] = {}
    for key, config in declared.items():
        usable = config is None or isinstance(config, dict)
        if not (key.isascii() and key.isdecimal() and len(key) <= _CODEC_DIGITS) or not usable:
            msg = f"the HEADER of {path} declares codec {key!r} as {config!r:.100}"
            raise FormatError(msg)
        try:
            codecs.check_config(config)
        except FormatError as error:
            msg = f"{path} can't be read: {error}"
            raise FormatError(msg) from error
        table[int(key)] = config
    return table
