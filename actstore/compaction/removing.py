"""Owns removing logs whose archive is whole: only as they were when it was made of them.

What a log in a bucket is, is ``stream.segments``'s; the files beside one, ``stream.sidecars``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actstore import files
from actstore.buckets import RemotePath
from actstore.compaction.worker import stamps_of
from actstore.errors import ArchiveError, ConfigError, FormatError
from actstore.stream import segments, sidecars
from actstore.stream.reader import open_stream

__all__ = ["remove", "states_of"]


def states_of(paths: Sequence[Path | RemotePath]) -> dict[Path | RemotePath, Any]:
    """Give the states of logs, which change when they are written to; None where there is none.

    Raises
    ------
    ConfigError
        One is being written; or is in a bucket, and not whole.
    """
    return {path: _state(path) for path in paths}


def _state(path: Path | RemotePath) -> Any:
    if isinstance(path, RemotePath):
        state: Any = segments.complete_of(path.bucket)
        grows = state is None and segments.is_segmented(path)
    else:
        state = stamps_of([path]) if path.exists() else None
        grows = state is not None and files.is_locked(path)
    if grows:
        lacks = f", for there is no {segments.COMPLETE}" if isinstance(path, RemotePath) else ""
        msg = (
            f"remove_logs=True removes logs that were closed; {path} is being written{lacks}: "
            "compact it when its capture has ended, or without remove_logs"
        )
        raise ConfigError(msg)
    return state


def remove(states: Mapping[Path | RemotePath, Any], archive: Path | RemotePath) -> None:
    """Remove logs, and the files beside them that say no more than they do.

    Parameters
    ----------
    states : mapping
        What `states_of` gave before they were opened.
    archive : Path or RemotePath
        What was made of them.

    Raises
    ------
    ArchiveError
        One was written meanwhile; none is removed.
    """
    for path, state in states.items():
        try:
            same = _state(path) == state
        except ConfigError:
            same = False
        if not same:
            msg = (
                f"{path} was written while it was compacted, and no log is removed: {archive} is "
                "whole, and holds what there was then; compact again, to another name"
            )
            raise ArchiveError(msg)
    for path in states:
        if isinstance(path, RemotePath):
            segments.remove(path.bucket)
        else:
            for one in (*_told(path), path):
                one.unlink()
            files.fsync_folder(path.parent)


def _told(path: Path) -> list[Path]:
    """Give the files beside a log whose tokens are the log's, or the first of these."""
    names = {sidecars.tokens_name(path), sidecars.older_tokens_name(path)}
    found = [one for one in (*names, sidecars.checkpoint_name(path)) if one.is_file()]
    if not found:
        return []
    with open_stream(path) as reader:
        tokens = [(one.token_id, one.token_text) for one in reader.tokens]
    told = []
    for one in found:
        try:
            said = [(token.token_id, token.token_text) for token in sidecars.read_tokens(one)]
        except FormatError:  # none of ours
            continue
        if said == tokens[: len(said)]:
            told.append(one)
    return told
