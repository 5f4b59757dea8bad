"""Owns making an archive of its content: shards, arrays' metadata, labels, the rename.

Who writes the shards is ``executing``'s; what of an archive is finished, ``archive.journal``'s.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import actstore
from actstore.archive import layout, store
from actstore.archive.coordinates import STRING, Coordinate
from actstore.archive.jobs import Job, Written
from actstore.archive.journal import Journal
from actstore.archive.precision import EXACT, SCALE, Errors
from actstore.archive.root import FORMAT, VERSION
from actstore.archive.shuffling import SEED
from actstore.archive.uploads import Uploads
from actstore.archive.zipped import Place
from actstore.buckets import RemotePath
from actstore.compaction.content import Content
from actstore.compaction.executing import Executor, Sending, unverified
from actstore.errors import ActstoreError, ArchiveError

__all__ = ["Progress", "write_archive"]

#: Values of an index that the root's metadata has.
_MOST_INDEXED: Final = 1 << 14

#: Called with the bytes that are done and those that there are.
Progress = Callable[[int, int], None]


def write_archive(
    content: Content,
    jobs: Sequence[Job],
    target: Path | RemotePath,
    profile: str,
    executor: Executor,
    progress: Progress | None,
    spool: Path | None = None,
) -> dict[str, Any]:
    """Write an archive, or go on with one; give what a report says of it.

    Of one in a bucket, ``spool`` is the folder for what isn't uploaded yet.

    Raises
    ------
    ArchiveError
        It can't be written, or doesn't read back.
    """
    name = f"{content.fingerprint(jobs)} {profile}"
    making: Journal
    if isinstance(target, RemotePath):
        uploads = Uploads(target, name, _now(), spool or Path())
        making = uploads
        executor = Sending(executor, uploads.send)
    else:
        making = Journal(target, name, _now())
    try:
        with making as journal:
            made = _write(content, jobs, journal, profile, executor, progress)
            journal.finish()
    except OSError as error:
        if isinstance(error, ActstoreError):
            raise
        msg = (
            f"{target} could not be written: {error}; what is finished of it is kept in "
            f"{making.folder.name} beside it: mend that and do it again to go on, or remove "
            "that folder"
        )
        raise ArchiveError(msg) from error
    return made


def _write(
    content: Content,
    jobs: Sequence[Job],
    journal: Journal,
    profile: str,
    executor: Executor,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write an archive, shard by verified shard."""
    plan = content.plan
    total, resumed = sum(job.raw_bytes for job in jobs), len(journal.done)
    done = sum(job.raw_bytes for job in jobs if job.file in journal.done)
    if progress is not None and resumed:
        progress(done, total)
    missing = [job for job in jobs if job.file not in journal.done]
    with closing(executor.written(missing, journal.folder, profile)) as ended:
        for job, written in ended:
            journal.add(job.file, written)
            done += job.raw_bytes
            if progress is not None:
                progress(done, total)
    stored = Counter[str]()
    for job in jobs:
        stored.update(_shares(job.owners, journal.done[job.file].nbytes))
    writer = store.ArchiveWriter(journal.folder)
    _describe_arrays(writer, content, profile)
    for name, exact in _exact(plan, jobs, journal.done).items():
        _describe_exact(writer, plan, name, exact, profile)
    _check_arrays(journal.place, jobs)
    _add_labels(writer, content)
    errors = _errors(jobs, journal.done)
    writer.finish(_attributes(content, stored, errors, profile, journal.created))
    return {
        "rows": plan.rows,
        "variables": (
            *(one.name for one in plan.variables),
            *(one.values_name for one in plan.ragged),
        ),
        "aliases": dict(plan.aliases),
        "raw_bytes": total,
        "stored_bytes": stored.total(),
        "shards_verified": len(jobs),
        "chunks_verified": sum(int(job.shard.present.sum()) for job in jobs),
        "shards_resumed": resumed,
    }


def _shares(owners: Mapping[str, int], nbytes: int) -> dict[str, int]:
    """Divide the bytes of a file by raw size, summing exactly."""
    total, before, result = sum(owners.values()), 0, {}
    for name, raw in owners.items():
        result[name] = (before + raw) * nbytes // total - before * nbytes // total
        before += raw
    return result


def _check_arrays(folder: Place, jobs: Sequence[Job]) -> None:
    """Read a chunk of each array by zarr-python, as its metadata says, and compare it."""
    for job in {job.name: job for job in jobs}.values():
        number = int(np.flatnonzero(job.shard.present)[0])
        first = job.shard.first + number * job.shard.chunk_rows
        for name, wanted in job.stored(number).items():
            try:
                found = store.read_rows(folder, name, job.place, first, first + len(wanted))
            except (ValueError, RuntimeError) as error:
                raise unverified(job) from error
            if found.dtype != wanted.dtype or found.tobytes() != wanted.tobytes():
                raise unverified(job)


def _describe_arrays(writer: store.ArchiveWriter, content: Content, profile: str) -> None:
    for one in content.plan.variables:
        precision = content.precision.get(one.name)
        writer.add_array(
            one.name,
            one.dims,
            one.shape,
            precision.code_dtype if precision and precision.coded else one.dtype,
            chunks=one.chunks,
            shards=one.shards,
            profile=profile,
            attributes=one.attributes | (precision.attributes() if precision else {}),
        )
        if precision and precision.scaled:
            leading = one.token_axis + 1
            writer.add_array(
                f"{one.name}{SCALE}",
                one.dims[:leading],
                one.shape[:leading],
                np.dtype(np.float32),
                chunks=one.shards[:leading],
                shards=one.shards[:leading],
                profile=profile,
                attributes={},
            )
    for ragged in content.plan.ragged:
        writer.add_array(
            ragged.values_name,
            ragged.dims,
            (ragged.size,),
            ragged.source.array,
            chunks=ragged.chunks,
            shards=ragged.shards,
            profile=profile,
            attributes=ragged.attributes,
        )


def _describe_exact(
    writer: store.ArchiveWriter,
    plan: layout.Plan,
    name: str,
    present: NDArray[np.bool_],
    profile: str,
) -> None:
    """Describe the array of the rows of a variable that have no codes, and say which these are."""
    one = next(one for one in plan.variables if one.name == name)
    leading = one.token_axis + 1
    writer.add_array(
        f"{name}{EXACT}",
        one.dims,
        one.shape,
        np.result_type(one.dtype, np.float32),
        chunks=one.chunks,
        shards=one.shards,
        profile=profile,
        attributes={},
    )
    there = present.reshape(one.shape[:leading])
    writer.add_small(Coordinate(f"{name}{EXACT}_present", one.dims[:leading], there))


def _exact(
    plan: layout.Plan, jobs: Sequence[Job], done: Mapping[str, Written]
) -> dict[str, NDArray[np.bool_]]:
    """Give which rows of which variables have no codes: bool [layers, rows]."""
    found: dict[str, NDArray[np.bool_]] = {}
    shapes = {one.name: (len(one.modules), one.rows) for one in plan.variables}
    for job in jobs:
        for number in done[job.file].exact:
            rows = found.setdefault(job.name, np.zeros(shapes[job.name], np.bool_))
            first = job.shard.first + number * job.shard.chunk_rows
            rows[(*job.place, 0)[0], first : first + job.shard.chunk_rows] = True
    return found


def _errors(jobs: Sequence[Job], done: Mapping[str, Written]) -> dict[str, dict[str, Any]]:
    """Give how far off the values of each layer are, by its name, and of which precision."""
    found: dict[str, Errors] = {}
    precision: dict[str, str] = {}
    for job in jobs:
        errors = done[job.file].errors
        if errors is not None:
            (layer,) = job.owners  # of a variable a shard is one layer's
            found[layer] = found.get(layer, Errors()) + errors
            precision[layer] = str(job.precision)
    return {layer: {"precision": precision[layer], **one.said()} for layer, one in found.items()}


def _add_labels(writer: store.ArchiveWriter, content: Content) -> None:
    plan = content.plan
    for coordinate in plan.coordinates:
        writer.add_small(coordinate)
        if coordinate.values.dtype == STRING:
            writer.add_text(coordinate)
    for variable in plan.variables:
        if variable.partial:
            writer.add_small(variable.present())
    for group, dim in (("tokens", "recorded"), ("passes", "pass")):
        for name, values in content.tables[group].items():
            writer.add_small(Coordinate(name, (dim,), values), group=group)


def _attributes(
    content: Content,
    stored: Mapping[str, int],
    errors: Mapping[str, Mapping[str, Any]],
    profile: str,
    created: str,
) -> dict[str, Any]:
    plan = content.plan
    labels = [one.name for one in plan.coordinates if one.dims != (one.name,)]
    captured = content.captured
    shuffled = {} if captured is None else {"layout": "shuffled", SEED: captured.shuffle.seed}
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "coordinates": " ".join(labels),
        "index": _index(plan.coordinates),
        "rows": dict(plan.rows),
        **shuffled,
        "aliases": dict(plan.aliases),
        "profile": profile,
        "precision": {name: str(one) for name, one in content.precision.items()},
        "runs": content.runs,
        "analysis": _analysis(content.analysis, stored, errors, profile),
        "provenance": {
            "writer": {"name": "actstore", "version": actstore.__version__},
            "created": created,
            "logs": content.logs,
        },
    }


def _index(coordinates: Sequence[Coordinate]) -> dict[str, list[int]]:
    """Give the values of the indices, which readers want at once, where they are few."""
    return {
        one.name: one.values.tolist()
        for one in coordinates
        if one.dims == (one.name,)
        and one.values.dtype.kind in "iu"
        and one.values.size <= _MOST_INDEXED
    }


def _analysis(
    found: Mapping[str, Any],
    stored: Mapping[str, int],
    errors: Mapping[str, Mapping[str, Any]],
    profile: str,
) -> dict[str, Any]:
    """Give what ``analyze_activations`` says of the archive: the logs' counts, its own bytes."""
    per_layer = {
        name: {**layer, "bytes": stored.get(name, 0)}
        | ({"errors": dict(errors[name])} if name in errors else {})
        for name, layer in found["per_layer"].items()
    }
    total, raw = sum(stored.values()), found["total_raw_bytes"]
    kept = {name: value for name, value in found.items() if name != "stream_path"}
    return kept | {
        "compression": profile,
        "per_layer": per_layer,
        "total_compressed_bytes": total,
        "compression_ratio": raw / total if total else 1.0,
    }


def _now() -> str:
    """Give the time in UTC; that of ``SOURCE_DATE_EPOCH``, where a build is to be reproduced."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.now(UTC) if fixed is None else datetime.fromtimestamp(int(fixed), UTC)
    return now.isoformat(timespec="milliseconds")
