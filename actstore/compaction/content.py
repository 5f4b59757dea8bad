"""Owns what an archive will hold, before any value is read: arrays, labels, shards to write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import actstore
from actstore.archive import layout
from actstore.archive.coordinates import pass_columns, token_columns
from actstore.archive.jobs import Job, Read
from actstore.archive.precision import Precision
from actstore.archive.root import VERSION
from actstore.archive.shuffling import Shuffle, reordered
from actstore.compaction.logs import (
    Reader,
    element_reader,
    headers_of,
    logs_of,
    plan_log,
    row_reader,
    runs_of,
)
from actstore.compaction.shuffling import Gather, Layer
from actstore.errors import ConfigError
from actstore.stream import summary

__all__ = ["Captured", "Content", "Wanted", "dense_jobs", "ragged_jobs", "shards_of"]

#: Of the log that are still held while shards are written.
_BLOCKS: Final = 64 << 20

#: A precision for all floats, or for the variables or sites whose names match.
Wanted = str | Precision | Mapping[str, str | Precision] | None


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """What an archive would hold in the order of its logs, and the order that it has instead."""

    plan: layout.Plan
    shuffle: Shuffle

    def shuffled(self) -> layout.Plan:
        """Give the plan in that order."""
        return reordered(self.plan, self.shuffle)


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
        The HEADER of each log; of logs that are united, the first one's.
    logs : tuple of mapping
        What ``provenance`` says of each.
    analysis : mapping
        Counts of all of them, as `summary.merge` gives them.
    precision : mapping of str to Precision
        Of the variables that give up some.
    captured : Captured or None
        What is shuffled, where the rows are.
    times : tuple of int
        Of logs that have no run id, which are told apart by little else: when each was written
        to, in ns.
    """

    plan: layout.Plan
    tables: Mapping[str, Mapping[str, NDArray[Any]]]
    runs: tuple[Mapping[str, Any], ...]
    logs: tuple[Mapping[str, Any], ...]
    analysis: Mapping[str, Any]
    precision: Mapping[str, Precision] = field(default_factory=dict)
    captured: Captured | None = None
    times: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        reader: Reader,
        tokenizer: Any = None,
        precision: Wanted = None,
        ranks: str = "all",
        seed: int | None = None,
    ) -> Content:
        """Plan the archive of a log, or of several; of a seed, with shuffled rows."""
        plan, logs, runs = plan_log(reader, tokenizer), logs_of(reader), runs_of(reader)
        captured = None if seed is None else Captured(plan, Shuffle.drawn(plan.rows, seed))
        return cls(
            plan if captured is None else captured.shuffled(),
            {
                "tokens": token_columns(reader.tokens, runs),
                "passes": pass_columns(reader.passes, runs),
            },
            headers_of(reader),
            tuple(
                {
                    "name": one.path.name,
                    "run_id": one.header.get("run_id"),
                    "bytes": one.file_bytes,
                    "complete": one.complete,
                }
                | ({"parallel": one.header["parallel"]} if "parallel" in one.header else {})
                | ({"ranks": ranks} if ranks != "all" else {})
                for one in logs
            ),
            summary.merge([summary.summarise(one) for one in logs])
            | {"passes": len(reader.passes), "tokens": len(reader.tokens)},
            _precisions(plan, precision),
            captured,
            tuple(one.path.stat().st_mtime_ns for one in logs if "run_id" not in one.header),
        )

    def shuffling_bytes(self, jobs: Sequence[Job]) -> int:
        """Give the bytes that shuffling takes beside threads: rows' places, decoded blocks."""
        if self.captured is None:
            return 0
        return 3 * self.captured.shuffle.nbytes + min(_BLOCKS, sum(job.raw_bytes for job in jobs))

    def jobs(self, reader: Reader) -> list[Job]:
        """Give the shards to write."""
        return list(shards_of(reader, self.plan, self.precision, self.captured))

    def fingerprint(self, jobs: Sequence[Job]) -> str:
        """Give what tells one making of an archive from another: the logs, plan and shards."""
        said = {
            "writer": actstore.__version__,
            "format": VERSION,
            "logs": self.logs,
            "times": self.times,
            "shards": [(one.file, one.shard.first, one.shard.last, one.raw_bytes) for one in jobs],
            "arrays": [
                (one.name, one.dims, one.shape, one.source.name) for one in self.plan.variables
            ],
            "precision": {name: str(one) for name, one in self.precision.items()},
        }
        if self.captured is not None:
            said["shuffle"] = self.captured.shuffle.seed
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def shards_of(
    reader: Reader,
    plan: layout.Plan,
    precision: Mapping[str, Precision],
    captured: Captured | None = None,
) -> Iterator[Job]:
    """Give the shards to write: those that hold anything."""
    if captured is None:
        for one in plan.variables:
            rows = [row_reader(reader, one, place) for place in range(len(one.modules))]
            reads = [partial(mine.read, fill=one.fill) if mine else None for mine in rows]
            yield from dense_jobs(one, reads, precision.get(one.name))
    else:
        for one, stored in zip(captured.plan.variables, plan.variables, strict=True):
            mine = precision.get(one.name)
            yield from _shuffled_jobs(reader, one, stored, captured.shuffle, mine)
    for ragged in plan.ragged:
        layers = reader.table.layer[ragged.packets]
        yield from ragged_jobs(ragged, layers, reader, element_reader(reader, ragged).read)


def _shuffled_jobs(
    reader: Reader,
    captured: layout.Variable,
    stored: layout.Variable,
    shuffle: Shuffle,
    precision: Precision | None,
) -> Iterator[Job]:
    """Give the shards of a variable whose rows are in another order than the logs'."""
    axis = stored.token_axis
    order, shard_rows = shuffle.orders[stored.dims[axis]], stored.shards[axis]
    reads: list[Gather | None] = []
    for place, segments in enumerate(captured.segments):
        rows = row_reader(reader, captured, place)
        reads.append(
            Gather(Layer(rows, segments, order, shard_rows, stored.fill))
            if rows is not None and segments is not None
            else None
        )
    for job in dense_jobs(stored, reads, precision):
        read = reads[(*job.place, 0)[0]]
        yield job if read is None else replace(job, beside=read.layer.beside)


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
