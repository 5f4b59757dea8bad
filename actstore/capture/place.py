"""Owns where a capture writes: whether a path can become a log, and what must make room."""

from __future__ import annotations

import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actstore import files
from actstore.errors import ActstoreError, ActstoreWarning, CaptureError, ConfigError
from actstore.stream import resume
from actstore.stream.sidecars import (
    Checkpoint,
    checkpoint_name,
    older_tokens_name,
    tokens_name,
)
from actstore.stream.writer import StreamWriter

__all__ = ["check_path", "checkpoint_path", "has_begun", "keep_cut", "move_aside", "telling"]

_log = logging.getLogger("actstore")


def check_path(path: Path) -> None:
    """Refuse an output path that can't become a log.

    Raises
    ------
    ConfigError
        Its folder is missing, it is no file, or it holds something that is no log.
    """
    _check_place("output_path", path)
    if path.exists() and not resume.is_log(path) and resume.begun(path):
        msg = (
            f"output_path {str(path)!r} is a file that is no .stream log, and is not overwritten; "
            "give another path, or move it away"
        )
        raise ConfigError(msg)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        msg = f"output_path {str(path)!r} can't be written; give another path, or permission"
        raise ConfigError(msg)


def checkpoint_path(given: str | os.PathLike[str] | None, path: Path) -> Path:
    """Give the path of the checkpoint, refusing one that can't be written or is in use."""
    if given is None:
        return checkpoint_name(path)
    place = Path(given).absolute()
    _check_place("checkpoint_path", place)
    if place.resolve() in (path.resolve(), tokens_name(path).resolve()):
        msg = f"checkpoint_path {str(place)!r} is the log or its token table; give another path"
        raise ConfigError(msg)
    return place


def _check_place(what: str, path: Path) -> None:
    """Refuse a path that no file can have, or that something else than a file has."""
    if not path.parent.is_dir():
        msg = f"{what} {str(path)!r}: there is no folder {str(path.parent)!r}; create it"
        raise ConfigError(msg)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        msg = f"{what} {str(path)!r} can't be a file: {error}; give another path"
        raise ConfigError(msg) from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "no plain file"
        msg = f"{what} {str(path)!r} is {kind}; give the name of a file"
        raise ConfigError(msg)


def move_aside(path: Path, checkpoint: Path) -> None:
    """Move a log that is in the way, and what is of it or of one like it, to free names."""
    there = path.exists() and path.stat().st_size > 0
    of_log = {tokens_name(path): tokens_name, checkpoint_name(path): checkpoint_name}
    if there:  # else what has the older name may be anything
        of_log[older_tokens_name(path)] = older_tokens_name
    found = [name for name in (*of_log, checkpoint) if name.exists()]
    if checkpoint in found and checkpoint not in of_log:
        Checkpoint.read(checkpoint)  # raises: a file that is none is not ours to move
    if not there and not found:
        return
    with StreamWriter(path):  # holds its lock: no other capture is writing it
        aside = files.free_name(path)
        for name in dict.fromkeys(found):
            rename = of_log.get(name)
            name.rename(rename(aside) if rename else files.free_name(name))
        if there:
            files.replace(path, aside)
    what = (
        f"{path} held a log, which is never overwritten: it is now {aside}, its sidecars with it"
        if there
        else f"beside {path} stood files of a log that is gone: they are now those of {aside}"
    )
    warnings.warn(what, ActstoreWarning, stacklevel=6)


def has_begun(path: Path) -> bool:
    """Whether a log can be resumed; of one that never began, what is there is kept beside it."""
    if resume.begun(path):
        return True
    resume.keep_cut(path, 0)
    os.truncate(path, 0)
    return False


def keep_cut(path: Path, where: resume.ResumePoint) -> None:
    """Keep what a log holds behind the place where it is resumed; warn if that is damaged."""
    kept = resume.keep_cut(path, where.offset)
    _log.info("what %s held after its last whole step is kept in %s", path, kept)
    if where.torn is not None:
        warnings.warn(
            f"{path} is damaged from byte {where.torn} on, as a power cut leaves what was not yet "
            f"on the disk: the run goes on after token {where.point.next_step}; what stood behind "
            f"it is kept in {kept}",
            ActstoreWarning,
            stacklevel=8,
        )


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Let what the file system refuses as a capture begins be a `CaptureError`."""
    try:
        yield
    except ActstoreError:
        raise
    except OSError as error:
        msg = f"the capture into {path} can't begin: {error}; mend that, and begin it again"
        raise CaptureError(msg) from error
