"""Owns a log's way into a bucket: sealed segments, in order, while it grows or afterwards.

What a segment is, and how they are read as a log, is ``segments.py``'s.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from actstore import files
from actstore.buckets import Bucket, RemotePath, remote
from actstore.errors import (
    ActstoreError,
    BucketError,
    ConfigError,
    FormatError,
    StreamCorruptError,
)
from actstore.stream import records
from actstore.stream.records import MAGIC, Frame, Opcode, Record
from actstore.stream.resume import is_log
from actstore.stream.scan import LogFile, Scan, walk
from actstore.stream.segments import (
    COMPLETE,
    Segment,
    Unfiled,
    check_complete,
    complete_of,
    described,
    segments_of,
)
from actstore.stream.writer import CommitPoint, StreamWriter

__all__ = ["SEGMENT_BYTES", "UploadReport", "UploadedWriter", "spooled", "upload"]

SEGMENT_BYTES: Final = 64 << 20
SEGMENT_SECONDS: Final = 30.0  # after which a smaller one is sealed
SPOOL_BYTES: Final = 1 << 30
#: Bytes at a log's beginning that are never given back: they say what it is.
_KEPT: Final = 64 << 10
_PAGE: Final = 4096
_PUNCH_HOLE: Final = 3  # and keep the size
_POLL_SECONDS: Final = 0.1
_IDLE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class UploadReport:
    """What an upload did.

    Attributes
    ----------
    url : str
        The log in the bucket.
    segments, bytes : int
        What is there of it now.
    sent : int
        Segments that this call uploaded.
    complete : bool
        The log was closed, and all of it is there.
    """

    url: str
    segments: int
    bytes: int
    sent: int
    complete: bool


class _Sender:
    """Uploads ranges of a log's bytes as its segments, one after the other."""

    def __init__(self, path: Path, bucket: Bucket) -> None:
        self._path = path
        self.bucket = bucket
        self.segments = segments_of(bucket)
        self._crcs: dict[int, int] = {}

    @property
    def end(self) -> int:
        """The bytes of the log that are in the bucket."""
        return self.segments[-1].end if self.segments else 0

    def send(self, descriptor: int, end: int) -> None:
        """Upload what stands between what is there and an offset."""
        segment = Segment(self.end, end - self.end)
        data = bytearray(segment.size)
        view, at = memoryview(data), 0
        while at < segment.size:
            count = os.preadv(descriptor, [view[at:]], segment.start + at)
            if not count:
                msg = f"{self._path} was cut at byte {segment.start + at} before it was uploaded"
                raise FormatError(msg)
            at += count
        self._crcs[segment.start] = records.crc32c(data)
        try:
            self.bucket.put(segment.name, data, new=True)
        except FileExistsError:
            msg = (
                f"{self.bucket.url}/{segment.name} holds other bytes than {self._path}: "
                "something else uploads a log to this URL; give another one"
            )
            raise ConfigError(msg) from None
        self.segments.append(segment)

    def confirm(self, file: LogFile, sync: bytes, said: Mapping[str, Any] | None) -> None:
        """Find that what uploads before this one sent is in the bucket as it is here.

        Where its bytes were given back, that its records are intact. All as ``complete.json``
        says, where there is one.
        """
        told = said["segments"] if said is not None else []
        wanted = {one["start"]: one.get("crc32c") for one in told}
        for one in self.segments:
            if one.start not in self._crcs:
                there = self.bucket.get(one.name)
                if _is_here(file, one):
                    same = there == file.read(one.start, one.size)
                else:
                    same = _Held(there).is_intact(sync, one.start)
                crc = records.crc32c(there)
                if not same or wanted.get(one.start, f"{crc:08x}") != f"{crc:08x}":
                    msg = (
                        f"{self.bucket.url}/{one.name} is damaged, or has other bytes than "
                        f"{file.path}, which is kept: remove that object and those behind it, and "
                        "the same call uploads them again"
                    )
                    raise StreamCorruptError(msg, path=self.bucket.url, offset=one.start)
                self._crcs[one.start] = crc

    def complete(self) -> None:
        """Say that the log is whole, of which all is sent or confirmed."""
        crcs = [self._crcs[one.start] for one in self.segments]
        try:
            said = described(self.segments, crcs, Path(self.bucket.url).name)
            self.bucket.put(COMPLETE, said, new=True)
        except FileExistsError:
            msg = f"{self.bucket.url}/{COMPLETE} tells of another log; give another URL"
            raise ConfigError(msg) from None


# -- while it is written ------------------------------------------------------------------------


class UploadedWriter(StreamWriter):
    """Append groups to a log that is uploaded meanwhile; what is uploaded is given back here.

    Parameters
    ----------
    path : Path
        The log on this machine: the spool.
    bucket : Bucket
        Where it goes.
    spool_bytes : int
        What may wait for its upload; the writer waits where there is more.
    segment_bytes : int
        Where a segment is sealed; the group that reaches it is in it.
    clock : callable
        Seconds, monotonic; tests inject their own.

    Attributes
    ----------
    waited_seconds : float
        How long the writer waited for the bucket.
    """

    def __init__(
        self,
        path: Path,
        bucket: Bucket,
        *,
        spool_bytes: int = SPOOL_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(path, clock)
        self.waited_seconds = 0.0
        self._bucket = bucket
        self._spool_bytes = spool_bytes
        self._segment_bytes = max(min(segment_bytes, spool_bytes // 4), 1)
        self._sender = _Sender(path, bucket)
        if self._sender.segments or complete_of(bucket) is not None:
            msg = (
                f"{bucket.url} holds a log, which is never overwritten: give another URL; the "
                "rest of a killed capture's is uploaded by actstore.upload(spool, url)"
            )
            raise ConfigError(msg)
        self._changed = threading.Condition()
        self._committed = self._given_back = 0
        self._ends: deque[int] = deque()  # of the groups that aren't in the bucket yet
        self._finishing = self._closing = self._stopped = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="actstore-upload", daemon=True)

    def start(self, attributes: Mapping[str, Any]) -> None:
        """Begin an empty file, and its upload; see `StreamWriter.start`."""
        super().start(attributes)
        self._thread.start()

    def append(self, group: Sequence[Record], point: CommitPoint) -> None:
        """Write a group and its COMMIT; wait where the bucket is slower.

        Raises
        ------
        OSError
            The file system refuses.
        BucketError
            The bucket doesn't take what was written before; it is in the spool.
        """
        super().append(group, point)
        began = self._clock()
        with self._changed:
            self._ends.append(self.offset)
            self._committed = self.offset
            self._changed.notify_all()
            while self._failure is None and self._is_full():
                self._changed.wait()
        self.waited_seconds += self._clock() - began
        self._check_upload()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the log, and upload the rest of it; then it is in the bucket only.

        Raises
        ------
        OSError
            The file system refuses.
        BucketError
            The bucket doesn't take it; it is in the spool.
        """
        self._finishing = True  # closing the file doesn't end the upload
        try:
            super().finish(summary)
        finally:
            self._finishing = False
        with self._changed:
            self._committed = self.offset
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._check_upload()
        self.path.unlink()

    def abandon(self) -> None:
        """Close the file as it is, and upload no more; a second call does nothing."""
        super().abandon()
        if os.getpid() == self._process and not (self._finishing or self._closing):
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            if self._thread.ident is not None and self._thread is not threading.current_thread():
                self._thread.join()

    def _is_full(self) -> bool:
        return self._committed - self._given_back > self._spool_bytes and self._thread.is_alive()

    def _check_upload(self) -> None:
        if self._failure is not None:
            msg = (
                f"{self._failure}; nothing is lost: what is not in the bucket is in {self.path}, "
                f"and actstore.upload({str(self.path)!r}, {self._bucket.url!r}) uploads it"
            )
            raise BucketError(msg) from self._failure

    def _run(self) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                while (end := self._due()) is not None:
                    self._sender.send(descriptor, end)
                    given_back = _give_back(descriptor, self._given_back, end)
                    with self._changed:
                        self._given_back = given_back
                        self._changed.notify_all()
                if not self._stopped:
                    self._sender.complete()
            finally:
                os.close(descriptor)
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _due(self) -> int | None:
        """Wait for what is to be a segment; give its end, None where nothing more comes."""
        with self._changed:
            sealed = self._sender.end
            while self._ends and self._ends[0] <= sealed:
                self._ends.popleft()
            began = self._clock()
            while not self._stopped:
                full = (end for end in self._ends if end - sealed >= self._segment_bytes)
                if (end := next(full, None)) is not None:
                    return end
                waiting = self._committed > sealed
                if self._closing:
                    return self._committed if waiting else None
                left = SEGMENT_SECONDS - (self._clock() - began)
                if left <= 0 and waiting:
                    return self._committed
                self._changed.wait(max(left, _POLL_SECONDS))
            return None


def _give_back(descriptor: int, start: int, end: int) -> int:
    """Let the disk have the pages of a file up to an offset again; give where that ends."""
    first, last = max(start, _KEPT) // _PAGE * _PAGE, end // _PAGE * _PAGE
    if last > first:
        libc = ctypes.CDLL(None, use_errno=True)
        call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
        if call is None:
            raise OSError(errno.ENOTSUP, "the spool can't be given back: fallocate is Linux's")
        sizes = ctypes.c_int64(first), ctypes.c_int64(last - first)
        if call(descriptor, _PUNCH_HOLE, *sizes):
            number = ctypes.get_errno()
            raise OSError(number, f"the spool can't be given back: {os.strerror(number)}")
    return end


def spooled(where: RemotePath, spool: str | os.PathLike[str] | None) -> Path:
    """Give the file that a log's bytes wait in for their upload to a URL.

    Raises
    ------
    ConfigError
        There is no such folder; or it holds what a capture before left, to be uploaded first.
    """
    folder = files.path_of(spool) if spool is not None else Path()
    if not folder.is_dir():
        msg = f"the spool must be a folder that is there; got {str(folder)!r}: create it"
        raise ConfigError(msg)
    mark = hashlib.sha256(str(where).encode()).hexdigest()[:12]
    path = folder.absolute() / f"{where.stem}.{mark}.stream"
    if path.exists():
        msg = (
            f"{path} has what a capture to {where} left: actstore.upload({str(path)!r}, "
            f"{str(where)!r}, remove=True) uploads the rest of it; then give another URL"
        )
        raise ConfigError(msg)
    return path


# -- afterwards ---------------------------------------------------------------------------------


def upload(
    path: str | os.PathLike[str],
    url: str,
    *,
    follow: bool = False,
    remove: bool = False,
    segment_bytes: int = SEGMENT_BYTES,
    storage_options: Mapping[str, Any] | None = None,
) -> UploadReport:
    """Upload a log to a bucket, or the rest of one, as segments that end with a COMMIT.

    What is there already is not sent again: the same call after a kill goes on. It also uploads
    what a capture to a URL left in its spool.

    Parameters
    ----------
    path : path
        The ``.stream`` log, closed or not.
    url : str
        The log's URL, such as ``s3://bucket/run.stream``.
    follow : bool
        Go on while a capture is writing the log, until it is closed or its writer is gone.
    remove : bool
        Remove the log here when all of it that was committed is in the bucket: what an earlier
        call uploaded is read back, and compared.
    segment_bytes : int
        Bytes of a segment, about.
    storage_options : mapping, optional
        As for `open_dataset`.

    Returns
    -------
    UploadReport
        What is there.

    Raises
    ------
    ConfigError
        ``url`` is no URL, or has another log.
    MissingFileError
        There is no log at ``path``.
    FormatError
        It is none, or not one of ours; or segments of it are lost that were there.
    StreamCorruptError
        It is damaged, and what stands before the damage is uploaded; or what was uploaded before
        is.
    BucketError
        The bucket doesn't answer.
    """
    where = remote(url, storage_options)
    if where is None or where.inside:
        msg = f"upload wants the URL of a log, such as s3://bucket/run.stream; got {url!r}"
        raise ConfigError(msg)
    place = files.existing(path, "upload")
    if not place.is_file() or not is_log(place):
        msg = f"{place} is no .stream log of actstore; only such are uploaded"
        raise FormatError(msg)
    if remove and not follow:
        _check_idle(place)
    with closing(LogFile(place)) as file:
        work = _Upload(file, _Sender(place, where.bucket), segment_bytes)
        closed = work.run(complete_of(where.bucket), follow=follow)
        if work.damage is not None:
            raise work.damage
        if remove:
            work.confirm(complete_of(where.bucket))
            _check_idle(place)
            place.unlink()
    sender = work.sender
    return UploadReport(str(where), len(sender.segments), sender.end, work.sent, closed)


def _check_idle(place: Path) -> None:
    """Refuse to remove a log that is being written."""
    if files.is_locked(place):
        msg = f"{place} is being written: upload it with follow=True, or without remove=True"
        raise ConfigError(msg)


class _Upload:
    """Uploads a log that lies on this machine, from where the bucket has no more of it."""

    def __init__(self, file: LogFile, sender: _Sender, segment_bytes: int) -> None:
        self.sender = sender
        self.sent = 0
        self.damage: StreamCorruptError | None = None
        self._file = file
        self._segment_bytes = segment_bytes
        self._sync = Frame.decode(file.read(len(MAGIC), Frame.SIZE)).sync

    def run(self, said: Mapping[str, Any] | None, *, follow: bool) -> bool:
        """Upload; give whether the log is whole, and all there."""
        self._check_same()
        if said is not None:
            if said["bytes"] != self._file.size:
                raise self._other()
            check_complete(self.sender.bucket, said, self.sender.segments)
            return True
        self._check_last()
        idle = 0.0
        while not self._send():
            ended = not follow or (idle >= _IDLE_SECONDS and not files.is_locked(self._file.path))
            if self._file.grow():
                idle = 0.0
            elif ended:
                return False
            else:
                time.sleep(_POLL_SECONDS)
                idle += _POLL_SECONDS
        self.confirm(None)
        self.sender.complete()
        return True

    def confirm(self, said: Mapping[str, Any] | None) -> None:
        """Find that the bucket has what is here; see `_Sender.confirm`."""
        self.sender.confirm(self._file, self._sync, said)

    def _send(self) -> bool:
        """Upload what is committed; give whether the log was closed, and all of it is there."""
        found = Scan({}, self._sync)
        end = begin = self.sender.end
        self.damage = None
        if begin == self._file.size and self._is_closed():
            return True
        for entry in walk(self._file, found, begin or len(MAGIC)):
            if found.damage:
                first = found.damage[0]
                self.damage = self._file.corrupt(first.offset, first.reason)
                break
            if entry.opcode == Opcode.COMMIT:
                end = entry.end
                if end - self.sender.end >= self._segment_bytes:
                    self._put(end)
            elif entry.opcode == Opcode.END and self._file.size == entry.end + len(MAGIC):
                self._put(self._file.size)
                return True
        if end > self.sender.end:
            self._put(end)
        return False

    def _is_closed(self) -> bool:
        try:
            last, _ = self._file.entry(self._file.size - records.TAIL_SIZE, self._sync)
        except FormatError:
            return False
        return last.opcode == Opcode.END

    def _put(self, end: int) -> None:
        self.sender.send(self._file.descriptor, end)
        self.sent += 1

    def _check_same(self) -> None:
        """Refuse a log that is not the one of which there are segments already."""
        sender, size = self.sender, len(MAGIC) + Frame.SIZE
        if not sender.segments:
            return
        first = self.sender.bucket.part(sender.segments[0].name, 0, size)
        if first != self._file.read(0, size) or sender.end > self._file.size:
            raise self._other()

    def _check_last(self) -> None:
        """Remove the last segment if it is broken: who sent it died before it was sure of it.

        Only where its bytes are here: they are given back when it is sure. One that is intact, and
        other than they are, is of what a resume cut away, or the disk lost: that is refused.
        """
        if not self.sender.segments:
            return
        last, file = self.sender.segments[-1], self._file
        if not _is_here(file, last):
            return
        there = self.sender.bucket.get(last.name)
        if there != file.read(last.start, last.size):
            if _Held(there).is_intact(self._sync, last.start):
                raise self._other()
            self.sender.bucket.delete(last.name)
            self.sender.segments.pop()

    def _other(self) -> ActstoreError:
        msg = (
            f"{self.sender.bucket.url} holds another log than {self._file.path}, or another state "
            "of it: give another URL"
        )
        return ConfigError(msg)


def _is_here(file: LogFile, segment: Segment) -> bool:
    """Whether a log's file still has the bytes of a segment: none of them was given back."""
    return os.lseek(file.descriptor, segment.start, os.SEEK_HOLE) >= segment.end


class _Held(Unfiled):
    """Bytes of a log that are in memory."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data, self.size = data, len(data)

    def is_intact(self, sync: bytes, start: int) -> bool:
        """Whether they are whole records, as a segment is that begins at an offset."""
        found, end = Scan({}, sync), 0 if start else len(MAGIC)
        try:
            for entry in walk(self, found, end):
                self.check(entry)
                end = entry.end
        except FormatError:
            return False
        return not found.damage and self._data[end:] in (b"", MAGIC)

    def _some(self, length: int, offset: int) -> bytes:
        return self._data[offset : offset + length]
