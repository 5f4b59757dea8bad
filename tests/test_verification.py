"""Verification names what is damaged: any flipped bit of a log or an archive, and nothing else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import pytest

import actstore
from actstore.archive import grid
from actstore.errors import (
    ActstoreError,
    ConfigError,
    FormatError,
    MissingFileError,
    UnsupportedVersionError,
)
from actstore.stream.records import Frame, Opcode
from actstore.verification import verify

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, random_values


def small_log(path: Path, *, finish: bool = True) -> LogBuilder:
    """Write a log with a record of every kind."""
    log = LogBuilder(path)
    log.features(64, [1, 2])
    log.texts({100: "x"})
    log.layer("h.0", "resid", 0)
    log.layer("alias", "alias", 0)
    for number in range(2):
        log.begin(axis(1, 3, mask=[[False, True, True]]), annotations={"topic": ["a"]})
        values = random_values((1, 3, 40), "bfloat16", seed=number)
        log.put("alias", values, alias_of=log.put("h.0", values, parts=2))
        log.token(5, "tok")
        log.record(Opcode.PAD, b"", bytes(24))
        log.record(0x90, b"private", b"payload")
        log.commit()
    log.close(finish=finish)
    return log


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


# -- logs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("finish", [True, False])
def test_an_intact_log_is_ok_and_all_of_it_is_counted(tmp_path: Path, finish: bool) -> None:
    log = small_log(tmp_path / "run.stream", finish=finish)
    report = verify(log.path)
    assert (report.ok, report.damage, report.kind) == (True, (), "log")
    assert report.complete is finish
    assert report.bytes == log.path.stat().st_size
    assert dict(report.checked) == {
        **{"HEADER": 1, "FEATURES": 1, "TEXT": 1, "LAYER": 2, "PASS": 2, "BLOCK": 6, "TOKEN": 2},
        **{"PAD": 2, "opcode 0x90": 2, "COMMIT": 4, "packets": 4},
        **({"INDEX": 1, "END": 1} if finish else {}),
    }


def test_any_flipped_bit_of_a_closed_log_is_found(tmp_path: Path) -> None:
    log = small_log(tmp_path / "run.stream")
    data, damaged = log.path.read_bytes(), tmp_path / "damaged.stream"
    for byte in range(len(data)):
        damaged.write_bytes(data[:byte] + bytes([data[byte] ^ 1 << byte % 8]) + data[byte + 1 :])
        try:
            report = verify(damaged)
        except (FormatError, UnsupportedVersionError):
            assert byte < 8, "only the magic decides whether it is a log"
            continue
        assert not report.ok, byte
        assert all(one.offset <= byte for one in report.damage[:1])


def test_damage_in_two_places_is_named_at_both(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", compression="none")
    data = log.path.read_bytes()
    blocks = {}
    for name in ("model.layers.0", "model.layers.2"):
        values = next(one for one in log.fired if one.layer == name).values
        byte = data.index(values.tobytes())
        blocks[data.rindex(data[8:24], 0, byte)] = byte + 3
    for byte in blocks.values():
        flip(log.path, byte)
    report = verify(log.path)
    assert [one.offset for one in report.damage] == sorted(blocks)
    assert {one.where for one in report.damage} == {"BLOCK"}
    assert all(str(one.offset) in str(one) for one in report.damage)


@pytest.mark.parametrize("keep", [1, 39, 41, 200])
def test_a_torn_tail_is_no_damage(tmp_path: Path, keep: int) -> None:
    log = small_log(tmp_path / "run.stream", finish=False)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + whole[8 : 8 + keep])
    report = verify(log.path)
    assert report.ok
    assert not report.complete


def test_a_log_that_was_cut_anywhere_is_intact_as_far_as_it_goes(tmp_path: Path) -> None:
    data = small_log(tmp_path / "run.stream").path.read_bytes()
    cut = tmp_path / "cut.stream"
    (commit,) = (at for at in [first_commit(data)] if at)
    for size in range(commit, len(data), 7):
        cut.write_bytes(data[:size])
        assert verify(cut).ok, size


def first_commit(data: bytes) -> int:
    """Give the end of the HEADER of a log: from there on it may be cut."""
    header, payload = (
        int.from_bytes(data[8 + 20 : 8 + 24], "little"),
        int.from_bytes(data[8 + 24 : 8 + 32], "little"),
    )
    return 8 + Frame.SIZE + header + payload


def test_a_directory_that_lies_is_found_though_its_checksum_is_right(tmp_path: Path) -> None:
    log = small_log(tmp_path / "run.stream")
    data = bytearray(log.path.read_bytes())
    place = data.index(b"private", data.index(b"private") + 1)  # in the COMMIT's payload
    frame = data.rindex(data[8:24], 0, place)
    header = int.from_bytes(data[frame + 20 : frame + 24], "little")
    length = int.from_bytes(data[frame + 24 : frame + 32], "little")
    data[place : place + 7] = b"altered"
    body, head = frame + 40 + header, slice(frame + 40, frame + 40 + header)
    data[frame + 32 : frame + 36] = crc32c.crc32c(bytes(data[body : body + length])).to_bytes(
        4, "little"
    )
    checked = bytes(data[frame : frame + 36]) + bytes(data[head])
    data[frame + 36 : frame + 40] = crc32c.crc32c(checked).to_bytes(4, "little")
    log.path.write_bytes(data)
    (found,) = verify(log.path).damage
    assert (found.where, found.offset) == ("COMMIT", frame)


def test_an_alias_of_nothing_and_parts_that_lack_bytes_are_found(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("a")
    log.begin(axis(1, 2))
    log.put("a", random_values((1, 2, 3)))
    log.put("a", random_values((1, 2, 4)), alias_of=0, call=1)
    report = verify(log.close())
    assert [one.where for one in report.damage] == ["BLOCK"]
    assert "alias" in report.damage[0].reason


@pytest.mark.parametrize("what", ["pass", "step"])
def test_numbers_beyond_int64_are_damage_and_not_a_crash(tmp_path: Path, what: str) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    if what == "pass":
        log.begin(axis(1, 2), index=(1 << 64) - 1)
        log._pass = 0
    else:
        log.begin(axis(1, 2))
        log._step = 1 << 63
        log.token(1, "x")
        log._step = 0
    assert not verify(log.close()).ok


# -- archives -----------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an archive with missing rows, several shards and several chunks in each."""
    monkeypatch.setattr(grid, "CHUNK_BYTES", 256)
    monkeypatch.setattr(grid, "SHARD_BYTES", 1024)
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("h.0", "resid", 0)
    log.layer("h.1", "resid", 1)
    log.layer("loose")
    for number in range(20):
        log.begin(axis(1, 3))
        log.put("h.0", random_values((1, 3, 8), seed=number))
        if number == 17:
            log.put("h.1", random_values((1, 3, 8), seed=number))
        log.put("loose", random_values((5, 7), seed=number))
    return actstore.compact(log.close(), tmp_path / "run.zarr").path


def files_of(archive: Path) -> list[Path]:
    return sorted(path for path in archive.rglob("*") if path.is_file())


def test_an_intact_archive_is_ok_and_all_of_it_is_counted(archive: Path) -> None:
    report = verify(archive)
    assert (report.ok, report.damage, report.kind) == (True, (), "archive")
    assert report.checked["files"] == len(files_of(archive))
    nodes = [json.loads(path.read_bytes()) for path in archive.rglob("zarr.json")]
    assert report.checked["arrays"] == sum(one["node_type"] == "array" for one in nodes)
    assert report.bytes > sum(path.stat().st_size for path in archive.rglob("c/**/*"))


def test_a_flipped_bit_of_any_file_of_an_archive_is_found_and_named(archive: Path) -> None:
    for path in files_of(archive):
        data = path.read_bytes()
        for byte in sorted({0, len(data) // 3, len(data) // 2, len(data) - 1}):
            flip(path, byte, 2)
            found = verify(archive).damage
            assert found, (path, byte)
            if "c" in path.relative_to(archive).parts:
                assert found[0].where.startswith(str(path.relative_to(archive)))
            path.write_bytes(data)
    assert verify(archive).ok


def test_the_damaged_chunk_of_a_shard_is_named(archive: Path) -> None:
    shard = archive / "resid" / "c" / "0" / "1" / "0"
    flip(shard, 5)
    assert [one.where for one in verify(archive).damage] == ["resid/c/0/1/0, chunk 0"]


def test_any_file_that_is_gone_is_missed(archive: Path) -> None:
    for path in files_of(archive):
        if path == archive / "zarr.json":
            continue
        data = path.read_bytes()
        path.unlink()
        assert not verify(archive).ok, path
        path.write_bytes(data)


def test_a_folder_that_is_gone_is_missed(archive: Path) -> None:
    shutil.rmtree(archive / "resid")
    found = {one.where for one in verify(archive).damage}
    assert "resid/zarr.json" in found
    assert "resid/c/0/0/0" in found


def edit(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Give what changes the root's metadata, and mends its checksum, as a forger would."""

    def forge(archive: Path) -> None:
        place = archive / "zarr.json"
        said = json.loads(place.read_bytes())
        said["attributes"] = {"metadata_crc32c": "0" * 8} | {
            name: one for name, one in said["attributes"].items() if name != "metadata_crc32c"
        }
        change(said)
        data = json.dumps(said, indent=2).encode()
        crc = f"{crc32c.crc32c(data):08x}".encode()
        place.write_bytes(data.replace(b"0" * 8, crc, 1))

    return forge


def nodes(said: Any) -> Any:
    return said["consolidated_metadata"]["metadata"]


@pytest.mark.parametrize(
    "change",
    [
        lambda said: nodes(said)["resid"].update(shape=[2, 1 << 40, 8]),
        lambda said: nodes(said)["resid"].update(shape=[2, 0, 8]),
        lambda said: nodes(said)["resid"].update(shape="large"),
        lambda said: nodes(said)["resid"].update(codecs=[]),
        lambda said: nodes(said)["token_id"].update(codecs=[{"name": "bytes"}]),
        lambda said: nodes(said)["resid"]["chunk_grid"]["configuration"].update(
            chunk_shape=[0, 0, 0]
        ),
        lambda said: nodes(said)["resid"]["codecs"][0]["configuration"].update(
            chunk_shape=[1, 7, 8]
        ),
        lambda said: nodes(said).pop("token_id"),
        lambda said: nodes(said).update({"../../up": nodes(said)["resid"]}),
        lambda said: nodes(said).update(new=3),
        lambda said: said.pop("consolidated_metadata"),
        lambda said: said["attributes"].update(rows={"token": 3}),
        lambda said: said["attributes"].update(coordinates="nothing"),
        lambda said: said["attributes"].pop("rows"),
    ],
)
def test_metadata_that_contradicts_itself_is_damage_and_never_a_crash(
    archive: Path, change: Callable[[Any], None]
) -> None:
    edit(lambda said: None)(archive)
    assert verify(archive).ok
    edit(change)(archive)
    assert not verify(archive).ok


def test_a_changed_attribute_is_found(archive: Path) -> None:
    place = archive / "zarr.json"
    place.write_text(place.read_text().replace('"token": 60', '"token": 61'))
    assert {one.where for one in verify(archive).damage} == {
        "zarr.json",
        "batch_item/zarr.json",
    } | {
        f"{name}/zarr.json"
        for name in (
            *("is_padding", "pass_index", "position", "resid", "resid_present", "step"),
            *("token_id", "token_text"),
        )
    }


# -- neither ------------------------------------------------------------------------------------


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing of the kind")
    with pytest.raises(FormatError, match="neither"):
        verify(tmp_path / "notes.txt")
    with pytest.raises(FormatError, match="archive"):
        verify(tmp_path)
    with pytest.raises(MissingFileError):
        verify(tmp_path / "gone")
    with pytest.raises(ConfigError, match="path"):
        verify(None)  # type: ignore[arg-type]
    assert issubclass(FormatError, ActstoreError)


def test_another_version_is_refused(archive: Path) -> None:
    place = archive / "zarr.json"
    place.write_text(place.read_text().replace('"format_version": 0', '"format_version": 9'))
    with pytest.raises(UnsupportedVersionError, match="version 9"):
        verify(archive)
