"""A zipped archive is read in place; a zip that isn't safe to unpack is refused before it is."""

from __future__ import annotations

import os
import random
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
import zarr
from logs import decoder_log, files_of

import actstore
from actstore.archive.zipped import ZipPath
from actstore.errors import ActstoreError, ArchiveError, FormatError


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zipped")
    log = decoder_log(folder / "run.stream").path
    return actstore.compact(log, folder / "run.zarr").path


@pytest.fixture
def path(archive: Path, tmp_path: Path) -> Path:
    return actstore.export(archive, tmp_path / "run.zarr.zip").path


def rezip(path: Path, change: Callable[[dict[str, bytes]], Any] = lambda members: None) -> None:
    """Write a zip anew by the standard library, with other members."""
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    change(members)
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)


# -- good zips ----------------------------------------------------------------------------------


def test_members_are_the_archives_files_as_they_are_its_root_first(
    archive: Path, path: Path
) -> None:
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
        infos = found.infolist()
        assert infos[0].filename == "zarr.json"
        assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.filename: found.read(info) for info in infos} == files_of(archive)


def test_equal_archives_are_equal_zips(archive: Path, path: Path, tmp_path: Path) -> None:
    other = actstore.export(archive, tmp_path / "other.zarr.zip").path
    assert other.read_bytes() == path.read_bytes()


def test_zarr_and_xarray_open_it_in_place(archive: Path, path: Path) -> None:
    held = zarr.storage.ZipStore(path, mode="r")
    with xr.open_zarr(held) as one, xr.open_zarr(archive) as other:
        xr.testing.assert_identical(one.compute(), other.compute())
    held.close()


def test_a_zip_that_another_program_stored_opens_too(
    archive: Path, path: Path, tmp_path: Path
) -> None:
    rezip(path)
    with actstore.open_dataset(path) as one, actstore.open_dataset(archive) as other:
        xr.testing.assert_identical(one.compute(), other.compute())
    assert actstore.verify(path).ok
    made = actstore.import_archive(path, tmp_path / "made.zarr").path
    assert files_of(made) == files_of(archive)


def test_members_behind_four_gigabytes_are_found(archive: Path, path: Path) -> None:
    """A sparse hole before the directory: zip64 records say where it is."""
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    count, length, start = struct.unpack_from("<HII", data, end + 10)
    hole = 5 << 30
    with path.open("r+b") as file:
        file.truncate(start)
        file.seek(start + hole)
        file.write(data[start:end])
        place = file.tell()
        file.write(
            struct.pack(
                "<4sQ2H2I4Q",
                *(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, start + hole),
            )
        )
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, place, 1))
        file.write(
            struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, *[2**32 - 1] * 2, 0)
        )
    with zipfile.ZipFile(path) as found:
        assert len(found.namelist()) == count
    with actstore.open_dataset(path) as one, actstore.open_dataset(archive) as other:
        xr.testing.assert_identical(one.compute(), other.compute())


def test_a_place_has_what_readers_need_of_a_path(path: Path) -> None:
    root = ZipPath(path)
    place = root / "resid" / "zarr.json"
    assert place.is_file()
    assert not (root / "resid").exists()
    assert (place.name, str(place.parent)) == ("zarr.json", f"{path}/resid")
    assert place.parent.parent == root
    assert len(place.read_bytes()) == place.stat().st_size
    with place.open() as file:
        file.seek(-3, os.SEEK_END)
        assert file.read(100) == place.read_bytes()[-3:]
        assert file.read(1) == b""
    with pytest.raises(FileNotFoundError):
        (root / "gone").open()


# -- hostile ones -------------------------------------------------------------------------------


def info(name: str, **given: Any) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    for key, value in given.items():
        setattr(made, key, value)
    return made


def add(name: str, data: bytes = b"x", **given: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(info(name, **given), data)

    return change


def patched(at: Callable[[bytes], int], values: bytes) -> Callable[[Path], None]:
    """Overwrite bytes."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        place = at(bytes(data))
        data[place : place + len(values)] = values
        path.write_bytes(data)

    return change


def central(offset: int, number: int = 1) -> Callable[[bytes], int]:
    """Give where a field of an entry of the directory is."""

    def find(data: bytes) -> int:
        place = -1
        for _ in range(number + 1):
            place = data.index(b"PK\x01\x02", place + 1)
        return place + offset

    return find


def end(offset: int) -> Callable[[bytes], int]:
    return lambda data: data.rindex(b"PK\x05\x06") + offset


def twice(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        add("zarr.json")(path)


def deflated(path: Path) -> None:
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/zarr.json", bytes(1 << 24))


def overlapping(path: Path) -> None:
    """Let the second member be where the first is, as a zip bomb's all are."""
    first = path.read_bytes()
    place = central(42, 0)(first)
    patched(central(42, 1), first[place : place + 4])(path)


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "parent": add("../evil"),
    "parent within": add("resid/../../evil"),
    "absolute": add("/tmp/evil"),
    "backslash": add("resid\\..\\evil"),
    "dot": add("./zarr.json"),
    "empty part": add("resid//c"),
    "link": add("resid/c/9", b"/etc/hostname", external_attr=(stat.S_IFLNK | 0o777) << 16),
    "device": add("resid/c/9", external_attr=stat.S_IFCHR << 16),
    "twice": twice,
    "deflated": deflated,
    "folder with bytes": patched(central(46), b"resid/c///"),
    "method of one": patched(central(10), struct.pack("<H", 8)),
    "encrypted": patched(central(8), struct.pack("<H", 1)),
    "streamed": patched(central(8), struct.pack("<H", 8)),
    "other packed size": patched(central(20), struct.pack("<I", 1)),
    "absurd size": patched(central(20), struct.pack("<II", 1 << 31, 1 << 31)),
    "absurd place": patched(central(42), struct.pack("<I", 1 << 31)),
    "overlapping": overlapping,
    "name goes on": patched(central(28), struct.pack("<H", 0xFFFF)),
    "no entry": patched(central(0), b"PK\x01\x03"),
    "other count": patched(end(8), struct.pack("<HH", 3, 3)),
    "absurd count": patched(end(8), struct.pack("<HH", 0xFFFE, 0xFFFE)),
    "absurd directory": patched(end(12), struct.pack("<I", 1 << 30)),
    "other start": patched(end(16), struct.pack("<I", 7)),
    "comment": lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\x03\0abc"),
    "behind it": lambda path: path.write_bytes(path.read_bytes() + b"PK"),
    "before it": lambda path: path.write_bytes(b"PK\x03\x04" + path.read_bytes()),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b"PK\x03\x04"),
    "no root": lambda path: rezip(path, lambda members: members.pop("zarr.json")),
    "root no json": lambda path: rezip(path, lambda all_: all_.update({"zarr.json": b"[" * 99})),
}

#: What opens, for it only has more, or fails where it is read; it is not imported.
ODD: dict[str, Callable[[Path], Any]] = {
    "stranger": add("run.sh", b"echo"),
    "stranger in an array": add("resid/evil"),
    "chunk of a group": add("tokens/c/0"),
    "chunk of no number": add("resid/c/x"),
    "chunk elsewhere": add("nothing/c/0"),
    "another start": patched(lambda data: data.index(b"PK\x03\x04", 9) + 30, b"other"),
    "flipped": patched(lambda data: data.index(b"PK\x03\x04", 9) + 60, b"\xff"),
    "missing": lambda path: rezip(path, lambda members: members.pop("layer/c/0")),
}


def tried(work: Callable[[], Any]) -> Any:
    """Give what something returns, or the error of ours that it raises; no other may be."""
    try:
        return work()
    except ActstoreError as error:
        return error


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_zip_is_refused_and_leaves_nothing(path: Path, name: str) -> None:
    HOSTILE[name](path)
    tracemalloc.start()
    for work in (actstore.open_dataset, actstore.verify):
        with pytest.raises(FormatError):
            work(path)
    with pytest.raises(FormatError):
        actstore.import_archive(path, path.with_name("made.zarr"))
    with pytest.raises(FormatError):
        actstore.export(path, path.with_name("made.h5"))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert {one.name for one in path.parent.iterdir()} == {"run.zarr.zip"}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_part_of_the_archive_is_told_and_never_unpacked(path: Path, name: str) -> None:
    ODD[name](path)
    report = tried(lambda: actstore.verify(path))
    assert not report.ok
    with pytest.raises((FormatError, ArchiveError)):
        actstore.import_archive(path, path.with_name("made.zarr"))
    assert {one.name for one in path.parent.iterdir()} == {"run.zarr.zip"}


def test_a_zip_of_others_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.txt", "a")
    for work in (actstore.open_dataset, actstore.verify):
        with pytest.raises(FormatError, match="no archive of actstore"):
            work(tmp_path / "a.zip")


def test_any_flipped_byte_of_a_zip_is_found(path: Path) -> None:
    """Some of the headers are of no consequence: dates, versions, permissions."""
    data = path.read_bytes()
    with actstore.open_dataset(path, None) as found:
        wanted = found.compute()
    generator = random.Random(0)
    for _ in range(60):
        flipped = bytearray(data)
        flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        report = tried(lambda: actstore.verify(path))
        if not isinstance(report, ActstoreError) and report.ok:
            with actstore.open_dataset(path, None) as found:
                assert found.compute().identical(wanted)


@pytest.mark.skipif(not Path("/usr/bin/unzip").exists(), reason="unzip is not installed")
def test_unzip_makes_the_archive_of_it(archive: Path, path: Path, tmp_path: Path) -> None:
    subprocess.run(["unzip", "-q", path, "-d", tmp_path / "out"], check=True)
    assert files_of(tmp_path / "out") == files_of(archive)


def test_a_zip_opens_where_h5py_is_missing(path: Path) -> None:
    code = (
        "import sys; sys.modules['h5py'] = None\n"
        "import actstore; assert actstore.verify(sys.argv[1]).ok\n"
        "print(actstore.open_dataset(sys.argv[1]).resid.sum().values)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)
