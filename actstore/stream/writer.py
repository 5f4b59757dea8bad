"""Owns a growing log: its lock, its offsets, its durability. One thread calls it, in order.

What a group holds, and when it is due, is decided by ``actstore.capture``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from actstore import files
from actstore.errors import ConfigError
from actstore.stream import records
from actstore.stream.direct import PAGE, DirectFile, paged
from actstore.stream.records import Commit, Entry, Frame, Header, Index, Opcode, Record

__all__ = ["CommitPoint", "StreamWriter"]

SYNC_SECONDS: Final = 30.0
SYNC_BYTES: Final = 1 << 30
#: From this payload on, a group is written past the page cache.
DIRECT_BYTES: Final = 1 << 20
_ZEROS: Final = bytes(2 * PAGE)
_IOV_MAX: Final = os.sysconf("SC_IOV_MAX")


@dataclass(frozen=True, slots=True)
class CommitPoint:
    """Where a run stands when a group is closed.

    Attributes
    ----------
    next_seq, next_pass, next_step : int
        The numbers that follow all that were given.
    step_boundary : bool
        No pass began since the last recorded token.
    """

    next_seq: int = 0
    next_pass: int = 0
    next_step: int = 0
    step_boundary: bool = True


class StreamWriter:
    """Append groups to one log.

    Parameters
    ----------
    path : Path
        The log. Entering the context opens or creates it and takes its lock; then call
        ``start`` or ``resume``.
    clock : callable
        Seconds, monotonic; tests inject their own.

    Attributes
    ----------
    offset : int
        Bytes of the log that were written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.offset = 0
        self._clock = clock
        self._descriptor = -1
        self._in_use = threading.Lock()
        self._process = os.getpid()
        self._sync = b""
        self._commits: list[int] = []
        self._synced_at = 0.0
        self._synced_offset = 0
        self._buffered = False  # something since the last sync
        self._direct: DirectFile | None = None
        self._tries_direct = True

    def __enter__(self) -> Self:
        # O_APPEND: if something cuts the file, what follows leaves no hole that hides it
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND
        self._descriptor = os.open(self.path, flags, 0o666)
        try:
            files.lock(self._descriptor, self.path)
        except files.LockedError as error:
            self.abandon()
            msg = (
                f"{self.path} is being written by another capture; wait for it to end, "
                "or give another output_path"
            )
            raise ConfigError(msg) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abandon()

    def start(self, attributes: Mapping[str, Any]) -> None:
        """Begin an empty file: the magic, the HEADER, and a first COMMIT; durable on return."""
        self._sync = os.urandom(16)
        header = Record(Opcode.HEADER, Header(attributes).encode())
        # at once: no power cut leaves the magic of a log without the frame behind it
        self._write([records.MAGIC, header.frame(self._sync)])
        self.append([], CommitPoint())
        self.sync()
        files.fsync_folder(self.path.parent)

    def resume(self, sync: bytes, commits: Sequence[int], offset: int) -> None:
        """Go on after a COMMIT: cut the file at ``offset``, and append there.

        Parameters
        ----------
        sync : bytes
            The file's sync marker.
        commits : sequence of int
            Offsets of the COMMITs that stay.
        offset : int
            The end of the last of them.
        """
        self._sync = sync
        self._commits = list(commits)
        self.offset = offset
        with self._using() as descriptor:
            os.ftruncate(descriptor, offset)
        self.sync()

    def append(self, group: Sequence[Record], point: CommitPoint) -> None:
        """Write a group and its COMMIT.

        Raises
        ------
        OSError
            The file system refuses; the log is readable up to the COMMIT before.
        """
        self._check_file()
        payload = sum(record.payload_length for record in group)
        direct = self._direct_file() if payload >= DIRECT_BYTES else None
        start = self.offset
        if direct is not None:
            self._write(_Layout(start, self._sync).pad().buffers)
            if self._buffered:  # what follows on the disk must not come there before it
                self.sync()
        layout = _Layout(self.offset, self._sync)
        entries = []
        for record in group:
            if direct is not None and any(map(paged, record.payload)):
                layout.pad(record.head_length)
            entries.append(layout.add(record))
        directory = records.encode_entries(entries)
        numbers = (point.next_seq, point.next_pass, point.next_step, point.step_boundary)
        head = Commit(start, *numbers, synced=start <= self._synced_offset)
        commit = Record.of(Opcode.COMMIT, head.encode(), directory)
        if direct is not None:
            layout.pad(commit.head_length + commit.payload_length)
        offset = layout.add(commit).offset
        self._write(layout.buffers, direct)
        self._commits.append(offset)
        late = self._clock() - self._synced_at >= SYNC_SECONDS
        if late or self.offset - self._synced_offset >= SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Return when all that was appended is on the disk, under the log's name.

        Raises
        ------
        OSError
            The disk refuses, or the file was removed or cut meanwhile.
        """
        with self._using() as descriptor:
            files.fdatasync(descriptor)
        self._check_file()
        self._synced_at = self._clock()
        self._synced_offset = self.offset
        self._buffered = False

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the log cleanly: INDEX, END, magic; durable on return."""
        self._check_file()
        index_offset = self.offset
        index = Record.of(Opcode.INDEX, *Index(tuple(self._commits), summary).encode())
        end = Record(Opcode.END, records.encode_end(index_offset))
        self._write(
            [index.frame(self._sync), *index.payload, end.frame(self._sync), records.MAGIC]
        )
        self.sync()
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is; a second call does nothing.

        A call that another thread is in ends first, for its descriptor's number may be another
        file's after that; its next one fails.
        """
        forked = os.getpid() != self._process  # then nobody is, though the lock may say so
        with contextlib.nullcontext() if forked else self._in_use:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                with contextlib.suppress(OSError):  # what matters was synced, or its error raised
                    os.close(descriptor)

    def _check_file(self) -> None:
        """Raise where the file is not what was written, or has no name any more."""
        with self._using() as descriptor:
            found = os.fstat(descriptor)
        if not found.st_nlink:
            reason = "the log was removed or replaced while it was written"
            raise OSError(errno.ENOENT, reason, str(self.path))
        if found.st_size != self.offset:
            reason = f"something else left {found.st_size} of the {self.offset} bytes of the log"
            raise OSError(errno.EIO, reason, str(self.path))

    @contextlib.contextmanager
    def _using(self) -> Iterator[int]:
        """Give the descriptor, which stays open meanwhile; let an error say which file it is."""
        with self._in_use:
            try:
                yield self._descriptor
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _direct_file(self) -> DirectFile | None:
        """Give what writes past the page cache; None where the file system can't."""
        if self._direct is None and self._tries_direct:
            self._tries_direct = False
            with contextlib.suppress(OSError):
                self._direct = DirectFile(self._descriptor)
        return self._direct if self._direct is not None and self._direct.works else None

    def _write(self, buffers: Sequence[Any], direct: DirectFile | None = None) -> None:
        pending = [memoryview(part).cast("B") for part in buffers if len(part)]
        if direct is not None:
            with self._using():
                direct.write(pending)
            self.offset += sum(map(len, pending))
            return
        first = 0
        while first < len(pending):
            with self._using() as descriptor:
                written = os.writev(descriptor, pending[first : first + _IOV_MAX])
            self._buffered = True
            self.offset += written
            while first < len(pending) and written >= len(pending[first]):
                written -= len(pending[first])
                first += 1
            if written:
                pending[first] = pending[first][written:]


class _Layout:
    """Records one behind the other, from an offset of the file on."""

    def __init__(self, offset: int, sync: bytes) -> None:
        self._buffers: list[Any] = []
        self._small: list[Any] = []
        self._at = offset
        self._sync = sync

    @property
    def buffers(self) -> list[Any]:
        """The records' bytes; of small ones in a row joined, for a call is made of each buffer."""
        if self._small:
            self._buffers.append(b"".join(self._small))
            self._small = []
        return self._buffers

    def add(self, record: Record) -> Entry:
        """Put a record behind those before; say where it is."""
        entry = record.entry(self._at)
        self._small.append(record.frame(self._sync))
        if entry.payload_length <= PAGE:
            self._small += record.payload
        else:
            self.buffers.extend(record.payload)
        self._at = entry.end
        return entry

    def pad(self, following: int = 0) -> Self:
        """Fill up, so that what comes that many bytes later begins at a page."""
        gap = -(self._at + following) % PAGE
        if gap:
            gap += PAGE if gap < Frame.SIZE else 0
            self.add(Record.of(Opcode.PAD, b"", _ZEROS[: gap - Frame.SIZE]))
        return self
