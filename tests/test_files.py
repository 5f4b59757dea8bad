"""Files appear whole or not at all, and durably; a lock excludes others until its holder ends."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import actstore
from actstore import files
from actstore.errors import ActstoreError, ConfigError, MissingFileError

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import decoder_log

OLD, NEW = b"old" * 5, b"new" * 100_000

# A process that kills itself at the n-th thing that it asks of the system: opening the temporary
# file, its mode, the renaming, opening the folder.
KILLED_AT = """
import os, signal, sys
from pathlib import Path
from actstore import files

path, left = Path(sys.argv[1]), int(sys.argv[2])

def hook(event, _):
    global left
    if event in ("tempfile.mkstemp", "open", "os.chmod", "os.rename", "os.remove"):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

sys.addaudithook(hook)
files.atomic_write(path, b"new" * 100_000)
print("done")
"""

HOLDER = """
import os, sys, time
from pathlib import Path
from actstore import files

path = Path(sys.argv[1])
files.lock(os.open(path, os.O_RDWR), path)
print("locked", flush=True)
time.sleep(100)
"""


def killed_at(step: int, path: Path) -> bool:
    """Run until that step; give whether the process was killed there."""
    arguments = [sys.executable, "-c", KILLED_AT, str(path), str(step)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) in ((-signal.SIGKILL, ""), (0, "done\n")), done.stderr
    return done.returncode != 0


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Syncs:
    """Notes what was synced: the inode, and the size and the target's content at that time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.seen: list[tuple[int, int, bytes]] = []
        sync = os.fsync

        def noting(descriptor: int) -> None:
            found = os.fstat(descriptor)
            content = path.read_bytes()[:3] if path.exists() else b""
            size = found.st_size if stat.S_ISREG(found.st_mode) else -1
            self.seen.append((found.st_ino, size, content))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", noting)


# -- atomic_write -------------------------------------------------------------------------------


def test_a_process_killed_at_any_step_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    found = []
    for step in range(20):
        path.write_bytes(OLD)
        killed = killed_at(step, path)
        found.append({OLD: "old", NEW: "new"}[path.read_bytes()])
        if not killed:
            break
    assert not killed
    assert found.count("old") >= 4
    assert found[-2:] == ["new", "new"], "killed once after the renaming, then not at all"
    assert found == sorted(found, reverse=True)


def test_the_content_is_durable_before_its_name_and_the_name_on_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(OLD)
    syncs = Syncs(monkeypatch, path)
    files.atomic_write(path, NEW)
    assert syncs.seen == [
        (path.stat().st_ino, len(NEW), b"old"),
        (tmp_path.stat().st_ino, -1, b"new"),
    ]
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad disk"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", ["fsync", "chmod", "replace"])
def test_whatever_is_raised_on_the_way_the_old_content_stays_alone(
    error: BaseException, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(OLD)

    def failing(*_: Any) -> None:
        raise error

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os if at == "fsync" else Path, at, failing)
        with pytest.raises(type(error)):
            files.atomic_write(path, NEW)
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]
    assert descriptors() == before


def test_what_is_no_content_or_no_place_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(OLD)
    with pytest.raises(TypeError):
        files.atomic_write(path, "text")  # type: ignore[arg-type]
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        files.atomic_write(folder, NEW)
    with pytest.raises(FileNotFoundError):
        files.atomic_write(tmp_path / "missing" / "state.json", NEW)
    assert sorted(tmp_path.iterdir()) == [folder, path]
    assert path.read_bytes() == OLD


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_the_umask_leaves(
    umask: int, mode: int, tmp_path: Path
) -> None:
    path = tmp_path / "state.json"
    before = os.umask(umask)
    try:
        files.atomic_write(path, NEW)
        assert os.umask(umask) == umask, "asking for it did not change it"
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == NEW


# -- write_new, names ---------------------------------------------------------------------------


def test_a_new_file_is_written_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "part"
    syncs = Syncs(monkeypatch, path)
    files.write_new(path, [b"one", memoryview(b"two"), b"", bytearray(NEW)])
    assert path.read_bytes() == b"onetwo" + NEW
    assert syncs.seen == [(path.stat().st_ino, 6 + len(NEW), b"one")]


def test_what_exists_is_not_written_over(tmp_path: Path) -> None:
    path, link = tmp_path / "part", tmp_path / "link"
    path.write_bytes(OLD)
    link.symlink_to(tmp_path / "nowhere")
    for taken in (path, link):
        with pytest.raises(FileExistsError):
            files.write_new(taken, [NEW])
    assert path.read_bytes() == OLD
    assert not (tmp_path / "nowhere").exists()


def test_a_free_name_is_the_first_that_nothing_has(tmp_path: Path) -> None:
    path = tmp_path / "gen.v2.stream"
    assert files.free_name(path) == tmp_path / "gen.v2.1.stream"
    for number in (1, 2, 4):
        (tmp_path / f"gen.v2.{number}.stream").touch()
    assert files.free_name(path) == tmp_path / "gen.v2.3.stream"
    assert not path.exists()


@pytest.mark.parametrize("elsewhere", [True, False])
def test_renaming_makes_both_folders_durable(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "from" / "file"
    source.parent.mkdir()
    source.write_bytes(NEW)
    target = (tmp_path if elsewhere else source.parent) / "renamed"
    syncs = Syncs(monkeypatch, target)
    files.replace(source, target)
    assert target.read_bytes() == NEW
    assert not source.exists()
    assert {one[0] for one in syncs.seen} == {
        target.parent.stat().st_ino,
        source.parent.stat().st_ino,
    }
    assert {one[2] for one in syncs.seen} == {b"new"}, "after the renaming"


# -- fsync --------------------------------------------------------------------------------------


def test_a_file_or_a_folder_is_synced_and_closed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(NEW)
    syncs, before = Syncs(monkeypatch, path), descriptors()
    files.fsync_file(path)
    files.fsync_folder(tmp_path)
    assert [one[:2] for one in syncs.seen] == [
        (path.stat().st_ino, len(NEW)),
        (tmp_path.stat().st_ino, -1),
    ]
    assert descriptors() == before
    with pytest.raises(FileNotFoundError):
        files.fsync_file(tmp_path / "none")
    with pytest.raises(NotADirectoryError):
        files.fsync_folder(path)


@pytest.mark.parametrize("sync", [files.fsync_file, files.fsync_folder])
def test_a_sync_that_fails_is_told_and_leaves_nothing_open(
    sync: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.EIO, "bad disk")

    path = tmp_path / "file"
    path.touch()
    before = descriptors()
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="bad disk"):
        sync(path if sync is files.fsync_file else tmp_path)
    assert descriptors() == before


# -- lock ---------------------------------------------------------------------------------------


def test_a_lock_excludes_other_descriptions_of_the_file_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    first, second = (os.open(path, os.O_RDWR) for _ in range(2))
    try:
        files.lock(first, path)
        files.lock(first, path)
        with pytest.raises(files.LockedError) as caught:
            files.lock(second, path)
        assert (caught.value.errno, caught.value.filename) == (errno.EWOULDBLOCK, str(path))
        os.close(first)
        files.lock(second, path)
    finally:
        os.close(second)


def test_a_lock_excludes_another_process_until_that_one_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    descriptor = os.open(path, os.O_RDWR)
    arguments = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        try:
            with pytest.raises(files.LockedError, match="another writer holds it"):
                files.lock(descriptor, path)
        finally:
            holder.kill()
    assert holder.returncode == -signal.SIGKILL
    files.lock(descriptor, path)
    os.close(descriptor)


def test_a_lock_file_that_its_holder_removed_is_not_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = files.take(path)
    with pytest.raises(files.LockedError):
        files.take(path)
    late = os.open(path, os.O_RDWR)
    path.unlink()
    os.close(first)
    files.lock(late, path)  # of a file that has no name: no one else's business
    second = files.take(path)
    with pytest.raises(files.LockedError):
        files.take(path)
    os.close(late)
    os.close(second)


# -- what is given as a path ----------------------------------------------------------------------


def analyze(path: Any) -> object:
    config = actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR)
    return actstore.InstrumentationFramework(config).analyze_activations(path)


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    return decoder_log(tmp_path / "torn.stream", steps=1, finish=False).path


READERS = {
    "open_stream": actstore.open_stream,
    "recover": actstore.recover,
    "packet_table": actstore.packet_table,
    "analyze_activations": analyze,
    "open_dataset": actstore.open_dataset,
    "verify": actstore.verify,
    "append": lambda path: actstore.append(path, path),
    "compact": lambda path: actstore.compact(path, "never.zarr"),
}
by_reader = pytest.mark.parametrize("ask", READERS.values(), ids=READERS)


@by_reader
@pytest.mark.parametrize("given", [None, 3, b"a.stream", "a\0.stream"])
def test_what_is_no_path_is_refused(ask: Callable[[Any], object], given: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(given))):
        ask(given)


@by_reader
def test_what_is_no_file_is_missing(
    ask: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    for path in ("none", "file/below"):
        with pytest.raises(MissingFileError, match=path):
            ask(path)


@by_reader
def test_what_may_not_be_read_is_told(
    ask: Callable[[Any], object], torn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(torn.parent)
    with contextlib.suppress(ActstoreError):
        ask(torn)  # imports what it needs while that may be read
    shutil.rmtree("never.zarr", ignore_errors=True)
    torn.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=r"can't be read: .*Permission denied"):
            ask(torn)
    finally:
        os.seteuid(user)


def test_recovering_into_no_folder_is_refused(torn: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        actstore.recover(torn, torn.parent / "none" / "whole.stream")
    with pytest.raises(ConfigError, match="must be a str or a path"):
        actstore.recover(torn, 3)  # type: ignore[arg-type]
    assert [one.name for one in torn.parent.iterdir()] == [torn.name]
