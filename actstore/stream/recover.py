"""Owns going on with a log whose writer ended: where it can be resumed, and what is cut there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from actstore import files
from actstore.errors import ConfigError, FormatError
from actstore.stream.reader import StreamReader, open_stream
from actstore.stream.records import MAGIC, Commit, Frame
from actstore.stream.scan import LogFile
from actstore.stream.writer import CommitPoint

__all__ = ["ResumePoint", "begun", "is_log", "keep_cut", "resume_point"]

_STRIDE: Final = 1 << 20
_FIRST_COMMIT: Final = Frame.SIZE + len(Commit(0, 0, 0, 0, step_boundary=True).encode())


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a log can be resumed: its last COMMIT at a step boundary.

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
    """

    offset: int
    sync: bytes
    commits: tuple[int, ...]
    point: CommitPoint
    loses: bool


def is_log(path: Path) -> bool:
    """Whether a file begins as a log does, of whatever version."""
    with path.open("rb") as file:
        return file.read(len(MAGIC))[:-1] == MAGIC[:-1]


def begun(path: Path) -> bool:
    """Whether a log has got as far as its HEADER and first COMMIT: else nothing was captured.

    A log that is damaged there, not cut short, has begun: a reader will say what is wrong with it.
    """
    file = LogFile(path)
    start = len(MAGIC) + Frame.SIZE
    try:
        if file.size < start:
            return False
        head = Frame.decode(file.read(len(MAGIC), Frame.SIZE))
        if start + head.header_length > file.size:  # what is there of it is JSON, or it is damaged
            rest = file.read(start, file.size - start)
            return not (rest.isascii() and rest.decode("ascii").isprintable())
        head.check(file.read(start, head.header_length))
        return file.size >= len(MAGIC) + head.length + _FIRST_COMMIT
    except FormatError:
        return True
    finally:
        file.close()


def resume_point(path: Path) -> ResumePoint:
    """Find where a log can be resumed.

    Raises
    ------
    StreamCorruptError
        The log is damaged.
    ConfigError
        It was captured without tracking tokens, so that it has no step to go on from.
    """
    with open_stream(path) as reader:
        reader.check()
        if not reader.header.get("capture", {}).get("track_per_token", False):
            msg = (
                f"{path} was captured without track_per_token=True and has no step to resume "
                "from; give another output_path, or leave resume_from_checkpoint=False to have "
                "it moved aside"
            )
            raise ConfigError(msg)
        return _last_boundary(reader)


def _last_boundary(reader: StreamReader) -> ResumePoint:
    groups = reader.scan.groups
    last = max(index for index, group in enumerate(groups) if group.commit.step_boundary)
    commit, end = groups[last].commit, groups[last].end
    later = any(group.entries for group in groups[last + 1 :])
    torn = not reader.scan.complete and reader.file_bytes > groups[-1].end
    return ResumePoint(
        end,
        reader.scan.sync,
        tuple(group.offset for group in groups[: last + 1]),
        CommitPoint(commit.next_seq, commit.next_pass, commit.next_step, step_boundary=True),
        later or torn,
    )


def keep_cut(path: Path, offset: int) -> Path:
    """Copy what a log holds behind an offset beside it, durably, before it is cut there."""
    kept = files.free_name(path.with_name(f"{path.name}.cut"))
    with path.open("rb") as source, kept.open("xb") as target:
        source.seek(offset)
        shutil.copyfileobj(source, target, _STRIDE)
    files.fsync_file(kept)
    files.fsync_folder(kept.parent)
    return kept
