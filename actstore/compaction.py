"""Owns making an archive from a log: a pure plan, shards by threads, verification, the rename.

What the plan is, is ``archive.layout``'s; reading rows, ``stream.rows``'s.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import crc32c as castagnoli
import numpy as np
from numpy.typing import NDArray

import actstore
from actstore import codecs, files
from actstore.archive import layout, shards, store
from actstore.archive.coordinates import STRING, Coordinate
from actstore.errors import ArchiveError, ConfigError
from actstore.stream import summary
from actstore.stream.reader import StreamReader, open_stream
from actstore.stream.rows import ElementReader, RowReader

__all__ = ["CompactionReport", "compact", "plan_log"]

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
    shards_verified : int
        Shards that were read back by zarr-python and compared with the log.
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
    seconds: float

    @property
    def ratio(self) -> float:
        """Raw bytes over stored bytes."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One shard: which rows of which layer of which array, and who reads them."""

    name: str
    module: str
    place: tuple[int, ...]
    trailing: int
    first: int
    last: int
    shard_rows: int
    chunk_rows: int
    fill: Any
    raw_bytes: int
    read: Callable[[int, int], NDArray[Any]]

    @property
    def grid(self) -> tuple[int, ...]:
        """Its place in the grid of shards."""
        return (*self.place, self.first // self.shard_rows, *(0,) * self.trailing)


def compact(
    streams: Pathlike | Sequence[Pathlike],
    out: Pathlike,
    *,
    compression: str = "zstd",
    tokenizer: Any = None,
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
    compression : {"zstd", "lz4", "none"}
        Of the archive's chunks; always lossless.
    tokenizer : object, optional
        With ``decode([id])``: gives the rows' ``token_text``.
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
        ``out`` exists, or what was written doesn't read back as the log has it.
    MissingFileError, FormatError, StreamCorruptError
        As for `open_stream`.
    """
    began = time.monotonic()
    path, target = _one(streams), Path(out)
    codecs.check_name(compression)
    _check_workers(workers)
    _check_target(target)
    with open_stream(path) as reader:
        reader.check()
        partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:12]}")
        try:
            made = _write(reader, partial, compression, tokenizer, workers, progress)
            files.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return CompactionReport(path=target, seconds=time.monotonic() - began, **made)


def plan_log(reader: StreamReader, tokenizer: Any = None) -> layout.Plan:
    """Plan the dataset of a log."""
    texts = dict(reader.token_texts)
    if tokenizer is not None:
        fed = {
            int(one) for info in reader.passes for axis in info.axes for one in axis.token_ids.flat
        }
        texts |= {one: str(tokenizer.decode([one])) for one in fed - {-1}}
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
    compression: str,
    tokenizer: Any,
    workers: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write and verify an archive; give what a report says of it."""
    plan = plan_log(reader, tokenizer)
    writer = store.ArchiveWriter(folder)
    jobs = list(_jobs(reader, plan))
    total, done = sum(job.raw_bytes for job in jobs), 0
    stored: dict[str, int] = {}
    with ThreadPoolExecutor(workers, "actstore-compact") as pool:
        written = pool.map(lambda job: _write_shard(folder, job, compression), jobs)
        checks = []
        for job, (nbytes, crc) in zip(jobs, written, strict=True):
            stored[job.module] = stored.get(job.module, 0) + nbytes
            checks.append(crc)
            done += job.raw_bytes
            if progress is not None:
                progress(done, total)
        _describe_arrays(writer, plan, compression)
        list(pool.map(lambda one: _verify_shard(folder, *one), zip(jobs, checks, strict=True)))
    _add_labels(writer, plan, reader)
    analysis = _analysis(reader, stored, compression)
    rows = _rows(plan)
    writer.finish(_attributes(reader, plan, analysis, rows, compression))
    return {
        "rows": rows,
        "variables": (
            *(one.name for one in plan.variables),
            *(one.values_name for one in plan.ragged),
        ),
        "aliases": dict(plan.aliases),
        "raw_bytes": total,
        "stored_bytes": sum(stored.values()),
        "shards_verified": len(jobs),
    }


def _jobs(reader: StreamReader, plan: layout.Plan) -> Iterator[_Job]:
    """Give the shards to write: those that hold any row."""
    for variable in plan.variables:
        for place, segments in enumerate(variable.segments):
            rows = row_reader(reader, variable, place)
            if segments is None or rows is None or 0 in variable.row_shape:
                continue
            axis = variable.token_axis
            shard_rows, fill = variable.shards[axis], variable.fill
            size = int(np.prod(variable.row_shape, dtype=np.int64)) * variable.source.itemsize
            ends = segments.start + segments.count
            for first in range(0, variable.rows, shard_rows):
                last = min(first + shard_rows, variable.rows)
                inside = np.minimum(ends, last) - np.maximum(segments.start, first)
                count = int(inside.clip(0).sum())
                if not count:
                    continue
                yield _Job(
                    variable.name,
                    variable.modules[place],
                    (place,) * axis,
                    len(variable.row_shape),
                    first,
                    last,
                    shard_rows,
                    variable.chunks[axis],
                    fill,
                    count * size,
                    _filled(rows, fill),
                )
    for ragged in plan.ragged:
        yield from _ragged_jobs(reader, ragged)


def _filled(rows: RowReader, fill: Any) -> Callable[[int, int], NDArray[Any]]:
    return lambda first, last: rows.read(first, last, fill)


def _ragged_jobs(reader: StreamReader, ragged: layout.Ragged) -> Iterator[_Job]:
    elements = element_reader(reader, ragged)
    length = ragged.shards[0]
    for first in range(0, ragged.size, length):
        last = min(first + length, ragged.size)
        yield _Job(
            ragged.values_name,
            f"{ragged.site} (ragged)",
            (),
            0,
            first,
            last,
            length,
            ragged.chunks[0],
            0,
            (last - first) * ragged.source.itemsize,
            elements.read,
        )


def _write_shard(folder: Path, job: _Job, compression: str) -> tuple[int, int]:
    """Write a shard; give the bytes of its file, and the CRC-32C of its rows."""
    rows = job.read(job.first, job.last)
    count = job.shard_rows // job.chunk_rows
    buffers = shards.encode_shard(rows, job.chunk_rows, count, job.fill, compression)
    nbytes = shards.write_shard(store.shard_path(folder, job.name, job.grid), buffers)
    return nbytes, _crc(rows)


def _verify_shard(folder: Path, job: _Job, crc: int) -> None:
    """Read a shard back by zarr-python and compare it with the log's rows."""
    found = store.read_rows(folder, job.name, job.place, job.first, job.last)
    if _crc(found) != crc:
        msg = (
            f"{job.name} at {job.place}, rows {job.first} to {job.last}, doesn't read back as the "
            "log has it; nothing was kept of this archive: check the disk, and compact again"
        )
        raise ArchiveError(msg)


def _crc(rows: NDArray[Any]) -> int:
    return castagnoli.crc32c(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))


def _describe_arrays(writer: store.ArchiveWriter, plan: layout.Plan, compression: str) -> None:
    for one in plan.variables:
        attributes = variable_attributes(one)
        writer.add_array(
            one.name,
            one.dims,
            one.shape,
            one.dtype,
            chunks=one.chunks,
            shards=one.shards,
            compression=compression,
            attributes=attributes,
        )
    for ragged in plan.ragged:
        writer.add_array(
            ragged.values_name,
            ragged.dims,
            (ragged.size,),
            ragged.source.array,
            chunks=ragged.chunks,
            shards=ragged.shards,
            compression=compression,
            attributes={"site": ragged.site, "source_dtype": ragged.source.name},
        )


def variable_attributes(one: layout.Variable) -> dict[str, Any]:
    """Give the attributes of a variable, in an archive and over a log."""
    return {"site": one.site, "source_dtype": one.source.name, "modules": list(one.modules)}


def _add_labels(writer: store.ArchiveWriter, plan: layout.Plan, reader: StreamReader) -> None:
    for coordinate in plan.coordinates:
        writer.add_small(coordinate)
        if coordinate.values.dtype == STRING:
            writer.add_text(coordinate)
    for variable in plan.variables:
        if variable.partial:
            dims = variable.dims[: variable.token_axis + 1]
            writer.add_small(Coordinate(f"{variable.name}_present", dims, variable.present()))
    for group, columns in (("tokens", _token_columns(reader)), ("passes", _pass_columns(reader))):
        for name, values in columns.items():
            writer.add_small(Coordinate(name, (group.removesuffix("s"),), values), group=group)


def _token_columns(reader: StreamReader) -> dict[str, NDArray[Any]]:
    """Give what ``record_token`` was told, as columns."""
    tokens = reader.tokens
    return {
        "step": np.array([one.step for one in tokens], np.int64),
        "token_id": np.array([one.token_id for one in tokens], np.int64),
        "token_text": np.array([one.token_text for one in tokens], STRING),
        "position": np.array(
            [np.nan if one.position is None else one.position for one in tokens], np.float64
        ),
        "pass_index": np.array([one.pass_index for one in tokens], np.int64),
        "time": np.array([one.time for one in tokens], np.float64),
    }


def _pass_columns(reader: StreamReader) -> dict[str, NDArray[Any]]:
    passes = reader.passes
    return {
        "index": np.array([one.index for one in passes], np.int64),
        "entry": np.array([one.entry for one in passes], STRING),
        "aborted": np.array([one.aborted for one in passes], np.bool_),
        "logits_to_keep": np.array([one.logits_to_keep for one in passes], np.int64),
    }


def _analysis(reader: StreamReader, stored: Mapping[str, int], compression: str) -> dict[str, Any]:
    """Give what ``analyze_activations`` says of the archive: the log's counts, its own bytes."""
    found = summary.summarise(reader)
    for name, layer in found["per_layer"].items():
        layer["bytes"] = stored.get(name, 0)
    for name, nbytes in stored.items():
        if name not in found["per_layer"]:
            found["per_layer"][name] = {"count": 0, "bytes": nbytes}
    total = sum(stored.values())
    raw = found["total_raw_bytes"]
    return found | {
        "compression": compression,
        "total_compressed_bytes": total,
        "compression_ratio": raw / total if total else 1.0,
    }


def _rows(plan: layout.Plan) -> dict[str, int]:
    return {
        one.dims[0]: len(one.values) for one in plan.coordinates if one.name.endswith("batch_item")
    }


def _attributes(
    reader: StreamReader,
    plan: layout.Plan,
    analysis: Mapping[str, Any],
    rows: Mapping[str, int],
    compression: str,
) -> dict[str, Any]:
    labels = [one.name for one in plan.coordinates if one.dims != (one.name,)]
    analysis = {name: value for name, value in analysis.items() if name != "stream_path"}
    return {
        "format": store.FORMAT,
        "format_version": store.VERSION,
        "coordinates": " ".join(labels),
        "rows": dict(rows),
        "aliases": dict(plan.aliases),
        "compression": compression,
        "run": dict(reader.header),
        "analysis": analysis,
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
    if len(streams) != 1:
        msg = f"compact takes one log for now; got {len(streams)}: compact each by itself"
        raise ConfigError(msg)
    return Path(streams[0])


def _check_workers(workers: int) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        msg = f"workers must be a positive int; got {workers!r}"
        raise ConfigError(msg)


def _check_target(target: Path) -> None:
    if target.exists():
        msg = f"{target} exists, and is not overwritten; give another name, or remove it"
        raise ArchiveError(msg)
    if not target.parent.is_dir():
        msg = f"there is no folder {str(target.parent)!r} for {target.name!r}; create it"
        raise ConfigError(msg)
