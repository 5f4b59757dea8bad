"""Every record is read as it was written, by two readers; damage and huge lengths are refused."""

from __future__ import annotations

import json
import os
import struct
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actstore import dtypes
from actstore.errors import FormatError
from actstore.packet import Axis, LayerInfo, PassInfo, TokenRecord
from actstore.stream import records
from actstore.stream.records import (
    Block,
    Commit,
    Entry,
    Features,
    Frame,
    Header,
    Index,
    Layer,
    Opcode,
    Pass,
    Record,
    Run,
    Text,
    Token,
)
from actstore.stream.scan import LogFile

sys.path.insert(0, str(Path(__file__).parents[1]))
import independent_reader

SYNC = bytes(range(200, 216))

u16, u32 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
i64, natural = st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 1)
plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
any_text = st.text(max_size=20) | st.just("lone \ud83d surrogate")
json_values = st.recursive(
    st.none() | st.booleans() | i64 | st.floats(allow_nan=False) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(any_text, json_values, max_size=4)


def through_a_frame(opcode: int, header: bytes, *payload: bytes) -> tuple[Any, Any]:
    """Frame a record; give its header and payload as the independent reader finds them."""
    record = Record.of(opcode, header, *payload)
    data = independent_reader.MAGIC + record.frame(SYNC) + b"".join(record.payload)
    found = independent_reader.frame(data + b"behind it", 8)
    assert found is not None
    assert (found["opcode"], found["end"], found["intact"]) == (opcode, len(data), True)
    return independent_reader.Cursor(found["header"]), independent_reader.Cursor(found["payload"])


def at_end(*cursors: Any) -> bool:
    return all(cursor.at == len(cursor.data) for cursor in cursors)


# -- round trips --------------------------------------------------------------------------------


def test_the_checksum_is_crc_32c() -> None:
    assert records.crc32c(b"123456789") == 0xE306_9283
    assert records.crc32c(bytes(32)) == 0x8A91_36AA  # RFC 3720, B.4
    assert records.crc32c(b"6789", records.crc32c(b"12345")) == 0xE306_9283
    assert records.crc32c(b"") == 0


@given(st.integers(1, 255), st.binary(max_size=60), st.lists(st.binary(max_size=30), max_size=4))
def test_a_frame_says_what_follows_it(opcode: int, header: bytes, payload: list[bytes]) -> None:
    record, whole = Record.of(opcode, header, *payload), b"".join(payload)
    data = record.frame(SYNC)
    wanted = struct.pack(
        "<16sBBHIQI", SYNC, opcode, 0, 0, len(header), len(whole), crc32c.crc32c(whole)
    )
    assert data == wanted + struct.pack("<I", crc32c.crc32c(wanted + header)) + header
    found = Frame.decode(data)
    found.check(header)
    assert (found.sync, found.opcode, found.length) == (SYNC, opcode, len(data) + len(whole))
    assert (found.header_length, found.payload_length) == (len(header), len(whole))
    assert found.payload_crc == crc32c.crc32c(whole)
    head, body = through_a_frame(opcode, header, *payload)
    assert (head.data, body.data) == (header, whole)
    entry = record.entry(77)
    assert (entry.payload_offset, entry.end) == (77 + len(data), 77 + len(data) + len(whole))


@given(json_objects)
def test_a_header_holds_any_json(attributes: dict[str, Any]) -> None:
    encoded = Header(attributes).encode()
    assert Header.decode(encoded).attributes == attributes
    assert json.loads(encoded.decode("ascii")) == attributes


@given(u32, any_text, any_text, st.integers(-1, 2**31 - 1), any_text)
def test_a_layer_comes_back(number: int, name: str, site: str, block: int, kind: str) -> None:
    info = LayerInfo(number, name, site, block, kind)
    encoded = Layer(info).encode()
    assert Layer.decode(encoded).info == info
    wanted = {"id": number, "name": name, "site": site, "block": block, "class": kind}
    assert json.loads(encoded.decode("ascii")) == wanted


@given(st.sets(u32, max_size=50), u32)
def test_features_come_back(kept: set[int], width: int) -> None:
    width = max([width, *(one + 1 for one in kept if one < 2**32 - 1)])
    indices = np.array(sorted(kept - {2**32 - 1}), np.uint32)
    header, payload = Features(width, indices).encode()
    found = Features.decode(header, payload)
    assert (found.width, found.indices.tolist()) == (width, indices.tolist())
    head, body = through_a_frame(Opcode.FEATURES, header, payload)
    assert head.fields("I width I count") == {"width": width, "count": indices.size}
    assert body.integers(6, indices.size) == indices.tolist()
    assert at_end(head, body)


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    batch, sequence = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    shape, rows = (batch, sequence), batch * sequence
    numbers = draw(st.sampled_from([st.integers(-(2**31), 2**31 - 1), i64, st.just(-1)]))
    made = [
        np.array(draw(st.lists(numbers, min_size=rows, max_size=rows)), np.int64).reshape(shape)
        for _ in range(2)
    ]
    mask = np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), bool)
    name = draw(plain)
    return Axis(
        name, batch, sequence, made[0], made[1], mask.reshape(shape), flat=draw(st.booleans())
    )


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    info = PassInfo(
        draw(natural),
        tuple(draw(st.lists(axes(), max_size=3))),
        draw(st.dictionaries(any_text, st.lists(json_values, max_size=3), max_size=2)),
        draw(st.booleans()),
        draw(plain),
        draw(u32),
    )
    return Pass(info, closed=draw(st.booleans()))


def axis_of(found: Axis) -> tuple[Any, ...]:
    arrays = found.token_ids, found.positions, found.mask
    assert [one.dtype for one in arrays] == [np.int64, np.int64, np.bool_]
    assert {one.shape for one in arrays} == {(found.batch, found.sequence)}
    flat = (*(one.ravel().tolist() for one in arrays), bool(found.flat))
    return (found.name, found.batch, found.sequence, *flat)


@given(passes())
def test_a_pass_comes_back(given_pass: Pass) -> None:
    info = given_pass.info
    header, payload = given_pass.encode()
    assert Pass.peek(header) == info.index
    found = Pass.decode(header, payload)
    assert (found.closed, found.status_only) == (given_pass.closed, False)
    assert found.info.aborted == (info.aborted and given_pass.closed)
    for name in ("index", "entry", "logits_to_keep", "annotations"):
        assert getattr(found.info, name) == getattr(info, name)
    wanted = [axis_of(one) for one in info.axes]
    assert [axis_of(one) for one in found.info.axes] == wanted
    head, body = through_a_frame(Opcode.PASS, header, payload)
    other = independent_reader.read_pass(head, body)
    assert at_end(head, body)
    order = ("name", "batch", "sequence", "ids", "positions", "mask", "flat")
    assert [tuple(one[name] for name in order) for one in other["axes"]] == wanted
    assert (other["index"], other["entry"]) == (info.index, info.entry)
    assert (other["annotations"], other["closed"]) == (info.annotations, given_pass.closed)


@given(passes())
def test_the_status_of_a_pass_has_neither_axes_nor_annotations(given_pass: Pass) -> None:
    info = given_pass.info
    header, payload = Pass(info, closed=True, status_only=True).encode()
    assert payload == b""
    found = Pass.decode(header, payload)
    assert (found.status_only, found.closed, found.info.aborted) == (True, True, info.aborted)
    assert (found.info.index, found.info.entry) == (info.index, info.entry)
    assert (found.info.axes, dict(found.info.annotations)) == ((), {})


@pytest.mark.parametrize(
    ("value", "size"), [(0, 4), (2**31 - 1, 4), (-(2**31), 4), (2**31, 8), (-(2**31) - 1, 8)]
)
def test_numbers_of_a_pass_take_4_bytes_where_they_fit(value: int, size: int) -> None:
    numbers, mask = np.full((2, 3), value, np.int64), np.ones((2, 3), np.bool_)
    info = PassInfo(0, (Axis("token", 2, 3, np.full((2, 3), -1), numbers, mask),))
    _, payload = Pass(info, closed=True).encode()
    assert len(payload) == 6 * size, "no ids and no mask: neither takes a byte"


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    kind = draw(st.sampled_from(list(dtypes.BY_CODE.values())))
    shapes = tuple(draw(st.lists(st.lists(st.integers(0, 6), max_size=4).map(tuple), min_size=1)))
    runs = []
    for _ in range(draw(st.integers(1, 4))):
        seq = draw(st.integers(0, 2**40))
        runs.append(
            Run(
                seq,
                draw(st.integers(0, 2**40)),
                draw(st.just(0) | st.integers(0, seq)),
                draw(st.integers(1, 9)),
                *(draw(st.integers(1, 2**32 - 1)), draw(u32), draw(u32), draw(u32)),
                draw(st.integers(0, len(shapes) - 1)),
            )
        )
    sizes = (int(np.prod(shapes[r.shape], dtype=int)) * r.count for r in runs if not r.alias_back)
    raw = kind.itemsize * sum(sizes)
    assume(raw <= records.BLOCK_LIMIT)
    return Block(draw(u32), draw(st.integers(0, 255)), kind.code, draw(u32), raw, shapes, (*runs,))


@given(blocks())
def test_a_block_comes_back(block: Block) -> None:
    header = block.encode()
    assert Block.decode(header) == block
    raw = np.random.default_rng(0).bytes(block.raw_length)
    head, body = through_a_frame(Opcode.BLOCK, header, raw)
    found = list(independent_reader.read_block(head, body, {str(block.codec): None}))
    assert at_end(head, body)
    wanted, at = [], 0
    for run in block.runs:
        shape = block.shapes[run.shape]
        size = block.packet_bytes(run, dtypes.from_code(block.dtype).itemsize)
        for i in range(run.count):
            numbers = run.seq + i * run.seq_step, run.pass_index + i * run.pass_step
            call = run.call + i * run.call_step
            wanted.append((*numbers, call, run.alias_back, list(shape), raw[at : at + size]))
            at += size
    names = ("seq", "pass", "call", "alias_back", "shape", "bytes")
    assert [tuple(one[name] for name in names) for one in found] == wanted
    assert {one["layer"] for one in found} == {block.layer}


@given(natural, i64, any_text, st.none() | i64, i64, st.floats(allow_nan=False))
def test_a_token_comes_back(
    step: int, token_id: int, text: str, position: int | None, pass_index: int, time: float
) -> None:
    assume(position != records.NO_POSITION)
    record = TokenRecord(step, token_id, text, position, pass_index, time)
    header = Token(record).encode()
    assert Token.decode(header).record == record
    head, _ = through_a_frame(Opcode.TOKEN, header)
    found = head.fields("Q step q token_id q position q pass d time I text")
    given_position = -(2**63) if position is None else position
    assert (found["step"], found["token_id"], found["position"]) == (
        step,
        token_id,
        given_position,
    )
    assert (found["pass"], found["time"], head.text(found["text"])) == (pass_index, time, text)
    assert at_end(head)


@given(st.dictionaries(i64, any_text, max_size=5))
def test_texts_come_back(texts: dict[int, str]) -> None:
    encoded = Text(texts).encode()
    assert Text.decode(encoded).texts == texts
    assert json.loads(encoded.decode("ascii")) == {str(one): text for one, text in texts.items()}


@given(st.tuples(natural, natural, natural, natural), st.booleans(), st.booleans())
def test_a_commit_comes_back(numbers: tuple[int, ...], at_step: bool, synced: bool) -> None:
    commit = Commit(*numbers, at_step, synced)
    header = commit.encode()
    assert header == struct.pack("<QQQQB", *numbers, at_step + 2 * synced)
    assert Commit.decode(header) == commit


@given(
    st.lists(
        st.builds(Entry, natural, st.integers(0, 255), st.binary(max_size=40), natural, u32),
        max_size=5,
    )
)
def test_a_directory_comes_back(entries: list[Entry]) -> None:
    encoded = records.encode_entries(entries)
    assert list(records.decode_entries(encoded)) == entries
    cursor = independent_reader.Cursor(encoded)
    for one in entries:
        found = cursor.fields("Q at B opcode 3s zero I header Q payload I crc")
        assert (found["at"], found["opcode"]) == (one.offset, one.opcode)
        assert (found["payload"], found["crc"]) == (one.payload_length, one.payload_crc)
        assert (found["zero"], cursor.take(found["header"])) == (bytes(3), one.header)
    assert at_end(cursor)


@given(st.lists(natural, max_size=6), json_objects, natural)
def test_an_index_and_an_end_come_back(
    commits: list[int], summary: dict[str, Any], offset: int
) -> None:
    header, payload = Index(tuple(commits), summary).encode()
    found = Index.decode(header, payload)
    assert (found.commits, found.summary) == (tuple(commits), summary)
    assert payload[: 8 * len(commits)] == b"".join(one.to_bytes(8, "little") for one in commits)
    assert json.loads(payload[8 * len(commits) :]) == summary
    assert records.encode_end(offset) == offset.to_bytes(8, "little")
    assert records.decode_end(records.encode_end(offset)) == offset


@given(any_text, any_text)
def test_names_of_a_pass_hold_lone_surrogates_as_any_text_does(entry: str, name: str) -> None:
    one = np.zeros((1, 1), np.int64)
    info = PassInfo(0, (Axis(name, 1, 1, one, one, one == 0),), entry=entry)
    found = Pass.decode(*Pass(info, closed=True).encode()).info
    assert (found.entry, found.axes[0].name) == (entry, name)


# -- damage -------------------------------------------------------------------------------------

_RUN = Run(3, 1, 0, 2, 1, 1, 0, 0, 0)
_ONE = np.ones((1, 3), np.int64)
_AXIS = Axis("token", 1, 3, _ONE, _ONE, np.array([[False, True, True]]))
EACH: dict[str, Record] = {
    "HEADER": Record(Opcode.HEADER, Header({"codecs": {"0": None}}).encode()),
    "LAYER": Record(Opcode.LAYER, Layer(LayerInfo(0, "h", "resid")).encode()),
    "FEATURES": Record.of(Opcode.FEATURES, *Features(9, np.array([1, 5], np.uint32)).encode()),
    "PASS": Record.of(
        Opcode.PASS, *Pass(PassInfo(1, (_AXIS,), {"topic": ["x"]}), closed=True).encode()
    ),
    "BLOCK": Record.of(
        Opcode.BLOCK, Block(0, 0, 12, 0, 24, ((1, 3),), (_RUN,)).encode(), bytes(range(24))
    ),
    "TOKEN": Record(Opcode.TOKEN, Token(TokenRecord(0, 7, "tok")).encode()),
    "COMMIT": Record.of(
        Opcode.COMMIT,
        Commit(1, 2, 3, 4, step_boundary=True).encode(),
        records.encode_entries([Entry(8, 5, b"header", 3, 4)]),
    ),
    "PAD": Record.of(Opcode.PAD, b"", bytes(16)),
    "INDEX": Record.of(Opcode.INDEX, *Index((8, 100), {"a": 1}).encode()),
    "END": Record(Opcode.END, records.encode_end(100)),
    "TEXT": Record(Opcode.TEXT, Text({5: "five"}).encode()),
}


def test_there_is_a_record_of_every_kind_to_damage() -> None:
    assert EACH.keys() == Opcode.__members__.keys()


@pytest.mark.parametrize("name", EACH)
def test_any_flipped_bit_of_a_record_is_found(name: str, tmp_path: Path) -> None:
    record, path = EACH[name], tmp_path / "record"
    data = record.frame(SYNC) + b"".join(record.payload)
    path.write_bytes(data)
    file, descriptor = LogFile(path), os.open(path, os.O_RDWR)
    try:
        assert file.entry(0, None) == (record.entry(0), SYNC)
        assert file.payload(record.entry(0)) == b"".join(record.payload)
        for bit in range(8 * len(data)):
            byte = bit // 8
            os.pwrite(descriptor, bytes([data[byte] ^ 1 << bit % 8]), byte)
            with pytest.raises(FormatError):
                file.payload(file.entry(0, None)[0])
            in_payload = byte >= len(data) - record.payload_length
            if in_payload:  # the frame and the header are not to blame
                assert file.entry(0, SYNC)[0] == record.entry(0)
            os.pwrite(descriptor, data[byte : byte + 1], byte)
        assert file.payload(file.entry(0, SYNC)[0]) == b"".join(record.payload)
    finally:
        file.close()
        os.close(descriptor)


DECODE: dict[str, Callable[[bytes, bytes], Any]] = {
    "HEADER": lambda header, _: Header.decode(header),
    "LAYER": lambda header, _: Layer.decode(header),
    "FEATURES": Features.decode,
    "PASS": Pass.decode,
    "BLOCK": lambda header, _: Block.decode(header),
    "TOKEN": lambda header, _: Token.decode(header),
    "COMMIT": lambda header, payload: (
        Commit.decode(header),
        list(records.decode_entries(payload)),
    ),
    "INDEX": Index.decode,
    "END": lambda header, _: records.decode_end(header),
    "TEXT": lambda header, _: Text.decode(header),
}


@pytest.mark.parametrize("name", DECODE)
def test_a_record_that_is_shorter_or_longer_than_its_fields_say_is_refused(name: str) -> None:
    header, payload = EACH[name].header, b"".join(EACH[name].payload)
    DECODE[name](header, payload)
    for cut in range(len(header)):
        with pytest.raises(FormatError):
            DECODE[name](header[:cut], payload)
    with pytest.raises(FormatError):
        DECODE[name](header + b"\0", payload)
    for cut in range(len(payload) if name not in ("BLOCK", "COMMIT") else 0):
        with pytest.raises(FormatError):
            DECODE[name](header, payload[:cut])
    if payload and name != "BLOCK":
        with pytest.raises(FormatError):
            DECODE[name](header, payload + b"\0")


@pytest.mark.parametrize("name", DECODE)
@given(data=st.data())
def test_bytes_that_are_no_record_are_refused_and_never_crash(
    name: str, data: st.DataObject
) -> None:
    header, payload = bytearray(EACH[name].header), bytearray(b"".join(EACH[name].payload))
    for part in (header, payload):
        for _ in range(data.draw(st.integers(0, 4)) if part else 0):
            part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    tracemalloc.start()
    try:
        DECODE[name](bytes(header), bytes(payload))
    except FormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


# -- limits -------------------------------------------------------------------------------------

MOST = 2**32 - 1


def pass_header(batch: int, sequence: int, *codes: int, annotations: int = 0) -> bytes:
    return struct.pack("<QIIHBB", 0, 0, annotations, 0, 1, 1) + struct.pack(
        "<IIBBBBB", batch, sequence, 0, *codes, 0
    )


def block_header(raw: int = 0, shapes: int = 0, runs: int = 0, rest: bytes = b"") -> bytes:
    return struct.pack("<IBBHIIII", 0, 0, 12, 0, 0, raw, shapes, runs) + rest


HUGE: dict[str, Callable[[], Any]] = {
    "features": lambda: Features.decode(struct.pack("<II", MOST, MOST), b"1234"),
    "entry": lambda: Pass.decode(struct.pack("<QIIHBB", 0, 0, 0, 65535, 0, 1), b""),
    "rows": lambda: Pass.decode(pass_header(MOST, MOST, 9, 9, 1), bytes(64)),
    "rows without ids": lambda: Pass.decode(pass_header(1 << 31, 4, 7, 0, 0), bytes(64)),
    "masks": lambda: Pass.decode(pass_header(0, MOST, 7, 0, 1), b"1"),
    "annotations": lambda: Pass.decode(pass_header(0, 0, 7, 0, 0, annotations=MOST), b"{}"),
    "raw bytes": lambda: Block.decode(block_header(raw=MOST)),
    "shapes": lambda: Block.decode(block_header(shapes=MOST)),
    "shapes within the limit": lambda: Block.decode(block_header(shapes=1 << 16)),
    "runs": lambda: Block.decode(block_header(runs=MOST)),
    "dimensions": lambda: Block.decode(block_header(shapes=1, rest=b"\xff" + bytes(60))),
    "a shape": lambda: Block.decode(
        block_header(shapes=1, rest=b"\2" + struct.pack("<2Q", 2**63, 0))
    ),
    "a run": lambda: Block.decode(
        block_header(
            shapes=1,
            runs=1,
            rest=b"\0" + struct.pack("<QQQIIIIIHHHH", 1, 0, 1, MOST, 1, 0, 0, 0, 0, 0, 1, 0),
        )
    ),
    "text": lambda: Token.decode(struct.pack("<QqqqdI", 0, 0, 0, 0, 0.0, MOST) + b"x"),
    "directory": lambda: list(
        records.decode_entries(struct.pack("<QBxxxIQI", 0, 5, MOST, 0, 0) + b"x")
    ),
    "commits": lambda: Index.decode(struct.pack("<II", MOST, 2), b"{}"),
    "summary": lambda: Index.decode(struct.pack("<II", 0, MOST), b"{}"),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_huge_length_is_refused_before_anything_is_allocated(what: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            HUGE[what]()
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "payload", "refused"),
    [
        (1 << 24, 0, "exceeds the file"),
        (0, 1 << 30, "exceeds the file"),
        (1 << 24, 1 << 30, "exceeds the file"),
        ((1 << 24) + 1, 0, "exceed 16777216 and 1073741824"),
        (0, (1 << 30) + 1, "exceed 16777216 and 1073741824"),
        (MOST, 2**64 - 1, "exceed 16777216 and 1073741824"),
    ],
)
def test_a_frame_of_huge_lengths_is_refused_before_it_is_read(
    header: int, payload: int, refused: str, tmp_path: Path
) -> None:
    head = struct.pack("<16sBBHIQI", SYNC, 5, 0, 0, header, payload, 0)
    path = tmp_path / "record"
    path.write_bytes(head + struct.pack("<I", crc32c.crc32c(head)) + bytes(100))
    file = LogFile(path)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=refused):
            file.entry(0, SYNC)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
        file.close()


def test_lengths_at_their_limits_are_taken() -> None:
    for header, payload in ((1 << 24, 1 << 30), (0, 0)):
        head = struct.pack("<16sBBHIQII", SYNC, 5, 0, 0, header, payload, 0, 0)
        assert Frame.decode(head).length == 40 + header + payload
    packets = Run(0, 0, 0, 1 << 16, 1, 0, 0, 0, 0)
    block = Block(0, 0, 2, 0, 1 << 24, ((256,),), (packets,))
    assert Block.decode(block.encode()) == block
    every_shape = replace(block, shapes=((256,),) * (1 << 16))
    assert Block.decode(every_shape.encode()) == every_shape
    with pytest.raises(FormatError, match="65537 shapes"):
        Block.decode(replace(block, shapes=((256,),) * ((1 << 16) + 1)).encode())
    for count, size in ((1 << 16, (257,)), ((1 << 16) + 1, (0,))):
        run = Run(0, 0, 0, count, 1, 0, 0, 0, 0)
        wrong = Block(0, 0, 2, 0, count * size[0], (size,), (run,))
        with pytest.raises(FormatError):
            Block.decode(wrong.encode())


def test_texts_are_split_into_records_of_a_bounded_size() -> None:
    texts = dict.fromkeys(range(40000), "," * 3)
    found = [records.Text.decode(one.encode()).texts for one in records.Text.split(texts)]
    assert [len(one) for one in found] == [16_384, 16_384, 7_232]
    assert {key: text for one in found for key, text in one.items()} == texts
    assert list(records.Text.split({})) == []


def test_json_that_no_reader_would_take_is_not_written() -> None:
    most = records.JSON_LIMIT
    header = records.Header({"values": [0] * (most - 1)})
    assert records.Header.decode(header.encode()) == header
    with pytest.raises(FormatError, match=f"{most + 1} commas and brackets"):
        records.Header({"values": [0] * most}).encode()
    with pytest.raises(FormatError, match="the limits are 16777216"):
        records.Header({"text": "a" * 2**24}).encode()
