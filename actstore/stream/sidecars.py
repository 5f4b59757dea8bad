"""Owns the JSON files beside a log: the token table and the checkpoint, their names and reading.

Both are conveniences: the log alone is enough to rebuild them. They are written, atomically, by
``actstore.capture.tokens``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from actstore.errors import FormatError
from actstore.packet import TokenRecord
from actstore.stream.reader import StreamReader

__all__ = [
    "CHECKPOINT_VERSION",
    "Checkpoint",
    "checkpoint_name",
    "older_tokens_name",
    "read_tokens",
    "resume_count",
    "token_dict",
    "token_metadata",
    "tokens_name",
]

CHECKPOINT_VERSION: Final = 1
_JSON_LIMIT: Final = 1 << 30


def tokens_name(path: Path) -> Path:
    """Give the name of a log's token table: ``{output_path}_tokens.json``."""
    return path.with_name(f"{path.name}_tokens.json")


def checkpoint_name(path: Path) -> Path:
    """Give the default name of a log's checkpoint: ``{output_path}.ckpt.json``."""
    return path.with_name(f"{path.name}.ckpt.json")


def older_tokens_name(path: Path) -> Path:
    """Give the name that older tools used: ``gen_tokens.json`` beside ``gen.stream``."""
    return path.with_name(f"{path.name.removesuffix('.stream')}_tokens.json")


def token_metadata(reader: StreamReader) -> dict[str, Any] | None:
    """Give a log's token table: the one beside it, else rebuilt; None where none were tracked.

    The log counts: a table that says other tokens is of another run, from before a resume that
    was killed, or damaged.
    """
    capture = reader.header.get("capture")
    if not reader.tokens and isinstance(capture, dict) and not capture.get("track_per_token"):
        return None
    said = [(one.token_id, one.token_text) for one in reader.tokens]
    here = reader.path if isinstance(reader.path, Path) else None
    for name in (tokens_name(here), older_tokens_name(here)) if here else ():
        if name.exists():
            found = _table(name)
            if found is not None and _said(found) == said:
                return found
    if not reader.tokens:
        return None
    return {
        "total_tokens": len(reader.tokens),
        "tokens": [token_dict(record) for record in reader.tokens],
        "capture_duration_seconds": reader.summary.get("duration_seconds"),
    }


def read_tokens(name: Path) -> tuple[TokenRecord, ...]:
    """Give the tokens of a token table or a checkpoint.

    Raises
    ------
    FormatError
        The file is neither.
    """
    found = _read(name)
    try:
        return _records(found)
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        msg = f"{name} holds no token table ({error!r})"
        raise FormatError(msg) from error


def resume_count(path: Path) -> int:
    """Give how often a log was resumed until now, by the files beside it.

    Raises
    ------
    FormatError
        There are such files, and they don't say.
    """
    counts = [0]
    for name in (tokens_name(path), checkpoint_name(path)):
        if name.exists():
            found = _read(name)
            said = found.get("metadata", found)
            counts.append(said.get("resume_count", 0) if isinstance(said, dict) else 0)
    try:
        return max(_integer(one, least=0) for one in counts)
    except (TypeError, ValueError, OverflowError) as error:
        msg = f"the files beside {path} don't say how often it was resumed: {error}"
        raise FormatError(msg) from error


def _table(path: Path) -> dict[str, Any] | None:
    """Read a token table; None where the file is none."""
    try:
        found = _read(path)
    except FormatError:
        return None
    return found if isinstance(found.get("total_tokens"), int) else None


def _said(table: Mapping[str, Any]) -> list[tuple[Any, Any]] | None:
    """Give the ids and texts of a token table; None where it hasn't them."""
    tokens = table.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(one, dict) for one in tokens):
        return None
    return [(one.get("token_id"), one.get("token_text")) for one in tokens]


def token_dict(record: TokenRecord) -> dict[str, Any]:
    """Give a recorded token as the JSON files have it."""
    index = record.step if record.position is None else record.position
    return {
        "token_index": index,
        "token_id": record.token_id,
        "token_text": record.token_text,
        "step": record.step,
        "position": record.position,
        "pass_index": record.pass_index,
        "time": record.time,
    }


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint file says.

    Attributes
    ----------
    tokens : tuple of TokenRecord
        The tokens recorded until then.
    start_time : float
        When the run first began, in seconds since the epoch.
    resume_count : int
        How often it was resumed.
    """

    tokens: tuple[TokenRecord, ...]
    start_time: float
    resume_count: int

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a checkpoint file.

        Raises
        ------
        FormatError
            It is none, or of another version.
        """
        found = _read(path)
        if found.get("version") != CHECKPOINT_VERSION:
            msg = (
                f"{path} is no checkpoint of version {CHECKPOINT_VERSION}: it says version "
                f"{found.get('version')!r}; move it away to start without it"
            )
            raise FormatError(msg)
        try:
            metadata = found.get("metadata", {})
            return cls(
                _records(found),
                _seconds(metadata.get("start_time", time.time())),
                _integer(metadata.get("resume_count", 0), least=0),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            msg = f"{path} is no whole checkpoint ({error!r}); move it away to start without it"
            raise FormatError(msg) from error


def _records(found: Mapping[str, Any]) -> tuple[TokenRecord, ...]:
    rows = found["tokens"]
    return tuple(_record(step, rows[step]) for step in range(len(rows)))


def _record(step: int, found: dict[str, Any]) -> TokenRecord:
    position = found.get("position")
    if position is None and found["token_index"] != step:
        position = found["token_index"]
    return TokenRecord(
        step,
        _integer(found["token_id"]),
        str(found["token_text"]),
        None if position is None else _integer(position),
        _integer(found.get("pass_index", -1), least=-1),
        _seconds(found.get("time", 0.0)),
    )


def _integer(value: Any, least: int = -(1 << 63)) -> int:
    found = int(value)
    if found != value or not least <= found < 1 << 63:
        msg = f"{value!r:.40} is no integer from {least} to 2**63"
        raise ValueError(msg)
    return found


def _seconds(value: Any) -> float:
    found = float(value)
    if not math.isfinite(found):
        msg = f"{value!r} is no time"
        raise ValueError(msg)
    return found


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _JSON_LIMIT:
        msg = f"{path} has {path.stat().st_size} bytes; no JSON of over {_JSON_LIMIT} is read"
        raise FormatError(msg)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        msg = f"{path} holds no JSON: {error}"
        raise FormatError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} holds a JSON {type(found).__name__}; wanted an object"
        raise FormatError(msg)
    return found
