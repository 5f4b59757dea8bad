"""Owns a log that lies in a bucket: its segments, their names, and reading them as one log.

A segment is a range of bytes of the log, from the end of a COMMIT to the end of another, named by
where it begins. What uploads them is ``uploading.py``; what the bytes are, ``records.py``'s.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from actstore.buckets import Bucket, RemotePath
from actstore.errors import FormatError, MissingFileError
from actstore.stream.scan import LogFile

__all__ = [
    "COMPLETE",
    "Segment",
    "SegmentedLog",
    "Unfiled",
    "check_complete",
    "complete_of",
    "is_segmented",
    "log_file",
    "remove",
    "segments_of",
]

#: The object that says that a log is whole.
COMPLETE: Final = "complete.json"
_NAME: Final = re.compile(r"(\d{20})\.segment")
_JSON_LIMIT: Final = 1 << 28
_WINDOW: Final = 1 << 20  # what is read where little is wanted: frames stand close together
_WINDOWS: Final = 32  # that are kept
_LITTLE: Final = 64 << 10


class Segment(NamedTuple):
    """A segment: the bytes of the log from ``start`` on."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """Where the next begins."""
        return self.start + self.size

    @property
    def name(self) -> str:
        """Its object, below the log's URL."""
        return f"{self.start:020d}.segment"


def segments_of(bucket: Bucket) -> list[Segment]:
    """Give the segments of the log below a URL, as far as each begins where the one before ends.

    Objects of other names are none of its business.
    """
    found: list[Segment] = []
    for one in bucket.list():
        parsed = _NAME.fullmatch(one.name)
        if parsed is not None:
            segment = Segment(int(parsed[1]), one.size)
            if segment.start != (found[-1].end if found else 0):
                break
            found.append(segment)
    return found


def is_segmented(where: RemotePath) -> bool:
    """Whether a log lies there, or the beginning of one."""
    return not where.inside and bool(segments_of(where.bucket))


def complete_of(bucket: Bucket) -> Mapping[str, Any] | None:
    """Read what says that a log is whole; None where nothing does.

    Raises
    ------
    FormatError
        It is not what it should be.
    """
    try:
        said = json.loads(bucket.get(COMPLETE, limit=_JSON_LIMIT))
        sizes = [int(one["bytes"]) for one in said["segments"] if int(one["start"]) >= 0]
        found = dict(said)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"{bucket.url}/{COMPLETE} doesn't say what a log's should: {error!r}"
        raise FormatError(msg) from error
    if sum(sizes) != found["bytes"]:
        said_ = f"its segments have {sum(sizes)} bytes, the log {found['bytes']}"
        msg = f"{bucket.url}/{COMPLETE} is damaged: {said_}"
        raise FormatError(msg)
    return found


def check_complete(bucket: Bucket, said: Mapping[str, Any], segments: Sequence[Segment]) -> None:
    """Refuse a log whose segments are others than ``complete.json`` tells of.

    Raises
    ------
    FormatError
        They are.
    """
    wanted = [(one["start"], one["bytes"]) for one in said["segments"]]
    if wanted != list(segments):
        there = sum(one.size for one in segments)
        msg = (
            f"{bucket.url} is damaged: {COMPLETE} tells of {len(wanted)} segments of "
            f"{said['bytes']} bytes, there are {len(segments)} of {there}; where the log is still "
            "somewhere, upload it to another URL"
        )
        raise FormatError(msg)


def remove(bucket: Bucket) -> None:
    """Remove a log, from its end on."""
    bucket.delete(COMPLETE)
    for one in reversed(segments_of(bucket)):
        bucket.delete(one.name)


def log_file(path: Path | RemotePath) -> LogFile:
    """Open a log's bytes, wherever it is; raises as `LogFile` does."""
    return SegmentedLog(path) if isinstance(path, RemotePath) else LogFile(path)


class Unfiled(LogFile):
    """A log's bytes that are in no file of this machine; what is one says how some are read."""

    def __init__(self) -> None:
        self._descriptor, self._vain = -1, 0

    def _into(self, buffer: memoryview, offset: int) -> int:
        data = self._some(len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)


class SegmentedLog(Unfiled):
    """The bytes of a log in a bucket: ranges of its segments are read as they are wanted.

    Raises
    ------
    MissingFileError
        No log is there.
    FormatError
        ``complete.json`` tells of other segments than there are.
    BucketError
        The bucket doesn't answer.
    """

    def __init__(self, where: RemotePath) -> None:
        super().__init__()
        self.path = where  # type: ignore[assignment] # that names it
        self._bucket = where.bucket
        self._segments = segments_of(self._bucket)
        if where.inside or not self._segments:
            msg = f"no log at {where}: give the URL that a log was uploaded to"
            raise MissingFileError(msg)
        said = complete_of(self._bucket)
        if said is not None:
            check_complete(self._bucket, said, self._segments)
        self.size = self._segments[-1].end
        self.whole = said is not None
        self._starts = np.array([one.start for one in self._segments], np.int64)
        self._lock = threading.Lock()
        self._windows: OrderedDict[int, bytes] = OrderedDict()

    def close(self) -> None:
        """Forget what was read."""
        if hasattr(self, "_windows"):
            self._windows.clear()

    def _some(self, length: int, offset: int) -> bytes:
        """Read bytes, fewer where a segment ends."""
        if length > _LITTLE:
            return self._of_segment(offset, length)
        number = offset // _WINDOW
        with self._lock:
            window = self._windows.get(number)
            if window is not None:
                self._windows.move_to_end(number)
        if window is None:
            window = self._window(number * _WINDOW)
            with self._lock:
                self._windows[number] = window
                while len(self._windows) > _WINDOWS:
                    self._windows.popitem(last=False)
        within = offset - number * _WINDOW
        return window[within : within + length]

    def _window(self, start: int) -> bytes:
        end, parts = min(start + _WINDOW, self.size), []
        while start < end:
            part = self._of_segment(start, end - start)
            if not part:
                break
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def _of_segment(self, offset: int, length: int) -> bytes:
        place = int(np.searchsorted(self._starts, offset, side="right")) - 1
        segment = self._segments[place]
        wanted = min(length, segment.end - offset)
        try:
            data = self._bucket.part(segment.name, offset - segment.start, wanted)
        except FileNotFoundError:
            msg = f"{self._bucket.url}/{segment.name} is not there any more"
            raise FormatError(msg) from None
        if len(data) != wanted:
            msg = f"{self.path}/{segment.name} ends before byte {offset + length} of the log"
            raise FormatError(msg)
        return data


def described(segments: Sequence[Segment], crcs: Sequence[int], log: str) -> bytes:
    """Give what ``complete.json`` says of a log (``schemas/stream.md``)."""
    said = {
        "format": "actstore.segments",
        "format_version": 0,
        "log": log,
        "bytes": sum(one.size for one in segments),
        "segments": [
            {"start": one.start, "bytes": one.size, "crc32c": f"{crc:08x}"}
            for one, crc in zip(segments, crcs, strict=True)
        ],
    }
    return json.dumps(said, indent=2).encode()
