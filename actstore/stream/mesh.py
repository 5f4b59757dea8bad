"""Owns which logs are of one run on several processes, and whether all of its mesh are there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from actstore.buckets import RemotePath
from actstore.errors import ConfigError
from actstore.parallel import AXES, Parallel
from actstore.stream.parts import Member
from actstore.stream.reader import StreamReader
from actstore.stream.united import UnitedReader, passes_of

__all__ = ["RANKS", "replicas"]

#: What is done where processes, or passes of some, are missing.
RANKS: Final = ("all", "common", "given")
_NAMED: Final = 8


def replicas(readers: Sequence[StreamReader], ranks: str) -> list[StreamReader | UnitedReader]:
    """Unite the logs of the processes that ran one model; what is left is one behind the other.

    Parameters
    ----------
    readers : sequence of StreamReader
        The logs.
    ranks : {"all", "common", "given"}
        Refuse runs of which processes or passes are missing; keep the passes that all have; or
        take the processes that there are, and the passes that all of these have.

    Returns
    -------
    list
        A reader for each run and data-parallel replica: runs in the order in which they are
        first given, replicas by their place.

    Raises
    ------
    ConfigError
        A process is missing, or given twice; or its log contradicts the others'.
    FormatError
        A HEADER can't be understood.
    """
    if ranks not in RANKS:
        msg = f"ranks must be one of {', '.join(map(repr, RANKS))}; got {ranks!r}"
        raise ConfigError(msg)
    _check_twice(readers)
    runs: dict[Any, list[Member]] = {}
    for number, reader in enumerate(readers):
        parallel = Parallel.of(reader.header)
        run = number if parallel is None else (parallel.run_id,)
        if parallel is None and ranks != "given" and len(readers) > 1:
            _check_undivided(reader)
        runs.setdefault(run, []).append(Member(reader, parallel or Parallel()))
    return [one for members in runs.values() for one in _replicas(members, ranks)]


def _check_undivided(reader: StreamReader) -> None:
    """Refuse a log, among others, that has parts of layers, but doesn't say where it stands."""
    for name, info in reader.layers.items():
        if info.shard is not None:
            msg = (
                f"layer {name!r} of {reader.path} is divided among processes, and its HEADER "
                "doesn't say among which: capture with instrument_model(parallel=...). "
                "ranks='given' takes each log as a run of its own"
            )
            raise ConfigError(msg)


def _replicas(members: Sequence[Member], ranks: str) -> list[StreamReader | UnitedReader]:
    """Give the replicas of one run."""
    _check_mesh(members)
    whole = ranks != "given"
    if whole:
        _check_complete(members)
    by_place: dict[int, list[Member]] = {}
    for one in sorted(members, key=lambda one: one.parallel.places):
        by_place.setdefault(one.parallel.data[0], []).append(one)
    return [
        UnitedReader(mine, common=ranks != "all", whole=whole)
        if mine[0].parallel.sizes[1:] != (1, 1)
        else mine[0].reader
        for mine in by_place.values()
    ]


def _check_twice(readers: Sequence[StreamReader]) -> None:
    seen: dict[Any, Path | RemotePath] = {}
    for one in readers:
        run = one.header.get("run_id", str(one.path.resolve()))
        if run in seen:
            msg = (
                f"{one.path} and {seen[run]} are logs of the same run {run!r}; give each run once"
            )
            raise ConfigError(msg)
        seen[run] = one.path


def _check_mesh(members: Sequence[Member]) -> None:
    """Refuse meshes that differ, and places that two logs have."""
    first = members[0]
    seen: dict[tuple[int, int, int], Member] = {}
    for one in members:
        if one.parallel.sizes != first.parallel.sizes:
            msg = (
                f"{one.reader.path} is of a mesh of {_mesh(one)}, {first.reader.path} of one of "
                f"{_mesh(first)}, but both are of run {one.parallel.run_id!r}: give each run of "
                "a model its own run_id"
            )
            raise ConfigError(msg)
        twin = seen.setdefault(one.parallel.places, one)
        if twin is not one:
            both = ", ".join(
                f"{mine.reader.path} with {passes_of(mine.reader)} passes" for mine in (twin, one)
            )
            msg = (
                f"{one.parallel} of run {one.parallel.run_id!r} is given twice: {both}. If the "
                "run was started again, give the logs of one of its starts, each with a run_id of "
                "its own, or go on with a log by resume_from_checkpoint=True"
            )
            raise ConfigError(msg)


def _check_complete(members: Sequence[Member]) -> None:
    """Refuse a run of which processes are missing."""
    first = members[0].parallel
    there = {one.parallel.places for one in members}
    lacking = math.prod(first.sizes) - len(there)
    if lacking:  # as many as a HEADER says: only those that are named are gone through
        every = itertools.product(*map(range, first.sizes))
        missing = itertools.islice((one for one in every if one not in there), _NAMED)
        pairs = [
            str(Parallel(*zip(places, first.sizes, strict=True)))  # type: ignore[arg-type]
            for places in missing
        ]
        more = f"; and {lacking - _NAMED} more" if lacking > _NAMED else ""
        msg = (
            f"of run {first.run_id!r}, on a mesh of {_mesh(members[0])}, there are "
            f"{len(members)} logs; missing: {'; '.join(pairs)}{more}. Give the logs of all "
            "processes; ranks='given' takes those that there are"
        )
        raise ConfigError(msg)


def _mesh(member: Member) -> str:
    return " × ".join(
        f"{axis} {size}" for axis, size in zip(AXES, member.parallel.sizes, strict=True)
    )
