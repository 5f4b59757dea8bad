"""Owns making an archive from a log: a pure plan, shards by threads, verification, the rename.

What the plan is, is ``archive.layout``'s; reading rows, ``stream.rows``'s.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import crc32c as castagnoli
import numpy as np
from numpy.typing import NDArray

import actstore
from actstore import codecs, files
from actstore.archive import layout, shards, store
from actstore.archive.coordinates import STRING, Coordinate, pass_columns, token_columns
from actstore.archive.grid import Shard
from actstore.errors import ActstoreError, ArchiveError, ConfigError
from actstore.stream import summary
from actstore.stream.reader import StreamReader, open_stream
from actstore.stream.rows import ElementReader, RowReader

__all__ = ["CompactionReport", "compact", "element_reader", "plan_log", "row_reader"]

#: Called with the bytes that are done and those that there are.
Progress = Callable[[int, int], None]
Pathlike = str | os.PathLike[str]

_WORKERS: Final = 2


@dataclass(frozen=True, slots=True)
class CompactionReport:
    """What a compaction made.

    Attributes
    ----------
    path : Path
        The archive.
    rows : mapping of str to int
        Rows of each token axis.
    variables : tuple of str
        The arrays of values, ragged ones included.
    aliases : mapping of str to str
        Sites that are not written, and those that hold their values.
    raw_bytes, stored_bytes : int
        Of the values in the model's dtype, aliases not counted, and of the shards' files.
    shards_verified, chunks_verified : int
        Shards that were read back by zarr-python and compared with the log, and the inner chunks
        in them.
    seconds : float
        What it took.
    """

    path: Path
    rows: Mapping[str, int]
    variables: tuple[str, ...]
    aliases: Mapping[str, str]
    raw_bytes: int
    stored_bytes: int
    shards_verified: int
    chunks_verified: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Raw bytes over stored bytes."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One shard to write: of which array, what reads its rows, and whose bytes they are.

    ``place`` is its place on ``layer``, where the array has that; ``owners`` has the raw bytes
    that each module has in it.
    """

    name: str
    place: tuple[int, ...]
    trailing: int
    shard: Shard
    fill: Any
    owners: Mapping[str, int]
    read: Callable[[int, int], NDArray[Any]]

    @property
    def path(self) -> tuple[int, ...]:
        """Its place in the grid of shards."""
        return (*self.place, self.shard.number, *(0,) * self.trailing)

    @property
    def raw_bytes(self) -> int:
        """Bytes of its rows that are there, in the model's dtype."""
        return sum(self.owners.values())

    def rows(self) -> NDArray[Any]:
        """Read its rows from the log."""
        return self.read(self.shard.first, self.shard.last)


def compact(
    streams: Pathlike | Sequence[Pathlike],
    out: Pathlike,
    *,
    profile: str = "balanced",
    tokenizer: Any = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    workers: int = _WORKERS,
    progress: Progress | None = None,
) -> CompactionReport:
    """Compact a log into a Zarr v3 archive, verified before it appears.

    Parameters
    ----------
    streams : path or sequence of one path
        The log. Merging several is not there yet.
    out : path
        The archive, a folder that must not exist; by custom ``name.zarr``.
    profile : {"balanced", "fast", "dense", "none"}
        Of the archive's chunks, always lossless: small at little cost; LZ4; the smallest, which
        takes about three times as long to encode, and no longer to read; raw.
    tokenizer : object, optional
        With ``decode([id])``: gives the rows' ``token_text``.
    shapes, dtypes : mapping, optional
        Of a log of ``llm-instrumentation``, which holds none: as for `open_stream`.
    workers : int
        Threads; each holds a shard of about 64 MiB.
    progress : callable, optional
        Called with the bytes that are done and those that there are.

    Returns
    -------
    CompactionReport
        What was made.

    Raises
    ------
    ConfigError
        An argument can't be honoured.
    ArchiveError
        ``out`` exists, can't be written, or what was written doesn't read back as the log has
        it.
    MissingFileError, FormatError, StreamCorruptError
        As for `open_stream`.
    """
    began = time.monotonic()
    path, target = _one(streams), _path(out)
    shards.check_profile(profile)
    _check_workers(workers)
    _check_target(target)
    with open_stream(path, shapes=shapes, dtypes=dtypes) as reader:
        reader.check()
        folder = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:12]}")
        try:
            made = _write(reader, folder, profile, tokenizer, workers, progress)
            files.replace(folder, target)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, ActstoreError):
                msg = f"{target} could not be written: {error}; nothing was kept of it"
                raise ArchiveError(msg) from error
            raise
    return CompactionReport(path=target, seconds=time.monotonic() - began, **made)


def plan_log(reader: StreamReader, tokenizer: Any = None) -> layout.Plan:
    """Plan the dataset of a log."""
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
    )
    return layout.plan(source)


def row_reader(reader: StreamReader, variable: layout.Variable, place: int) -> RowReader | None:
    """Give what reads the rows of one layer of a variable; None where it has none."""
    segments = variable.segments[place]
    if segments is None:
        return None
    columns = (segments.packet, segments.source, segments.start, segments.count)
    return RowReader(reader, columns, variable.row_shape, variable.source)


def element_reader(reader: StreamReader, ragged: layout.Ragged) -> ElementReader:
    """Give what reads the elements of a ragged array."""
    return ElementReader(reader, ragged.packets, ragged.offsets, ragged.size, ragged.source)


def _write(
    reader: StreamReader,
    folder: Path,
    profile: str,
    tokenizer: Any,
    workers: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write and verify an archive; give what a report says of it."""
    plan = plan_log(reader, tokenizer)
    writer = store.ArchiveWriter(folder)
    jobs = list(_jobs(reader, plan))
    total, done = sum(job.raw_bytes for job in jobs), 0
    stored = Counter[str]()
    checks = []
    with _threads(workers) as pool:
        written = pool.map(lambda job: _write_shard(folder, job, profile), jobs)
        for job, (nbytes, crc) in zip(jobs, written, strict=True):
            stored.update(_shares(job.owners, nbytes))
            checks.append((job, crc))
            done += job.raw_bytes
            if progress is not None:
                progress(done, total)
        _describe_arrays(writer, plan, profile)
        chunks = sum(pool.map(lambda one: _verify_shard(folder, *one), checks))
    _add_labels(writer, plan, reader)
    writer.finish(_attributes(reader, plan, stored, profile))
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
        "chunks_verified": chunks,
    }


@contextmanager
def _threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads; where the context fails, what they have not begun is not begun."""
    pool = ThreadPoolExecutor(workers, "actstore-compact")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(reader: StreamReader, plan: layout.Plan) -> Iterator[_Job]:
    """Give the shards to write: those that hold anything."""
    for one in plan.variables:
        axis = one.token_axis
        for place, module in enumerate(one.modules):
            rows = row_reader(reader, one, place)
            if rows is None:
                continue
            for shard in one.cut(place):
                owners, trailing = {module: shard.rows * one.row_bytes}, len(one.row_shape)
                read = partial(rows.read, fill=one.fill)
                yield _Job(one.name, (place,) * axis, trailing, shard, one.fill, owners, read)
    for ragged in plan.ragged:
        elements = element_reader(reader, ragged)
        for shard in ragged.cut():
            owners = _ragged_owners(reader, ragged, shard)
            yield _Job(ragged.values_name, (), 0, shard, 0, owners, elements.read)


def _ragged_owners(reader: StreamReader, ragged: layout.Ragged, shard: Shard) -> dict[str, int]:
    """Give the raw bytes that each module has in a shard of a ragged array."""
    names = {info.id: info.name for info in reader.layers.values()}
    ends = np.append(ragged.offsets[1:], ragged.size)
    inside = np.minimum(ends, shard.last) - np.maximum(ragged.offsets, shard.first)
    layers = reader.table.layer[ragged.packets]
    nbytes = inside.clip(0) * ragged.source.itemsize
    return {names[one]: int(nbytes[layers == one].sum()) for one in np.unique(layers).tolist()}


def _shares(owners: Mapping[str, int], nbytes: int) -> dict[str, int]:
    """Divide the bytes of a file by raw size, summing exactly."""
    total, before, result = sum(owners.values()), 0, {}
    for name, raw in owners.items():
        result[name] = (before + raw) * nbytes // total - before * nbytes // total
        before += raw
    return result


def _write_shard(folder: Path, job: _Job, profile: str) -> tuple[int, int]:
    """Write a shard; give the bytes of its file, and the CRC-32C of its rows."""
    rows, shard = job.rows(), job.shard
    room = shards.room(rows, shard.chunk_rows, shard.present)
    encoded = shards.encode_shard(
        rows, shard.chunk_rows, shard.present, job.fill, profile, codecs.scratch("shard", room)
    )
    nbytes = shards.write_shard(store.shard_path(folder, job.name, job.path), encoded)
    return nbytes, _crc(rows)


def _verify_shard(folder: Path, job: _Job, crc: int) -> int:
    """Read a shard back by zarr-python, compare it with the log's rows, and count its chunks."""
    shard = job.shard
    try:
        found = store.read_rows(folder, job.name, job.place, shard.first, shard.last)
    except (ValueError, RuntimeError) as error:
        raise _unverified(job) from error
    if _crc(found) != crc:
        raise _unverified(job)
    return int(shard.present.sum())


def _unverified(job: _Job) -> ArchiveError:
    msg = (
        f"{job.name} at {job.place}, rows {job.shard.first} to {job.shard.last}, doesn't read "
        "back as the log has it; nothing was kept of this archive: check the disk, and compact "
        "again"
    )
    return ArchiveError(msg)


def _crc(rows: NDArray[Any]) -> int:
    return castagnoli.crc32c(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))


def _describe_arrays(writer: store.ArchiveWriter, plan: layout.Plan, profile: str) -> None:
    for one in plan.variables:
        writer.add_array(
            one.name,
            one.dims,
            one.shape,
            one.dtype,
            chunks=one.chunks,
            shards=one.shards,
            profile=profile,
            attributes=one.attributes,
        )
    for ragged in plan.ragged:
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


def _add_labels(writer: store.ArchiveWriter, plan: layout.Plan, reader: StreamReader) -> None:
    for coordinate in plan.coordinates:
        writer.add_small(coordinate)
        if coordinate.values.dtype == STRING:
            writer.add_text(coordinate)
    for variable in plan.variables:
        if variable.partial:
            writer.add_small(variable.present())
    tables = (
        ("tokens", "token", token_columns(reader.tokens)),
        ("passes", "pass", pass_columns(reader.passes)),
    )
    for group, dim, columns in tables:
        for name, values in columns.items():
            writer.add_small(Coordinate(name, (dim,), values), group=group)


def _analysis(reader: StreamReader, stored: Mapping[str, int], profile: str) -> dict[str, Any]:
    """Give what ``analyze_activations`` says of the archive: the log's counts, its own bytes."""
    found = summary.summarise(reader)
    del found["stream_path"]
    for name, layer in found["per_layer"].items():
        layer["bytes"] = stored.get(name, 0)
    total, raw = sum(stored.values()), found["total_raw_bytes"]
    return found | {
        "compression": profile,
        "total_compressed_bytes": total,
        "compression_ratio": raw / total if total else 1.0,
    }


def _attributes(
    reader: StreamReader, plan: layout.Plan, stored: Mapping[str, int], profile: str
) -> dict[str, Any]:
    labels = [one.name for one in plan.coordinates if one.dims != (one.name,)]
    return {
        "format": store.FORMAT,
        "format_version": store.VERSION,
        "coordinates": " ".join(labels),
        "rows": dict(plan.rows),
        "aliases": dict(plan.aliases),
        "profile": profile,
        "run": dict(reader.header),
        "analysis": _analysis(reader, stored, profile),
        "provenance": {
            "writer": {"name": "actstore", "version": actstore.__version__},
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "logs": [
                {
                    "name": reader.path.name,
                    "run_id": reader.header.get("run_id"),
                    "bytes": reader.file_bytes,
                    "complete": reader.complete,
                }
            ],
        },
    }


def _one(streams: Pathlike | Sequence[Pathlike]) -> Path:
    if isinstance(streams, str | os.PathLike):
        return Path(streams)
    if not isinstance(streams, Sequence) or len(streams) != 1:
        found = len(streams) if isinstance(streams, Sequence) else repr(streams)
        msg = f"compact takes the path of one log for now; got {found}: compact each by itself"
        raise ConfigError(msg)
    return _path(streams[0])


def _path(given: Pathlike) -> Path:
    try:
        return Path(given)
    except TypeError:
        msg = f"a path must be a str or a path object; got {given!r}"
        raise ConfigError(msg) from None


def _check_workers(workers: int) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        msg = f"workers must be a positive int; got {workers!r}"
        raise ConfigError(msg)


def _check_target(target: Path) -> None:
    if target.exists() or target.is_symlink():
        msg = f"{target} exists, and is not overwritten; give another name, or remove it"
        raise ArchiveError(msg)
    if not target.parent.is_dir():
        msg = f"there is no folder {str(target.parent)!r} for {target.name!r}; create it"
        raise ConfigError(msg)
