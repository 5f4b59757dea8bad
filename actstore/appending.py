"""Owns bringing later logs into an archive: what is full of it stays, what isn't is made anew.

The grown archive is made beside the old one as `compaction` makes any, from the old one's rows
and the logs'; then they change names. Shards that are full are the same files in both.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore import files
from actstore.archive import layout, store
from actstore.archive.adding import ADDED, only_writer
from actstore.archive.coordinates import RUN, STRING, Coordinate, prefix_of
from actstore.archive.grid import Segments
from actstore.archive.jobs import Job, Read
from actstore.archive.reading import ShardedRows
from actstore.archive.root import arrays_of, read_root
from actstore.archive.shuffling import is_shuffled
from actstore.arguments import check_callable, check_memory, check_tokenizer
from actstore.buckets import RemotePath, local
from actstore.clusters import check_client
from actstore.compaction import CompactionReport, Pathlike, Progress
from actstore.compaction.cluster import chosen
from actstore.compaction.content import Content, dense_jobs, ragged_jobs
from actstore.compaction.executing import workers_of
from actstore.compaction.logs import Reader, element_reader, opened, paths_of, row_reader
from actstore.compaction.writing import write_archive
from actstore.errors import ArchiveError, ConfigError
from actstore.stream import summary

__all__ = ["append"]

Integers = NDArray[np.int64]
_OF_THE_ARCHIVE: Final = -1  # for the packet of a row that is no log's


def append(
    streams: Pathlike | Sequence[Pathlike],
    archive: Pathlike,
    *,
    tokenizer: Any = None,
    workers: int | None = None,
    max_memory_gb: float = 1.0,
    client: Any = None,
    progress: Progress | None = None,
) -> CompactionReport:
    """Append later logs to an archive, which has their rows behind its own afterwards.

    Readers see the old archive until the grown one is whole and verified, then that. Shards that
    were full are not written again; the last of each layer, which wasn't, is. A killed call is
    gone on with by the same call. Datasets that were opened before are to be opened again.

    Parameters
    ----------
    streams : path or sequence of paths
        Logs of other runs of the same model, with the same layers.
    archive : path
        An archive on a local disk; it keeps its name and its profile.
    tokenizer, workers, max_memory_gb, client, progress
        As for `compact`.

    Returns
    -------
    CompactionReport
        What the archive is now; ``shards_resumed`` counts those of a call that was cut short.

    Raises
    ------
    ConfigError
        A run is in the archive already, or an argument can't be honoured.
    ArchiveError
        The logs have other layers, sites, labels or dtypes than the archive: compact them with
        its logs, or by themselves. Or something was added to it, which has nothing for their
        rows: `remove_added` first. Or another process writes to it, or it can't be written.
    MissingFileError, FormatError, StreamCorruptError
        As for `open_stream` and `open_dataset`.
    """
    began = time.monotonic()
    threads = workers_of(workers)
    check_memory(max_memory_gb)
    check_tokenizer(tokenizer)
    check_callable("progress", progress)
    check_client(client)
    place = local(archive, "append").absolute()
    _Old.open(place)  # refuses what is none before anything is made beside it
    with only_writer(place):
        old = _Old.open(place)
        grown = place.with_name(f".{place.name}.grown")
        shutil.rmtree(grown, ignore_errors=True)  # of a call that was killed before its last step
        recipe = _Growth(tuple(path.absolute() for path in paths_of(streams, "append")), place)
        with recipe.made(tokenizer) as (content, jobs):
            executor = chosen(client, recipe, content, jobs, threads, max_memory_gb)
            made = write_archive(
                content, jobs, grown, old.attributes["profile"], executor, progress
            )
        files.exchange(grown, place)
        shutil.rmtree(grown)
    return CompactionReport(path=place, seconds=time.monotonic() - began, **made)


@dataclass(frozen=True, slots=True)
class _Growth:
    """Makes the grown archive of logs and the archive as it was; a `Recipe`."""

    paths: tuple[Path | RemotePath, ...]
    archive: Path

    @contextmanager
    def made(self, tokenizer: Any = None) -> Iterator[tuple[Content, list[Job]]]:
        with opened(self.paths, None, None) as reader:
            yield _together(_Old.open(self.archive), Content.of(reader, tokenizer), reader)


@dataclass(frozen=True, slots=True, eq=False)
class _Old:
    """The archive as it was: its root attributes, and the metadata of its arrays by name."""

    folder: Path
    attributes: Mapping[str, Any]
    arrays: Mapping[str, Mapping[str, Any]]

    @classmethod
    def open(cls, folder: Path) -> _Old:
        root = read_root(folder)
        return cls(folder, root["attributes"], arrays_of(root))

    def values(self, name: str) -> NDArray[Any]:
        """Read a small array whole."""
        said = self.arrays[name]
        found = store.read_part(self.folder, name, (slice(None),) * len(said["shape"]))
        return found.astype(STRING) if said["data_type"] == "string" else found

    def rows(self, name: str) -> ShardedRows:
        """Give what reads an array of values."""
        found = ShardedRows.of(self.folder / name, self.arrays[name])
        if found is None:
            raise _refused(f"{name!r} has a form that only later versions write")
        return found

    @property
    def runs(self) -> int:
        return len(self.attributes["runs"])

    @property
    def of_values(self) -> set[str]:
        """The names of its arrays of values."""
        return {name for name, said in self.arrays.items() if "source_dtype" in said["attributes"]}


def _refused(why: str) -> ArchiveError:
    msg = (
        f"the logs can't be appended to this archive: {why}; compact them together with its logs, "
        "or into an archive of their own"
    )
    return ArchiveError(msg)


def _together(old: _Old, new: Content, reader: Reader) -> tuple[Content, list[Job]]:
    """Plan the grown archive, and its shards."""
    if old.attributes.get(ADDED):
        added = ", ".join(map(repr, old.attributes[ADDED]))
        msg = (
            f"{old.folder} has labels or statistics that were added to it, of its rows alone: "
            f"{added}; take them out with actstore.remove_added, append, and add those of all rows"
        )
        raise ArchiveError(msg)
    if is_shuffled(old.attributes):
        raise _refused("its rows are shuffled, and those of the logs would stand behind them")
    known = {one.get("run_id") for one in old.attributes["runs"]}
    for one in new.runs:
        if one.get("run_id") in known:
            msg = f"run {one.get('run_id')!r} is in {old.folder} already"
            raise ConfigError(msg)
    if old.attributes.get("precision"):
        raise _refused("what it keeps of floats is less than they were, and would be less again")
    plan = new.plan
    names = {one.name for one in plan.variables} | {one.values_name for one in plan.ragged}
    if names != old.of_values:
        odd = ", ".join(map(repr, sorted(names ^ old.of_values)))
        raise _refused(f"only one of both has {odd}")
    if dict(plan.aliases) != old.attributes["aliases"]:
        raise _refused(
            f"its aliases are {old.attributes['aliases']!r}, theirs {dict(plan.aliases)!r}"
        )
    rows = old.attributes["rows"]
    variables = [_longer(one, old, rows[one.dims[one.token_axis]]) for one in plan.variables]
    ragged = [_more(one, old) for one in plan.ragged]
    jobs: list[Job] = []
    for before, after in zip(plan.variables, variables, strict=True):
        jobs += _dense_jobs(before, after, old, reader)
    for mine, whole in zip(plan.ragged, ragged, strict=True):
        jobs += _ragged_jobs(mine, whole, old, reader)
    grown = layout.Plan(
        tuple(variables),
        tuple(ragged),
        _labels(plan, old),
        {dim: rows[dim] + count for dim, count in plan.rows.items()},
        plan.aliases,
    )
    content = Content(
        grown,
        {group: _table(group, columns, old) for group, columns in new.tables.items()},
        (*old.attributes["runs"], *new.runs),
        (*old.attributes["provenance"]["logs"], *new.logs),
        summary.merge([old.attributes["analysis"], new.analysis]),
        times=new.times,
    )
    return content, jobs


# -- values -------------------------------------------------------------------------------------


def _longer(new: layout.Variable, old: _Old, before: int) -> layout.Variable:
    """Give a variable with the archive's rows before its own."""
    said, axis = old.arrays[new.name], new.token_axis
    shape = list(said["shape"])
    wanted = [*new.shape[:axis], shape[axis], *new.shape[axis + 1 :]]
    attributes = {name: said["attributes"].get(name) for name in new.attributes}
    same = said["dimension_names"] == list(new.dims) and said["data_type"] == new.dtype.name
    if not same or shape != wanted or attributes != new.attributes:
        raise _refused(f"{new.name!r} has other dimensions, modules or another dtype there")
    present = (
        old.values(f"{new.name}_present")
        if f"{new.name}_present" in old.arrays
        else np.ones(shape[: axis + 1], np.bool_)
    ).reshape(-1, before)
    segments = tuple(
        _behind(mine, theirs, before) for mine, theirs in zip(present, new.segments, strict=True)
    )
    grown = (*new.shape[:axis], before + new.rows, *new.shape[axis + 1 :])
    return replace(new, shape=grown, segments=segments)


def _behind(present: NDArray[np.bool_], new: Segments | None, before: int) -> Segments | None:
    """Give the archive's rows that are there, and those of the logs behind them."""
    edges = np.flatnonzero(np.diff(present, prepend=False, append=False))
    start, stop = edges[::2], edges[1::2]
    if new is None:
        return None if not start.size else Segments(*_of_archive(start, stop))
    mine = _of_archive(start, stop)
    theirs = (new.packet, new.source, new.start + before, new.count)
    return Segments(*(np.concatenate(pair) for pair in zip(mine, theirs, strict=True)))


def _of_archive(start: Integers, stop: Integers) -> tuple[Integers, ...]:
    return np.full_like(start, _OF_THE_ARCHIVE), np.zeros_like(start), start, stop - start


def _more(new: layout.Ragged, old: _Old) -> layout.Ragged:
    """Give a ragged array with the archive's packets before its own."""
    said = old.arrays[new.values_name]
    attributes = {name: said["attributes"].get(name) for name in new.attributes}
    if said["data_type"] != new.source.array.name or attributes != new.attributes:
        raise _refused(f"{new.values_name!r} has other modules or another dtype there")
    size, offsets = said["shape"][0], old.values(f"{new.name}_offset")
    packets = np.append(np.full(offsets.size, _OF_THE_ARCHIVE), new.packets)
    return replace(
        new, packets=packets, offsets=np.append(offsets, new.offsets + size), size=size + new.size
    )


def _dense_jobs(
    new: layout.Variable, grown: layout.Variable, old: _Old, reader: Reader
) -> Iterator[Job]:
    rows, before = old.rows(new.name), grown.rows - new.rows
    reads = []
    for place in range(len(grown.modules)):
        theirs = row_reader(reader, new, place)
        later = partial(theirs.read, fill=new.fill) if theirs else partial(_missing, new)
        reads.append(_joined(partial(_read_rows, rows, place), later, before))
    for job in dense_jobs(grown, reads):
        yield _linked(job, grown, old, before)


def _joined(mine: Read, theirs: Read, before: int) -> Read:
    """Give what reads rows, or elements, that are the archive's up to ``before``."""

    def read(first: int, last: int) -> NDArray[Any]:
        if last <= before:
            return mine(first, last)
        if first >= before:
            return theirs(first - before, last - before)
        return np.concatenate([mine(first, before), theirs(0, last - before)])

    return read


def _read_rows(rows: ShardedRows, place: int, first: int, last: int) -> NDArray[Any]:
    return rows.read(place, np.arange(first, last))


def _missing(variable: layout.Variable, first: int, last: int) -> NDArray[Any]:
    return np.full((last - first, *variable.row_shape), variable.fill, variable.dtype)


def _ragged_jobs(
    new: layout.Ragged, grown: layout.Ragged, old: _Old, reader: Reader
) -> Iterator[Job]:
    before = grown.size - new.size
    ids = {block: reader.layers[name].id for block, name in grown.modules.items()}
    mine = [ids[block] for block in old.values(f"{grown.name}_layer").tolist()]
    layers = np.append(np.array(mine, np.int64), reader.table.layer[new.packets])
    read = _joined(
        partial(_read_rows, old.rows(grown.values_name), 0),
        element_reader(reader, new).read,
        before,
    )
    for job in ragged_jobs(grown, layers, reader, read):
        yield _linked(job, grown, old, before)


def _linked(job: Job, grown: layout.Variable | layout.Ragged, old: _Old, before: int) -> Job:
    """Let a shard be the archive's file, where that is cut the same way and full."""
    said, shard = old.arrays[job.name], job.shard
    inner = said["codecs"][0]["configuration"]["chunk_shape"]
    outer = said["chunk_grid"]["configuration"]["chunk_shape"]
    same = (tuple(outer), tuple(inner)) == (grown.shards, grown.chunks)
    if same and shard.first + shard.chunk_rows * shard.present.size <= before:
        return replace(job, link=old.folder / job.file)
    return job


# -- labels -------------------------------------------------------------------------------------


def _labels(plan: layout.Plan, old: _Old) -> tuple[Coordinate, ...]:
    """Give the labels of the archive's rows and packets, and of the logs' behind them."""
    of_packets = {f"{one.name}_packet": one for one in plan.ragged}
    labels = [
        (dim, [one.name for one in plan.coordinates if one.dims == (dim,)]) for dim in plan.rows
    ]
    runs = {f"{prefix_of(names)}{RUN}": dim for dim, names in labels}
    runs |= {f"{one.name}_{RUN}": dim for dim, one in of_packets.items()}
    theirs = {one.name: one for one in plan.coordinates}
    _check_labels(theirs, old, {*plan.rows, *of_packets}, set(runs))
    found = [
        _joined_label(one, old.values(name), of_packets.get(one.dims[0]), old)
        if one.dims[0] in (*plan.rows, *of_packets)
        else one
        for name, one in theirs.items()
        if name not in runs
    ]
    for name, dim in runs.items():
        count = next(len(one.values) for one in theirs.values() if one.dims[0] == dim)
        whole = next(len(one.values) for one in found if one.dims[0] == dim)
        mine = np.zeros(whole - count, np.int64)
        mine = old.values(name) if name in old.arrays else mine
        new = theirs[name].values if name in theirs else np.zeros(count, np.int64)
        found.append(Coordinate(name, (dim,), np.append(mine, new + old.runs)))
    return tuple(found)


def _check_labels(
    theirs: Mapping[str, Coordinate], old: _Old, grows: set[str], runs: set[str]
) -> None:
    """Refuse labels that only one of both has, and others than rows' that differ."""
    for name, one in theirs.items():
        if name not in old.arrays and name not in runs:
            raise _refused(f"it has no label {name!r}")
        if one.dims[0] not in grows and not np.array_equal(old.values(name), one.values):
            raise _refused(f"{name!r} is {old.values(name).tolist()!r:.80} there")
    others = {f"{name}_present" for name in old.of_values} | old.of_values | runs
    for name, said in old.arrays.items():
        known = "/" in name or name in theirs or name in others
        if not known and (said["dimension_names"] or [""])[0] in grows:
            raise _refused(f"they have no label {name!r}")


def _joined_label(
    new: Coordinate, mine: NDArray[Any], ragged: layout.Ragged | None, old: _Old
) -> Coordinate:
    theirs = new.values
    if ragged is not None and new.name == f"{ragged.name}_offset":
        theirs = theirs + old.arrays[ragged.values_name]["shape"][0]
    if ragged is not None and new.name == f"{ragged.name}_shape":
        width = max(mine.shape[1], theirs.shape[1])
        mine, theirs = (
            np.pad(one, ((0, 0), (0, width - one.shape[1])), constant_values=-1)
            for one in (mine, theirs)
        )
    if mine.dtype != theirs.dtype:
        raise _refused(f"label {new.name!r} is {mine.dtype} there, {theirs.dtype} in the logs")
    return Coordinate(new.name, new.dims, np.concatenate([mine, theirs]))


def _table(group: str, columns: Mapping[str, NDArray[Any]], old: _Old) -> dict[str, NDArray[Any]]:
    """Give a table with the archive's lines before the logs'."""
    found = {
        name: np.concatenate([old.values(f"{group}/{name}"), theirs])
        for name, theirs in columns.items()
        if name != RUN
    }
    count, whole = (len(next(iter(one.values()))) for one in (columns, found))
    name = f"{group}/{RUN}"
    mine = old.values(name) if name in old.arrays else np.zeros(whole - count, np.int64)
    found[RUN] = np.append(mine, columns.get(RUN, np.zeros(count, np.int64)) + old.runs)
    return found
