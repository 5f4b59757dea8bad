"""A log of llm-instrumentation that is damaged or lies costs what is damaged, and no more."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lz4.frame
import pytest
import zstandard
from legacy_logs import ENCODE, LOGS, flat, packet

from actstore.errors import ActstoreError, StreamCorruptError
from actstore.stream import legacy_packets, summary
from actstore.stream.legacy import LegacyReader

SMALL = [path for path in LOGS if path.stem in (*ENCODE, "dtypes-lz4", "dtypes-none", "llama")]


def until_damage(reader: Any) -> list[tuple[str, bytes]]:
    """Give what comes before an error of ours; any other is the test's failure."""
    found: list[tuple[str, bytes]] = []
    with contextlib.suppress(ActstoreError):
        found.extend((packet.layer, packet.values.tobytes()) for packet in reader.packets())
    return found


def ends(data: bytes) -> Iterator[int]:
    """Give where each packet ends, by the format alone."""
    offset = 0
    while offset < len(data):
        name, length = struct.unpack_from("!HI", data, offset)
        offset += 6 + name + length
        yield offset


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "gen.stream"


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_a_log_cut_anywhere_has_the_packets_before_the_cut(path: Path, log: Path) -> None:
    data = path.read_bytes()
    with LegacyReader(path) as reader:
        whole = flat(reader)
    bounds = [0, *ends(data)]
    for cut in range(len(data)):
        log.write_bytes(data[:cut])
        with LegacyReader(log) as reader:
            found = flat(reader)
            assert reader.complete == (cut in bounds)
        assert found == whole[: sum(end <= cut for end in bounds[1:])]


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_a_flipped_byte_costs_no_packet_before_it(path: Path, log: Path) -> None:
    data = path.read_bytes()
    with LegacyReader(path) as reader:
        whole = flat(reader)
    bounds = list(ends(data))
    rng = random.Random(0)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        log.write_bytes(flipped)
        before = sum(end <= place for end in bounds)
        with LegacyReader(log, "skip" if place % 2 else "raise") as reader:
            assert until_damage(reader)[:before] == whole[:before]


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_random_bytes_at_random_places_raise_nothing_but_our_errors(path: Path, log: Path) -> None:
    data, rng = path.read_bytes(), random.Random(1)
    for _ in range(200):
        damaged = bytearray(data)
        start = rng.randrange(len(data))
        length = rng.randrange(1, 12)
        damaged[start : start + length] = rng.randbytes(rng.randrange(12))
        log.write_bytes(damaged)
        for errors in ("raise", "skip"):
            with LegacyReader(log, errors) as reader:
                until_damage(reader)
                summary.summarise(reader)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_payload_that_does_not_decode_costs_only_itself(log: Path, codec: str) -> None:
    good = ENCODE[codec](bytes(range(200)) * 2)
    bad = bytearray(good)
    bad[len(bad) // 2 :] = b"\xff" * (len(bad) - len(bad) // 2)
    log.write_bytes(packet(b"a", good) + packet(b"b", bytes(bad)) + packet(b"c", good))
    offset = len(packet(b"a", good))
    with LegacyReader(log) as reader:
        packets = reader.packets()
        assert next(packets).layer == "a"
        with pytest.raises(StreamCorruptError) as raised:
            next(packets)
    assert raised.value.offset == offset
    with LegacyReader(log, "skip") as reader:
        assert [layer for layer, _ in flat(reader)] == ["a", "c"]
        assert [region.offset for region in reader.damage] == [offset]
        assert not reader.complete


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_payload_that_is_no_frame_among_frames_is_damage(log: Path, codec: str) -> None:
    good = packet(b"a", ENCODE[codec](bytes(range(100))))
    log.write_bytes(good * 2 + packet(b"a", b"abcd") + good)
    with LegacyReader(log) as reader:
        packets = reader.packets()
        assert len([next(packets), next(packets)]) == 2
        with pytest.raises(StreamCorruptError, match=f"no {codec} frame"):
            next(packets)
    with LegacyReader(log, "skip") as reader:
        assert [one.pass_index for one in reader.packets()] == [0, 1, 3]
        (region,) = reader.damage
    assert (region.offset, region.length) == (2 * len(good), len(packet(b"a", b"abcd")))


@pytest.mark.parametrize("errors", ["raise", "skip"])
def test_damage_is_not_held_against_the_shapes_that_were_told(log: Path, errors: str) -> None:
    good = packet(b"a", ENCODE["zstd"](bytes(range(96))))
    log.write_bytes(good * 2 + packet(b"a", b"abcde") + good)
    with LegacyReader(log, errors, shapes={"a": (1, -1, 16)}) as reader:
        found = []
        with contextlib.suppress(StreamCorruptError):
            found.extend(packet.shape for packet in reader.packets())
    assert found == [(1, 3, 16)] * (2 if errors == "raise" else 3)


def test_a_log_that_was_resumed_with_another_codec_is_read(log: Path) -> None:
    data = bytes(range(100))
    log.write_bytes(b"".join(packet(b"a", encode(data)) for encode in ENCODE.values()) * 2)
    with pytest.raises(StreamCorruptError), LegacyReader(log) as reader:
        flat(reader)  # frames among which the raw ones could be anything
    log.write_bytes(b"".join(packet(b"a", ENCODE[name](data)) for name in ("lz4", "zstd", "zstd")))
    with LegacyReader(log) as reader:
        assert flat(reader) == [("a", data)] * 3
        assert reader.header["capture"]["compression"] == "zstd"


@pytest.mark.parametrize(
    ("tail", "match"),
    [
        (struct.pack("!HI", 2, 1) + b"\xff\xfeX", "no UTF-8"),
        (struct.pack("!HI", 2, (128 << 20) + 1) + b"abX", "the limit is"),
        (struct.pack("!HI", 0xFFFF, 0xFFFFFFFF) + b"abX", "the limit is"),
        (bytes(1000), "zeros"),
    ],
)
def test_what_can_be_no_packet_ends_the_log_with_an_error(
    log: Path, tail: bytes, match: str
) -> None:
    good = packet(b"a", b"abcd")
    log.write_bytes(good + tail)
    with LegacyReader(log) as reader:
        packets = reader.packets()
        assert next(packets).layer == "a"
        with pytest.raises(StreamCorruptError, match=match) as raised:
            next(packets)
        with pytest.raises(StreamCorruptError):
            reader.check()
    assert raised.value.offset == len(good)
    with LegacyReader(log, "skip") as reader:
        assert flat(reader) == [("a", b"abcd")]
        (region,) = reader.damage
    assert (region.offset, region.length) == (len(good), len(tail))


def zstd_frame(size: int, blocks: bytes) -> bytes:
    """Give a zstd frame of a window of 1 MiB that says how many bytes come out."""
    return b"\x28\xb5\x2f\xfd\xc0\x50" + struct.pack("<Q", size) + blocks


def zeros(count: int, *, last: bool) -> bytes:
    """Give zstd blocks, each of 128 KiB of zeros."""
    kinds = [(131072 << 3) | (1 << 1)] * count
    kinds[-1] |= last
    return b"".join(kind.to_bytes(3, "little") + b"\0" for kind in kinds)


def lz4_frame(size: int, data: bytes) -> bytes:
    """Give an LZ4 frame whose header says that so many bytes come out."""
    made = bytearray(lz4.frame.compress(data))
    made[6:14] = struct.pack("<Q", size)
    for made[14] in range(256):  # one of them is the header's checksum
        try:
            assert lz4.frame.get_frame_info(bytes(made))["content_size"] == size
        except RuntimeError:
            continue
        return bytes(made)
    raise AssertionError


HOSTILE = {
    "zstd that says too little": zstd_frame(1000, zeros(4000, last=True)),
    "zstd that says too much": zstd_frame(500 << 20, zeros(3999, last=False)),
    "zstd that says far too much": zstd_frame(1 << 62, zeros(3, last=True)),
    "zstd that ends nowhere": zstd_frame(400 << 17, zeros(400, last=False)),
    "zstd and more": zstandard.compress(b"a" * 1000) + b"more",
    "two zstd frames": zstandard.compress(b"a" * 1000) * 2,
    "lz4 that says too little": lz4_frame(1000, bytes(100 << 20)),
    "lz4 that says too much": lz4_frame(101 << 20, bytes(100 << 20)),
    "lz4 that says far too much": lz4_frame(1 << 62, bytes(100)),
    "lz4 and more": lz4.frame.compress(b"a" * 1000) + b"more",
    "lz4 that says nothing": lz4.frame.compress(bytes(100 << 20), store_size=False),
    "lz4 cut": lz4.frame.compress(bytes(100 << 20))[:-9],
    "lz4 magic alone": b"\x04\x22\x4d\x18",
    "zstd magic alone": b"\x28\xb5\x2f\xfd",
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE)
def test_a_lying_frame_raises_and_takes_little_memory(log: Path, payload: bytes) -> None:
    good = packet(b"a", ENCODE["zstd"](bytes(range(100))))
    log.write_bytes(good + packet(b"b", payload) + good)
    tracemalloc.start()
    try:
        with LegacyReader(log) as reader:
            packets = reader.packets()
            assert next(packets).layer == "a"
            with pytest.raises(StreamCorruptError) as raised:
                next(packets)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert raised.value.offset == len(good)
    assert peak < 68 << 20


def test_a_frame_that_says_the_truth_is_read_also_where_it_is_large(log: Path) -> None:
    data = bytes(100 << 20)
    log.write_bytes(packet(b"a", ENCODE["zstd"](data)) + packet(b"b", ENCODE["lz4"](data)))
    with LegacyReader(log) as reader:
        for one in reader.packets():
            assert one.values.nbytes == len(data)
            assert not one.values.any()


def test_many_tiny_packets_take_little_memory(log: Path) -> None:
    log.write_bytes(packet(b"a", b"") * 100_000)
    tracemalloc.start()
    try:
        with LegacyReader(log) as reader:
            assert reader.packet_count == 100_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_too_many_layers_are_refused(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy_packets, "LAYERS_LIMIT", 3)
    log.write_bytes(b"".join(packet(name, b"ab") for name in (b"a", b"b", b"c", b"a", b"d")))
    with LegacyReader(log, "skip") as reader:
        assert [layer for layer, _ in flat(reader)] == ["a", "b", "c", "a"]
        assert "more than 3 layers" in reader.damage[0].reason


def test_an_empty_log_has_no_packets(log: Path) -> None:
    log.touch()
    with LegacyReader(log) as reader:
        assert flat(reader) == []
        assert summary.summarise(reader)["packets"] == 0
