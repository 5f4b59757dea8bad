"""Logs that are made to be expensive cost no more time and memory than what they hold."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import legacy_pieces
import limits
from limits import Target
from log_pieces import (
    BLOCK,
    BLOCK_HEAD,
    COMMIT,
    END,
    FRAME,
    HEADER,
    INDEX,
    LAYER,
    MAGIC,
    PAD,
    PASS,
    RUN,
    TEXT,
    TOKEN,
    Piece,
    put_together,
    taken_apart,
    zeros,
)
from targets import targets

from actstore import open_stream, recover
from actstore.errors import FormatError, StreamCorruptError
from actstore.stream.legacy import LegacyReader
from actstore.stream.records import Block
from actstore.stream.summary import summarise

LOGS: Final = ("reader", "skip", "analyze", "verify", "recover", "dataset")
SYNC: Final = bytes(range(0xA0, 0xB0))
CODECS: Final = Piece(HEADER, b'{"codecs":{"0":null,"1":{"id":"blosc"},"2":{"id":"blosc"}}}')
GROUP_ENDS: Final = Piece(COMMIT, struct.pack("<QQQQB", 0, 0, 0, 0, 0))
DEEP: Final = 100_000


@pytest.fixture(scope="module")
def known() -> dict[str, Target]:
    return targets()


# -- how such logs are made -----------------------------------------------------------------------


def log(
    *pieces: Piece,
    header: Piece = CODECS,
    last: Piece = GROUP_ENDS,
    closed: bool = True,
    summary: bytes = b"{}",
) -> bytes:
    """Give a log of two layers and a packet, then a group of other records."""
    layer = '{"id":%d,"name":"%s","site":"%s","block":-1,"class":"Linear"}'
    made = [
        *(header, GROUP_ENDS),
        *(Piece(LAYER, (layer % (i, name, name)).encode()) for i, name in enumerate("ab")),
        *(block(0, [1], 4, bytes(4)), GROUP_ENDS, *pieces, last),
    ]
    if not closed:
        return put_together(SYNC, made)
    made += [Piece(INDEX, struct.pack("<II", 0, len(summary)), summary), Piece(END, bytes(8))]
    return put_together(SYNC, made) + MAGIC


def block(
    seq: int,
    shape: list[int],
    raw: int,
    payload: bytes = b"",
    *,
    layer: int = 0,
    codec: int = 0,
    count: int = 1,
    back: int = 0,
    part: tuple[int, int] = (0, 1),
    runs: int = 1,
) -> Piece:
    """Give a block of float32, by default of one run."""
    head = BLOCK_HEAD.pack(layer, codec, 12, 0, 0, raw, 1, runs)
    head += struct.pack(f"<B{len(shape)}Q", len(shape), *shape)
    each = [
        RUN.pack(seq + number * count, 0, back, count, 1, 0, seq % 2**32, 1, 0, *part, 0)
        for number in range(runs)
    ]
    return Piece(BLOCK, head + b"".join(each), payload)


def token(step: int) -> Piece:
    return Piece(TOKEN, struct.pack("<QqqqdI", step, 1, -(2**63), step, 0.0, 0))


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def pieces_of(data: bytes) -> list[Piece]:
    return taken_apart(data[: -len(MAGIC)])[1]


# -- logs -----------------------------------------------------------------------------------------


def false_markers() -> bytes:
    return log(closed=False) + SYNC * 40_000


def long_headers_in_vain() -> bytes:
    frame = SYNC + struct.pack("<BBHIQII", TOKEN, 0, 0, 600_000, 0, 0, 0)
    return log(closed=False) + frame * 30_000


def many_damaged_records() -> bytes:
    return log(*[Piece(LAYER, b"{}")] * 8_000)


def parts_of_two_layers() -> bytes:
    parts = (
        block(5, [3_000], 4, bytes(4), layer=int(part > 0), part=(part, 3_000))
        for part in range(3_000)
    )
    return log(*parts)


def a_packet_of_many_bombs() -> bytes:
    part = zeros(2, 2**24)
    return log(*(block(1, [12, 2**22], 2**24, part, codec=2, part=(i, 12)) for i in range(12)))


def tokens_over_packets() -> bytes:
    return log(block(1, [0], 0, count=20_000), *map(token, range(5_000)))


def a_pass_again_and_again() -> bytes:
    notes = b'{"label":[1]}'
    said = Piece(PASS, struct.pack("<QIIHBB", 0, 0, len(notes), 0, 0, 1), notes)
    return log(*[said] * 5_000)


def an_index_of_one_commit() -> bytes:
    pieces, commits, at = pieces_of(log(*map(token, range(2_000)))), [], len(MAGIC)
    for one in pieces:
        commits += [at] if one.opcode == COMMIT else []
        at += FRAME.size + len(one.header) + len(one.payload)
    payload = struct.pack("<2000Q", *[commits[-1]] * 2_000) + b"{}"
    pieces[-2] = Piece(INDEX, struct.pack("<II", 2_000, 2), payload)
    return put_together(SYNC, pieces, whole=False) + MAGIC


def a_directory_of_one_block() -> bytes:
    pieces = pieces_of(log(block(1, [2**20], 2**22, zeros(2, 2**22), codec=2)))
    entry = pieces[-3].payload
    frame, header = entry[:28], entry[28:]
    entries = [frame + header.replace(number(1), number(seq)) for seq in range(1, 400)]
    pieces[-3] = Piece(COMMIT, pieces[-3].header, b"".join(entries))
    end = len(MAGIC) + sum(FRAME.size + len(one.header) + len(one.payload) for one in pieces[:-2])
    pieces[-1] = Piece(END, number(end))
    return put_together(SYNC, pieces, whole=False) + MAGIC


def aliases_of_nothing() -> bytes:
    return log(block(100_000, [1], 0, count=20_000, back=90_000))


def a_bomb() -> bytes:
    return log(block(1, [2**22], 2**24, zeros(1, 2**24), codec=1))


def more_packets_than_a_block_may_have() -> bytes:
    return log(block(1, [0], 0, count=65_536, runs=65_536))


def numbers_that_no_log_reaches() -> bytes:
    lies = replace(GROUP_ENDS, header=struct.pack("<QQQQB", 0, *[2**64 - 1] * 3, 1))
    return log(lies, block(2**63 - 1, [1], 4, bytes(4)), last=lies)


def capture_is_no_object() -> bytes:
    return log(header=Piece(HEADER, b'{"codecs":{"0":null},"capture":["zstd"]}'))


def deep_records() -> bytes:
    deep = b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"
    annotated = Piece(PASS, struct.pack("<QIIHBB", 0, 0, len(deep), 0, 0, 1), deep)
    return log(annotated, Piece(LAYER, deep), Piece(TEXT, deep), Piece(LAYER, b'{"id":' * DEEP))


def very_many_values() -> bytes:
    most = b'{"a":[' + b"[]," * 5_000_000 + b"1]}"
    annotated = Piece(PASS, struct.pack("<QIIHBB", 0, 0, len(most), 0, 0, 1), most)
    return log(Piece(LAYER, most), Piece(TEXT, most), annotated, summary=most)


def a_deep_summary() -> bytes:
    return log(summary=b'{"a":' * DEEP + b"1" + b"}" * DEEP)


HOSTILE: Final[tuple[Callable[[], bytes], ...]] = (
    *(false_markers, long_headers_in_vain, many_damaged_records, parts_of_two_layers),
    *(a_packet_of_many_bombs, tokens_over_packets, a_pass_again_and_again),
    *(an_index_of_one_commit, a_directory_of_one_block, aliases_of_nothing, a_bomb),
    *(more_packets_than_a_block_may_have, numbers_that_no_log_reaches, capture_is_no_object),
    *(deep_records, a_deep_summary, very_many_values),
)


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_hostile_log_costs_no_more_than_it_holds(
    known: dict[str, Target], make: Callable[[], bytes], name: str
) -> None:
    limits.check(known[name], make())


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_what_a_hostile_log_holds_intact_is_read(
    make: Callable[[], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "hostile.stream"
    path.write_bytes(make())
    with open_stream(path, errors="skip") as reader:
        assert next(reader.packets()).values.tobytes() == bytes(4)
        assert summarise(reader)["compression"] is None


def test_a_log_of_very_many_tiny_groups_is_read_in_memory_like_its_size(tmp_path: Path) -> None:
    path = tmp_path / "groups.stream"
    groups = [one for step in range(30_000) for one in (token(step), GROUP_ENDS)]
    path.write_bytes(log(*groups))
    with (
        limits.memory_limit(limits.MEMORY + 10 * path.stat().st_size),
        open_stream(path) as reader,
    ):
        assert reader.complete
        assert len(reader.tokens) == 30_000


def test_a_deep_header_is_refused(known: dict[str, Target], tmp_path: Path) -> None:
    path = tmp_path / "deep.stream"
    path.write_bytes(log(header=Piece(HEADER, b'{"codecs":' + b"[" * DEEP + b"]" * DEEP + b"}")))
    with pytest.raises(StreamCorruptError, match="HEADER"):
        open_stream(path)


def test_packets_beyond_the_bytes_of_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "many.stream"
    many = [block(1 + 65_536 * place, [0], 0, count=65_536) for place in range(3)]
    path.write_bytes(log(*many))
    with pytest.raises(StreamCorruptError, match="beyond the limits"), open_stream(path) as reader:
        reader.check()
    with open_stream(path, errors="skip") as reader:
        assert reader.packet_count == 1 + 65_536
        assert len(reader.damage) == 2
    path.write_bytes(log(*many, Piece(PAD, b"", bytes(150_000))))
    with open_stream(path) as reader:
        assert reader.packet_count == 1 + 3 * 65_536


def test_numbers_that_no_log_reaches_are_no_lists_of_what_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "numbers.stream"
    path.write_bytes(numbers_that_no_log_reaches())
    report = recover(path)
    assert report.packets == 2
    assert report.lost_packets == 2**64 - 3
    assert report.lost_passes == (0,)
    assert report.lost_steps == tuple(range(path.stat().st_size // FRAME.size))


@pytest.mark.parametrize("before", [MAGIC, log(closed=False)], ids=["magic", "log"])
def test_a_file_of_zeros_is_not_read_into_memory(before: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sparse.stream"
    path.write_bytes(before)
    with path.open("r+b") as file:
        file.truncate(2**28)
    with limits.memory_limit(limits.MEMORY):
        if before == MAGIC:
            with pytest.raises(StreamCorruptError):
                open_stream(path, errors="skip")
        else:
            with open_stream(path) as reader:
                assert reader.packet_count == 1
                assert not reader.complete


def test_zeros_behind_the_packets_of_an_older_log_are_no_packets(tmp_path: Path) -> None:
    path, data = tmp_path / "old.stream", legacy_pieces.vectors()[0]
    path.write_bytes(data)
    with LegacyReader(path) as reader:
        wanted = reader.packet_count
    with path.open("r+b") as file:
        file.truncate(2**30)
    with limits.memory_limit(limits.MEMORY), LegacyReader(path, errors="skip") as reader:
        assert reader.packet_count == wanted
        assert [one.offset for one in reader.damage] == [len(data)]


def test_a_record_of_a_gibibyte_of_nothing_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "hole.stream"
    hole = block(1, [2**22], 2**24, codec=1)
    hole = replace(hole, lies=(("payload_length", 2**30),))
    before = log(closed=False)
    path.write_bytes(before + hole.bytes(SYNC))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**30)
        file.seek(0, 2)
        file.write(replace(GROUP_ENDS, header=number(len(before)) + bytes(25)).bytes(SYNC))
    with limits.memory_limit(limits.MEMORY), open_stream(path, errors="skip") as reader:
        assert reader.packet_count == 1
        assert [one.offset for one in reader.damage] == [len(before)]


def test_a_block_of_more_runs_than_packets_is_refused_before_they_are_read() -> None:
    many = block(0, [0], 0, runs=65_537)
    with pytest.raises(FormatError, match="65537 runs"):
        Block.decode(many.header)
