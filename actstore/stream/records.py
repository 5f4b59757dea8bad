"""Owns bytes <-> record, pure: the frame, and each record's encode beside its decode.

The order and the words are those of ``schemas/stream.md``. What stands where in a file, and what
to do about damage, is the reader's and the writer's business.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import islice
from typing import Any, ClassVar, Final, Self

import crc32c as castagnoli
import numpy as np
from numpy.typing import NDArray

from actstore import dtypes
from actstore.errors import FormatError
from actstore.packet import Axis, LayerInfo, PassInfo, TokenRecord
from actstore.parallel import Shard

__all__ = [
    "BLOCK_LIMIT",
    "HEADER_LIMIT",
    "JSON_LIMIT",
    "MAGIC",
    "NO_POSITION",
    "PACKETS_LIMIT",
    "PAYLOAD_LIMIT",
    "TAIL_SIZE",
    "VERSION",
    "Block",
    "Commit",
    "Entry",
    "Features",
    "Frame",
    "Header",
    "Index",
    "Layer",
    "Opcode",
    "Pass",
    "Record",
    "Run",
    "Text",
    "Token",
    "crc32c",
    "decode_end",
    "decode_entries",
    "encode_end",
    "encode_entries",
    "read_entries",
]

VERSION: Final = 1
MAGIC: Final = b"\x89ACS\r\n\x1a" + bytes([VERSION])
HEADER_LIMIT: Final = 16 << 20  # bytes of any record's header
PAYLOAD_LIMIT: Final = 1 << 30  # bytes of any record's payload
JSON_LIMIT: Final = 1 << 18  # commas and brackets of a JSON: a value takes 20 times its bytes
BLOCK_LIMIT: Final = 16 << 20  # raw bytes of a block
PACKETS_LIMIT: Final = 1 << 16  # packets of a block
NO_POSITION: Final = -(1 << 63)
_AXES_LIMIT: Final = 16
_FEW: Final = 16
_TEXTS: Final = 1 << 14  # ids of a TEXT that is written
_NDIM_LIMIT: Final = 64
_SIZE_LIMIT: Final = 1 << 58  # what NumPy takes of 16 bytes each; also where a length is 0


class Opcode(IntEnum):
    """What a record is; 0x80 and up are private and skipped, as are all unknown ones."""

    HEADER = 0x01
    LAYER = 0x02
    FEATURES = 0x03
    PASS = 0x04
    BLOCK = 0x05
    TOKEN = 0x06
    COMMIT = 0x07
    PAD = 0x08
    INDEX = 0x09
    END = 0x0A
    TEXT = 0x0B


def crc32c(data: Any, start: int = 0) -> int:
    """Give the CRC-32C (Castagnoli, RFC 3720) of a buffer, continuing from ``start``."""
    return castagnoli.crc32c(data, start)


# -- the frame ----------------------------------------------------------------------------------

_FRAME = struct.Struct("<16sBBHIQII")
_FRAME_CHECKED = _FRAME.size - 4


@dataclass(frozen=True, slots=True)
class Frame:
    """The 40 bytes before every record."""

    sync: bytes
    opcode: int
    header_length: int
    payload_length: int
    payload_crc: int
    header_crc: int
    checked: bytes

    SIZE: ClassVar[int] = _FRAME.size

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Take a frame apart, and refuse lengths over the limits before anyone believes them."""
        if len(data) < _FRAME.size:
            msg = f"a frame has {_FRAME.size} bytes; {len(data)} are left"
            raise FormatError(msg)
        sync, opcode, flags, reserved, header, payload, payload_crc, crc = _FRAME.unpack_from(data)
        if flags or reserved:
            msg = f"reserved bytes of a frame must be 0; found {flags:#x}, {reserved:#x}"
            raise FormatError(msg)
        if header > HEADER_LIMIT or payload > PAYLOAD_LIMIT:
            msg = f"lengths {header} and {payload} exceed {HEADER_LIMIT} and {PAYLOAD_LIMIT}"
            raise FormatError(msg)
        return cls(sync, opcode, header, payload, payload_crc, crc, data[:_FRAME_CHECKED])

    @property
    def length(self) -> int:
        """Bytes of the whole record."""
        return _FRAME.size + self.header_length + self.payload_length

    def check(self, header: bytes) -> None:
        """Compare the frame and its record's header with their checksum."""
        found = crc32c(header, crc32c(self.checked))
        if len(header) != self.header_length or found != self.header_crc:
            wanted = self.header_crc
            msg = f"CRC-32C of a record's frame and header is {found:#010x}, not {wanted:#010x}"
            raise FormatError(msg)


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A record ready to be written: all of it but its place in a file.

    Attributes
    ----------
    opcode : int
        What it is.
    header : bytes
        Its header.
    payload : tuple of bytes-like
        Buffers of bytes that together are its payload.
    payload_crc : int
        CRC-32C of the payload.
    """

    opcode: int
    header: bytes
    payload: tuple[Any, ...] = ()
    payload_crc: int = 0

    @classmethod
    def of(cls, opcode: int, header: bytes, *payload: Any) -> Self:
        """Make a record, computing its payload's checksum."""
        parts = tuple(memoryview(part) for part in payload if len(part))
        crc = 0
        for part in parts:
            crc = crc32c(part, crc)
        return cls(opcode, header, parts, crc)

    @property
    def head_length(self) -> int:
        """Bytes of the frame and the header."""
        return _FRAME.size + len(self.header)

    @property
    def payload_length(self) -> int:
        """Bytes of the payload."""
        return sum(map(len, self.payload))

    def frame(self, sync: bytes) -> bytes:
        """Give the bytes that stand before the payload: the frame and the header."""
        sizes = len(self.header), self.payload_length
        head = _FRAME.pack(sync, self.opcode, 0, 0, *sizes, self.payload_crc, 0)[:_FRAME_CHECKED]
        return b"".join((head, struct.pack("<I", crc32c(self.header, crc32c(head))), self.header))

    def entry(self, offset: int) -> Entry:
        """Describe the record at its place in a file, for its group's directory."""
        return Entry(offset, self.opcode, self.header, self.payload_length, self.payload_crc)


# -- HEADER -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """HEADER: a JSON object in the record's header."""

    attributes: Mapping[str, Any]

    def encode(self) -> bytes:
        """Give the record's header."""
        return _dump(self.attributes)

    @classmethod
    def decode(cls, header: bytes) -> Self:
        """Read the record's header."""
        return cls(_load(header, "HEADER"))


# -- LAYER --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """LAYER: a JSON object in the record's header."""

    info: LayerInfo

    def encode(self) -> bytes:
        """Give the record's header."""
        info = self.info
        said = {
            "id": info.id,
            "name": info.name,
            "site": info.site,
            "block": info.block,
            "class": info.kind,
        }
        return _dump(said | ({"shard": info.shard.member()} if info.shard is not None else {}))

    @classmethod
    def decode(cls, header: bytes) -> Self:
        """Read the record's header."""
        found: dict[str, Any] = _load(header, "LAYER")
        number: Any
        name: Any
        site: Any
        number, name, site = found.get("id"), found.get("name"), found.get("site")
        block, kind = found.get("block", -1), found.get("class", "")
        integers = all(type(value) is int for value in (number, block))
        texts = all(isinstance(value, str) for value in (name, site, kind))
        if not integers or not texts or not 0 <= number < 1 << 32 or not -1 <= block < 1 << 31:
            msg = f"a LAYER record needs id, name, site, block, class; found {found!r:.200}"
            raise FormatError(msg)
        shard = Shard.of(found["shard"]) if found.get("shard") is not None else None
        return cls(LayerInfo(number, name, site, block, kind, shard))


# -- FEATURES -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """FEATURES: which features of a width were kept; the indices are the payload."""

    width: int
    indices: NDArray[np.uint32]

    _HEAD: ClassVar[struct.Struct] = struct.Struct("<II")

    def encode(self) -> tuple[bytes, bytes]:
        """Give the record's header and payload."""
        data = np.ascontiguousarray(self.indices, "<u4")
        return self._HEAD.pack(self.width, data.size), data.tobytes()

    @classmethod
    def decode(cls, header: bytes, payload: bytes) -> Self:
        """Read the record's header and payload."""
        width, count = _unpack_whole(cls._HEAD, header, "FEATURES")
        if len(payload) != 4 * count or count > width:
            msg = f"FEATURES of width {width} declares {count} indices in {len(payload)} bytes"
            raise FormatError(msg)
        indices = np.frombuffer(payload, "<u4")
        if np.any(indices >= width) or np.any(indices[1:] <= indices[:-1]):
            msg = f"FEATURES of width {width}: wanted ascending indices below it"
            raise FormatError(msg)
        return cls(width, indices)


# -- PASS ---------------------------------------------------------------------------------------

_CLOSED, _ABORTED, _STATUS = 1, 2, 4


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """PASS: the inputs of a pass, then, when it ends after its group, its status alone.

    Attributes
    ----------
    info : PassInfo
        ``info.aborted`` counts only when ``closed``.
    closed : bool
        The pass has ended.
    status_only : bool
        Axes and annotations stand in an earlier PASS of the same index.
    """

    info: PassInfo
    closed: bool
    status_only: bool = False

    _HEAD: ClassVar[struct.Struct] = struct.Struct("<QIIHBB")
    _AXIS: ClassVar[struct.Struct] = struct.Struct("<IIBBBBB")

    def encode(self) -> tuple[bytes, bytes]:
        """Give the record's header and payload."""
        info = self.info
        axes = () if self.status_only else info.axes
        labels = {} if self.status_only else dict(info.annotations)
        annotations = _dump(labels) if labels else b""
        entry = info.entry.encode("utf-8", "surrogatepass")
        flags = (
            _CLOSED * self.closed
            | _ABORTED * (self.closed and info.aborted)
            | _STATUS * self.status_only
        )
        header = [
            self._HEAD.pack(
                info.index, info.logits_to_keep, len(annotations), len(entry), len(axes), flags
            ),
            entry,
        ]
        payload = []
        for axis in axes:
            arrays, codes = _encode_axis(axis)
            name = axis.name.encode("utf-8", "surrogatepass")
            header += [
                self._AXIS.pack(axis.batch, axis.sequence, axis.flat, *codes, len(name)),
                name,
            ]
            payload += arrays
        return b"".join(header), b"".join([*payload, annotations])

    @classmethod
    def peek(cls, header: bytes) -> int:
        """Give the index of the pass, without the rest."""
        index = int(_Cursor(header, "PASS").unpack(cls._HEAD)[0])
        if index >= 1 << 63:
            msg = f"PASS has index {index}; wanted one below 2**63"
            raise FormatError(msg)
        return index

    @classmethod
    def decode(cls, header: bytes, payload: bytes) -> Self:
        """Read the record's header and payload."""
        cursor = _Cursor(header, "PASS")
        index, keep, labels, entry_length, count, flags = cursor.unpack(cls._HEAD)
        status = bool(flags & _STATUS)
        unknown = flags & ~(_CLOSED | _ABORTED | _STATUS)
        if count > _AXES_LIMIT or unknown or (status and (count or labels)):
            msg = f"PASS {index} has {count} axes and flags {flags:#x}"
            raise FormatError(msg)
        entry = cursor.text(entry_length)
        values = _Cursor(payload, "PASS")
        axes = tuple(_decode_axis(cursor, values) for _ in range(count))
        cursor.finish()
        annotations = _load(values.take(labels), "PASS") if labels else {}
        values.finish()
        closed = bool(flags & _CLOSED)
        info = PassInfo(index, axes, annotations, bool(flags & _ABORTED), entry, keep)
        return cls(info, closed, status)


def _encode_axis(axis: Axis) -> tuple[list[bytes], tuple[int, int, int]]:
    """Give an axis's arrays as bytes, and their codes: 0 absent, else a dtype's (the mask: 1)."""
    ids = _encode_integers(axis.token_ids, -1)
    positions = _encode_integers(axis.positions)
    whole = bool(axis.mask.all())
    mask = b"" if whole else np.packbits(axis.mask, bitorder="little").tobytes()
    return [positions[0], ids[0], mask], (positions[1], ids[1], int(not whole))


def _encode_integers(values: NDArray[np.int64], absent: int | None = None) -> tuple[bytes, int]:
    """Give integers as bytes, and their dtype's code; nothing and 0 where all are ``absent``."""
    # of a few, as one token at a time has them, Python's own are faster than NumPy's
    numbers = values.ravel().tolist() if values.size <= _FEW else None
    low, high = (
        (min(numbers, default=0), max(numbers, default=0))
        if numbers is not None
        else (int(values.min()), int(values.max()))
    )
    if low == high == absent:
        return b"", 0
    narrow = low >= -(1 << 31) and high < 1 << 31
    code = dtypes.BY_NAME["int32" if narrow else "int64"].code
    if numbers is not None:
        return struct.pack(f"<{len(numbers)}{'i' if narrow else 'q'}", *numbers), code
    return values.astype("<i4" if narrow else "<i8").tobytes(), code


def _decode_axis(header: _Cursor, values: _Cursor) -> Axis:
    batch, sequence, flat, positions, ids, masked, length = header.unpack(Pass._AXIS)
    name = header.text(length)
    rows, shape = batch * sequence, (batch, sequence)
    if flat > 1 or masked > 1:
        msg = f"axis {name!r} has flat {flat} and mask {masked}; wanted 0 or 1"
        raise FormatError(msg)
    found = _decode_integers(values, positions, rows).reshape(shape)
    fed = _decode_integers(values, ids, rows).reshape(shape) if ids else np.full(shape, -1, "i8")
    mask = np.ones(shape, np.bool_)
    if masked:
        bits = np.frombuffer(values.take(-(-rows // 8)), np.uint8)
        mask = np.unpackbits(bits, count=rows, bitorder="little").astype(np.bool_).reshape(shape)
    return Axis(name, batch, sequence, fed, found, mask, bool(flat))


def _decode_integers(values: _Cursor, code: int, rows: int) -> NDArray[np.int64]:
    kind = dtypes.from_code(code)
    if kind.name not in ("int32", "int64"):
        msg = f"ids and positions are int32 or int64; found {kind.name}"
        raise FormatError(msg)
    data = np.frombuffer(values.take(rows * kind.itemsize), kind.numpy.newbyteorder("<"))
    return data.astype(np.int64)


# -- BLOCK --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Packets of a block at regular steps: packet i has ``seq + i * seq_step``, and so on.

    Attributes
    ----------
    seq, pass_index, call : int
        Of the first packet.
    alias_back : int
        How many packets before it in the run stands the one whose values it has; 0: none.
    count : int
        Packets in the run.
    seq_step, pass_step, call_step : int
        From one packet to the next.
    shape : int
        Index in the block's shapes.
    part, parts : int
        The packet is part ``part`` of ``parts``.
    """

    seq: int
    pass_index: int
    alias_back: int
    count: int
    seq_step: int
    pass_step: int
    call: int
    call_step: int
    shape: int
    part: int = 0
    parts: int = 1

    def at(self, number: int) -> Run:
        """Give one packet of the run, as a run of its own."""
        return replace(
            self,
            seq=self.seq + number * self.seq_step,
            pass_index=self.pass_index + number * self.pass_step,
            call=self.call + number * self.call_step,
            count=1,
            seq_step=0,
            pass_step=0,
            call_step=0,
        )


@dataclass(frozen=True, slots=True)
class Block:
    """BLOCK: consecutive packets of one layer; the encoded bytes are the payload."""

    layer: int
    codec: int
    dtype: int
    width: int
    raw_length: int
    shapes: tuple[tuple[int, ...], ...]
    runs: tuple[Run, ...]

    _HEAD: ClassVar[struct.Struct] = struct.Struct("<IBBHIIII")
    _RUN: ClassVar[struct.Struct] = struct.Struct("<QQQIIIIIHHHH")
    #: The same, as rows of an array.
    RUN: ClassVar[np.dtype[np.void]] = np.dtype(
        [
            *((name, "<u8") for name in ("seq", "pass_index", "back")),
            *((name, "<u4") for name in ("count", "seq_step", "pass_step", "call", "call_step")),
            *((name, "<u2") for name in ("shape", "part", "parts", "reserved")),
        ]
    )

    def encode(self) -> bytes:
        """Give the record's header."""
        rows = [
            (
                *(run.seq, run.pass_index, run.alias_back, run.count),
                *(run.seq_step, run.pass_step, run.call, run.call_step),
                *(run.shape, run.part, run.parts, 0),
            )
            for run in self.runs
        ]
        about = (self.layer, self.codec, self.dtype, self.width, self.raw_length)
        return self.encode_runs(about, self.shapes, np.array(rows, self.RUN))

    @classmethod
    def encode_runs(
        cls,
        about: tuple[int, int, int, int, int],
        shapes: Sequence[tuple[int, ...]],
        runs: NDArray[np.void],
    ) -> bytes:
        """Give the header of a record whose runs are rows of `RUN`.

        Parameters
        ----------
        about : tuple of int
            Layer, codec, dtype, width, raw length.
        shapes : sequence of tuple of int
            Those that the runs name by index.
        runs : numpy.ndarray
            Of dtype `RUN`.
        """
        layer, codec, dtype, width, raw_length = about
        head = cls._HEAD.pack(layer, codec, dtype, 0, width, raw_length, len(shapes), runs.size)
        packed = [struct.pack(f"<B{len(shape)}Q", len(shape), *shape) for shape in shapes]
        return b"".join((head, *packed, runs.tobytes()))

    @classmethod
    def decode(cls, header: bytes) -> Self:
        """Read the record's header; the sizes that it declares add up when this returns."""
        cursor = _Cursor(header, "BLOCK")
        layer, codec, dtype, reserved, width, raw, shape_count, run_count = cursor.unpack(
            cls._HEAD
        )
        if reserved or raw > BLOCK_LIMIT or max(shape_count, run_count) > PACKETS_LIMIT:
            msg = (
                f"BLOCK declares {raw} raw bytes, {shape_count} shapes and {run_count} runs "
                f"(limits {BLOCK_LIMIT} and {PACKETS_LIMIT})"
            )
            raise FormatError(msg)
        shapes = tuple(_decode_shape(cursor) for _ in range(shape_count))
        runs = tuple(_decode_run(cursor, cls._RUN, len(shapes)) for _ in range(run_count))
        cursor.finish()
        block = cls(layer, codec, dtype, width, raw, shapes, runs)
        block._check(dtypes.from_code(dtype).itemsize)
        return block

    def packet_bytes(self, run: Run, itemsize: int) -> int:
        """Give the raw bytes that each packet of a run has in this block."""
        if run.alias_back:
            return 0
        return self.raw_length if run.parts > 1 else itemsize * _size(self.shapes[run.shape])

    def _check(self, itemsize: int) -> None:
        packets = sum(run.count for run in self.runs)
        split = any(run.parts > 1 for run in self.runs)
        if not 0 < packets <= PACKETS_LIMIT or (split and packets != 1):
            msg = f"BLOCK declares {packets} packets (limit {PACKETS_LIMIT}; 1 if in parts)"
            raise FormatError(msg)
        total = sum(run.count * self.packet_bytes(run, itemsize) for run in self.runs)
        if total != self.raw_length:
            msg = f"BLOCK declares {self.raw_length} raw bytes; its packets have {total}"
            raise FormatError(msg)


def _decode_shape(cursor: _Cursor) -> tuple[int, ...]:
    (ndim,) = cursor.unpack(struct.Struct("<B"))
    if ndim > _NDIM_LIMIT:
        msg = f"a shape has {ndim} dimensions; the limit is {_NDIM_LIMIT}"
        raise FormatError(msg)
    shape: tuple[int, ...] = cursor.unpack(struct.Struct(f"<{ndim}Q"))
    if _size(tuple(max(length, 1) for length in shape)) > _SIZE_LIMIT:
        msg = f"shape {shape} is beyond {_SIZE_LIMIT} elements"
        raise FormatError(msg)
    return shape


def _decode_run(cursor: _Cursor, layout: struct.Struct, shapes: int) -> Run:
    *values, reserved = cursor.unpack(layout)
    run = Run(*values)
    last_seq = run.seq + (run.count - 1) * run.seq_step
    last_pass = run.pass_index + (run.count - 1) * run.pass_step
    steps = run.count == 1 or run.seq_step > 0
    parts = 0 <= run.part < run.parts and not (run.parts > 1 and run.alias_back)
    if reserved or run.shape >= shapes or run.count == 0 or not steps or not parts:
        msg = f"BLOCK has an impossible run {run}"
        raise FormatError(msg)
    if run.alias_back > run.seq or max(last_seq, last_pass) >= 1 << 63:
        msg = f"BLOCK has a run beyond the range of sequence numbers: {run}"
        raise FormatError(msg)
    return run


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


# -- TOKEN --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Token:
    """TOKEN: what ``record_token`` was told."""

    record: TokenRecord

    _HEAD: ClassVar[struct.Struct] = struct.Struct("<QqqqdI")

    def encode(self) -> bytes:
        """Give the record's header."""
        record = self.record
        text = record.token_text.encode("utf-8", "surrogatepass")
        position = NO_POSITION if record.position is None else record.position
        head = self._HEAD.pack(
            record.step, record.token_id, position, record.pass_index, record.time, len(text)
        )
        return head + text

    @classmethod
    def decode(cls, header: bytes) -> Self:
        """Read the record's header."""
        cursor = _Cursor(header, "TOKEN")
        step, token_id, position, pass_index, time, length = cursor.unpack(cls._HEAD)
        text = cursor.text(length)
        cursor.finish()
        if step >= 1 << 63:
            msg = f"TOKEN has step {step}; wanted one below 2**63"
            raise FormatError(msg)
        given = None if position == NO_POSITION else position
        return cls(TokenRecord(step, token_id, text, given, pass_index, time))


# -- TEXT ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    """TEXT: what token ids stand for; a JSON object in the record's header."""

    texts: Mapping[int, str]

    def encode(self) -> bytes:
        """Give the record's header."""
        return _dump({str(token_id): text for token_id, text in self.texts.items()})

    @classmethod
    def split(cls, texts: Mapping[int, str]) -> Iterator[Self]:
        """Give the records that say what some token ids stand for."""
        pairs = iter(texts.items())
        while some := dict(islice(pairs, _TEXTS)):
            yield cls(some)

    @classmethod
    def decode(cls, header: bytes) -> Self:
        """Read the record's header."""
        found = _load(header, "TEXT")
        try:
            texts = {int(token_id): text for token_id, text in found.items()}
        except ValueError as error:
            msg = f"TEXT has a key that is no token id: {error}"
            raise FormatError(msg) from error
        plain = all(str(one) == key for one, key in zip(texts, found, strict=False))
        if not plain or not all(isinstance(text, str) for text in texts.values()):
            msg = f"TEXT maps decimal token ids to text; found {repr(found)[:80]}"
            raise FormatError(msg)
        return cls(texts)


# -- COMMIT -------------------------------------------------------------------------------------

_ENTRY = struct.Struct("<QBxxxIQI")


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as its frame describes it, wherever that description was read."""

    offset: int
    opcode: int
    header: bytes
    payload_length: int
    payload_crc: int

    @property
    def payload_offset(self) -> int:
        """Where the payload begins in the file."""
        return self.offset + Frame.SIZE + len(self.header)

    @property
    def end(self) -> int:
        """Where the record ends in the file."""
        return self.payload_offset + self.payload_length


def encode_entries(entries: Sequence[Entry]) -> bytes:
    """Give the directory of a group: its records' frames and headers, again."""
    return b"".join(
        part
        for entry in entries
        for part in (
            _ENTRY.pack(
                entry.offset,
                entry.opcode,
                len(entry.header),
                entry.payload_length,
                entry.payload_crc,
            ),
            entry.header,
        )
    )


def decode_entries(payload: bytes) -> Iterator[Entry]:
    """Read the directory of a group."""
    cursor = _Cursor(payload, "COMMIT")
    while cursor.left:
        offset, opcode, header, length, crc = cursor.unpack(_ENTRY)
        yield Entry(offset, opcode, cursor.take(header), length, crc)


def read_entries(read: Callable[[int, int], bytes], size: int) -> Iterator[Entry]:
    """Read the directory of a group entry by entry, where it isn't held in memory.

    Parameters
    ----------
    read : callable
        Gives bytes of the directory, from an offset on.
    size : int
        How many there are.

    Raises
    ------
    FormatError
        It ends within an entry.
    """
    at = 0
    while at < size:
        head = _Cursor(read(at, min(_ENTRY.size, size - at)), "COMMIT")
        offset, opcode, header, length, crc = head.unpack(_ENTRY)
        at += _ENTRY.size
        body = _Cursor(read(at, min(header, size - at)), "COMMIT")
        yield Entry(offset, opcode, body.take(header), length, crc)
        at += header


@dataclass(frozen=True, slots=True)
class Commit:
    """COMMIT: closes a group; the group's directory is the payload.

    ``synced``: all that stands before ``start`` was on the disk when this was written.
    """

    start: int
    next_seq: int
    next_pass: int
    next_step: int
    step_boundary: bool
    synced: bool = False

    _HEAD: ClassVar[struct.Struct] = struct.Struct("<QQQQB")

    def encode(self) -> bytes:
        """Give the record's header."""
        flags = self.step_boundary | self.synced << 1
        return self._HEAD.pack(self.start, self.next_seq, self.next_pass, self.next_step, flags)

    @classmethod
    def decode(cls, header: bytes) -> Self:
        """Read the record's header."""
        start, seq, index, step, flags = _unpack_whole(cls._HEAD, header, "COMMIT")
        if flags > 3:
            msg = f"COMMIT has flags of {flags}; wanted 0 to 3"
            raise FormatError(msg)
        return cls(start, seq, index, step, bool(flags & 1), bool(flags & 2))


# -- INDEX and END ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Index:
    """INDEX: where the COMMITs are, and the run's summary."""

    commits: tuple[int, ...]
    summary: Mapping[str, Any] = field(default_factory=dict)

    _HEAD: ClassVar[struct.Struct] = struct.Struct("<II")

    def encode(self) -> tuple[bytes, bytes]:
        """Give the record's header and payload."""
        summary = _dump(self.summary)
        offsets = struct.pack(f"<{len(self.commits)}Q", *self.commits)
        return self._HEAD.pack(len(self.commits), len(summary)), offsets + summary

    @classmethod
    def decode(cls, header: bytes, payload: bytes) -> Self:
        """Read the record's header and payload."""
        count, length = _unpack_whole(cls._HEAD, header, "INDEX")
        cursor = _Cursor(payload, "INDEX")
        offsets = np.frombuffer(cursor.take(8 * count), "<u8")
        summary = _load(cursor.take(length), "INDEX")
        cursor.finish()
        return cls(tuple(offsets.tolist()), summary)


_END = struct.Struct("<Q")
#: Bytes of the END record and the magic after it: the end of a log that was closed.
TAIL_SIZE: Final = _FRAME.size + _END.size + len(MAGIC)


def encode_end(index_offset: int) -> bytes:
    """Give END's header: where the INDEX record begins."""
    return _END.pack(index_offset)


def decode_end(header: bytes) -> int:
    """Read END's header."""
    return int(_unpack_whole(_END, header, "END")[0])


# -- pieces -------------------------------------------------------------------------------------


class _Cursor:
    """Reads a buffer from front to back, and never past its end."""

    def __init__(self, data: bytes, record: str) -> None:
        self._data = data
        self._at = 0
        self._record = record

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, length: int) -> bytes:
        if length > self.left:
            msg = f"{self._record} wants {length} more bytes; {self.left} are left"
            raise FormatError(msg)
        self._at += length
        return self._data[self._at - length : self._at]

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size))

    def text(self, length: int) -> str:
        try:
            return self.take(length).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            msg = f"{self._record} holds text that is not UTF-8: {error}"
            raise FormatError(msg) from error

    def finish(self) -> None:
        if self.left:
            msg = f"{self._record} has {self.left} bytes too many"
            raise FormatError(msg)


def _unpack_whole(layout: struct.Struct, header: bytes, record: str) -> tuple[Any, ...]:
    cursor = _Cursor(header, record)
    values = cursor.unpack(layout)
    cursor.finish()
    return values


def _dump(value: Mapping[str, Any]) -> bytes:
    data = json.dumps(value, separators=(",", ":")).encode("ascii")
    _check_json(data, "a record")
    return data


def _load(data: bytes, record: str) -> dict[str, Any]:
    _check_json(data, record)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        msg = f"{record} holds no JSON: {error}"
        raise FormatError(msg) from error
    if not isinstance(value, dict):
        msg = f"{record} holds a JSON {type(value).__name__}; wanted an object"
        raise FormatError(msg)
    return value


def _check_json(data: bytes, record: str) -> None:
    """Refuse what would be far larger in memory than it is."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if len(data) > HEADER_LIMIT or values > JSON_LIMIT:
        msg = (
            f"{record} has {len(data)} bytes of JSON with {values} commas and brackets; the "
            f"limits are {HEADER_LIMIT} and {JSON_LIMIT}"
        )
        raise FormatError(msg)
