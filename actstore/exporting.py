"""Owns making one file of an archive or a log: an HDF5 file, or a zip that is read in place.

How an archive is mirrored into HDF5, ``hdf5`` knows; how it lies in a zip, ``archive.zipped``. A
log is compacted first. A file has its name when all of it is on the disk and was read back.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from actstore import files, hdf5
from actstore.archive import zipped
from actstore.archive.checks import ArchiveCheck
from actstore.archive.root import read_root
from actstore.archive.zipped import Place, ZipPath
from actstore.arguments import check_callable, check_memory
from actstore.buckets import local, local_target
from actstore.compaction import Pathlike, Progress, compact
from actstore.errors import ArchiveError, ConfigError, FormatError
from actstore.stream.legacy import is_legacy
from actstore.stream.resume import is_log

__all__ = ["SUFFIXES", "ExportReport", "export", "target_of"]

#: How the name of a file ends -> what it is.
SUFFIXES: Final = {".h5": "HDF5", ".hdf5": "HDF5", ".zarr.zip": "zip"}


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export made.

    Attributes
    ----------
    path : Path
        The file.
    kind : {"HDF5", "zip"}
        What it is.
    arrays : int
        How many arrays are in it, labels included.
    raw_bytes, stored_bytes : int
        Of the arrays' values that are there, as the archive has them (of a zip: of its members),
        and of the file.
    verified : int
        Chunks of an HDF5 file, or members of a zip, that were read back and compared.
    seconds : float
        What it took.
    """

    path: Path
    kind: str
    arrays: int
    raw_bytes: int
    stored_bytes: int
    verified: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Raw bytes over stored bytes."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0


class _Made(NamedTuple):
    """What was made: arrays, bytes of values, and what was read back."""

    arrays: int
    raw_bytes: int
    verified: int


def export(
    source: Pathlike,
    target: Pathlike,
    *,
    compression: str | None = None,
    max_memory_gb: float = 1.0,
    progress: Progress | None = None,
) -> ExportReport:
    """Make one file of an archive or a log: ``.h5``, or ``.zarr.zip``.

    An ``.h5`` has the archive's arrays, names, dimensions and attributes, for whatever reads HDF5
    or netCDF-4. A ``.zarr.zip`` is the archive itself, as one file, for whatever reads Zarr. Both
    are opened by `open_dataset` in place, and made an archive again by `import_archive`.

    Parameters
    ----------
    source : path
        An archive's folder, a ``.zarr.zip`` (to ``.h5``), or a ``.stream`` log, which is compacted
        into a temporary archive beside the target first.
    target : path
        A file that must not exist; its name ends in ``.h5``, ``.hdf5`` or ``.zarr.zip``.
    compression : {"gzip", "zstd", "none"}, optional
        Of an HDF5 file's chunks: ``"gzip"`` where nothing is said, which every HDF5 reads;
        ``"zstd"`` is a little smaller and several times faster, and needs the plugin 32015
        (``hdf5plugin``) elsewhere, not in actstore. A zip has the archive's chunks as they are.
    max_memory_gb : float
        GB of memory, over what the process had.
    progress : callable, optional
        Called with the bytes that are done and those that there are, of a zip twice: it is
        written, and read back.

    Returns
    -------
    ExportReport
        What was made.

    Raises
    ------
    ConfigError
        An argument can't be honoured, a chunk needs more memory, or h5py is missing.
    ArchiveError
        ``target`` exists or can't be written, or what was written doesn't read back.
    MissingFileError, FormatError, StreamCorruptError
        As for `open_dataset`.
    """
    began = time.monotonic()
    check_memory(max_memory_gb)
    check_callable("progress", progress)
    target, kind = target_of(target)
    if kind == "HDF5":
        hdf5.check_installed()
    compression = _check_compression(compression, kind)
    place = local(source, "export")
    files.check_new(target)
    with (
        files.writing(target),
        _archive(place, target, max_memory_gb) as archive,
        _partial(target) as partial,
    ):
        make = _hdf5 if kind == "HDF5" else _zip
        made = make(archive, partial, compression, max_memory_gb, progress or _quiet)
    size = target.stat().st_size
    return ExportReport(target, kind, made.arrays, made.raw_bytes, size, made.verified,
                        time.monotonic() - began)  # fmt: skip


def target_of(given: Pathlike) -> tuple[Path, str]:
    """Give a path and what is there by its name; raise a `ConfigError` where that is nothing."""
    target = local_target(given, "export")
    for suffix, kind in SUFFIXES.items():
        if target.name.lower().endswith(suffix):
            return target, kind
    msg = f"wanted a name that ends in {', '.join(SUFFIXES)}; got {target.name!r}"
    raise ConfigError(msg)


def _check_compression(given: str | None, kind: str) -> str:
    if kind == "zip":
        if given is not None:
            msg = "a zip has the archive's chunks as they are: compression is for .h5"
            raise ConfigError(msg)
        return ""
    from actstore.hdf5 import chunks

    return chunks.check_compression("gzip" if given is None else given)


@contextmanager
def _archive(place: Path, target: Path, gigabytes: float) -> Iterator[Place]:
    """Give the archive to export: of a log one that is made, and removed whatever happens."""
    if place.is_dir():
        read_root(place)
        yield place
        return
    if zipped.is_zip(place) and target_of(target)[1] == "HDF5":
        found = ZipPath(place)
        read_root(found)
        yield found
        return
    if not (is_log(place) or is_legacy(place)):
        msg = (
            f"{place} can't be exported to {target.name}: wanted an archive's folder or a .stream "
            "log; make one of an .h5 or .zarr.zip by import_archive"
        )
        raise FormatError(msg)
    folder = target.with_name(f".{target.name}.source")
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    try:
        folder.mkdir()
        yield compact(place, folder / "run.zarr", max_memory_gb=gigabytes).path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """Give the file that is written; it becomes the target, or is removed where that fails."""
    partial = target.with_name(f".{target.name}.partial")
    with _held(partial, target):
        try:
            yield partial
            files.fsync_file(partial)
            files.check_new(target)
            files.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def _held(partial: Path, target: Path) -> Iterator[None]:
    """Hold the lock of an empty file."""
    with partial.open("ab") as file:
        try:
            files.lock(file.fileno(), partial)
            mine = partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat())
        except files.LockedError:
            mine = False
        if not mine:  # or it has become the target since it was opened
            msg = f"another export is making {target}; wait for it to end"
            raise ArchiveError(msg)
        file.truncate(0)  # of a call that was killed
        yield


def _hdf5(
    archive: Place, partial: Path, compression: str, gigabytes: float, progress: Progress
) -> _Made:
    from actstore.hdf5.writing import Hdf5Writer

    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(min(done, writer.nbytes), writer.nbytes)

    writer = Hdf5Writer(archive, compression, gigabytes, add)
    writer.write(partial)
    return _Made(len(writer.arrays), writer.raw_bytes, writer.chunks)


def _zip(
    archive: Place, partial: Path, _compression: str, _gigabytes: float, progress: Progress
) -> _Made:
    if not isinstance(archive, Path):
        msg = f"{archive} is zipped already"
        raise ConfigError(msg)
    names = zipped.member_names(archive)
    total = 2 * sum((archive / name).stat().st_size for name in names)
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    with partial.open("r+b") as file:
        zipped.pack(archive, file, add)
    made = ZipPath(partial)
    if list(made.members) != names:
        raise _unverified("the zip's directory")
    for name in names:
        if not (made / name).is_intact():
            raise _unverified(name)
        add(made.members[name].size)
    check = ArchiveCheck(made)
    for one in check.findings():
        raise _unverified(f"{one.where}: {one.reason};")
    return _Made(check.checked["arrays"], total // 2, len(names))


def _unverified(name: str) -> ArchiveError:
    msg = (
        f"{name} doesn't read back as an intact archive has it: see whether actstore.verify finds "
        "the archive to be one, check the disk, and export again"
    )
    return ArchiveError(msg)


def _quiet(_done: int, _total: int) -> Any:
    """Tell nobody."""
