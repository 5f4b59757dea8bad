"""Owns telling whether a log or an archive is intact: every checksum of it, whoever wrote it.

Reads all of the file or folder once, and holds no more than a block or a chunk of it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from actstore import codecs, dtypes, hdf5, machine, markup
from actstore.archive import zipped
from actstore.archive.checks import ArchiveCheck
from actstore.archive.root import check_identity, read_root
from actstore.archive.zipped import Place, ZipPath
from actstore.arguments import check_callable
from actstore.buckets import RemotePath, is_remote, place_of
from actstore.compaction import Pathlike, Progress
from actstore.compaction.comparing import differences
from actstore.compaction.logs import paths_of
from actstore.errors import ActstoreWarning, ConfigError, FormatError, StreamCorruptError
from actstore.stream import records
from actstore.stream.legacy import LegacyReader, is_legacy
from actstore.stream.reader import StreamReader
from actstore.stream.records import MAGIC, Block, Commit, Entry, Opcode
from actstore.stream.resume import is_log
from actstore.stream.scan import LogFile, Scan, walk
from actstore.stream.segments import log_file

__all__ = ["Damaged", "Report", "verify"]

_AHEAD: Final = 4  # batches of records whose payloads are read at a time
_SHOWN: Final = 50  # damaged places, in a notebook
_BATCH_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Damaged:
    """A record of a log, or a file or chunk of an archive, that is not as it was written.

    Attributes
    ----------
    where : str
        Of a log the kind of record, or ``"gap"`` for bytes that are no record; of an archive the
        file within it and, of a shard, the number of the inner chunk.
    offset : int
        Where it begins in a log; -1 in an archive.
    reason : str
        What was wanted and what was found.
    """

    where: str
    offset: int
    reason: str

    def __str__(self) -> str:
        place = f"{self.where} at byte {self.offset}" if self.offset >= 0 else self.where
        return f"{place}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Report:
    """What verification found.

    Attributes
    ----------
    path : Path or RemotePath
        What was verified.
    kind : {"log", "archive", "zip", "HDF5", "legacy log"}
        What it is; the last is a log of ``llm-instrumentation``.
    damage : tuple of Damaged
        All that is damaged; empty where everything is intact.
    checked : mapping of str to int
        How much was looked at: of a log the records of each kind and the packets, of an archive
        its arrays, files and chunks.
    bytes : int
        Bytes that were read.
    complete : bool
        Of a log: it was closed cleanly. One that was not is no damage: its writer died, and what
        it committed is intact.
    """

    path: Path | RemotePath
    kind: str
    damage: tuple[Damaged, ...]
    checked: Mapping[str, int]
    bytes: int
    complete: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    def _repr_html_(self) -> str:
        """Give what a notebook shows."""
        told = markup.facts(
            f"{self.kind} {self.path.name}",
            [
                ("intact", self.ok),
                ("closed cleanly", self.complete),
                ("read", markup.bytes_of(self.bytes)),
                *self.checked.items(),
                ("damaged places", len(self.damage)),
            ],
        )
        rows = [
            (one.where, one.offset if one.offset >= 0 else None, one.reason)
            for one in self.damage[:_SHOWN]
        ]
        damage = markup.table("What is damaged", ("where", "byte", "why"), rows)
        return told + (damage if rows else "")


def verify(  # noqa: PLR0911 - one for each container
    path: str | os.PathLike[str],
    *,
    decode: bool = False,
    against: Pathlike | Sequence[Pathlike] | None = None,
    progress: Progress | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Report:
    """Check every checksum of a log or an archive.

    Of a log each record's frame, header and payload is read, without trusting its index; of an
    archive the checksum of every chunk, and whether metadata, files and the rows that must be
    there agree. A log of ``llm-instrumentation`` has no checksums: its packets are decoded, which
    finds some damage and not all; a warning says so.

    Parameters
    ----------
    path : path
        A ``.stream`` log, an archive's folder, or a ``.zarr.zip`` or ``.h5`` of one; or the URL
        of a log or an archive in a bucket, all of which is read.
    decode : bool
        Also decode each block of a log: what a checksum can't tell is a writer that encoded wrong
        bytes. Several times slower.
    against : path or sequence of paths, optional
        Of an archive the logs that it was made of, in their order: every value and label is read
        by zarr-python and compared with theirs. For a shuffled one, the rows of a layer, or of
        some small ones, are put into a temporary folder meanwhile (in ``TMPDIR``).
    progress : callable, optional
        Called with the bytes that are done and those that there are; where an archive is compared
        with logs, again from 0 with those of the values.
    storage_options : mapping, optional
        Of a bucket that the log or archive is in, or that those of ``against`` are in, as for
        `open_dataset`.

    Returns
    -------
    Report
        ``ok``, and all ``damage`` by name or offset.

    Raises
    ------
    MissingFileError
        There is nothing at that path.
    FormatError
        It is neither a log nor an archive.
    UnsupportedVersionError
        It is one of a version that this actstore doesn't know.
    ConfigError
        ``against`` is given for a log, or has no path; or it is a log of ``llm-instrumentation``
        of LZ4 frames, and what decodes them is missing.
    BucketError
        The bucket doesn't answer.
    """
    check_callable("progress", progress)
    mine = storage_options if against is None or is_remote(path) else None  # else of its logs
    place = place_of(path, "verify", mine)
    logs = None if against is None else paths_of(against, "verify", storage_options)
    if isinstance(place, RemotePath):
        if logs is None and not (place / "zarr.json").exists():
            return _verify_log(place, progress, decode=decode)
        return _verify_archive(place, logs, progress)
    if place.is_dir():
        return _verify_archive(place, logs, progress)
    if zipped.is_zip(place):
        return _verify_zip(ZipPath(place), logs, progress)
    if logs is not None:
        msg = f"{place} is no archive: against= compares an archive with the logs it was made of"
        raise ConfigError(msg)
    if is_log(place):
        return _verify_log(place, progress, decode=decode)
    if is_legacy(place):
        return _verify_legacy(place)
    if hdf5.is_hdf5(place):
        return _verify_hdf5(place, progress)
    msg = f"{place} is neither a .stream log nor an archive: a Zarr folder, .zarr.zip or .h5"
    raise FormatError(msg)


def _verify_archive(
    folder: Place, logs: Sequence[Path | RemotePath] | None, progress: Progress | None
) -> Report:
    check_identity(folder)
    check = ArchiveCheck(folder)
    if progress is not None:
        size = zipped.size_of(folder)
        check.progress = lambda done: progress(min(done, size), size)
    found = [Damaged(one.where, -1, one.reason) for one in check.findings()]
    if logs is not None:
        compared = differences(folder, logs, progress=progress)
        found += [Damaged(where, -1, reason) for where, reason in compared]
    path = folder.file if isinstance(folder, ZipPath) else folder
    return Report(path, "archive", tuple(found), dict(check.checked), check.nbytes, complete=True)


def _verify_zip(
    archive: ZipPath, logs: Sequence[Path | RemotePath] | None, progress: Progress | None
) -> Report:
    found, whole = [], True
    for name in archive.members:
        try:
            if not (archive / name).is_intact():
                found.append(Damaged(name, -1, "its bytes don't match the zip's CRC-32 of it"))
        except FormatError as error:  # so that nothing more can be read of it
            found.append(Damaged(name, -1, str(error)))
            whole = False
    checked = {"members": len(archive.members)}
    if not whole:
        size = archive.file.stat().st_size
        return Report(archive.file, "zip", tuple(found), checked, size, complete=True)
    report = _verify_archive(archive, logs, progress)
    if report.ok:  # else the metadata may describe nothing
        odd = zipped.unexpected(read_root(archive), archive.members)
        found += [Damaged(name, -1, "the archive has no such file") for name in odd]
    damage = (*found, *report.damage)
    return replace(report, kind="zip", damage=damage, checked={**report.checked, **checked})


def _verify_hdf5(path: Path, progress: Progress | None) -> Report:
    hdf5.check_installed()
    from actstore.hdf5.checks import Hdf5Check

    check = Hdf5Check(path, progress=progress)
    found = tuple(Damaged(one.where, -1, one.reason) for one in check.findings())
    return Report(path, "HDF5", found, dict(check.checked), path.stat().st_size, complete=True)


def _verify_legacy(path: Path) -> Report:
    warnings.warn(
        f"{path} is a log of llm-instrumentation, which has no checksums: its packets were "
        "decoded, and damage that decodes isn't found; compact it, and keep the archive",
        ActstoreWarning,
        stacklevel=3,
    )
    with LegacyReader(path, errors="skip") as reader:
        for _ in reader.packets():
            pass
        regions = sorted(reader.damage, key=lambda one: one.offset)
        damage = tuple(Damaged("packet", one.offset, one.reason) for one in regions)
        checked = {"packets": reader.packet_count}
        complete = reader.scan.complete
        return Report(path, "legacy log", damage, checked, reader.file_bytes, complete)


def _verify_log(path: Path | RemotePath, progress: Progress | None, *, decode: bool) -> Report:
    try:
        reader = StreamReader(path, errors="skip")
    except StreamCorruptError as error:
        lost = (Damaged("HEADER", error.offset, str(error)),)
        with closing(log_file(path)) as file:
            return Report(path, "log", lost, {}, file.size, complete=False)
    with reader, closing(log_file(path)) as file:
        check = _LogCheck(reader, file, decode, progress)
        found: dict[int, Damaged] = {}
        for one in check.findings():
            found.setdefault(one.offset, one)
        damage = tuple(found[offset] for offset in sorted(found))
        complete = reader.scan.complete and file.whole
        return Report(path, "log", damage, dict(check.checked), file.size, complete)


class _Record(NamedTuple):
    """A record as its frame describes it; of its header, which may be long, a hash."""

    offset: int
    opcode: int
    header: bytes
    payload_length: int
    payload_crc: int

    @classmethod
    def of(cls, entry: Entry) -> _Record:
        header = hashlib.blake2b(entry.header, digest_size=16).digest()
        return cls(entry.offset, entry.opcode, header, entry.payload_length, entry.payload_crc)


@dataclass(slots=True)
class _LogCheck:
    """Walks a log from its first byte on."""

    reader: StreamReader
    file: LogFile
    decode: bool
    progress: Progress | None = None
    checked: Counter[str] = field(default_factory=Counter)

    def findings(self) -> Iterator[Damaged]:
        """Yield what is damaged; the same place perhaps more than once."""
        with ThreadPoolExecutor(machine.cores()) as pool:
            yield from self._of_records(pool)
        yield from self._packets()

    def _of_records(self, pool: ThreadPoolExecutor) -> Iterator[Damaged]:
        """Walk the records; their payloads are read by threads, a few at a time, in order."""
        walked = Scan({}, self.reader.scan.sync)
        group: list[_Record] = []
        waiting: list[Damaged] = []  # counts when a COMMIT follows: before, it is a torn tail
        index: Entry | None = None
        for entry, found in _ahead(pool, self._record, walk(self.file, walked, len(MAGIC))):
            self.checked[_name(entry.opcode)] += 1
            waiting += found
            if self.progress is not None:
                self.progress(entry.end, self.file.size)
            match entry.opcode:
                case Opcode.COMMIT:
                    gaps = bool(walked.damage)
                    waiting += self._directory(entry, group, gaps=gaps)
                    yield from waiting
                    waiting, group = [], []
                case Opcode.INDEX | Opcode.END:
                    index = entry if entry.opcode == Opcode.INDEX else index
                    yield from waiting
                    waiting = []
                case Opcode.PAD | Opcode.HEADER:
                    pass
                case _:
                    group.append(_Record.of(entry))
        yield from (Damaged("gap", one.offset, one.reason) for one in walked.damage)
        yield from self._end(index)

    def _record(self, entry: Entry) -> list[Damaged]:
        """Check a record's payload, and decode a block's where that is asked for."""
        try:
            if entry.opcode != Opcode.BLOCK or not self.decode:
                self.file.check(entry)
            else:
                payload = self.file.payload(entry)
                block = Block.decode(entry.header)
                table: Mapping[str, Any] = self.reader.header["codecs"]
                if str(block.codec) in table:  # else the reader says so
                    codecs.decode(table[str(block.codec)], payload, block.raw_length)
        except FormatError as error:
            return [Damaged(_name(entry.opcode), entry.offset, str(error))]
        return []

    def _directory(self, commit: Entry, group: list[_Record], *, gaps: bool) -> Iterator[Damaged]:
        """Compare a group's directory with its records; where there is a gap, with those left."""
        try:
            start = Commit.decode(commit.header).start
            self.file.check(commit)
            start_of, size = commit.payload_offset, commit.payload_length
            entries = records.read_entries(
                lambda at, length: self.file.read(start_of + at, length), size
            )
            said = [_Record.of(entry) for entry in entries if entry.opcode != Opcode.PAD]
        except FormatError as error:
            yield Damaged("COMMIT", commit.offset, str(error))
            return
        group = [entry for entry in group if entry.offset >= start]
        same = set(group) <= set(said) if gaps else group == said
        if not same:
            reason = "its directory doesn't name the records of its group"
            yield Damaged("COMMIT", commit.offset, reason)

    def _end(self, index: Entry | None) -> Iterator[Damaged]:
        """Tell a damaged end of a closed log from the end of one that was not closed."""
        whole = index is not None and index.end + records.TAIL_SIZE == self.file.size
        if index is not None and whole and not self.reader.scan.complete:
            yield Damaged("END", index.end, "END and the magic behind the INDEX are not intact")

    def _packets(self) -> Iterator[Damaged]:
        """Check what the records mean together: what the reader finds, aliases, and parts."""
        reader, rows = self.reader, self.reader.table
        self.checked["packets"] = reader.packet_count
        _ = reader.passes  # decodes them, and notes what it can't
        yield from (Damaged("record", one.offset, one.reason) for one in reader.damage)
        yield from (Damaged("BLOCK", one.offset, str(one)) for one in reader.alias_faults())
        split = np.flatnonzero((rows.parts > 1) & rows.whole())
        for row in split.tolist():
            last = row + int(rows.parts[row])
            kind = dtypes.from_code(int(rows.dtype[row]))
            size = kind.itemsize * int(np.prod(rows.shapes[int(rows.shape[row])], dtype=np.int64))
            found = int(rows.nbytes[row:last].sum())
            if found != size:
                offset = rows.blocks[int(rows.block[row])].entry.offset
                yield Damaged(
                    "BLOCK", offset, f"its packet's parts have {found} bytes, not {size}"
                )


def _ahead(
    pool: ThreadPoolExecutor,
    check: Callable[[Entry], list[Damaged]],
    entries: Iterator[Entry],
) -> Iterator[tuple[Entry, list[Damaged]]]:
    """Yield each entry and what its check found, while those behind it are being checked."""

    def check_all(mine: list[Entry]) -> deque[tuple[Entry, list[Damaged]]]:
        return deque((entry, check(entry)) for entry in mine)

    def taken() -> Iterator[tuple[Entry, list[Damaged]]]:
        found = pending.popleft().result()
        while found:  # what was looked at is not kept: headers may be long
            yield found.popleft()

    pending: deque[Future[deque[tuple[Entry, list[Damaged]]]]] = deque()
    for mine in _batches(entries):
        pending.append(pool.submit(check_all, mine))
        if len(pending) >= _AHEAD:
            yield from taken()
    while pending:
        yield from taken()


def _batches(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Put entries together that are worth a thread's while."""
    mine: list[Entry] = []
    nbytes = 0
    for entry in entries:
        mine.append(entry)
        nbytes += entry.payload_length + len(entry.header)
        if nbytes >= _BATCH_BYTES:
            yield mine
            mine, nbytes = [], 0
    if mine:
        yield mine


def _name(opcode: int) -> str:
    try:
        return Opcode(opcode).name
    except ValueError:
        return f"opcode {opcode:#04x}"
