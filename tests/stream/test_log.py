"""A log is read whole by its index or without; torn or damaged, all but what was touched is."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actstore.errors import (
    ConfigError,
    FormatError,
    MissingFileError,
    StreamCorruptError,
    UnsupportedVersionError,
)
from actstore.packet import PassInfo
from actstore.stream.reader import StreamReader, open_stream
from actstore.stream.records import Opcode, Pass, Record
from actstore.stream.resume import begun, is_log, keep_cut, resume_point
from actstore.stream.writer import SYNC_SECONDS, CommitPoint, StreamWriter

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
import independent_reader
from logs import LogBuilder, axis, random_values


class Builder(LogBuilder):
    """Writes logs whose groups end where a test wants: at a step boundary, or not."""

    def __init__(self, path: Path, **how: Any) -> None:
        super().__init__(path, capture={"track_per_token": True}, **how)

    def commit(self, *, boundary: bool = True) -> None:
        point = CommitPoint(self._seq, self._pass, self._step, boundary)
        self._writer.append(self._group, point)
        self._group = []

    def half(self) -> None:
        """Close the group before the last record."""
        last = self._group.pop()
        self.commit(boundary=False)
        self._group.append(last)


def filled(log: Builder) -> Builder:
    """Write three groups and a bit with a record of every kind, and what spans groups."""
    log.features(64, [3, 8])
    log.texts({100: "a", 101: "é"})
    log.layer("h", "resid", 0)
    log.layer("alias", "alias")
    log.begin(axis(1, 3, mask=[[False, True, True]]), annotations={"topic": ["x"]})
    first = log.put("h", random_values((1, 3, 40), "bfloat16"))
    log.put("alias", log.fired[0].values, alias_of=first)
    log.token(7, "one")
    log.commit()
    log.record(Opcode.PAD, b"", bytes(24))
    log.layer("late", "late")
    log.begin(axis(2, 1, start=3), keep=1)
    log._group[-1] = open_pass(1)
    log.put("h", random_values((2, 1, 3), "float32", seed=1), width=64)
    log.put("late", random_values((2, 1, 9), "int8", seed=2), parts=2)
    log.half()
    log.record(0x90, b"private", b"payload")
    log.put("alias", random_values((2, 1, 3), "float32", seed=3))
    status = PassInfo(1, aborted=True)
    log._group.append(Record.of(Opcode.PASS, *Pass(status, True, status_only=True).encode()))
    log.token(8, "two \ud83d")
    log.texts({101: "e"})
    log.commit()
    return log


def open_pass(index: int) -> Record:
    """Give a PASS that doesn't say how it ended."""
    info = PassInfo(index, (axis(2, 1, start=3),), entry="inner", logits_to_keep=1)
    return Record.of(Opcode.PASS, *Pass(info, closed=False).encode())


def contents(reader: StreamReader) -> dict[str, Any]:
    """Give all that actstore makes of a log, as plain values."""
    return {
        "packets": [
            (p.seq, p.layer, p.pass_index, p.call, p.dtype.name, p.shape, p.values.tobytes())
            for p in reader.packets()
        ],
        "layers": {
            name: (one.id, one.site, one.block, one.kind) for name, one in reader.layers.items()
        },
        "passes": [
            (
                *(one.index, one.entry, one.logits_to_keep, one.aborted, dict(one.annotations)),
                [
                    (
                        *(a.name, a.batch, a.sequence, a.flat, a.positions.ravel().tolist()),
                        *(a.token_ids.ravel().tolist(), a.mask.ravel().tolist()),
                    )
                    for a in one.axes
                ],
            )
            for one in reader.passes
        ],
        "tokens": [
            (one.step, one.token_id, one.position, one.pass_index, one.time, one.token_text)
            for one in reader.tokens
        ],
        "features": {width: kept.tolist() for width, kept in reader.features.items()},
        "texts": dict(reader.token_texts),
    }


def read(path: Path) -> dict[str, Any]:
    with open_stream(path) as reader:
        return contents(reader)


def read_independently(path: Path) -> dict[str, Any]:
    """Give the same of a reader that knows only the specification."""
    found = independent_reader.read(path)
    names = ("seq", "layer", "pass", "call", "dtype")
    return {
        "packets": [
            (*(one[name] for name in names), tuple(one["shape"]), one["bytes"])
            for one in found["packets"]
        ],
        "layers": {
            one["name"]: (one["id"], one["site"], one["block"], one["class"])
            for one in found["layers"]
        },
        "passes": [
            (
                *(one["index"], one["entry"], one["logits_to_keep"]),
                *(one["aborted"] or not one["closed"], one["annotations"]),
                [
                    (
                        *(a["name"], a["batch"], a["sequence"], bool(a["flat"])),
                        *(a["positions"], a["ids"], a["mask"]),
                    )
                    for a in one["axes"]
                ],
            )
            for one in found["passes"]
        ],
        "tokens": [
            (
                *(one["step"], one["token_id"]),
                None if one["position"] == -(2**63) else one["position"],
                *(one["pass"], one["time"], one["text"]),
            )
            for one in found["tokens"]
        ],
        "features": found["features"],
        "texts": found["texts"],
    }


def records_of(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, with their offsets, as the independent reader finds them."""
    at = 8
    while found := independent_reader.frame(data, at):
        yield found | {"offset": at}
        at = found["end"]


def commits_of(data: bytes) -> list[dict[str, Any]]:
    return [one for one in records_of(data) if one["opcode"] == Opcode.COMMIT]


@pytest.fixture(params=["zstd", "none"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Builder:
    """Give a log that was filled and not closed."""
    return filled(Builder(tmp_path / "run.stream", compression=request.param))


# -- whole --------------------------------------------------------------------------------------


def test_by_the_index_and_without_a_log_is_what_was_written(log: Builder, tmp_path: Path) -> None:
    log.close()
    data = log.path.read_bytes()
    index = next(one for one in records_of(data) if one["opcode"] == Opcode.INDEX)
    cut, walked = tmp_path / "cut.stream", tmp_path / "walked.stream"
    cut.write_bytes(data[: index["offset"]])
    walked.write_bytes(data[:-1] + b"\xff")
    wanted = read_independently(log.path)
    assert [one[6] for one in wanted["packets"]] == [one.values.tobytes() for one in log.fired]
    assert [one[3] for one in wanted["passes"]] == [False, True]
    assert [one[5] for one in wanted["tokens"]] == ["one", "two \ud83d"]
    for path in (log.path, cut, walked):
        assert read(path) == wanted
    with open_stream(log.path) as one, open_stream(cut) as other:
        assert (one.complete, other.complete) == (True, False)
        assert (dict(one.summary), dict(other.summary)) == ({"duration_seconds": 2.0}, {})
        assert one.header == other.header
        for group, walked_group in zip(one.scan.groups, other.scan.groups, strict=True):
            kept = tuple(entry for entry in group.entries if entry.opcode != Opcode.PAD)
            assert replace(group, entries=kept) == walked_group


def test_with_an_index_no_frame_but_the_commits_is_needed(log: Builder) -> None:
    log.close()
    wanted = read_independently(log.path)
    data = bytearray(log.path.read_bytes())
    for one in list(records_of(bytes(data)))[1:]:
        if one["opcode"] not in (Opcode.COMMIT, Opcode.INDEX, Opcode.END):
            data[one["offset"] : one["offset"] + 40 + one["hl"]] = bytes(40 + one["hl"])
    log.path.write_bytes(data)
    assert read(log.path) == wanted


def test_a_log_that_still_grows_is_read_up_to_its_last_commit(log: Builder) -> None:
    before = read(log.path)
    log.put("h", random_values((2, 1, 3), seed=9))
    with open_stream(log.path) as reader:
        log.commit()
        assert contents(reader) == before
    assert read(log.path)["packets"][:-1] == before["packets"]


def test_a_group_of_more_records_than_the_system_takes_at_once_is_whole(tmp_path: Path) -> None:
    log = Builder(tmp_path / "run.stream", compression="none")
    log.layer("x")
    log.begin(axis(1, 1))
    for number in range(1500):
        log.put("x", np.full((1, 1, 2), number, np.int32), call=number)
    log.close()
    found = read(log.path)["packets"]
    assert [one[6] for one in found] == [np.full(2, n, "<i4").tobytes() for n in range(1500)]
    assert read_independently(log.path)["packets"] == found


@pytest.mark.parametrize("opcode", [0x0C, 0x7F, 0x80, 0xFF])
def test_a_record_of_an_unknown_kind_is_skipped(opcode: int, tmp_path: Path) -> None:
    for name in ("with", "without"):
        log = Builder(tmp_path / name)
        for number in range(2):
            if name == "with":
                log.record(opcode, b"header", b"payload")
            if number == 0:
                log.layer("x")
                log.begin(axis(1, 2))
            log.put("x", random_values((1, 2, 3), seed=number), call=number)
            log.commit()
        log.close(finish=opcode % 2 == 0)
    found = read(tmp_path / "with")
    assert found == read(tmp_path / "without")
    assert len(found["packets"]) == 2


@pytest.mark.parametrize("version", [0, 2, 255])
def test_a_log_of_another_version_is_refused_naming_it(version: int, log: Builder) -> None:
    log.close()
    data = log.path.read_bytes()
    log.path.write_bytes(data[:7] + bytes([version]) + data[8:])
    assert is_log(log.path)
    for work in (open_stream, resume_point):
        with pytest.raises(UnsupportedVersionError, match=rf"version {version}; .* 1: install"):
            work(log.path)


def test_what_is_no_log_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(FormatError, match=r"other is no \.stream log.*HDF"):
        open_stream(tmp_path / "other")
    with pytest.raises(MissingFileError, match=r"no log at .*none"):
        open_stream(tmp_path / "none")
    with pytest.raises(ConfigError, match="'raise' or 'skip'; got 'ignore'"):
        open_stream(tmp_path / "other", errors="ignore")


def test_a_folder_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is no \.stream log.*found a directory"):
        open_stream(tmp_path)


# -- torn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_log_torn_at_any_byte_is_read_up_to_its_last_commit(policy: str, tmp_path: Path) -> None:
    log = filled(Builder(tmp_path / "run.stream"))
    log.close()
    data, torn = log.path.read_bytes(), tmp_path / "torn.stream"
    start = next(records_of(data))["end"]
    ends = [one["end"] for one in commits_of(data)]
    wanted = {}
    for end in (start, *ends):
        torn.write_bytes(data[:end])
        wanted[end] = read_independently(torn)
    assert [len(one["packets"]) for one in wanted.values()] == [0, 0, 2, 3, 5, 5]
    torn.write_bytes(data)
    for size in range(len(data) - 1, -1, -1):
        os.truncate(torn, size)
        if size < start:
            kind = FormatError if size < 8 else StreamCorruptError
            with pytest.raises(FormatError) as caught:
                open_stream(torn, errors=policy)
            assert type(caught.value) is kind
            assert getattr(caught.value, "offset", 8) == 8
            continue
        last = max(end for end in (start, *ends) if end <= size)
        with open_stream(torn, errors=policy) as reader:
            assert contents(reader) == wanted[last], size
            assert (reader.complete, reader.damage) == (False, [])


def test_a_log_torn_at_any_byte_is_gone_on_with_from_its_last_step(tmp_path: Path) -> None:
    log = filled(Builder(tmp_path / "run.stream"))
    log.close()
    data, torn = log.path.read_bytes(), tmp_path / "torn.stream"
    commits = commits_of(data)
    steps = [one for one in commits if one["header"][-1] & 1]
    assert len(steps) == len(commits) - 1
    torn.write_bytes(data)
    for size in range(len(data), -1, -1):
        os.truncate(torn, size)
        assert begun(torn) == (size >= commits[0]["end"]), size
        if not begun(torn):
            continue
        found = resume_point(torn)
        last = max((one for one in steps if one["end"] <= size), key=lambda one: one["end"])
        assert (found.offset, found.sync) == (last["end"], data[8:24])
        stay = tuple(one["offset"] for one in commits if one["end"] <= last["end"])
        assert found.commits == stay
        point = int.from_bytes(last["header"][8:16], "little"), found.point.step_boundary
        assert (found.point.next_seq, found.point.step_boundary) == (point[0], True)
        whole = last["end"] == steps[-1]["end"] and size == len(data)
        assert found.loses == (size > last["end"] and not whole), size


def test_what_was_not_committed_may_be_anything(log: Builder, tmp_path: Path) -> None:
    log._writer.abandon()
    data, wanted = log.path.read_bytes(), read_independently(log.path)
    block = next(one for one in records_of(data) if one["opcode"] == Opcode.BLOCK)
    other = filled(Builder(tmp_path / "other.stream")).path.read_bytes()
    torn = tmp_path / "torn.stream"
    for tail in (
        other[next(records_of(other))["end"] :],  # of a marker of its own
        bytes(5000),
        b"\xff" * 100,
        data[8:24] * 20,
        data[block["offset"] : block["end"]] * 2,
        data[block["offset"] : block["end"] - 1],
        data[:200],
    ):
        torn.write_bytes(data + tail)
        with open_stream(torn) as reader:
            assert contents(reader) == wanted
            assert (reader.complete, reader.damage) == (False, [])


@pytest.mark.parametrize("room", [0, 39, 41, 700, 20_000, 33_000])
def test_a_group_that_the_file_system_cuts_leaves_those_before_it(
    room: int, log: Builder, tmp_path: Path
) -> None:
    wanted, size = read(log.path), log.path.stat().st_size
    log.put("h", random_values((1, 1 << 13), seed=5), pass_index=1)
    log.token(9, "lost")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            log.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert log.path.stat().st_size == size + room
    assert read(log.path) == wanted
    assert resume_point(log.path).offset == size


# -- damaged ------------------------------------------------------------------------------------


HOLDS = {
    Opcode.LAYER: "layers",
    Opcode.PASS: "passes",
    Opcode.TOKEN: "tokens",
    Opcode.FEATURES: "features",
    Opcode.TEXT: "texts",
}


def packets_of(record: dict[str, Any], codecs: dict[str, Any]) -> list[int]:
    """Give the sequence numbers of the packets of a BLOCK."""
    if record["opcode"] != Opcode.BLOCK:
        return []
    cursors = (independent_reader.Cursor(record[name]) for name in ("header", "payload"))
    return [one["seq"] for one in independent_reader.read_block(*cursors, codecs)]


def lost_with(record: dict[str, Any], everything: list[dict[str, Any]], log: Builder) -> set[int]:
    """Give the packets that a reader can't have without a record: by hand."""
    codecs = independent_reader.read(log.path)["header"]["codecs"]
    gone = {record["offset"]}
    if record["opcode"] == Opcode.LAYER:
        number = json.loads(record["header"])["id"]
        gone |= {
            one["offset"]
            for one in everything
            if one["opcode"] == Opcode.BLOCK
            and int.from_bytes(one["header"][:4], "little") == number
        }
    lost = {seq for one in everything if one["offset"] in gone for seq in packets_of(one, codecs)}
    return lost | ({1} if 0 in lost else set())  # 1 is the alias of 0


@pytest.mark.parametrize("place", ["sync", "frame", "header", "payload"])
def test_damage_costs_what_it_touched_and_is_named(
    place: str, log: Builder, tmp_path: Path
) -> None:
    log._writer.abandon()
    data, damaged = log.path.read_bytes(), tmp_path / "damaged.stream"
    whole, everything = read_independently(log.path), list(records_of(data))
    touched = 0
    for record in everything[1:]:
        at = {"sync": 3, "frame": 30, "header": 40, "payload": 40 + record["hl"]}[place]
        inside = record["hl"] if place == "header" else record["pl"] if place == "payload" else 1
        last = record is everything[-1]
        if not inside or (last and place != "payload"):  # the latter is a torn tail
            continue
        touched += 1
        flipped = bytearray(data)
        flipped[record["offset"] + at] ^= 4
        damaged.write_bytes(flipped)
        lost = lost_with(record, everything, log)
        with open_stream(damaged, errors="skip") as reader:
            found = contents(reader)
            assert found["packets"] == [one for one in whole["packets"] if one[0] not in lost]
            offsets = [one.offset for one in reader.damage]
        if place == "payload" and record["opcode"] in (Opcode.PAD, 0x90):  # never looked at
            assert (found, offsets) == (whole, [])
            continue
        others = {one["offset"] for one in everything if one["opcode"] == Opcode.BLOCK and lost}
        assert offsets[0] == record["offset"]
        assert set(offsets[1:]) <= others, "the blocks of a lost layer, the alias of a lost block"
        for kind, name in HOLDS.items():
            if kind != record["opcode"]:
                assert found[name] == whole[name]
            elif kind != Opcode.PASS:  # that it was aborted is known without its last record
                assert len(found[name]) < len(whole[name]) or found["texts"] != whole["texts"]
        _assert_raises(damaged, record, whole, lost)
    assert touched > 6


def _assert_raises(
    damaged: Path, record: dict[str, Any], whole: dict[str, Any], lost: set[int]
) -> None:
    """Read until the damage; compare what came before it with what stands before it."""
    before: list[int] = []
    with (
        pytest.raises(StreamCorruptError, match=rf"damaged at byte {record['offset']}") as caught,
        open_stream(damaged) as reader,
    ):
        before.extend(packet.seq for packet in reader.packets())
        _ = reader.passes
    assert caught.value.offset == record["offset"]
    assert caught.value.path == str(damaged)
    assert lost.isdisjoint(before)
    assert before == [one[0] for one in whole["packets"]][: len(before)]
    if lost and record["opcode"] == Opcode.BLOCK:
        assert before == list(range(min(lost)))


def test_damage_in_two_groups_is_named_twice_and_all_between_is_read(
    log: Builder, tmp_path: Path
) -> None:
    log.close()
    data = bytearray(log.path.read_bytes())
    blocks = [one for one in records_of(bytes(data)) if one["opcode"] == Opcode.BLOCK]
    with_values = [one for one in blocks if one["pl"]]
    for one in (with_values[0], with_values[-1]):
        data[one["end"] - 1] ^= 0x10
    log.path.write_bytes(data)
    with open_stream(log.path, errors="skip") as reader:
        assert reader.complete, "payloads are not read before they are asked for"
        assert [packet.seq for packet in reader.packets()] == [2, 3]
        places = [one.offset for one in reader.damage]
        assert places[0] == with_values[0]["offset"]
        assert places[-1] == with_values[-1]["offset"]
        assert not reader.complete
        assert [packet.seq for packet in reader.packets("h")] == [2]
        assert len(reader.damage) == len(places)
    with open_stream(log.path) as reader, pytest.raises(StreamCorruptError) as caught:
        list(reader.packets())
    assert caught.value.offset == with_values[0]["offset"]


def test_commits_say_what_was_on_the_disk_before_them(log: Builder) -> None:
    for _ in range(2):
        log.commit()
    log._writer.sync()
    for _ in range(2):
        log.commit()
    log._writer.abandon()
    synced = [one["header"][-1] >> 1 for one in commits_of(log.path.read_bytes())]
    assert synced == [0, 1, *(0 for _ in synced[2:-2]), 1, 0]


@pytest.mark.parametrize("inside", ["frame", "payload"])
@pytest.mark.parametrize("number", range(2, 9))
def test_a_log_is_resumed_before_damage_that_a_power_cut_can_have_left(
    number: int, inside: str, log: Builder
) -> None:
    log._writer.abandon()
    data = bytearray(log.path.read_bytes())
    struck = list(records_of(bytes(data)))[number]
    data[struck["end"] - 1 if inside == "payload" else struck["offset"] + 30] ^= 1
    before = [one for one in commits_of(bytes(data)) if one["end"] <= struck["offset"]]
    log.path.write_bytes(data)
    found = resume_point(log.path)
    last = [one for one in before if one["header"][-1] & 1][-1]
    assert (found.offset, found.torn, found.loses) == (last["end"], struck["offset"], True)


def test_a_log_whose_durable_part_is_damaged_is_not_resumed(log: Builder) -> None:
    log._writer.sync()
    log.commit()
    log._writer.abandon()
    data = bytearray(log.path.read_bytes())
    third = list(records_of(bytes(data)))[3]["offset"]
    data[third + 30] ^= 1
    log.path.write_bytes(data)
    with pytest.raises(StreamCorruptError) as caught:
        resume_point(log.path)
    assert caught.value.offset == third


def test_a_log_without_steps_is_not_resumed(tmp_path: Path) -> None:
    other = LogBuilder(tmp_path / "untracked.stream")
    with pytest.raises(ConfigError, match="captured without track_per_token"):
        resume_point(other.close())


@pytest.mark.parametrize("filler", [b"\0", b"\xaa"])
@pytest.mark.parametrize("place", ["whole", "header", "commit"])
def test_a_beginning_that_a_power_cut_left_has_not_begun(
    place: str, filler: bytes, log: Builder
) -> None:
    log._writer.abandon()
    whole = log.path.read_bytes()
    header, commit = list(records_of(whole))[:2]
    begin = {"whole": 0, "header": header["offset"] + 60, "commit": commit["offset"] + 9}[place]
    data = bytearray(whole[: commit["end"]])
    assert begun(log.path)
    data[begin:] = filler * (len(data) - begin)
    log.path.write_bytes(data)
    assert begun(log.path) == (place == "whole" and filler != b"\0")  # what is no log is kept
    log.path.write_bytes(data + whole[commit["end"] :])
    assert begun(log.path)


# -- writing ------------------------------------------------------------------------------------


def test_a_log_has_one_writer_and_a_second_harms_nothing(log: Builder) -> None:
    before = log.path.read_bytes()
    with (
        pytest.raises(ConfigError, match=r"run\.stream is being written by another capture"),
        StreamWriter(log.path),
    ):
        pytest.fail("entered")
    assert log.path.read_bytes() == before
    log.token(9, "three")
    log.close()
    assert [one[1] for one in read(log.path)["tokens"]] == [7, 8, 9]
    with StreamWriter(log.path):
        pass


def test_a_resumed_log_is_cut_there_and_goes_on_as_if_never_interrupted(
    log: Builder, tmp_path: Path
) -> None:
    log.close()
    data, wanted = log.path.read_bytes(), read(log.path)
    for commit in commits_of(data)[1:]:
        path = tmp_path / "resumed.stream"
        path.write_bytes(data[: commit["end"] + 17])
        found = resume_point(path)
        rest = [
            Record.of(one["opcode"], one["header"], one["payload"])
            for one in records_of(data)
            if one["offset"] >= found.offset and one["opcode"] in (*range(2, 7), Opcode.TEXT)
        ]
        with StreamWriter(path) as writer:
            writer.resume(found.sync, found.commits, found.offset)
            assert path.stat().st_size == writer.offset == found.offset
            writer.append(rest, CommitPoint(5, 2, 2))
            writer.finish({"again": True})
        assert path.read_bytes()[: found.offset] == data[: found.offset]
        assert read(path) == read_independently(path) == wanted
        with open_stream(path) as reader:
            assert reader.complete
            assert reader.summary == {"again": True}
            assert len(reader.scan.groups) == len(found.commits) + 1


def test_what_is_cut_is_kept_beside_the_log_under_a_free_name(log: Builder) -> None:
    log.close()
    data = log.path.read_bytes()
    wanted = [log.path.with_name(f"run.stream.{number}.cut") for number in (1, 2)]
    for offset, name in zip((100, len(data) - 3), wanted, strict=True):
        assert keep_cut(log.path, offset) == name
        assert name.read_bytes() == data[offset:]
    assert log.path.read_bytes() == data


def test_a_log_that_something_cuts_at_any_moment_is_not_closed_as_if_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writev = tmp_path / "run.stream", os.writev
    with StreamWriter(path) as writer:
        writer.start({"codecs": {"0": None}})
        writer.append([], CommitPoint())
        os.truncate(path, 100)
        with pytest.raises(OSError, match="something else left 100 of"):
            writer.finish({})
    path.unlink()

    def cutting(descriptor: int, buffers: Any) -> int:
        os.truncate(path, 100)
        return writev(descriptor, buffers)

    with StreamWriter(path) as writer:
        writer.start({"codecs": {"0": None}})
        monkeypatch.setattr(os, "writev", cutting)
        with pytest.raises(OSError, match=r"something else left \d+ of"):
            writer.finish({})


def test_groups_become_durable_by_time_and_the_end_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, synced = 0.0, []
    sync = os.fdatasync

    def noting(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", noting)
    path = tmp_path / "run.stream"
    with StreamWriter(path, clock=lambda: now) as writer:
        writer.start({"codecs": {"0": None}})
        assert synced == [writer.offset]
        sizes = []
        for step in (1.0, SYNC_SECONDS - 2, 1.0, 1.0, SYNC_SECONDS):
            now += step
            writer.append([], CommitPoint())
            sizes.append(writer.offset)
        assert synced[1:] == [sizes[2], sizes[4]]
        writer.finish({})
        assert synced[3:] == [path.stat().st_size]
