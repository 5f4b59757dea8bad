"""Appending logs to an archive: it is then what compacting them together makes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import actstore
from actstore import files
from actstore.appending import append
from actstore.archive import grid, shards
from actstore.archive.root import read_attributes
from actstore.compaction import compact
from actstore.errors import ArchiveError, ConfigError, MissingFileError

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, random_values


def same(one: Path, other: Path) -> None:
    """Compare two archives: values, labels, tables, and what their roots say."""
    for group in (None, "tokens", "passes", "text"):
        with xr.open_zarr(one, group=group) as mine, xr.open_zarr(other, group=group) as its:
            assert set(mine.variables) == set(its.variables)
            assert mine.sizes == its.sizes
            for name in mine.variables:
                left, right = mine[name].values, its[name].values
                assert left.dtype == right.dtype, name
                if left.dtype.kind == "T":
                    assert left.tolist() == right.tolist(), name
                else:
                    assert left.tobytes() == right.tobytes(), name
    said, wanted = read_attributes(one), read_attributes(other)
    for about in (said, wanted):
        del about["metadata_crc32c"], about["provenance"]["created"]
        about["coordinates"] = sorted(about["coordinates"].split())
        for layer in about["analysis"]["per_layer"].values():
            layer.pop("shapes")
    assert said == wanted


@pytest.mark.parametrize("small", [True, False])
def test_an_appended_log_is_as_if_compacted_together(
    tmp_path: Path, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:  # several chunks and shards a layer
        monkeypatch.setattr(grid, "CHUNK_BYTES", 128)
        monkeypatch.setattr(grid, "SHARD_BYTES", 512)
    logs = [
        decoder_log(tmp_path / f"{one}.stream", steps=20 + one, run=str(one)).path
        for one in range(4)
    ]
    grown = compact(logs[0], tmp_path / "grown.zarr").path
    append(logs[1], grown)
    report = append(logs[2:], grown)
    compact(logs, tmp_path / "whole.zarr")
    same(grown, tmp_path / "whole.zarr")
    assert actstore.verify(grown).ok
    assert actstore.verify(grown, against=logs).ok
    assert report.rows == {"token": sum(10 + 2 * (20 + one) for one in range(4))}
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".stream"}
    assert left == {"grown.zarr", "whole.zarr"}


def test_full_shards_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "CHUNK_BYTES", 128)
    monkeypatch.setattr(grid, "SHARD_BYTES", 512)
    logs = [
        decoder_log(tmp_path / f"{one}.stream", steps=40, run=str(one)).path for one in range(2)
    ]
    grown = compact(logs[0], tmp_path / "grown.zarr").path
    before = {
        path: path.stat().st_ino
        for path in grown.rglob("*")
        if path.is_file() and "c" in path.relative_to(grown).parts[1:-1]
    }
    written = 0
    encode = shards.encode_shard

    def counting(*given: Any) -> Any:
        nonlocal written
        written += 1
        return encode(*given)

    monkeypatch.setattr(shards, "encode_shard", counting)
    report = append(logs[1], grown)
    kept = [path for path, inode in before.items() if path.stat().st_ino == inode]
    of_mlp = [path for path in kept if "mlp" in path.parts]
    assert len(of_mlp) == 3 * (90 // 16)  # layers, full shards of 16 rows
    assert written == report.shards_verified - len(kept)


def test_layers_that_fire_in_some_passes_only(tmp_path: Path) -> None:
    logs = []
    for number, fires in enumerate(([True, False], [False, True], [True, True], [False, False])):
        log = LogBuilder(tmp_path / f"{number}.stream", run=str(number))
        log.layer("h.0", "resid", 0)
        log.layer("h.1", "resid", 1)
        log.layer("odd", "odd")
        for at in range(3):
            log.begin(axis(1, 4))
            for block, name in enumerate(("h.0", "h.1")):
                if fires[block] or at == 1:
                    log.put(name, random_values((1, 4, 6), seed=10 * number + at))
            log.put("odd", random_values((3 + at, 2, 5), seed=at))
        logs.append(log.close())
    grown = compact(logs[0], tmp_path / "grown.zarr").path
    for log_path in logs[1:]:
        append(log_path, grown)
    compact(logs, tmp_path / "whole.zarr")
    same(grown, tmp_path / "whole.zarr")
    assert actstore.verify(grown, against=logs).ok


def test_what_does_not_go_together_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "one.stream", run="1")
    grown = compact(log.path, tmp_path / "grown.zarr").path
    before = (grown / "zarr.json").read_bytes()
    with pytest.raises(ConfigError, match="run '1' is in"):
        append(log.path, grown)
    wider = decoder_log(tmp_path / "wider.stream", run="2", width=16)
    with pytest.raises(ArchiveError, match="other dimensions"):
        append(wider.path, grown)
    more = decoder_log(tmp_path / "more.stream", run="3", blocks=4)
    with pytest.raises(ArchiveError, match="can't be appended"):
        append(more.path, grown)
    few = LogBuilder(tmp_path / "few.stream", run="4")
    few.layer("other")
    few.begin(axis(1, 2))
    few.put("other", random_values((1, 2, 3)))
    with pytest.raises(ArchiveError, match="only one of both has"):
        append(few.close(), grown)
    with pytest.raises(MissingFileError):
        append(log.path, tmp_path / "gone.zarr")
    assert (grown / "zarr.json").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class StoppedError(Exception):
    """What a test raises from inside."""


@pytest.mark.parametrize("where", ["progress", "exchange", "after"])
def test_an_append_that_is_cut_short_leaves_the_archive_and_goes_on(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = [decoder_log(tmp_path / f"{one}.stream", run=str(one)).path for one in range(2)]
    grown = compact(logs[0], tmp_path / "grown.zarr").path
    before = {path: path.read_bytes() for path in grown.rglob("*") if path.is_file()}

    def stop(*_: Any) -> None:
        raise StoppedError

    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        if where == "exchange":
            patched.setattr(files, "exchange", stop)
        if where == "after":
            honest = files.exchange
            patched.setattr(files, "exchange", lambda *names: (honest(*names), stop()))
        append(logs[1], grown, progress=stop if where == "progress" else None)
    if where == "after":
        with pytest.raises(ConfigError, match="already"):
            append(logs[1], grown)
    else:
        assert {p: p.read_bytes() for p in grown.rglob("*") if p.is_file()} == before
        append(logs[1], grown)
    compact(logs, tmp_path / "whole.zarr")
    same(grown, tmp_path / "whole.zarr")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_folders_change_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    files.exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one/file").read_text() == "two"
    assert (tmp_path / "two/file").read_text() == "one"
    np.testing.assert_equal(len(list(tmp_path.iterdir())), 2)
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "gone", tmp_path / "two")


@pytest.mark.parametrize("given", [None, b"run.stream", (), 3])
def test_what_are_no_logs_is_refused_by_who_wanted_them(given: Any, tmp_path: Path) -> None:
    archive = actstore.compact(decoder_log(tmp_path / "run.stream").path, tmp_path / "a.zarr").path
    with pytest.raises(ConfigError, match="append takes the path of a log, or a sequence"):
        actstore.append(given, archive)
    with pytest.raises(ConfigError, match="compact takes the path of a log, or a sequence"):
        actstore.compact(given, tmp_path / "b.zarr")
    with pytest.raises(ConfigError, match="verify takes the path of a log, or a sequence"):
        actstore.verify(archive, against=given or ())
