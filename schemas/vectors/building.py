"""A log in the making, and what a reader must make of it: for `good_logs.py` and `bad_logs.py`."""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAGIC = b"\x89ACS\r\n\x1a\x01"
SYNC = bytes(range(0xA0, 0xB0))
HEADER, LAYER, FEATURES, PASS, BLOCK, TOKEN, COMMIT, PAD, INDEX, END, TEXT = range(1, 12)
CLOSED, ABORTED, STATUS = 1, 2, 4
NO_POSITION = -(2**63)

#: code, name, itemsize
DTYPES = (
    *((1, "bool", 1), (2, "uint8", 1), (3, "int8", 1), (4, "uint16", 2), (5, "int16", 2)),
    *((6, "uint32", 4), (7, "int32", 4), (8, "uint64", 8), (9, "int64", 8), (10, "float16", 2)),
    *((11, "bfloat16", 2), (12, "float32", 4), (13, "float64", 8), (14, "complex64", 8)),
    *((15, "complex128", 16), (16, "float8_e4m3fn", 1), (17, "float8_e5m2", 1)),
    *((18, "float8_e4m3fnuz", 1), (19, "float8_e5m2fnuz", 1), (20, "float8_e8m0fnu", 1)),
)
FLOAT32 = 12
NAMES = {code: name for code, name, _ in DTYPES}

#: A codec table.
RAW: Mapping[str, Any] = {"0": None}


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """Give the CRC-32C of RFC 3720, byte by byte."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def document(value: Mapping[str, Any]) -> bytes:
    """Give JSON in ASCII, as records hold it."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def utf8(text: str) -> bytes:
    """Give text as records hold it."""
    return text.encode("utf-8", "surrogatepass")


# -- records ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run of a BLOCK, in the order of its fields."""

    seq: int
    pass_index: int = 0
    back: int = 0
    count: int = 1
    seq_step: int = 0
    pass_step: int = 0
    call: int = 0
    call_step: int = 0
    shape: int = 0
    part: int = 0
    parts: int = 1
    reserved: int = 0


class Axis(NamedTuple):
    """An axis of a pass: positions and ids in C order, with the dtype codes that hold them."""

    name: str
    batch: int
    sequence: int
    positions: Sequence[int]
    ids: Sequence[int] | None = None
    mask: Sequence[int] | None = None
    flat: int = 0
    position_code: int = 7
    id_code: int = 7

    def header(self) -> bytes:
        """Give the axis as the header of a PASS holds it."""
        name, codes = (
            utf8(self.name),
            (self.position_code, 0 if self.ids is None else self.id_code),
        )
        sizes = (self.batch, self.sequence, self.flat, *codes, int(self.mask is not None))
        return struct.pack("<IIBBBBB", *sizes, len(name)) + name

    def payload(self) -> bytes:
        """Give its arrays as the payload of a PASS holds them."""
        kinds = {7: "i", 9: "q"}
        data = struct.pack(f"<{len(self.positions)}{kinds[self.position_code]}", *self.positions)
        if self.ids is not None:
            data += struct.pack(f"<{len(self.ids)}{kinds[self.id_code]}", *self.ids)
        if self.mask is not None:
            number = sum(bit << place for place, bit in enumerate(self.mask))
            data += number.to_bytes(-(-len(self.mask) // 8), "little")
        return data

    def expected(self) -> dict[str, Any]:
        """Say what a reader makes of it."""
        rows = self.batch * self.sequence
        return {
            "name": self.name,
            "batch": self.batch,
            "sequence": self.sequence,
            "flat": bool(self.flat),
            "positions": list(self.positions),
            "ids": [-1] * rows if self.ids is None else list(self.ids),
            "mask": [True] * rows if self.mask is None else [bool(bit) for bit in self.mask],
        }


def frame(opcode: int, header: bytes, payload: bytes, **lies: int) -> bytes:
    """Give a record; `lies` are fields that say something else than they should."""
    fields = {
        "opcode": opcode,
        "flags": 0,
        "reserved": 0,
        "header_length": len(header),
        "payload_length": len(payload),
        "payload_crc": crc32c(payload),
    }
    head = SYNC + struct.pack("<BBHIQI", *(fields | lies).values())
    return head + struct.pack("<I", crc32c(head + header)) + header + payload


def block_header(
    runs: Sequence[Run], shapes: Sequence[Sequence[int]], raw_length: int, /, **lies: int
) -> bytes:
    """Give the header of a BLOCK of float32 of layer 0, uncompressed, but for what `lies` say."""
    fields = {
        "layer": 0,
        "codec": 0,
        "dtype": FLOAT32,
        "reserved": 0,
        "width": 0,
        "raw_length": raw_length,
        "shape_count": len(shapes),
        "run_count": len(runs),
    }
    header = struct.pack("<IBBHIIII", *(fields | lies).values())
    for shape in shapes:
        header += struct.pack(f"<B{len(shape)}Q", len(shape), *shape)
    return header + b"".join(struct.pack("<QQQIIIIIHHHH", *run) for run in runs)


class Log:
    """A log that is being written, and what a reader must make of it."""

    def __init__(self, codecs: Mapping[str, Any] = RAW, **members: Any) -> None:
        self.data = bytearray(MAGIC)
        self.commits: list[int] = []
        self.directory: list[bytes] = []
        self.start: int | None = None
        self.expected: dict[str, Any] = {
            "complete": False,
            "layers": [],
            "features": {},
            "texts": {},
            "tokens": [],
            "passes": [],
            "packets": [],
        }
        self.record(HEADER, document({"run_id": "vector", "codecs": codecs} | members))
        self.directory, self.start = [], None

    def record(self, opcode: int, header: bytes = b"", payload: bytes = b"", **lies: int) -> int:
        """Append a record to the group, and give its offset."""
        offset = len(self.data)
        self.start = offset if self.start is None else self.start
        self.data += frame(opcode, header, payload, **lies)
        if opcode != PAD:
            sizes = len(header), len(payload), crc32c(payload)
            self.directory += [struct.pack("<QBxxxIQI", offset, opcode, *sizes), header]
        return offset

    def commit(
        self,
        next_seq: int = 0,
        next_pass: int = 0,
        next_step: int = 0,
        boundary: int = 0,
        synced: int = 0,
    ) -> int:
        """Close the group, and give the offset of the COMMIT."""
        offset = len(self.data)
        start = offset if self.start is None else self.start
        flags = boundary | synced << 1
        header = struct.pack("<QQQQB", start, next_seq, next_pass, next_step, flags)
        self.data += frame(COMMIT, header, b"".join(self.directory))
        self.commits.append(offset)
        self.directory, self.start = [], None
        return offset

    def close(
        self,
        summary: Mapping[str, Any] | None = None,
        *,
        commits: Sequence[int] | None = None,
        index_offset: int | None = None,
    ) -> int:
        """Append INDEX, END and magic, and give the offset of the INDEX; or say what isn't so."""
        offset, text = len(self.data), document(summary or {})
        said = self.commits if commits is None else commits
        payload = struct.pack(f"<{len(said)}Q", *said) + text
        self.data += frame(INDEX, struct.pack("<II", len(said), len(text)), payload)
        place = offset if index_offset is None else index_offset
        self.data += frame(END, struct.pack("<Q", place), b"") + MAGIC
        self.expected["complete"] = True
        return offset

    def layer(self, number: int = 0, name: str = "layer", block: int = -1) -> int:
        """Declare a layer."""
        info = {"id": number, "name": name, "site": name, "block": block, "class": "Linear"}
        self.expected["layers"].append(info)
        return self.record(LAYER, document(info))

    def features(self, width: int, indices: Sequence[int]) -> int:
        """Say which features of a width are kept."""
        self.expected["features"][str(width)] = list(indices)
        header = struct.pack("<II", width, len(indices))
        return self.record(FEATURES, header, struct.pack(f"<{len(indices)}I", *indices))

    def texts(self, texts: Mapping[str, str]) -> int:
        """Say what token ids stand for."""
        self.expected["texts"] |= texts
        return self.record(TEXT, document(texts))

    def pass_(
        self,
        index: int = 0,
        axes: Sequence[Axis] = (),
        *,
        flags: int = CLOSED,
        annotations: Mapping[str, Any] | None = None,
        entry: str = "",
        keep: int = 0,
    ) -> int:
        """Append the PASS that begins a pass."""
        notes, name = document(annotations) if annotations else b"", utf8(entry)
        head = struct.pack("<QIIHBB", index, keep, len(notes), len(name), len(axes), flags)
        header = head + name + b"".join(axis.header() for axis in axes)
        self.expected["passes"].append(
            {
                "index": index,
                "entry": entry,
                "logits_to_keep": keep,
                "closed": bool(flags & CLOSED),
                "aborted": bool(flags & ABORTED),
                "annotations": dict(annotations or {}),
                "axes": [axis.expected() for axis in axes],
            }
        )
        return self.record(PASS, header, b"".join(axis.payload() for axis in axes) + notes)

    def pass_ends(self, index: int, flags: int) -> int:
        """Append the PASS that says how an earlier one ended."""
        (known,) = (one for one in self.expected["passes"] if one["index"] == index)
        known |= {"closed": bool(flags & CLOSED), "aborted": bool(flags & ABORTED)}
        return self.record(PASS, struct.pack("<QIIHBB", index, 0, 0, 0, 0, flags | STATUS))

    def block(
        self,
        runs: Sequence[Run],
        shapes: Sequence[Sequence[int]],
        raw: bytes = b"",
        payload: bytes | None = None,
        **lies: int,
    ) -> int:
        """Append a BLOCK."""
        header = block_header(runs, shapes, len(raw), **lies)
        return self.record(BLOCK, header, raw if payload is None else payload)

    def expect(
        self,
        seq: int,
        shape: Sequence[int],
        values: bytes,
        *,
        layer: str = "layer",
        pass_index: int = 0,
        call: int = 0,
        dtype: int = FLOAT32,
    ) -> None:
        """Say that a reader gives this packet."""
        self.expected["packets"].append(
            {
                "seq": seq,
                "layer": layer,
                "pass": pass_index,
                "call": call,
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "values": values.hex(),
            }
        )
        self.expected["packets"].sort(key=lambda packet: packet["seq"])

    def tensor(self, seq: int, *values: float, call: int | None = None) -> int:
        """Append a BLOCK of one packet of layer 0 in pass 0: a vector of float32."""
        raw, called = struct.pack(f"<{len(values)}f", *values), seq if call is None else call
        self.expect(seq, [len(values)], raw, call=called)
        return self.block([Run(seq, call=called)], [[len(values)]], raw)

    def token(
        self,
        step: int,
        token_id: int,
        text: str,
        *,
        position: int | None = None,
        pass_index: int = -1,
        time: float = 0.0,
    ) -> int:
        """Append a TOKEN."""
        raw, place = utf8(text), NO_POSITION if position is None else position
        self.expected["tokens"].append(
            {
                "step": step,
                "token_id": token_id,
                "position": position,
                "pass": pass_index,
                "time": time,
                "text": text,
            }
        )
        header = struct.pack("<QqqqdI", step, token_id, place, pass_index, time, len(raw))
        return self.record(TOKEN, header + raw)


def begun(codecs: Mapping[str, Any] = RAW) -> Log:
    """Give a log with a layer and a pass, its first group open."""
    log = Log(codecs)
    log.commit(boundary=1)
    log.layer()
    log.pass_()
    return log
