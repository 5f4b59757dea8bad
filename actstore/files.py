"""Owns how files appear, lock and become durable; leaves what is in them to others."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from actstore.errors import ActstoreError, ArchiveError, ConfigError, MissingFileError

__all__ = [
    "LockedError",
    "appearing",
    "atomic_write",
    "check_new",
    "closed",
    "exchange",
    "existing",
    "fdatasync",
    "free_name",
    "fsync",
    "fsync_file",
    "fsync_folder",
    "is_locked",
    "link_or_copy",
    "lock",
    "path_of",
    "replace",
    "sha256",
    "take",
    "unreadable",
    "write_new",
    "writing",
]


_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class LockedError(OSError):
    """Another process holds the lock."""


def fsync(descriptor: int) -> None:
    """Make an open file durable."""
    if not _flushed(descriptor):
        os.fsync(descriptor)


def fdatasync(descriptor: int) -> None:
    """Make the content of an open file durable, and its size."""
    if not _flushed(descriptor):
        getattr(os, "fdatasync", os.fsync)(descriptor)


def _flushed(descriptor: int) -> bool:
    """Make a file durable as macOS does, whose fsync leaves it in the drive; False elsewhere."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        return False
    try:
        fcntl.fcntl(descriptor, full)
    except OSError:  # not every file system has it
        return False
    return True


def fsync_file(path: Path) -> None:
    """Make a file's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, also after a power cut."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    fsync_folder(path.parent)


def write_new(path: Path, buffers: Sequence[Any]) -> None:
    """Write a file that must not exist, durably; its folder is for the caller to sync."""
    with path.open("xb") as file:
        file.writelines(buffers)
        file.flush()
        fsync(file.fileno())


def replace(source: Path, target: Path) -> None:
    """Rename within a file system, durably."""
    source.rename(target)
    fsync_folder(target.parent)
    if source.parent != target.parent:
        fsync_folder(source.parent)


def link_or_copy(source: Path, target: Path) -> int:
    """Let a file have a second name, or copy it where that can't be; give its bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)
        fsync_file(target)
    return target.stat().st_size


def exchange(one: Path, other: Path) -> None:
    """Let two folders have each other's names, durably: at once, where the system can.

    Elsewhere ``other`` has no name for a moment.
    """
    if not _exchanged(one, other):
        aside = free_name(one)
        other.rename(aside)
        one.rename(other)
        aside.rename(one)
    fsync_folder(other.parent)
    fsync_folder(one.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders have each other's names at once; False where the system can't."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux has it
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if not call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def free_name(path: Path) -> Path:
    """Give the first of ``stem.1.suffix``, ``stem.2.suffix``, … that does not exist."""
    return next(name for name in _numbered(path) if not name.exists())


def lock(descriptor: int, path: Path) -> None:
    """Take the exclusive lock of an open file, or raise at once.

    The lock belongs to the open file description and ends with it, however the process ends.

    Raises
    ------
    LockedError
        Another open file description holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(errno.EWOULDBLOCK, "another writer holds it", str(path)) from None


def take(path: Path) -> int:
    """Open a file that is there only for its lock, made where it isn't, and take the lock.

    Returns
    -------
    int
        The descriptor. Who holds it may unlink the file before closing it: whoever opened it
        meanwhile finds that it has no name, and opens the next.

    Raises
    ------
    LockedError
        Another open file description holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o666)
        try:
            lock(descriptor, path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def existing(path: str | os.PathLike[str], asked: str) -> Path:
    """Give the path of a log or an archive that is there.

    Raises
    ------
    ConfigError
        It is no path, or may not be read.
    MissingFileError
        There is nothing.
    """
    place = path_of(path, f"{asked} wants the path of a log or an archive")
    try:
        os.close(os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except (FileNotFoundError, NotADirectoryError):
        msg = f"nothing at {place}: give the path of a .stream log or of an archive"
        raise MissingFileError(msg) from None
    except OSError as error:
        raise unreadable(place, error) from error
    return place


def unreadable(path: object, error: OSError) -> ConfigError:
    """Give the error of a file that is there, and can't be opened."""
    return ConfigError(f"{path} can't be read: {error}; mend that, or give another path")


def closed(path: Path) -> ConfigError:
    """Give the error of reading a file after whoever opened it has closed it."""
    return ConfigError(f"{path} was closed; read it inside the with, or open it again")


def is_locked(path: Path) -> bool:
    """Whether another open file description holds a file's lock."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lock(descriptor, path)
    except LockedError:
        return True
    finally:
        os.close(descriptor)
    return False


def _numbered(path: Path) -> Iterator[Path]:
    number = 0
    while True:
        number += 1
        yield path.with_name(f"{path.stem}.{number}{path.suffix}")


def _umask() -> int:
    """Give the process's umask; the system call can only be asked by setting it."""
    current = os.umask(0o077)
    os.umask(current)
    return current


@contextlib.contextmanager
def appearing(
    target: Path, *, folder: bool = False, taken: type[ActstoreError] = ConfigError
) -> Iterator[Path]:
    """Give the path of a file or folder that gets its name when the context ends, whole.

    It lies in a hidden folder beside it until then, which is removed in any case. Files of a
    folder are made durable. Raises as `check_new` does, at the beginning and at the end, and as
    `writing`.
    """
    check_new(target, taken)
    with writing(target), _beside(target) as place:
        made = place / target.name
        if folder:
            made.mkdir()
        yield made
        inside = sorted(made.rglob("*")) if folder else [made]
        for path in inside:
            if path.is_file():
                fsync_file(path)
        for path in [made, *inside] if folder else []:
            if path.is_dir():
                fsync_folder(path)
        check_new(target, taken)
        replace(made, target)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Give a hidden folder beside a path, which is removed in the end."""
    place = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Let what the system says while a file or folder is made be an `ArchiveError` that names it.

    Nothing of it may be kept then.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, ActstoreError):
            raise
        msg = f"{target} could not be made: {error}; nothing was kept of it"
        raise ArchiveError(msg) from error


def check_new(target: Path, taken: type[ActstoreError] = ArchiveError) -> None:
    """Refuse a name that something has, or that has no folder.

    Raises
    ------
    ActstoreError
        Of the class ``taken``: something has that name.
    ConfigError
        There is no folder for it.
    """
    if os.path.lexists(target):
        msg = f"{target} exists, and is not overwritten; give another name, or remove it"
        raise taken(msg)
    if not target.parent.is_dir():
        msg = f"there is no folder {str(target.parent)!r} for {target.name!r}; create it"
        raise ConfigError(msg)


def path_of(
    given: str | os.PathLike[str], wanted: str = "a path must be a str or a path object"
) -> Path:
    """Give a path; raise a `ConfigError` where something else is given, or what none can be."""
    try:
        place = Path(given)
    except TypeError:
        msg = f"{wanted}; got {given!r}"
        raise ConfigError(msg) from None
    if "\0" in str(place):
        msg = f"{wanted}, without null characters; got {given!r}"
        raise ConfigError(msg)
    return place


def sha256(path: Path) -> str:
    """Give the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
