"""Owns whether an archive has the values of its logs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.archive import layout, store
from actstore.archive.coordinates import SOURCE_ROW, STRING, prefix_of
from actstore.archive.jobs import Job
from actstore.archive.precision import Precision
from actstore.archive.root import read_attributes
from actstore.archive.shuffling import SEED, Shuffle, is_shuffled
from actstore.archive.zipped import Place
from actstore.compaction.content import Captured, shards_of
from actstore.compaction.logs import Pathlike, opened, plan_log
from actstore.compaction.shuffling import scattered
from actstore.compaction.writing import Progress
from actstore.errors import ArchiveError

__all__ = ["differences"]


def differences(
    folder: Place,
    streams: Pathlike | Sequence[Pathlike],
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    *,
    progress: Progress | None = None,
) -> Iterator[tuple[str, str]]:
    """Compare an archive, read by zarr-python, with the logs that it was made of.

    Yields
    ------
    (str, str)
        What of the archive differs, and how. Texts are not compared: a tokenizer may have given
        them.
    """
    attributes = read_attributes(folder)
    logs = attributes.get("provenance", {}).get("logs", ())
    ranks = next((one["ranks"] for one in logs if "ranks" in one), "all")
    with opened(streams, shapes, dtypes, ranks) as reader:
        plan = plan_log(reader)
        precision = {
            name: Precision.parse(one) for name, one in attributes.get("precision", {}).items()
        }
        captured = None
        if is_shuffled(attributes):
            try:
                captured = Captured(plan, _shuffle(folder, plan, attributes))
            except (OSError, ValueError, LookupError, ArchiveError) as error:
                yield SOURCE_ROW, f"it can't be read as the order of the rows: {error}"
                return
            plan = captured.shuffled()
        mine = list(shards_of(reader, plan, precision, captured))
        done, total = 0, sum(job.raw_bytes for job in mine)
        for job in _readable(mine, captured):
            if progress is not None:
                progress(done, total)
            done += job.raw_bytes
            reason = _difference(folder, job)
            if reason:
                yield f"{job.file}, rows {job.shard.first} to {job.shard.last}", reason
        for one in plan.coordinates:
            if one.values.dtype == STRING:
                continue
            try:
                found = store.read_part(folder, one.name, (slice(None),) * one.values.ndim)
            except (OSError, ValueError, LookupError) as error:
                yield one.name, f"it can't be read: {error}"
                continue
            if not np.array_equal(found, one.values, equal_nan=one.values.dtype.kind == "f"):
                yield one.name, "its values are not those of the logs"


def _shuffle(folder: Place, plan: layout.Plan, attributes: Mapping[str, Any]) -> Shuffle:
    """Read in which order the rows of an archive are.

    Raises
    ------
    ArchiveError
        It is none.
    """
    orders = {}
    for dim in plan.rows:
        prefix = prefix_of([one.name for one in plan.coordinates if one.dims == (dim,)]) or ""
        orders[dim] = store.read_part(folder, f"{prefix}{SOURCE_ROW}", (slice(None),))
    found = Shuffle(int(attributes[SEED]), orders)
    found.check(plan.rows)
    return found


def _readable(jobs: Sequence[Job], captured: Captured | None) -> Iterator[Job]:
    """Give shards; where rows are shuffled, those of a layer are scattered into a folder first."""
    if captured is None:
        yield from jobs
        return
    with tempfile.TemporaryDirectory(prefix="actstore-") as beside:
        for batch in scattered(jobs, Path(beside) / "rows", 1):
            yield from batch


def _difference(folder: Place, job: Job) -> str:
    """Say how the rows of a shard differ from the log's, if they do."""
    read: dict[str, NDArray[Any]] = {}
    for number in np.flatnonzero(job.shard.present).tolist():
        start = number * job.shard.chunk_rows
        for name, rows in job.stored(number).items():
            if name not in read:
                try:
                    read[name] = store.read_rows(
                        folder, name, job.place, job.shard.first, job.shard.last
                    )
                except (OSError, ValueError, IndexError, RuntimeError, ArchiveError) as error:
                    return f"{name} can't be read: {error}"
            mine = read[name][start : start + len(rows)]
            if mine.dtype != rows.dtype or mine.tobytes() != rows.tobytes():
                return f"its chunk {number} has other values than the logs"
    return ""
