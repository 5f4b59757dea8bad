"""Owns making an archive from logs: a pure plan, shards by threads, verification, the rename.

What the plan is, is ``archive.layout``'s; reading rows, ``stream.rows``'s; what of an archive is
finished, ``archive.journal``'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import actstore
from actstore import files, markup
from actstore.archive import jobs, layout, shards, store
from actstore.archive.coordinates import STRING, Coordinate, Runs, pass_columns, token_columns
from actstore.archive.jobs import Job, Read, Written
from actstore.archive.journal import Journal
from actstore.archive.precision import EXACT, SCALE, Errors, Precision
from actstore.errors import ActstoreError, ArchiveError, ConfigError
from actstore.stream import summary
from actstore.stream.joined import JoinedReader
from actstore.stream.reader import StreamReader, open_stream
from actstore.stream.rows import ElementReader, RowReader

__all__ = [
    "CompactionReport",
    "Content",
    "check_workers",
    "compact",
    "dense_jobs",
    "differences",
    "element_reader",
    "fitting",
    "opened",
    "paths_of",
    "plan_log",
    "ragged_jobs",
    "row_reader",
    "runs_of",
    "write_archive",
]

#: Called with the bytes that are done and those that there are.
Progress = Callable[[int, int], None]
Pathlike = str | os.PathLike[str]
Reader = StreamReader | JoinedReader
#: A precision for all floats, or for the variables or sites whose names match.
Wanted = str | Precision | Mapping[str, str | Precision] | None

_WORKERS: Final = 2
_MEMORY_GB: Final = 1.0
#: What a compaction holds beside its shards: the logs' tables, and what of them is decoded.
_BESIDE: Final = 64 << 20


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
        Shards whose chunks were decoded by stock Blosc and compared with the log, and whose files
        were read back and compared; and the inner chunks in them.
    shards_resumed : int
        Of these the shards that an earlier compaction, which was cut short, had finished.
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
    shards_resumed: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Raw bytes over stored bytes."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0

    def _repr_html_(self) -> str:
        """Give what a notebook shows."""
        return markup.facts(
            f"archive {self.path.name}",
            [
                *((f"rows of {dim}", count) for dim, count in self.rows.items()),
                ("variables", self.variables),
                ("captured", markup.bytes_of(self.raw_bytes)),
                ("stored", markup.bytes_of(self.stored_bytes)),
                ("times smaller", self.ratio),
                ("shards verified", self.shards_verified),
                ("chunks verified", self.chunks_verified),
                ("shards of an earlier run", self.shards_resumed),
                ("seconds", self.seconds),
            ],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What an archive will hold, before any value is read.

    Attributes
    ----------
    plan : layout.Plan
        Its arrays and labels.
    tables : mapping of str to mapping of str to numpy.ndarray
        The columns of the groups ``tokens`` and ``passes``.
    runs : tuple of mapping
        The HEADER of each log.
    logs : tuple of mapping
        What ``provenance`` says of each.
    analysis : mapping
        Counts of all of them, as `summary.merge` gives them.
    precision : mapping of str to Precision
        Of the variables that give up some.
    """

    plan: layout.Plan
    tables: Mapping[str, Mapping[str, NDArray[Any]]]
    runs: tuple[Mapping[str, Any], ...]
    logs: tuple[Mapping[str, Any], ...]
    analysis: Mapping[str, Any]
    precision: Mapping[str, Precision] = field(default_factory=dict)

    @classmethod
    def of(cls, reader: Reader, tokenizer: Any = None, precision: Wanted = None) -> Content:
        """Plan the archive of a log, or of several."""
        plan, logs, runs = plan_log(reader, tokenizer), _logs(reader), runs_of(reader)
        return cls(
            plan,
            {
                "tokens": token_columns(reader.tokens, runs),
                "passes": pass_columns(reader.passes, runs),
            },
            tuple(dict(one.header) for one in logs),
            tuple(
                {
                    "name": one.path.name,
                    "run_id": one.header.get("run_id"),
                    "bytes": one.file_bytes,
                    "complete": one.complete,
                }
                for one in logs
            ),
            summary.merge([summary.summarise(one) for one in logs]),
            _precisions(plan, precision),
        )

    def jobs(self, reader: Reader) -> list[Job]:
        """Give the shards to write."""
        return list(_jobs(reader, self.plan, self.precision))

    def fingerprint(self, jobs: Sequence[Job]) -> str:
        """Give what tells one making of an archive from another: the logs, plan and shards."""
        said = {
            "writer": actstore.__version__,
            "format": store.VERSION,
            "logs": self.logs,
            "shards": [(one.file, one.shard.first, one.shard.last, one.raw_bytes) for one in jobs],
            "arrays": [
                (one.name, one.dims, one.shape, one.source.name) for one in self.plan.variables
            ],
            "precision": {name: str(one) for name, one in self.precision.items()},
        }
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def compact(  # noqa: PLR0913 - each is its own choice, by name
    streams: Pathlike | Sequence[Pathlike],
    out: Pathlike,
    *,
    profile: str = "balanced",
    precision: Wanted = None,
    tokenizer: Any = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    workers: int = _WORKERS,
    max_memory_gb: float = _MEMORY_GB,
    remove_logs: bool = False,
    progress: Progress | None = None,
) -> CompactionReport:
    """Compact logs into a Zarr v3 archive, verified before it appears.

    What is finished of an archive is kept in a hidden folder beside it until the archive is whole:
    the same call after a kill, an interrupt or a full disk goes on where that one was.

    Parameters
    ----------
    streams : path or sequence of paths
        The log, or several of them (the ranks of a run, or different runs of a model). Rows are
        in the order of the logs as they are given here, then pass, batch item, position; with
        several, the coordinate ``run`` has the number of the log.
    out : path
        The archive, a folder that must not exist; by custom ``name.zarr``.
    profile : {"balanced", "fast", "dense", "none"}
        Of the archive's chunks, always lossless: small at little cost; LZ4; the smallest, which
        takes about three times as long to encode, and no longer to read; raw.
    precision : str, Precision, or mapping, optional
        How much of the floats is kept: all where nothing is said. Of all of them, or a mapping
        from names of variables or sites, globs among them, of which the first that matches
        counts. Ragged arrays, integers and complex numbers are always kept whole. Promised of
        every chunk, and checked while it is written; one that would break it is kept whole:

        ``"relative=e"``
            Each value is within e times itself: bit-rounding.
        ``"bfloat16"``, ``"float16"``
            Each value is the nearest of that dtype; none overflows.
        ``"nmse=e"``
            The squared error is at most e times the values' squares: codes with a step for each
            row. Small features beside large ones may become 0.
        ``"mse=e"``
            The mean squared error is at most e: codes with one step.
        ``"int8"``
            Each value is within 1/252 of the largest of its row: 255 codes a row.

        The first three are plain floats in the archive; xarray decodes ``mse``, and
        `open_dataset`, or ``dataset.actstore.decode()`` of what others opened, all of them.
    tokenizer : object, optional
        With ``decode([id])``: gives the rows' ``token_text``.
    shapes, dtypes : mapping, optional
        Of a log of ``llm-instrumentation``, which holds none: as for `open_stream`.
    workers : int
        Threads, at most; each holds an encoded shard of about 64 MiB.
    max_memory_gb : float
        GB of memory, over what the process had: fewer threads work where it allows no more.
    remove_logs : bool
        Remove the logs when the archive is whole, verified and on the disk.
    progress : callable, optional
        Called with the bytes that are done and those that there are.

    Returns
    -------
    CompactionReport
        What was made.

    Raises
    ------
    ConfigError
        An argument can't be honoured; logs say different things of one layer; or a single row
        needs more memory.
    ArchiveError
        ``out`` exists, can't be written, or what was written doesn't read back as the log has
        it.
    MissingFileError, FormatError, StreamCorruptError
        As for `open_stream`.
    """
    began = time.monotonic()
    paths, target = paths_of(streams), files.path_of(out)
    shards.check_profile(profile)
    check_workers(workers)
    files.check_new(target)
    with opened(paths, shapes, dtypes) as reader:
        content = Content.of(reader, tokenizer, precision)
        mine = content.jobs(reader)
        threads = fitting(mine, workers, max_memory_gb)
        made = write_archive(content, mine, target, profile, threads, progress)
    if remove_logs:
        for path in paths:
            path.unlink()
    return CompactionReport(path=target, seconds=time.monotonic() - began, **made)


@contextmanager
def opened(
    streams: Pathlike | Sequence[Pathlike],
    shapes: Mapping[str, Sequence[int]] | None,
    dtypes: Mapping[str, str] | None,
) -> Iterator[Reader]:
    """Open logs as one, and refuse damaged ones."""
    with ExitStack() as stack:
        readers = [
            stack.enter_context(open_stream(path, shapes=shapes, dtypes=dtypes))
            for path in paths_of(streams)
        ]
        reader = readers[0] if len(readers) == 1 else JoinedReader(readers)
        reader.check()
        yield reader


def fitting(jobs: Sequence[Job], workers: int, gigabytes: float) -> int:
    """Give how many threads fit into memory.

    Raises
    ------
    ConfigError
        Not even one does.
    """
    needed = max((job.memory for job in jobs), default=0)
    threads = (int(gigabytes * 1e9) - _BESIDE) // needed if needed else workers
    if threads < 1:
        msg = (
            f"a shard of this archive needs {(needed + _BESIDE) / 1e9:.2f} GB of memory; "
            f"max_memory_gb is {gigabytes:.2f}: give that much"
        )
        raise ConfigError(msg)
    return min(workers, threads)


def write_archive(
    content: Content,
    jobs: Sequence[Job],
    target: Path,
    profile: str,
    threads: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write an archive, or go on with one; give what a report says of it.

    Raises
    ------
    ArchiveError
        It can't be written, or doesn't read back.
    """
    making = Journal(target, f"{content.fingerprint(jobs)} {profile}", _now())
    try:
        with making as journal:
            made = _write(content, jobs, journal, profile, threads, progress)
            journal.finish()
    except OSError as error:
        if isinstance(error, ActstoreError):
            raise
        msg = (
            f"{target} could not be written: {error}; what is finished of it is kept in "
            f"{making.folder.name} beside it: make room and do it again to go on, or remove "
            "that folder"
        )
        raise ArchiveError(msg) from error
    return made


def differences(
    folder: Path,
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
    with opened(streams, shapes, dtypes) as reader:
        plan = plan_log(reader)
        said = store.read_attributes(folder).get("precision", {})
        precision = {name: Precision.parse(one) for name, one in said.items()}
        mine = list(_jobs(reader, plan, precision))
        done, total = 0, sum(job.raw_bytes for job in mine)
        for job in mine:
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


def _difference(folder: Path, job: Job) -> str:
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


def _precisions(plan: layout.Plan, wanted: Wanted) -> dict[str, Precision]:
    """Give the precision of each variable that gives up some.

    Raises
    ------
    ConfigError
        It is none, or a name matches no variable.
    """
    if wanted is None:
        return {}
    given = wanted if isinstance(wanted, Mapping) else {"*": wanted}
    by_name = {name: Precision.parse(one) for name, one in given.items()}
    own = {one.name for one in plan.variables}
    for name in by_name:
        if name != "*" and not any(_is_meant(name, one, own) for one in plan.variables):
            known = ", ".join(repr(one.name) for one in plan.variables)
            msg = f"precision names {name!r}, which no variable is called; there are {known}"
            raise ConfigError(msg)
    found = {}
    for variable in plan.variables:
        mine = next((one for name, one in by_name.items() if _is_meant(name, variable, own)), None)
        if mine is not None and mine.applies(variable.dtype, variable.row_shape):
            found[variable.name] = mine
    return found


def _is_meant(name: str, variable: layout.Variable, own: Set[str]) -> bool:
    """Whether a name is a variable's; one that is just that of a variable is of no other."""
    if name in own:
        return variable.name == name
    return fnmatchcase(variable.name, name) or fnmatchcase(variable.site, name)


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


def _logs(reader: Reader) -> tuple[StreamReader, ...]:
    return reader.readers if isinstance(reader, JoinedReader) else (reader,)


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


def _write(
    content: Content,
    jobs: Sequence[Job],
    journal: Journal,
    profile: str,
    threads: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write an archive, shard by verified shard."""
    plan = content.plan
    total, resumed = sum(job.raw_bytes for job in jobs), len(journal.done)
    done = sum(job.raw_bytes for job in jobs if job.file in journal.done)
    if progress is not None and resumed:
        progress(done, total)
    missing = [job for job in jobs if job.file not in journal.done]
    with _threads(threads) as pool:
        running = {pool.submit(_write_shard, journal, job, profile): job for job in missing}
        for future in _as_done(running):
            future.result()
            done += running[future].raw_bytes
            if progress is not None:
                progress(done, total)
    stored = Counter[str]()
    for job in jobs:
        stored.update(_shares(job.owners, journal.done[job.file].nbytes))
    writer = store.ArchiveWriter(journal.folder)
    _describe_arrays(writer, content, profile)
    for name, exact in _exact(plan, jobs, journal.done).items():
        _describe_exact(writer, plan, name, exact, profile)
    _check_arrays(journal.folder, jobs)
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


def _as_done(running: Mapping[Future[None], Job]) -> Iterator[Future[None]]:
    """Give what is running as it ends; an interrupt is not kept waiting."""
    left = set(running)
    while left:
        ended, left = wait(left, return_when="FIRST_COMPLETED")
        yield from ended


@contextmanager
def _threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads; where the context fails, what they have not begun is not begun."""
    pool = ThreadPoolExecutor(workers, "actstore-compact")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(reader: Reader, plan: layout.Plan, precision: Mapping[str, Precision]) -> Iterator[Job]:
    """Give the shards to write: those that hold anything."""
    for one in plan.variables:
        rows = [row_reader(reader, one, place) for place in range(len(one.modules))]
        reads = [partial(mine.read, fill=one.fill) if mine else None for mine in rows]
        yield from dense_jobs(one, reads, precision.get(one.name))
    for ragged in plan.ragged:
        layers = reader.table.layer[ragged.packets]
        yield from ragged_jobs(ragged, layers, reader, element_reader(reader, ragged).read)


def dense_jobs(
    variable: layout.Variable, reads: Sequence[Read | None], precision: Precision | None = None
) -> Iterator[Job]:
    """Give the shards of a variable.

    Parameters
    ----------
    variable : layout.Variable
        The variable.
    reads : sequence of callable or None
        What reads the rows of each of its places; None where there are none.
    precision : Precision, optional
        How much of them is kept.
    """
    for place, (module, read) in enumerate(zip(variable.modules, reads, strict=True)):
        if read is None:
            continue
        for shard in variable.cut(place):
            yield Job(
                variable.name,
                (place,) * variable.token_axis,
                variable.row_shape,
                variable.dtype,
                shard,
                variable.fill,
                {module: shard.rows * variable.row_bytes},
                read,
                precision=precision,
            )


def ragged_jobs(
    ragged: layout.Ragged, layers: NDArray[np.int64], reader: Reader, read: Read
) -> Iterator[Job]:
    """Give the shards of a ragged array.

    Parameters
    ----------
    ragged : layout.Ragged
        The array.
    layers : numpy.ndarray
        int64: of each of its packets the layer's id in the reader.
    reader : StreamReader or JoinedReader
        Names the layers.
    read : callable
        Reads its elements.
    """
    names = {info.id: info.name for info in reader.layers.values()}
    kinds = np.unique(layers).tolist()
    ends, itemsize = np.append(ragged.offsets[1:], ragged.size), ragged.source.itemsize
    for shard in ragged.cut():
        inside = np.minimum(ends, shard.last) - np.maximum(ragged.offsets, shard.first)
        nbytes = inside.clip(0) * itemsize
        owners = {names[one]: int(nbytes[layers == one].sum()) for one in kinds}
        yield Job(ragged.values_name, (), (), ragged.source.array, shard, 0, owners, read)


def _shares(owners: Mapping[str, int], nbytes: int) -> dict[str, int]:
    """Divide the bytes of a file by raw size, summing exactly."""
    total, before, result = sum(owners.values()), 0, {}
    for name, raw in owners.items():
        result[name] = (before + raw) * nbytes // total - before * nbytes // total
        before += raw
    return result


def _write_shard(journal: Journal, job: Job, profile: str) -> None:
    """Write a shard, compare what it decodes to with the log, and its files with what they are."""
    try:
        written = jobs.write(job, journal.folder, profile)
    except shards.MismatchError as error:
        raise _unverified(job) from error
    journal.add(job.file, written)


def _check_arrays(folder: Path, jobs: Sequence[Job]) -> None:
    """Read a chunk of each array by zarr-python, as its metadata says, and compare it."""
    for job in {job.name: job for job in jobs}.values():
        number = int(np.flatnonzero(job.shard.present)[0])
        first = job.shard.first + number * job.shard.chunk_rows
        for name, wanted in job.stored(number).items():
            try:
                found = store.read_rows(folder, name, job.place, first, first + len(wanted))
            except (ValueError, RuntimeError) as error:
                raise _unverified(job) from error
            if found.dtype != wanted.dtype or found.tobytes() != wanted.tobytes():
                raise _unverified(job)


def _unverified(job: Job) -> ArchiveError:
    msg = (
        f"{job.name} at {job.place}, rows {job.shard.first} to {job.shard.last}, doesn't read "
        "back as the log has it; nothing was kept of this archive: check the disk, and compact "
        "again"
    )
    return ArchiveError(msg)


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
    for group, dim in (("tokens", "token"), ("passes", "pass")):
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
    return {
        "format": store.FORMAT,
        "format_version": store.VERSION,
        "coordinates": " ".join(labels),
        "rows": dict(plan.rows),
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


def paths_of(streams: Pathlike | Sequence[Pathlike]) -> list[Path]:
    """Give the paths of one log or several."""
    if isinstance(streams, str | os.PathLike):
        return [Path(streams)]
    if not isinstance(streams, Sequence) or not streams:
        msg = f"compact takes the path of a log, or a sequence of them; got {streams!r}"
        raise ConfigError(msg)
    return [files.path_of(one) for one in streams]


def check_workers(workers: int) -> None:
    """Refuse a number of threads that is none."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        msg = f"workers must be a positive int; got {workers!r}"
        raise ConfigError(msg)
