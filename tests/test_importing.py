"""An import makes a whole archive, or none; a killed one is gone on with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import actstore
from actstore import importing
from actstore.archive import grid, shards
from actstore.errors import ArchiveError, ConfigError, FormatError, MissingFileError

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import decoder_log, files_of

SUFFIXES = ["h5", "zarr.zip"]


@pytest.fixture(params=SUFFIXES)
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(grid, "CHUNK_BYTES", 256)
    monkeypatch.setattr(grid, "SHARD_BYTES", 1024)
    log = decoder_log(tmp_path / "run.stream", steps=40).path
    archive = actstore.compact(log, tmp_path / "run.zarr").path
    return actstore.export(archive, tmp_path / f"run.{request.param}").path


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Let the import end when so many files are finished, as a signal or a full disk would."""
    honest, seen = importing.Journal.add, []

    def add(self: Any, name: str, nbytes: int) -> None:
        honest(self, name, nbytes)
        seen.append(name)
        if len(seen) == count:
            raise error

    monkeypatch.setattr(importing.Journal, "add", add)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_import_that_was_cut_short_is_gone_on_with(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = file.with_name("made.zarr")
    with monkeypatch.context() as patched:
        stop_after(patched, 3, error)
        with pytest.raises((KeyboardInterrupt, ArchiveError)):
            actstore.import_archive(file, target)
    assert not target.exists()
    report = actstore.import_archive(file, target)
    assert report.resumed >= 3
    assert files_of(target) == files_of(file.with_name("run.zarr"))
    assert not [one for one in file.parent.iterdir() if one.name.startswith(".")]


def test_another_file_begins_anew(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = file.with_name("made.zarr")
    with monkeypatch.context() as patched:
        stop_after(patched, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            actstore.import_archive(file, target)
    log = decoder_log(file.with_name("other.stream"), steps=7).path
    archive = actstore.compact(log, file.with_name("other.zarr")).path
    other = actstore.export(archive, file.with_name(f"other.{file.name[4:]}")).path
    report = actstore.import_archive(other, target)
    assert report.resumed == 0
    assert files_of(target) == files_of(archive)


def test_what_encodes_wrong_bytes_is_told_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = actstore.export(decoder_log(tmp_path / "run.stream").path, tmp_path / "run.h5").path
    honest = shards.encode_chunk

    def wrong(out: Any, data: Any, *given: Any) -> int:
        return honest(out, data[::-1].copy(), *given)

    monkeypatch.setattr(shards, "encode_chunk", wrong)
    with pytest.raises(ArchiveError, match="doesn't read back"):
        actstore.import_archive(file, tmp_path / "made.zarr")
    assert {one.name for one in tmp_path.iterdir()} == {"run.stream", "run.h5"}


def test_progress_counts_up_to_all(file: Path) -> None:
    seen: list[tuple[int, int]] = []
    actstore.import_archive(
        file, file.with_name("made.zarr"), progress=lambda *said: seen.append(said)
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_what_is_there_is_not_overwritten(file: Path) -> None:
    with pytest.raises(ArchiveError, match="exists"):
        actstore.import_archive(file, file.with_name("run.zarr"))
    with pytest.raises(ConfigError, match="no folder"):
        actstore.import_archive(file, file.parent / "nowhere" / "made.zarr")
    with pytest.raises(MissingFileError):
        actstore.import_archive(file.with_name("gone.h5"), file.with_name("made.zarr"))
    for other in ("run.zarr", "run.stream"):
        with pytest.raises(FormatError, match=r"neither an \.h5 nor a \.zarr\.zip"):
            actstore.import_archive(file.with_name(other), file.with_name("made.zarr"))
