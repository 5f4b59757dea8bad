"""Owns finding the records of a log that are to be believed: by its INDEX, or by walking it.

What the records mean together is ``table.py``'s and ``reader.py``'s business.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from actstore import codecs, files
from actstore.errors import (
    FormatError,
    MissingFileError,
    StreamCorruptError,
    UnsupportedVersionError,
)
from actstore.stream import records
from actstore.stream.records import MAGIC, Commit, Entry, Frame, Header, Index, Opcode

__all__ = ["Damage", "Group", "LogFile", "Scan", "scan", "scan_on", "walk"]

_SIGHT: Final = 4096  # bytes read at a record's place: its frame and, mostly, its header
_STRIDE: Final = 1 << 20
_SYNC_SIZE: Final = 16
_SYNC_DISTINCT: Final = 4  # bytes; a random marker has fewer once in 10**24 files
_PIECE: Final = 1 << 20
_local = threading.local()


@dataclass(frozen=True, slots=True)
class Damage:
    """A region of a log that doesn't pass its checks.

    Attributes
    ----------
    offset, length : int
        The bytes of the file.
    reason : str
        What was wanted and what was found.
    """

    offset: int
    length: int
    reason: str


@dataclass(frozen=True, slots=True)
class Group:
    """The records of a group, and the COMMIT that makes them believed, with its payload's CRC."""

    offset: int
    end: int
    commit: Commit
    entries: tuple[Entry, ...]
    crc: int


@dataclass(slots=True)
class Scan:
    """What a log holds, by its frames.

    Attributes
    ----------
    header : mapping
        The HEADER.
    sync : bytes
        The file's sync marker.
    groups : list of Group
        Those that were committed, in order.
    complete : bool
        The log was closed cleanly and nothing is damaged.
    damage : list of Damage
        Regions between intact records that are not intact.
    summary : mapping
        The INDEX's summary; empty in a log that was not closed.
    """

    header: Mapping[str, Any]
    sync: bytes
    groups: list[Group] = field(default_factory=list)
    complete: bool = False
    damage: list[Damage] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)


class LogFile:
    """An open log, read by offset; every length is checked against the file.

    Attributes
    ----------
    path : Path
        The log.
    size : int
        Its bytes.
    whole : bool
        What of it is in a bucket is all of it.
    """

    whole = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._vain = 0  # bytes of headers that were checked, and weren't intact
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            msg = f"no log at {path}: give the path of a .stream file"
            raise MissingFileError(msg) from error
        except PermissionError as error:
            raise files.unreadable(path, error) from error
        found = os.fstat(self._descriptor)
        if stat.S_ISDIR(found.st_mode):
            self.close()
            raise _no_log(path, "a directory")
        self.size = found.st_size

    def __del__(self) -> None:
        if os is not None:  # at the interpreter's exit, modules may be gone
            self.close()

    @property
    def descriptor(self) -> int:
        """The open file's.

        Raises
        ------
        ConfigError
            It was closed.
        """
        if self._descriptor < 0:
            raise files.closed(self.path)
        return self._descriptor

    def grow(self) -> bool:
        """Take in what was appended since; tell whether anything was."""
        before, self.size = self.size, os.fstat(self.descriptor).st_size
        return self.size > before

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes.

        Raises
        ------
        FormatError
            The file ends before.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            msg = f"{length} bytes are wanted at offset {offset}; the file has {self.size}"
            raise FormatError(msg)
        parts = []
        while length:
            part = self._some(min(length, 1 << 30), offset)
            if not part:
                msg = f"the file was cut at offset {offset} while it was read"
                raise FormatError(msg)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def entry(self, offset: int, sync: bytes | None) -> tuple[Entry, bytes]:
        """Read and check a record's frame and header; give them, and its sync marker."""
        sight = self.read(offset, min(_SIGHT, self.size - offset))
        head = Frame.decode(sight)
        if sync is not None and head.sync != sync:
            msg = f"no record begins at offset {offset}"
            raise FormatError(msg)
        if sync is None and not _is_marker(head.sync):
            msg = f"a sync marker is random; found {head.sync!r}"
            raise FormatError(msg)
        if offset + head.length > self.size:
            msg = f"a record of {head.length} bytes at offset {offset} exceeds the file"
            raise FormatError(msg)
        if head.header_length > _SIGHT and self._vain > self.size + records.HEADER_LIMIT:
            msg = f"{self._vain} bytes of headers weren't intact; no long ones are tried any more"
            raise FormatError(msg)
        header = sight[Frame.SIZE : Frame.SIZE + head.header_length]
        if len(header) < head.header_length:
            header = self.read(offset + Frame.SIZE, head.header_length)
        try:
            head.check(header)
        except FormatError:
            self._vain += len(header)
            raise
        return Entry(offset, head.opcode, header, head.payload_length, head.payload_crc), head.sync

    def payload(self, entry: Entry) -> bytes:
        """Read and check a record's payload.

        Raises
        ------
        FormatError
            It is cut or doesn't match its checksum.
        """
        payload = self.read(entry.payload_offset, entry.payload_length)
        _check_crc(records.crc32c(payload), entry)
        return payload

    def check(self, entry: Entry) -> None:
        """Check a record's payload in small pieces, in memory that each thread uses again.

        Raises
        ------
        FormatError
            It is cut or doesn't match its checksum.
        """
        buffer = _piece()
        offset, left, found = entry.payload_offset, entry.payload_length, 0
        while left:
            count = self._into(buffer[:left], offset)
            if not count:
                msg = f"the file was cut at offset {offset} while it was read"
                raise FormatError(msg)
            found = records.crc32c(buffer[:count], found)
            offset += count
            left -= count
        _check_crc(found, entry)

    def _some(self, length: int, offset: int) -> bytes:
        """Read bytes at an offset, perhaps fewer."""
        return os.pread(self.descriptor, length, offset)

    def _into(self, buffer: memoryview, offset: int) -> int:
        """Read bytes at an offset into memory; give how many."""
        return os.preadv(self.descriptor, [buffer], offset)

    def corrupt(self, offset: int, reason: str) -> StreamCorruptError:
        """Make the error of damage at an offset of this file."""
        msg = (
            f"{self.path} is damaged at byte {offset}: {reason}; actstore.open_stream(path, "
            "errors='skip') reads what is intact"
        )
        return StreamCorruptError(msg, path=str(self.path), offset=offset)


def _check_crc(found: int, entry: Entry) -> None:
    if found != entry.payload_crc:
        msg = f"payload CRC-32C is {found:#010x}, wanted {entry.payload_crc:#010x}"
        raise FormatError(msg)


def _piece() -> memoryview:
    """Give this thread's buffer: fresh memory costs more than reading into it."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(bytearray(_PIECE))
    found: memoryview = _local.buffer
    return found


def scan(file: LogFile, *, lenient: bool = False) -> Scan:
    """Find what a log holds: by its INDEX where it was closed, else by walking its frames.

    With ``lenient``, a damaged HEADER costs what it says, and no more.

    Raises
    ------
    FormatError
        The file is no log.
    UnsupportedVersionError
        It is one of another version.
    StreamCorruptError
        Its HEADER is damaged, and not ``lenient`` or nothing intact follows.
    """
    _check_magic(file)
    try:
        return _from_header(file)
    except StreamCorruptError:
        found = _without_header(file, "the HEADER is damaged") if lenient else None
        if found is None:
            raise
        return found


def scan_on(file: LogFile, found: Scan) -> bool:
    """Take in what stands behind the last COMMIT by now, without going through what is before it.

    Returns
    -------
    bool
        False, where what was found is no longer there, or the log was closed: scan it anew.
    """
    if not found.groups:
        return False
    last = found.groups[-1]
    held = next((one for one in reversed(found.groups) if one.entries), last)
    if not (_is_there(file, found.sync, last) and _is_there(file, found.sync, held)):
        return False
    found.damage = [one for one in found.damage if one.offset < last.end]
    _by_walking(file, found, last.end)
    return not found.complete


def _is_there(file: LogFile, sync: bytes, group: Group) -> bool:
    """Whether a group still stands where it did."""
    try:
        entry, _ = file.entry(group.offset, sync)
        same = entry.opcode == Opcode.COMMIT and Commit.decode(entry.header) == group.commit
    except FormatError:
        return False
    return same and entry.payload_crc == group.crc


def _from_header(file: LogFile) -> Scan:
    try:
        first, sync = file.entry(len(MAGIC), None)
        if first.opcode != Opcode.HEADER:
            raise file.corrupt(first.offset, f"opcode {first.opcode}, wanted a HEADER")
        found = Scan(Header.decode(first.header).attributes, sync)
    except StreamCorruptError:
        raise
    except FormatError as error:
        raise file.corrupt(len(MAGIC), f"the HEADER can't be read: {error}") from error
    if not _by_index(file, found):
        _by_walking(file, found, first.end)
    return found


def _without_header(file: LogFile, reason: str) -> Scan | None:
    """Find what follows a damaged HEADER, with the sync marker of its frame or of the END."""
    for place in (len(MAGIC), file.size - records.TAIL_SIZE):
        if not len(MAGIC) <= place <= file.size - _SYNC_SIZE:
            continue
        sync = file.read(place, _SYNC_SIZE)
        if not _is_marker(sync):
            continue
        following = _resynchronise(file, sync, len(MAGIC) + 1)
        if following is not None and following.offset < file.size - records.TAIL_SIZE:
            known = {str(number): entry for number, entry in codecs.CODECS.items()}
            found = Scan({"codecs": known}, sync)
            found.damage.append(Damage(len(MAGIC), following.offset - len(MAGIC), reason))
            _by_walking(file, found, following.offset)
            return found
    return None


def _is_marker(sync: bytes) -> bool:
    """Whether a sync marker is one: of few different bytes, it might begin at each of a hole."""
    return len(set(sync)) >= _SYNC_DISTINCT


def _check_magic(file: LogFile) -> None:
    start = file.read(0, min(len(MAGIC), file.size))
    if start == MAGIC:
        return
    if len(start) == len(MAGIC) and start[:-1] == MAGIC[:-1]:
        msg = (
            f"{file.path} is a log of format version {start[-1]}; this actstore reads version "
            f"{records.VERSION}: install the version that wrote it"
        )
        raise UnsupportedVersionError(msg)
    raise _no_log(file.path, f"a file that begins with {start!r}")


def _no_log(path: Path, found: str) -> FormatError:
    msg = f"{path} is no .stream log: wanted a file that begins with {MAGIC!r}, found {found}"
    return FormatError(msg)


def _by_index(file: LogFile, found: Scan) -> bool:
    """Fill a scan from the INDEX; give False, and leave it empty, where that can't be done."""
    try:
        index = _read_index(file, found.sync)
        groups: list[Group] = []
        for offset in index.commits:
            before = groups[-1].end if groups else 0
            groups.append(_read_group(file, found.sync, offset, before))
    except FormatError:
        return False
    found.groups, found.summary, found.complete = groups, index.summary, True
    return True


def _read_index(file: LogFile, sync: bytes) -> Index:
    tail = file.size - records.TAIL_SIZE
    end, _ = file.entry(tail, sync)
    if end.opcode != Opcode.END or file.read(file.size - len(MAGIC), len(MAGIC)) != MAGIC:
        msg = "the log was not closed"
        raise FormatError(msg)
    entry, _ = file.entry(records.decode_end(end.header), sync)
    if entry.opcode != Opcode.INDEX or entry.end != tail:
        msg = f"END points at opcode {entry.opcode}, wanted the INDEX"
        raise FormatError(msg)
    return Index.decode(entry.header, file.payload(entry))


def _read_group(file: LogFile, sync: bytes, offset: int, before: int) -> Group:
    entry, _ = file.entry(offset, sync)
    if entry.opcode != Opcode.COMMIT:
        msg = f"the INDEX points at opcode {entry.opcode}, wanted a COMMIT"
        raise FormatError(msg)
    commit = Commit.decode(entry.header)
    entries = tuple(records.decode_entries(file.payload(entry)))
    place = max(commit.start, before)
    for one in entries:  # no byte of the file is two records'
        if one.offset < place or one.end > offset:
            msg = f"the directory at offset {offset} points outside of its group, or twice"
            raise FormatError(msg)
        place = one.end
    return Group(offset, entry.end, commit, entries, entry.payload_crc)


def _by_walking(file: LogFile, found: Scan, offset: int) -> None:
    pending: list[Entry] = []
    index: Entry | None = None
    for entry in walk(file, found, offset):
        try:
            match entry.opcode:
                case Opcode.COMMIT:
                    commit, records_ = Commit.decode(entry.header), tuple(pending)
                    group = Group(entry.offset, entry.end, commit, records_, entry.payload_crc)
                    found.groups.append(group)
                    pending = []
                    file.check(entry)
                case Opcode.INDEX:
                    index = entry
                case Opcode.END:
                    _check_end(file, found, index, entry)
                case Opcode.PAD:
                    pass
                case _:
                    pending.append(entry)
        except FormatError as error:
            found.damage.append(Damage(entry.offset, entry.end - entry.offset, str(error)))
    found.complete = found.complete and not found.damage


def _check_end(file: LogFile, found: Scan, index: Entry | None, end: Entry) -> None:
    """Take the INDEX in where an END and the magic close the log behind it."""
    if index is None or index.end != end.offset or file.size - end.end != len(MAGIC):
        return
    if file.read(end.end, len(MAGIC)) != MAGIC:
        return
    found.complete = True
    if records.decode_end(end.header) != index.offset:
        msg = f"END says that the INDEX is at offset {records.decode_end(end.header)}"
        raise FormatError(msg)
    try:
        said = Index.decode(index.header, file.payload(index))
    except FormatError as error:
        found.damage.append(Damage(index.offset, index.end - index.offset, str(error)))
        return
    found.summary = said.summary
    if not found.damage and said.commits != tuple(group.offset for group in found.groups):
        reason = "the INDEX doesn't name the COMMITs that stand before it"
        found.damage.append(Damage(index.offset, index.end - index.offset, reason))


def walk(file: LogFile, found: Scan, offset: int) -> Iterator[Entry]:
    """Yield the intact records from an offset on; what lies between them is damage."""
    while offset < file.size:
        try:
            entry, _ = file.entry(offset, found.sync)
        except FormatError as error:
            following = _resynchronise(file, found.sync, offset + 1)
            if following is None:  # a torn tail, or the magic after END
                if _was_closed(file, offset):
                    found.damage.append(Damage(offset, file.size - offset, str(error)))
                return
            found.damage.append(Damage(offset, following.offset - offset, str(error)))
            entry = following
        yield entry
        offset = entry.end


def _was_closed(file: LogFile, offset: int) -> bool:
    """Whether a log ends with the magic, but something else stands before it."""
    place = file.size - len(MAGIC)
    return offset < place and file.read(place, len(MAGIC)) == MAGIC


def _resynchronise(file: LogFile, sync: bytes, offset: int) -> Entry | None:
    """Find the next place where the sync marker begins a frame that passes its checksum."""
    while offset < file.size:
        length = min(_STRIDE, file.size - offset)
        stretch = file.read(offset, length)
        place = stretch.find(sync)
        while place >= 0:
            try:
                return file.entry(offset + place, sync)[0]
            except FormatError:
                place = stretch.find(sync, place + 1)
        offset += max(length - len(sync) + 1, 1)
    return None
