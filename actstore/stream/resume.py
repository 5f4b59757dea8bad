"""Owns going on with a log whose writer ended: whether it can be, where, and what is cut away."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from actstore import files
from actstore.errors import ConfigError, FormatError
from actstore.stream.reader import StreamReader, open_stream
from actstore.stream.records import HEADER_LIMIT, MAGIC, Commit, Frame, Opcode
from actstore.stream.scan import Damage, LogFile, Scan, walk
from actstore.stream.writer import CommitPoint

__all__ = ["ResumePoint", "begun", "is_log", "keep_cut", "resume_point"]

_STRIDE: Final = 1 << 20
_FIRST_COMMIT: Final = Frame.SIZE + len(Commit(0, 0, 0, 0, step_boundary=True).encode())


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a log can be resumed: its last COMMIT at a step boundary that is intact.

    Attributes
    ----------
    offset : int
        The end of that COMMIT: the log is cut here.
    sync : bytes
        The file's sync marker.
    commits : tuple of int
        Offsets of the COMMITs that stay.
    point : CommitPoint
        Where the run stood.
    loses : bool
        Something that was captured stands behind it.
    torn : int or None
        Where it is damaged as a power cut leaves what was not yet on the disk.
    """

    offset: int
    sync: bytes
    commits: tuple[int, ...]
    point: CommitPoint
    loses: bool
    torn: int | None


def is_log(path: Path) -> bool:
    """Whether a file begins as a log does, of whatever version."""
    with path.open("rb") as file:
        return file.read(len(MAGIC))[:-1] == MAGIC[:-1]


def begun(path: Path) -> bool:
    """Whether a file is more than the beginning of a log whose first COMMIT never came.

    Of that, a kill leaves a part, and a power cut any part, or zeros: nothing was captured. What
    is no log, or is one that is damaged in what follows, has begun: a reader will say what is
    wrong with it.
    """
    with closing(LogFile(path)) as file:
        start = file.read(0, min(len(MAGIC), file.size))
        if start != MAGIC:
            return not (MAGIC.startswith(start) or _blank(file))
        try:
            head = Frame.decode(file.read(len(MAGIC), Frame.SIZE))
        except FormatError:
            return file.size >= len(MAGIC) + Frame.SIZE
        intact = [one.opcode for one in islice(walk(file, Scan({}, head.sync), len(MAGIC)), 2)]
        if intact in ([], [Opcode.HEADER], [Opcode.COMMIT]):
            return file.size > len(MAGIC) + head.length + _FIRST_COMMIT
        return True


def _blank(file: LogFile) -> bool:
    """Whether a file is no larger than a log's beginning, and all zeros."""
    return file.size <= HEADER_LIMIT and not any(file.read(0, file.size))


def resume_point(path: Path) -> ResumePoint:
    """Find where a log can be resumed.

    What was written since the last sync that a COMMIT tells of may be damaged, as a power cut
    leaves it: the log is then resumed before that.

    Raises
    ------
    StreamCorruptError
        What had been on the disk is damaged.
    ConfigError
        It was captured without tracking tokens, so that it has no step to go on from.
    """
    with open_stream(path) as reader:
        torn = _torn(reader)
        if any(one.offset < torn for one in reader.damage):
            reader.check()
        if not reader.header.get("capture", {}).get("track_per_token", False):
            msg = (
                f"{path} was captured without track_per_token=True and has no step to resume "
                "from; give another output_path, or leave resume_from_checkpoint=False to have "
                "it moved aside"
            )
            raise ConfigError(msg)
        return _last_boundary(reader, torn)


def _torn(reader: StreamReader) -> int:
    """Give where damage begins in what may not have been on the disk; the file's size if none."""
    groups = reader.scan.groups
    known = (group.commit.start for group in groups if group.commit.synced)
    synced = max(known, default=groups[0].end if groups else reader.file_bytes)
    found = Scan({}, reader.scan.sync)
    with closing(LogFile(reader.local)) as file:
        for entry in walk(file, found, synced):
            try:
                file.check(entry)
            except FormatError as error:
                found.damage.append(Damage(entry.offset, entry.end - entry.offset, str(error)))
    return min((one.offset for one in found.damage), default=reader.file_bytes)


def _last_boundary(reader: StreamReader, torn: int) -> ResumePoint:
    groups = reader.scan.groups
    places = [at for at, one in enumerate(groups) if one.commit.step_boundary and one.end <= torn]
    if not places:
        reader.check()
        msg = f"{reader.path} has no COMMIT at which it can be resumed; move it away to begin anew"
        raise FormatError(msg)
    last = places[-1]
    commit, end = groups[last].commit, groups[last].end
    later = any(group.entries for group in groups[last + 1 :])
    tail = not reader.scan.complete and reader.file_bytes > groups[-1].end
    damaged = torn < reader.file_bytes
    return ResumePoint(
        end,
        reader.scan.sync,
        tuple(group.offset for group in groups[: last + 1]),
        CommitPoint(commit.next_seq, commit.next_pass, commit.next_step, step_boundary=True),
        later or tail or damaged,
        torn if damaged else None,
    )


def keep_cut(path: Path, offset: int) -> Path:
    """Copy what a log holds behind an offset beside it, durably, before it is cut there."""
    kept = files.free_name(path.with_name(f"{path.name}.cut"))
    try:
        with path.open("rb") as source, kept.open("xb") as target:
            source.seek(offset)
            shutil.copyfileobj(source, target, _STRIDE)
        files.fsync_file(kept)
    except BaseException:
        kept.unlink(missing_ok=True)
        raise
    files.fsync_folder(kept.parent)
    return kept
