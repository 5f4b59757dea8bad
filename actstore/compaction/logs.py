"""Owns what a compaction has of its logs: opened as one, planned, and what reads their rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from actstore import files
from actstore.archive import layout
from actstore.archive.coordinates import Runs
from actstore.buckets import RemotePath, is_remote, remote
from actstore.errors import ConfigError
from actstore.stream.joined import JoinedReader
from actstore.stream.mesh import replicas
from actstore.stream.reader import StreamReader, open_stream
from actstore.stream.rows import ElementReader, RowReader
from actstore.stream.united import UnitedReader

__all__ = [
    "Pathlike",
    "Reader",
    "element_reader",
    "headers_of",
    "logs_of",
    "opened",
    "path_of",
    "paths_of",
    "plan_log",
    "row_reader",
    "runs_of",
]

Pathlike = str | os.PathLike[str]
Reader = StreamReader | JoinedReader | UnitedReader


@contextmanager
def opened(
    streams: Pathlike | Sequence[Pathlike],
    shapes: Mapping[str, Sequence[int]] | None,
    dtypes: Mapping[str, str] | None,
    ranks: str = "all",
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Reader]:
    """Open logs as one, and refuse damaged ones; ``ranks`` as for `replicas`."""
    with ExitStack() as stack:
        readers = [
            stack.enter_context(open_stream(path, shapes=shapes, dtypes=dtypes))
            for path in paths_of(streams, "compact", storage_options)
        ]
        for one in readers:
            one.check()
        runs = replicas(readers, ranks)
        yield runs[0] if len(runs) == 1 else JoinedReader(runs)


def paths_of(
    streams: Pathlike | Sequence[Pathlike],
    asked: str,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Path | RemotePath]:
    """Give the paths of one log or several, which are there; ``asked`` is who wants them."""
    if isinstance(streams, str | os.PathLike):
        return [_log_at(streams, asked, storage_options)]
    if is_remote(streams):  # a store of obstore
        return [path_of(streams, storage_options)]  # type: ignore[arg-type]
    if not isinstance(streams, Sequence) or isinstance(streams, bytes) or not streams:
        msg = f"{asked} takes the path of a log, or a sequence of them; got {streams!r}"
        raise ConfigError(msg)
    return [_log_at(one, asked, storage_options) for one in streams]


def _log_at(
    path: Pathlike, asked: str, storage_options: Mapping[str, Any] | None
) -> Path | RemotePath:
    found = path_of(path, storage_options)
    return found if isinstance(found, RemotePath) else files.existing(found, asked)


def path_of(path: Pathlike, storage_options: Mapping[str, Any] | None) -> Path | RemotePath:
    """Give a path of this machine, or a place in a bucket."""
    far = remote(path, storage_options) if is_remote(path) else None
    return files.path_of(path) if far is None else far


def plan_log(reader: Reader, tokenizer: Any = None) -> layout.Plan:
    """Plan the dataset of a log, or of several."""
    texts = dict(reader.token_texts)
    if tokenizer is not None:
        parts = [axis.token_ids.ravel() for info in reader.passes for axis in info.axes]
        fed = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
        texts |= {one: str(tokenizer.decode([one])) for one in fed[fed >= 0].tolist()}
    source = layout.Source(
        tuple(reader.layers.values()),
        reader.passes,
        reader.tokens,
        reader.table,
        reader.features,
        texts,
        runs_of(reader),
    )
    return layout.plan(source)


def runs_of(reader: Reader) -> Runs:
    """Give the logs of a reader as labels have them."""
    return Runs(reader.starts if isinstance(reader, JoinedReader) else np.zeros(1, np.int64))


def logs_of(reader: Reader) -> tuple[StreamReader, ...]:
    """Give the logs of a reader."""
    if isinstance(reader, StreamReader):
        return (reader,)
    return tuple(log for one in reader.readers for log in logs_of(one))


def headers_of(reader: Reader) -> tuple[Mapping[str, Any], ...]:
    """Give the HEADER of each log; of logs that are united, the first one's."""
    runs = reader.readers if isinstance(reader, JoinedReader) else (reader,)
    return tuple(dict(one.header) for one in runs)


def row_reader(reader: Reader, variable: layout.Variable, place: int) -> RowReader | None:
    """Give what reads the rows of one layer of a variable; None where it has none."""
    segments = variable.segments[place]
    if segments is None:
        return None
    columns = (segments.packet, segments.source, segments.start, segments.count)
    return RowReader(reader, columns, variable.row_shape, variable.source)


def element_reader(reader: Reader, ragged: layout.Ragged) -> ElementReader:
    """Give what reads the elements of a ragged array."""
    return ElementReader(reader, ragged.packets, ragged.offsets, ragged.size, ragged.source)
