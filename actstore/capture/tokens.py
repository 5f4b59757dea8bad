"""Owns the token tracker, and writing the JSON files beside a log; knows nothing of torch.

Their names and their reading are ``actstore.stream.sidecars``'s.
"""

from __future__ import annotations

import contextlib
import json
import operator
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from actstore import files
from actstore.errors import CaptureError, ConfigError
from actstore.packet import TokenRecord
from actstore.stream.sidecars import CHECKPOINT_VERSION, token_dict

__all__ = ["Checkpoints", "_TokenBoundaryTracker"]


class Checkpoints:
    """Writes the checkpoint of a run.

    Parameters
    ----------
    path : Path
        The checkpoint file.
    interval : int, optional
        A checkpoint every so many tokens; None: none at intervals.
    start_time : float
        When the run first began.
    resume_count : int
        How often it was resumed.
    """

    def __init__(
        self, path: Path, interval: int | None, start_time: float, resume_count: int
    ) -> None:
        self.path = path
        self.start_time = start_time
        self.resume_count = resume_count
        self._interval = interval

    def due(self, count: int) -> bool:
        """Whether a checkpoint is due at so many tokens."""
        return self._interval is not None and count % self._interval == 0

    def write(self, tokens: list[dict[str, Any]]) -> None:
        """Write the checkpoint; the log must be durable up to these tokens."""
        state = {
            "version": CHECKPOINT_VERSION,
            "total_tokens": len(tokens),
            "last_checkpoint_time": time.time(),
            "metadata": {
                "start_time": self.start_time,
                "resume_count": self.resume_count,
                "updated_at": datetime.now(UTC).isoformat(),
            },
            "tokens": tokens,
        }
        _write(self.path, json.dumps(state).encode())

    def close(self, tokens: list[dict[str, Any]], *, clean: bool) -> None:
        """Remove the checkpoint after a clean end; bring it up to date after another."""
        if not clean:
            if self._interval is not None or self.path.exists():
                self.write(tokens)
            return
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
            files.fsync_folder(self.path.parent)


class _TokenBoundaryTracker:
    """What ``capture_activations(track_per_token=True)`` yields.

    Attributes
    ----------
    tokens : list of dict
        The tokens recorded so far, as the JSON file will have them.
    """

    def __init__(
        self,
        record: Callable[[TokenRecord], None],
        last_pass: Callable[[], int],
        flush: Callable[[], None],
        checkpoints: Checkpoints,
        hydrated: tuple[TokenRecord, ...] = (),
    ) -> None:
        self.tokens: list[dict[str, Any]] = [token_dict(one) for one in hydrated]
        self._record = record
        self._last_pass = last_pass
        self._flush = flush
        self._checkpoints = checkpoints

    def record_token(self, token_id: int, token_text: str, position: int | None = None) -> None:
        """Record a generated token: what the passes since the one before have predicted.

        Parameters
        ----------
        token_id : int
            The id in the vocabulary.
        token_text : str
            The decoded text.
        position : int, optional
            A position to keep as ``token_index``; by default the count of tokens.

        Raises
        ------
        ConfigError
            An argument is of the wrong kind.
        CaptureError
            The capture has failed.
        """
        if not isinstance(token_text, str):
            msg = f"record_token wants token_text as a str; got {token_text!r}"
            raise ConfigError(msg)
        record = TokenRecord(
            len(self.tokens),
            _integer("token_id", token_id),
            token_text,
            None if position is None else _integer("position", position),
            self._last_pass(),
            time.time(),
        )
        self._record(record)
        self.tokens.append(token_dict(record))
        if self._checkpoints.due(len(self.tokens)):
            self._flush()
            self._checkpoints.write(self.tokens)

    def save(self, path: Path) -> None:
        """Write the token table."""
        table = {
            "total_tokens": len(self.tokens),
            "tokens": self.tokens,
            # not below 0 where the clock was set back
            "capture_duration_seconds": max(time.time() - self._checkpoints.start_time, 0.0),
            "resume_count": self._checkpoints.resume_count,
        }
        _write(path, json.dumps(table, indent=2).encode())

    def close(self, *, clean: bool) -> None:
        """Deal with the checkpoint at the end of the capture."""
        self._checkpoints.close(self.tokens, clean=clean)


def _write(path: Path, data: bytes) -> None:
    try:
        files.atomic_write(path, data)
    except OSError as error:
        msg = f"{path} can't be written: {error}; the log has what it would hold, and is readable"
        raise CaptureError(msg) from error


def _integer(name: str, value: Any) -> int:
    """Take an int, or whatever stands for one exactly (a NumPy or torch scalar)."""
    try:
        number = operator.index(value)
    except TypeError:
        msg = f"record_token wants {name} as an int; got {value!r}"
        raise ConfigError(msg) from None
    if not -(1 << 63) < number < 1 << 63:
        msg = f"record_token wants {name} in 64 bits; got {value!r}"
        raise ConfigError(msg)
    return number
