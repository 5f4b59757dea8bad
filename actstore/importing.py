"""Owns making an archive of one file again: the very archive that was exported.

The metadata is written as the file has it, and shards are encoded as compaction encodes them; so
the archive is the same to the last byte, where the same library encodes. What is finished of it is
kept by the journal, as that of a compaction.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore import codecs, files, hdf5, machine
from actstore.archive import shards, store, zipped
from actstore.archive.checks import ArchiveCheck
from actstore.archive.jobs import Written
from actstore.archive.journal import Journal
from actstore.archive.root import metadata_crc, read_root
from actstore.archive.zipped import ZipPath
from actstore.arguments import check_callable, check_memory, count_fitting
from actstore.buckets import local, local_target
from actstore.compaction import Pathlike, Progress
from actstore.errors import ActstoreError, ArchiveError, FormatError

if TYPE_CHECKING:
    from actstore.hdf5.mirror import Array
    from actstore.hdf5.reading import Hdf5Archive

__all__ = ["ImportReport", "import_archive"]

_BESIDE: Final = 64 << 20
_PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import made.

    Attributes
    ----------
    path : Path
        The archive.
    arrays : int
        How many arrays are in it, labels included.
    stored_bytes : int
        Of its files.
    chunks : int
        Chunks whose checksums were compared when all was written.
    resumed : int
        Files that an earlier import, which was cut short, had finished.
    seconds : float
        What it took.
    """

    path: Path
    arrays: int
    stored_bytes: int
    chunks: int
    resumed: int
    seconds: float


def import_archive(
    source: Pathlike,
    target: Pathlike,
    *,
    max_memory_gb: float = 1.0,
    progress: Progress | None = None,
) -> ImportReport:
    """Make an archive of an ``.h5`` or a ``.zarr.zip`` that `export` made.

    Parameters
    ----------
    source : path
        The file. It may come from anyone: what has another form than `export` gives is refused,
        nothing is written but in the archive's folder, and no more than the file declares.
    target : path
        The archive, a folder that must not exist; by custom ``name.zarr``.
    max_memory_gb : float
        GB of memory, over what the process had: fewer threads work where it allows no more.
    progress : callable, optional
        Called with the bytes that are done and those that there are.

    Returns
    -------
    ImportReport
        What was made: the same archive, with the same profile.

    Raises
    ------
    ConfigError
        An argument can't be honoured, a shard needs more memory, or h5py is missing.
    ArchiveError
        ``target`` exists or can't be written, or the file is damaged.
    MissingFileError, FormatError, UnsupportedVersionError
        There is no file; it is none of actstore's; it is one of a later version.
    """
    began = time.monotonic()
    check_memory(max_memory_gb)
    check_callable("progress", progress)
    place, folder = local(source, "import_archive"), local_target(target, "import_archive")
    files.check_new(folder)
    kind = _import_zip if place.is_file() and zipped.is_zip(place) else _import_hdf5
    if place.is_dir() or (kind is _import_hdf5 and not hdf5.is_hdf5(place)):
        msg = f"{place} is neither an .h5 nor a .zarr.zip: wanted what actstore.export made"
        raise FormatError(msg)
    try:
        arrays, chunks, nbytes, resumed = kind(place, folder, max_memory_gb, progress or _quiet)
    except OSError as error:
        if isinstance(error, ActstoreError):
            raise
        msg = f"{folder} could not be made of {place}: {error}; make room and do it again to go on"
        raise ArchiveError(msg) from error
    return ImportReport(folder, arrays, nbytes, chunks, resumed, time.monotonic() - began)


def _quiet(_done: int, _total: int) -> Any:
    """Tell nobody."""


def _making(kind: str, place: Path, data: bytes) -> str:
    said = place.stat()
    return f"{kind} {said.st_size} {said.st_mtime_ns} {hashlib.sha256(data).hexdigest()}"


def _finished(journal: Journal, place: Path) -> tuple[int, int, int]:
    """Check the archive that was made, and give it its name."""
    check = ArchiveCheck(journal.folder)
    for one in check.findings():
        msg = f"{place} makes no intact archive: {one.where}: {one.reason}"
        raise ArchiveError(msg)
    for path in sorted(journal.folder.rglob("*")):
        (files.fsync_folder if path.is_dir() else files.fsync_file)(path)
    journal.finish()
    return check.checked["arrays"], check.checked["chunks"], check.nbytes


# -- a zip --------------------------------------------------------------------------------------


def _import_zip(
    place: Path, folder: Path, _gigabytes: float, progress: Progress
) -> tuple[int, int, int, int]:
    archive = ZipPath(place.absolute())
    members = archive.members
    root = read_root(archive)
    try:
        odd = next(zipped.unexpected(root, members), None)
    except (AttributeError, KeyError, TypeError) as error:
        msg = f"{place}: its metadata describe no archive: {error!r:.200}"
        raise FormatError(msg) from error
    if odd is not None:
        msg = f"{place} has a member {odd!r:.200} that is no part of its archive"
        raise FormatError(msg)
    total, done = sum(one.size for one in members.values()), 0
    making = _making("unzip", place, (archive / "zarr.json").read_bytes())
    with Journal(folder, making, "") as journal:
        resumed = len(journal.done)
        for name, member in members.items():
            if name not in journal.done:
                _unpack(archive / name, journal.folder / name)
                journal.add(name, Written({name: member.size}))
            done += member.size
            progress(done, total)
        arrays, chunks, nbytes = _finished(journal, place)
    return arrays, chunks, nbytes, resumed


def _unpack(source: ZipPath, target: Path) -> None:
    """Copy a member into a new file, in a folder that only we write to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    with source.open() as file, target.open("xb") as out:
        while piece := file.read(_PIECE):
            out.write(piece)
        out.flush()
        files.fsync(out.fileno())
    if not source.is_intact():
        msg = f"{source} is damaged: its bytes don't match their CRC-32"
        raise ArchiveError(msg)


# -- HDF5 ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Shard:
    """A shard to make: its place in the grid, and the chunks of HDF5 that it has, by number."""

    array: Array
    place: tuple[int, ...]
    count: int
    chunks: Mapping[int, tuple[int, ...]]
    profile: str

    @property
    def file(self) -> str:
        return shards.shard_path(Path(), self.array.name, self.place).as_posix()

    @property
    def memory(self) -> int:
        index = shards.index_bytes(self.count)
        return shards.memory_of(self.count, self.array.chunk_bytes) + 3 * index


def _import_hdf5(
    place: Path, folder: Path, gigabytes: float, progress: Progress
) -> tuple[int, int, int, int]:
    hdf5.check_installed()
    from actstore.hdf5.reading import Hdf5Archive

    with (
        Hdf5Archive(place) as archive,
        Journal(folder, _making("HDF5", place, archive.data), "") as journal,
    ):
        if len(set(metadata_crc(archive.data))) > 1:
            msg = f"{place}: its metadata don't match their checksum; see actstore.verify"
            raise ArchiveError(msg)
        resumed = len(journal.done)
        others, mine = _sorted(archive)
        jobs = [shard for array in mine for shard in _shards(archive, array)]
        total = sum(len(one.chunks) * one.array.chunk_bytes for one in jobs)
        _make_shards(archive, journal, jobs, gigabytes, lambda done: progress(done, total))
        _write_nodes(archive.root, journal.folder)
        for array in others:
            _write_other(archive, journal.folder, array)
        files.write_new(journal.folder / "zarr.json", [archive.data])
        arrays, chunks, nbytes = _finished(journal, place)
    return arrays, chunks, nbytes, resumed


def _sorted(archive: Hdf5Archive) -> tuple[list[Array], list[Array]]:
    """Tell the arrays whose shards we encode from all others."""
    others: list[Array] = []
    mine: list[Array] = []
    for name, array in archive.arrays.items():
        archive.stored(name)  # refused before anything is written
        (others if _profile(archive.root, array) is None else mine).append(array)
    return others, mine


def _profile(root: Mapping[str, Any], array: Array) -> str | None:
    """Give the profile that an array's codecs are; None where they are none that we encode."""
    if not array.sharded or array.cut() != array.chunk:
        return None
    said = root["attributes"].get("profile")
    for name in sorted(shards.PROFILES, key=lambda one: (one != said, one)):
        if array.said["codecs"] == shards.codec_metadata(array.chunk, array.dtype, name):
            return name
    return None


def _shards(archive: Hdf5Archive, array: Array) -> Iterator[_Shard]:
    """Give the shards of an array that hold a chunk."""
    stored, profile = archive.stored(array.name), _profile(archive.root, array)
    per = tuple(whole // part for whole, part in zip(array.shard, array.chunk, strict=True))
    found: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = {}
    for place in archive.places(stored):
        shard = tuple(at // count for at, count in zip(place, per, strict=True))
        inside = [at % count for at, count in zip(place, per, strict=True)]
        number = int(np.ravel_multi_index(inside, per))
        found.setdefault(shard, {})[number] = place
    for shard, chunks in sorted(found.items()):
        yield _Shard(array, shard, math.prod(per), dict(sorted(chunks.items())), profile or "")


def _make_shards(
    archive: Hdf5Archive,
    journal: Journal,
    jobs: list[_Shard],
    max_memory_gb: float,
    progress: Callable[[int], Any],
) -> None:
    needed = max((one.memory for one in jobs), default=1)
    threads = count_fitting("shard", needed, max_memory_gb, _BESIDE)
    done = 0
    pool = ThreadPoolExecutor(min(machine.cores(), threads), "actstore-import")
    try:
        running = {
            pool.submit(_make_shard, archive, journal, one): one
            for one in jobs
            if one.file not in journal.done
        }
        for future in as_completed(running):
            future.result()
            one = running[future]
            done += len(one.chunks) * one.array.chunk_bytes
            progress(done)
    finally:
        pool.shutdown(cancel_futures=True)


def _make_shard(archive: Hdf5Archive, journal: Journal, shard: _Shard) -> None:
    array, stored = shard.array, archive.stored(shard.array.name)
    axis = int(array.dims[0] == "layer")

    def read() -> Iterator[tuple[int, NDArray[Any]]]:
        for number, place in shard.chunks.items():
            chunk = archive.chunk(stored, place)
            if chunk is not None:
                yield number, chunk.view(array.dtype).reshape(array.chunk[axis:])

    room = shards.room(array.chunk_bytes, len(shard.chunks), shard.count)
    out = codecs.scratch("shard", room)
    try:
        encoded = shards.encode_shard(
            read(), array.chunk[axis], shard.count, array.fill, shard.profile, out
        )
        nbytes = shards.write_shard(journal.folder / shard.file, encoded)
    except shards.MismatchError as error:
        msg = f"{shard.file} doesn't read back as {archive.path} has it: check the disk"
        raise ArchiveError(msg) from error
    journal.add(shard.file, Written({shard.file: nbytes}))


def _write_nodes(root: Mapping[str, Any], folder: Path) -> None:
    for name, said in root["consolidated_metadata"]["metadata"].items():
        store.write_metadata(folder, name, said)


def _write_other(archive: Hdf5Archive, folder: Path, array: Array) -> None:
    """Write an array by zarr-python, in whole chunks; of a sharded one those shards that are."""
    if array.is_text:
        whole = tuple(map(slice, array.shape))
        store.write_part(folder, array.name, whole, archive.text(array.name))
        return
    places = [one.place for one in _shards(archive, array)] if array.sharded else array.places()
    for place in places if array.nbytes else ():
        part = tuple(
            slice(at * step, min((at + 1) * step, length))
            for at, step, length in zip(place, array.shard, array.shape, strict=True)
        )
        store.write_part(folder, array.name, part, archive.part(array.name, part))
