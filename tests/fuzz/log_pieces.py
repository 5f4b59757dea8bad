"""A log taken apart into its records, changed where that means something, and put together again.

Checksums, lengths, directories and the INDEX are mostly made to fit the change, so that what lies
behind them is reached.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Final

import crc32c
import numpy as np
from mutations import INTEGERS, TEXTS, mutate_bytes, mutate_json
from numcodecs import blosc

VECTORS: Final = Path(__file__).parents[2] / "schemas" / "vectors"
MAGIC: Final = b"\x89ACS\r\n\x1a\x01"
FRAME: Final = struct.Struct("<16sBBHIQII")
RUN: Final = struct.Struct("<QQQIIIIIHHHH")
BLOCK_HEAD: Final = struct.Struct("<IBBHIIII")
HEADER, LAYER, FEATURES, PASS, BLOCK, TOKEN, COMMIT, PAD, INDEX, END, TEXT = range(1, 12)
LONGEST: Final = 1 << 16  # bytes of a log that is made
_SYNC_SIZE: Final = 16
_JSON: Final = (HEADER, LAYER, TEXT)


@dataclass(frozen=True, slots=True)
class Piece:
    """A record of a log, and what its frame lies; below opcode 0, bytes that are no record."""

    opcode: int
    header: bytes = b""
    payload: bytes = b""
    lies: tuple[tuple[str, int], ...] = ()

    def bytes(self, sync: bytes) -> bytes:
        """Give it with checksums that fit."""
        if self.opcode < 0:
            return self.payload
        fields = {
            "opcode": self.opcode,
            "flags": 0,
            "reserved": 0,
            "header_length": len(self.header),
            "payload_length": len(self.payload),
            "payload_crc": crc32c.crc32c(self.payload),
        } | dict(self.lies)
        head = sync + struct.pack("<BBHIQI", *fields.values())
        return (
            head
            + struct.pack("<I", crc32c.crc32c(head + self.header))
            + self.header
            + self.payload
        )


@cache
def vectors() -> tuple[bytes, ...]:
    """Give the logs of the vectors."""
    paths = [path for kind in ("bad", "good") for path in VECTORS.glob(f"{kind}/*.stream")]
    return tuple(path.read_bytes() for path in sorted(paths))


def taken_apart(data: bytes) -> tuple[bytes, list[Piece]]:
    """Give a log's sync marker and its records; what isn't one, as a piece of bytes."""
    sync, at = data[8:24], min(8, len(data))
    pieces: list[Piece] = []
    while at < len(data):
        if len(data) - at >= FRAME.size and data[at : at + _SYNC_SIZE] == sync:
            _, opcode, _, _, header, payload, _, _ = FRAME.unpack_from(data, at)
            middle = at + FRAME.size + header
            if middle + payload <= len(data):
                pieces.append(
                    Piece(opcode, data[at + FRAME.size : middle], data[middle : middle + payload])
                )
                at = middle + payload
                continue
        end = data.find(sync, at + 1) if len(sync) == _SYNC_SIZE else -1
        end = len(data) if end < 0 else end
        pieces.append(Piece(-1, payload=data[at:end]))
        at = end
    return sync, pieces


def put_together(sync: bytes, pieces: list[Piece], *, whole: bool = True) -> bytes:
    """Give a log of records; `whole` also makes directories and the INDEX say what is there."""
    data = bytearray(MAGIC)
    directory: list[bytes] = []
    commits: list[int] = []
    start, index = -1, 0
    for piece in pieces:
        at = len(data)
        one = _fitted(piece, at if start < 0 else start, directory, commits, index)
        one = one if whole else piece
        data += one.bytes(sync)
        index = at if one.opcode == INDEX else index
        if one.opcode == COMMIT:
            commits.append(at)
        if one.opcode in (HEADER, COMMIT):
            directory, start = [], -1
        elif one.opcode not in (INDEX, END, -1):
            start = at if start < 0 else start
            if one.opcode != PAD:
                sizes = len(one.header), len(one.payload), crc32c.crc32c(one.payload)
                directory += [struct.pack("<QBxxxIQI", at, one.opcode, *sizes), one.header]
    return bytes(data)


def _fitted(
    piece: Piece, start: int, directory: list[bytes], commits: list[int], index: int
) -> Piece:
    """Give a COMMIT, an INDEX or an END that says what stands before it."""
    if piece.opcode == COMMIT and len(piece.header) == 33:
        header = struct.pack("<Q", start) + piece.header[8:]
        return replace(piece, header=header, payload=b"".join(directory))
    if piece.opcode == INDEX and len(piece.header) == 8:
        summary = piece.payload[8 * struct.unpack_from("<I", piece.header)[0] :]
        payload = struct.pack(f"<{len(commits)}Q", *commits) + summary
        return replace(
            piece, header=struct.pack("<II", len(commits), len(summary)), payload=payload
        )
    if piece.opcode == END and len(piece.header) == 8:
        return replace(piece, header=struct.pack("<Q", index))
    return piece


# -- mutations ------------------------------------------------------------------------------------

#: Where a header's fields are, and how long they are.
_FIELDS: Final = {
    FEATURES: ((0, 4), (4, 4)),
    PASS: ((0, 8), (8, 4), (12, 4), (16, 2), (18, 1), (19, 1)),
    BLOCK: ((0, 4), (4, 1), (5, 1), (6, 2), (8, 4), (12, 4), (16, 4), (20, 4)),
    TOKEN: ((0, 8), (8, 8), (16, 8), (24, 8), (32, 8), (40, 4)),
    COMMIT: ((0, 8), (8, 8), (16, 8), (24, 8), (32, 1)),
    INDEX: ((0, 4), (4, 4)),
    END: ((0, 8),),
}
_RUN_FIELDS: Final = (
    *((0, 8), (8, 8), (16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (40, 4)),
    *((44, 2), (46, 2), (48, 2), (50, 2)),
)
#: Where the length of the JSON at the end of a payload is said.
_NOTES: Final = {PASS: 12, INDEX: 4}


def mutate_log(data: bytes, rng: Random) -> bytes:
    """Change a log: raw, or by its records, with what depends on the change made to fit or not."""
    if len(data) < len(MAGIC) + _SYNC_SIZE or rng.randrange(8) == 0:
        return mutate_bytes(data, rng)[:LONGEST]
    sync, pieces = taken_apart(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _rearrange(sync, pieces, rng)
    changed = put_together(sync, pieces, whole=rng.randrange(4) > 0)
    if rng.randrange(12) == 0:
        changed = changed[: rng.randrange(len(changed) + 1)]
    return changed[:LONGEST]


def mutate_record(piece: Piece, rng: Random) -> Piece:
    """Change one record."""
    if piece.opcode < 0:
        return replace(piece, payload=mutate_bytes(piece.payload, rng))
    match rng.randrange(8):
        case 0:
            name = rng.choice(
                ("flags", "reserved", "header_length", "payload_length", "payload_crc")
            )
            size = {"flags": 1, "reserved": 2, "payload_length": 8}.get(name, 4)
            value = rng.choice((*INTEGERS, len(piece.header) + 1, 60_000)) % (1 << 8 * size)
            return replace(piece, lies=(*piece.lies, (name, value)))
        case 1:
            return replace(piece, opcode=rng.choice((*range(13), 0x80, 0xFF)))
        case 2 if piece.payload:
            return _other_payload(piece, rng)
        case 3:
            return replace(piece, header=mutate_bytes(piece.header, rng))
        case _ if piece.opcode in _JSON:
            return replace(piece, header=mutate_json(piece.header, rng))
        case _:
            return replace(piece, header=_other_field(piece.opcode, piece.header, rng))


def _rearrange(sync: bytes, pieces: list[Piece], rng: Random) -> None:
    """Take a record away, double, exchange or change one, or put others in."""
    at = rng.randrange(len(pieces) + 1)
    match rng.randrange(8):
        case 0 if pieces:
            pieces.pop(at % len(pieces))
        case 1 if pieces:
            pieces.insert(at, rng.choice(pieces))
        case 2 if pieces:
            other = rng.randrange(len(pieces))
            pieces[at % len(pieces)], pieces[other] = pieces[other], pieces[at % len(pieces)]
        case 3:
            _, others = taken_apart(rng.choice(vectors()))
            start = rng.randrange(len(others) + 1)
            pieces[at:at] = others[start : start + rng.choice((1, 3))]
        case 4:
            pieces[at:at] = rng.choice(_INVENTIONS)(sync, rng)
        case _ if pieces:
            pieces[at % len(pieces)] = mutate_record(pieces[at % len(pieces)], rng)


def _other_payload(piece: Piece, rng: Random) -> Piece:
    place = _NOTES.get(piece.opcode)
    at = piece.payload.find(b"{")
    if place is None or at < 0:
        return replace(piece, payload=mutate_bytes(piece.payload, rng))
    said = mutate_json(piece.payload[at:], rng)
    header = piece.header[:place] + struct.pack("<I", len(said)) + piece.header[place + 4 :]
    return replace(piece, header=header, payload=piece.payload[:at] + said)


def _other_field(opcode: int, header: bytes, rng: Random) -> bytes:
    """Change a field of a binary header."""
    fields = [one for one in _FIELDS.get(opcode, ()) if sum(one) <= len(header)]
    if opcode == BLOCK and len(header) >= BLOCK_HEAD.size + RUN.size and rng.randrange(2):
        count = max(struct.unpack_from("<I", header, 20)[0] % 64, 1)
        at = max(len(header) - RUN.size * rng.randint(1, count), BLOCK_HEAD.size)
        fields = [(at + place, size) for place, size in _RUN_FIELDS]
    if opcode == PASS and len(header) > 20 and rng.randrange(2):  # an axis, or the name
        fields = [(rng.randrange(20, len(header) + 1), rng.choice((1, 4)))]
    if not fields:
        return header
    at, size = rng.choice(fields)
    known = int.from_bytes(header[at : at + size], "little")
    near = known + rng.choice((-2, -1, 1, 2))
    value = rng.choice((near, rng.choice(INTEGERS), rng.randrange(20), known << 1))
    return header[:at] + (value % (1 << 8 * size)).to_bytes(size, "little") + header[at + size :]


# -- what a small log shouldn't get far with ------------------------------------------------------


def false_records(sync: bytes, rng: Random) -> list[Piece]:
    """Give what only begins as a record does."""
    lie = struct.pack("<BBHIQII", TOKEN, 0, 0, rng.choice((9, 4000, 60_000)), 0, 0, 0)
    return [Piece(-1, payload=(sync + rng.choice((b"", lie))) * rng.choice((3, 1500)))]


_SHAPES: Final = (
    *([], [0], [1], [2, 1, 3], [1] * 64, [*[1] * 63, 0], [2**57, 0], [2**58], [0, 2**40], [300]),
    *([1, 3, 4], [1, 1, 4], [3, 4], [65536], [4096, 1024], [2**24], [1, 2**20, 0]),
)


def odd_block(sync: bytes, rng: Random) -> list[Piece]:
    """Make a block that adds up, of odd sizes."""
    itemsizes = {1: 1, 2: 1, 11: 2, 12: 4, 15: 16, 20: 1}
    dtype = rng.choice(list(itemsizes))
    shape = rng.choice(_SHAPES)
    seq, count = (
        rng.choice((0, 1, 2, 50, 2**40)),
        rng.choice((1, 1, 1, 2, 2, 3, 3, 50, 1000, 65536)),
    )
    alias, parts = rng.choice((0, 0, 1, 2, seq)), rng.choice((1, 1, 1, 2, 3, 65535))
    if parts > 1:
        count, alias = 1, 0
    size = itemsizes[dtype]
    for length in shape:
        size *= length
    raw = min((0 if alias else size * count) // parts, 2**24)
    steps = rng.choice((1, 2)), rng.choice((0, 1)), rng.choice((0, 1)), rng.choice((0, 1))
    run = RUN.pack(
        *(seq, rng.choice((0, 0, 1, 2**62)), alias, count, *steps),
        *(0, rng.randrange(min(parts, 3)), parts, 0),
    )
    codec = rng.choice((0, 1, 1, 2)) if raw < LONGEST else rng.choice((1, 2))
    sizes = rng.choice((0, 0, 8)), raw, 1, 1
    head = BLOCK_HEAD.pack(rng.choice((0, 0, 1)), codec, dtype, 0, *sizes)
    header = head + struct.pack(f"<B{len(shape)}Q", len(shape), *shape) + run
    return [Piece(BLOCK, header, zeros(codec, raw))]


@cache
def zeros(codec: int, raw: int) -> bytes:
    """Encode zeros: what is little in the file, and much when it is decoded."""
    data = np.zeros(raw, np.uint8)
    if codec == 0 or not raw:
        return data.tobytes()
    return bytes(blosc.compress(data, b"lz4" if codec == 1 else b"zstd", 5, 1))


def _many_packets(sync: bytes, rng: Random) -> list[Piece]:
    (first,) = odd_block(sync, rng)
    steps = [struct.pack("<Q", 10 + 65536 * step) for step in range(rng.choice((2, 5, 200)))]
    before, after = first.header[: -RUN.size], first.header[8 - RUN.size :]
    return [replace(first, header=before + step + after) for step in steps]


def _parts_that_differ(sync: bytes, rng: Random) -> list[Piece]:
    made = []
    for part in range(rng.choice((3, 300))):
        run = RUN.pack(5, 0, 0, 1, 0, 0, part > 0, 0, 0, part, 400, 0)
        head = BLOCK_HEAD.pack(0, 0, 2, 0, 0, 1, 1, 1) + struct.pack("<BQ", 1, 400)
        made.append(Piece(BLOCK, head + run, b"x"))
    return made


def _many_rows(sync: bytes, rng: Random) -> list[Piece]:
    batch, sequence = rng.choice(((1, 3), (0, 2**32 - 1), (500, 16), (1, 12_000), (4, 1)))
    names = ("token", "decoder_token", "vision_token", "", "\u0130", "layer")
    name = rng.choice(names).encode()
    axis = struct.pack("<IIBBBBB", batch, sequence, rng.randrange(2), 7, 0, 0, len(name)) + name
    notes = rng.choice((b"", b'{"label":[1,"x",null,[1]]}', b'{"token_id":[99999999999999]}'))
    index = rng.choice((0, 1, 2**63 - 1, 2**63))
    head = struct.pack("<QIIHBB", index, rng.randrange(3), len(notes), 1, 1, 1) + b"e"
    return [Piece(PASS, head + axis, bytes(4 * batch * sequence) + notes)]


def _tokens(sync: bytes, rng: Random) -> list[Piece]:
    length = rng.choice((0, 5, 20_000))
    text = struct.pack("<I", length) + b"t" * length
    count = rng.choice((1, 3)) if length > 100 else rng.choice((3, 500))
    heads = [struct.pack("<Qqqqd", step, -step, step, step - 1, 0.0) for step in range(count)]
    return [Piece(TOKEN, head + text) for head in heads]


def _layers(sync: bytes, rng: Random) -> list[Piece]:
    said = {
        "id": rng.choice((0, 1, 2**32 - 1)),
        "name": rng.choice(TEXTS),
        "site": rng.choice(TEXTS),
    }
    said |= {"block": rng.choice((-1, 0, 2**31 - 1)), "class": "Linear"}
    return [Piece(LAYER, json.dumps(said).encode())]


def _texts(sync: bytes, rng: Random) -> list[Piece]:
    return [Piece(TEXT, json.dumps({str(rng.choice(INTEGERS)): rng.choice(TEXTS)}).encode())]


def _anything(sync: bytes, rng: Random) -> list[Piece]:
    opcode = rng.choice((PAD, 0, 0x0C, 0x7F, 0x80, 0xFF, COMMIT, INDEX, END))
    return [Piece(opcode, rng.randbytes(rng.choice((0, 8, 33))), bytes(rng.choice((0, 9))))]


_INVENTIONS: Final = (
    *(false_records, odd_block, _many_packets, _parts_that_differ, _many_rows),
    *(_tokens, _layers, _texts, _anything),
)
