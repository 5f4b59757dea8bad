"""Whatever byte of a log is flipped, wherever it is cut: only what was captured comes back.

What does not come back is said: by ``complete``, ``damage`` or a `StreamCorruptError`.

By default one random bit of every byte, and every truncation: 20 s. Every bit of every byte, two
bytes at a time, holes, and bytes lost or put in: ``pytest -m crash`` with this file,
about five minutes.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from actstore.errors import FormatError, MissingFileError, StreamCorruptError
from actstore.packet import PassInfo
from actstore.stream.reader import StreamReader, open_stream
from actstore.stream.records import Opcode

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis, random_values

MAGIC_SIZE = 8


def small(path: Path, compression: str, *, finish: bool) -> LogBuilder:
    """Write a log of a few groups that has a record of every kind."""
    log = LogBuilder(path, compression=compression, capture={"track_per_token": True})
    log.features(64, [1, 2])
    log.texts({100: "x", 101: "é"})
    log.layer("h.0", "resid", 0)
    log.layer("alias", "alias", 0)
    for number in range(2):
        mask = [[number != 1, True, True]]
        log.begin(axis(1, 3, start=number, mask=mask), annotations={"topic": ["a"]})
        values = random_values((1, 3, 40), "bfloat16", seed=number)
        values[:, 1:] = 0  # so that the codecs have something to do
        log.put("alias", values, alias_of=log.put("h.0", values, parts=1 + number % 2))
        log.token(5 + number, "tok")
        if number == 1:
            log.record(Opcode.PAD, b"", bytes(24))
            log.record(0x90, b"private", b"payload")
        log.commit()
    log.layer("late")
    log.put("late", random_values((2, 5), "float32", seed=9))
    log.close(finish=finish)
    return log


@dataclass
class Found:
    """What a reader gives of a log, by what names it, and how it ended."""

    packets: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    tokens: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    passes: dict[int, PassInfo] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    features: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    complete: bool = False

    def take(self, reader: StreamReader) -> None:
        """Read all that a reader gives, until it raises."""
        self.header, self.summary = dict(reader.header), dict(reader.summary)
        self.layers = dict(reader.layers)
        self.features = {width: kept.tolist() for width, kept in reader.features.items()}
        self.texts = dict(reader.token_texts)
        self.tokens = {
            one.step: (one.token_id, one.token_text, one.position, one.pass_index, one.time)
            for one in reader.tokens
        }
        try:
            self.passes = {one.index: one for one in reader.passes}
        except StreamCorruptError as error:
            self.said.append(str(error))
        try:
            for one in reader.packets():
                data = (one.layer, one.pass_index, one.call, one.values.dtype.name)
                self.packets[one.seq] = (*data, one.shape, one.values.tobytes())
        except StreamCorruptError as error:
            self.said.append(str(error))
        self.complete = reader.complete
        self.said += map(str, reader.damage)


def read(path: Path, errors: str) -> Found:
    """Read a log that may be damaged; only documented errors get out of it."""
    found = Found()
    try:
        with open_stream(path, errors=errors) as reader:
            found.take(reader)
    except MissingFileError:
        raise
    except FormatError as error:
        found.said.append(str(error))
    return found


def axes_of(one: PassInfo) -> list[Any]:
    return [
        (a.name, a.token_ids.tolist(), a.positions.tolist(), a.mask.tolist(), a.flat)
        for a in one.axes
    ]


def assert_only_what_was_written(found: Found, wanted: Found, where: str) -> None:
    """Compare all that came back with what was written; nothing need be there."""
    for kind in ("packets", "tokens", "layers", "features", "texts"):
        mine, theirs = getattr(found, kind), getattr(wanted, kind)
        assert all(theirs.get(key) == one for key, one in mine.items()), (kind, where)
    # of a damaged HEADER the codecs may be known without it
    assert all(wanted.header[key] == one for key, one in found.header.items()), where
    if found.summary:
        assert found.summary == wanted.summary, where
    assert found.passes.keys() <= wanted.passes.keys(), where
    for index, one in found.passes.items():
        other = wanted.passes[index]
        if one.axes or one.annotations:
            assert axes_of(one) == axes_of(other), where
            assert dict(one.annotations) == dict(other.annotations), where
        else:  # its record was lost
            assert one.aborted, where


def lacks(found: Found, wanted: Found) -> bool:
    """Whether something that was written did not come back."""
    kinds = ("packets", "tokens", "layers", "features", "texts")
    if any(getattr(found, kind).keys() != getattr(wanted, kind).keys() for kind in kinds):
        return True
    if found.passes.keys() != wanted.passes.keys():
        return True
    same = all(axes_of(one) == axes_of(wanted.passes[key]) for key, one in found.passes.items())
    return not same or found.header != wanted.header


def assert_honest(path: Path, wanted: Found, where: str, *, closed: bool) -> tuple[int, int]:
    """Read a damaged log both ways; give how many packets came back of each."""
    counts = []
    for errors in ("raise", "skip"):
        found = read(path, errors)
        assert_only_what_was_written(found, wanted, f"{where}, {errors}")
        if lacks(found, wanted):
            raised = errors == "raise" and found.said
            assert raised or not found.complete, f"{where}, {errors}: what is missing isn't said"
            if closed:  # in an unclosed log it may have been the torn tail
                assert found.said, f"{where}, {errors}: what is missing is not named"
        counts.append(len(found.packets))
    assert counts[0] <= counts[1], where
    return counts[0], counts[1]


LOGS = [("lz4", True), ("none", False), ("zstd", True), ("none", True), ("zstd", False)]


def of_logs(count: int | None = None) -> pytest.MarkDecorator:
    """Run a test with the first so many of the logs."""
    names = [f"{one}-{'closed' if closed else 'unclosed'}" for one, closed in LOGS]
    return pytest.mark.parametrize("log", LOGS[:count], ids=names[:count], indirect=True)


@pytest.fixture
def log(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bytes, Found, bool]:
    """Give a small log, its bytes, what it says, and whether it was closed."""
    compression, closed = request.param
    built = small(tmp_path / "run.stream", compression, finish=closed)
    wanted = read(built.path, "raise")
    assert wanted.complete is closed
    assert [one[-1] for _, one in sorted(wanted.packets.items())] == [
        one.values.tobytes() for one in built.fired
    ]
    return built.path, built.path.read_bytes(), wanted, closed


def overwritten(path: Path, data: bytes, offset: int, by: bytes) -> None:
    """Write bytes into a file that holds ``data``."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, by, offset)
    finally:
        os.close(descriptor)


@of_logs(2)
def test_a_flipped_bit_of_any_byte_gives_only_intact_data_and_is_told(
    log: tuple[Path, bytes, Found, bool],
) -> None:
    path, data, wanted, closed = log
    rng = random.Random(len(data))
    for byte in range(len(data)):
        _flip(path, data, byte, rng.randrange(8), wanted, closed)
    assert path.read_bytes() == data


def _flip(path: Path, data: bytes, byte: int, bit: int, wanted: Found, closed: bool) -> None:
    overwritten(path, data, byte, bytes([data[byte] ^ 1 << bit]))
    assert_honest(path, wanted, f"bit {bit} of byte {byte} flipped", closed=closed)
    overwritten(path, data, byte, data[byte : byte + 1])


@pytest.mark.slow
@pytest.mark.crash
@of_logs()
@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_gives_only_intact_data_and_is_told(
    bit: int, log: tuple[Path, bytes, Found, bool]
) -> None:
    path, data, wanted, closed = log
    for byte in range(len(data)):
        _flip(path, data, byte, bit, wanted, closed)


@pytest.mark.slow
@pytest.mark.crash
@of_logs()
def test_every_log_cut_at_any_byte_gives_just_the_groups_that_are_whole(
    log: tuple[Path, bytes, Found, bool],
) -> None:
    _check_cuts(*log)


def _ends(path: Path) -> list[tuple[int, int]]:
    """Give the end of each group, and the seq that follows it."""
    with open_stream(path) as reader:
        return [(group.end, group.commit.next_seq) for group in reader.scan.groups]


@of_logs(1)
def test_a_log_cut_at_any_byte_gives_just_the_groups_that_are_whole(
    log: tuple[Path, bytes, Found, bool],
) -> None:
    _check_cuts(*log)


def _check_cuts(path: Path, data: bytes, wanted: Found, _: bool) -> None:
    ends = _ends(path)
    with open_stream(path) as reader:
        header_end = reader.scan.groups[0].offset  # the first COMMIT has no records before it
    for length in range(len(data) - 1, -1, -1):
        os.truncate(path, length)
        if length < header_end:
            with pytest.raises(FormatError):
                open_stream(path)
            continue
        for errors in ("raise", "skip"):
            found = read(path, errors)
            assert not found.complete, length
            assert_only_what_was_written(found, wanted, f"cut at {length}")
            committed = max((seq for end, seq in ends if end <= length), default=0)
            kept = {seq: one for seq, one in wanted.packets.items() if seq < committed}
            assert found.packets == kept, (length, errors)
            assert not found.said, (length, errors)  # a torn tail is normal


# -- the long form ------------------------------------------------------------------------------


def _damages(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    size = len(data)
    for _ in range(400):
        one, other = rng.randrange(size), rng.randrange(size)
        damaged = bytearray(data)
        damaged[one] ^= 1 << rng.randrange(8)
        damaged[other] ^= 1 << rng.randrange(8)
        yield f"bytes {one} and {other} flipped", bytes(damaged)
    for _ in range(400):
        start = rng.randrange(size)
        end = min(size, start + rng.choice((1, 16, 40, 100, 512)))
        filler = rng.choice((bytes(end - start), rng.randbytes(end - start)))
        yield f"bytes {start} to {end} filled", data[:start] + filler + data[end:]
        yield f"bytes {start} to {end} lost", data[:start] + data[end:]
        yield f"bytes put in at {start}", data[:start] + filler + data[start:]
        yield f"bytes {start} to {end} twice", data[:end] + data[start:]
        other = rng.randrange(size)
        length = end - start
        moved = data[:other] + data[start:end] + data[other + length :]
        yield f"bytes {start} to {end} over those at {other}", moved


@pytest.mark.slow
@pytest.mark.crash
@of_logs()
@pytest.mark.parametrize("seed", range(3))
def test_larger_damage_gives_only_intact_data_and_is_told(
    seed: int, log: tuple[Path, bytes, Found, bool]
) -> None:
    path, data, wanted, closed = log
    for what, damaged in _damages(data, random.Random(seed)):
        if damaged == data:
            continue
        path.write_bytes(damaged)
        # what was lost from the end of a log may look like a torn tail
        intact_end = damaged[-MAGIC_SIZE:] == data[-MAGIC_SIZE:]
        assert_honest(path, wanted, what, closed=closed and intact_end)
