"""Owns whose packets a layer's are, where several processes ran one model: one's, or all's parts.

What the packets then are is ``united.py``'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreWarning, ConfigError
from actstore.packet import LayerInfo
from actstore.parallel import Parallel
from actstore.stream.reader import StreamReader

__all__ = ["Member", "Part", "decide"]

#: What stands in a stage for a block that another has.
_PLACEHOLDERS: Final = ("Identity", "PipelineIdentityLayer")
_NAMED: Final = 4


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """The log of one process, and where that stands."""

    reader: StreamReader
    parallel: Parallel

    def __str__(self) -> str:
        return f"{self.reader.path} ({self.parallel})"

    def layers(self) -> list[str]:
        """Give the names of the layers that have packets."""
        known = set(np.unique(self.reader.table.layer).tolist())
        return [name for name, info in self.reader.layers.items() if info.id in known]

    def rows(self, name: str) -> NDArray[np.int64]:
        """Give a layer's packets: rows of the log's table, by pass and call."""
        table = self.reader.table
        mine = table.whole() & (table.layer == self.reader.layers[name].id)
        rows = np.flatnonzero(mine)
        return rows[np.lexsort((table.call[rows], table.pass_index[rows]))]

    def firings(self, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Give of packets the pass, and which call in it."""
        table = self.reader.table
        return list(zip(table.pass_index[rows].tolist(), table.call[rows].tolist(), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A layer of the united log.

    Attributes
    ----------
    info : LayerInfo
        The layer; its id is not yet the united log's.
    own : str
        What the logs call it.
    members : tuple of int
        Whose packets it has; several: each of them has a part, in this order.
    dim : int
        Along which dimension, counted from the last.
    twins : tuple of int
        Who else has the same packets.
    """

    info: LayerInfo
    own: str
    members: tuple[int, ...]
    dim: int = 0
    twins: tuple[int, ...] = ()

    def apart(self, end: str) -> Part:
        """Give it as a layer of its own, of another name."""
        info = self.info
        named = replace(info, name=f"{info.name}{end}", site=f"{info.site}{end}")
        return replace(self, info=named)


def decide(members: Sequence[Member], *, whole: bool) -> list[Part]:
    """Say whose packets each layer has.

    Parameters
    ----------
    members : sequence of Member
        By stage, then by place on the tensor axis.
    whole : bool
        There is one for every place.

    Raises
    ------
    ConfigError
        They say what can't be together.
    """
    stages: dict[int, list[int]] = {}
    fired = [one.layers() for one in members]
    for number, one in enumerate(members):
        stages.setdefault(one.parallel.pipeline[0], []).append(number)
    found: list[list[Part]] = []
    for mine in stages.values():
        holders: dict[str, list[int]] = {}
        for number in mine:
            for name in fired[number]:
                holders.setdefault(name, []).append(number)
        parts = [_of_stage(*held, members, mine, whole=whole) for held in holders.items()]
        found.append([part for several in parts for part in several])
    result = _of_stages(found, members)
    apart = [one for one in result if one.info.name != one.own]
    if apart:
        _warn(members, apart)
    return result


def _of_stage(
    name: str,
    holders: Sequence[int],
    members: Sequence[Member],
    stage: Sequence[int],
    *,
    whole: bool,
) -> list[Part]:
    """Say whose packets a layer has among those that have the same layers."""
    infos = [members[one].reader.layers[name] for one in holders]
    first = infos[0]
    _check_same(name, members, holders)
    if members[holders[0]].parallel.tensor[1] == 1:
        return [Part(first, name, (holders[0],))]
    if all(info.shard is None for info in infos):
        if all(_alike(name, members, holders[0], one) for one in holders[1:]):
            return [Part(first, name, (holders[0],), twins=tuple(holders[1:]))]
    elif all(info.shard and not info.shard.partial for info in infos):
        complete = len(holders) == members[holders[0]].parallel.tensor[1]
        if complete:
            return [_sharded(name, members, holders)]
        if whole:
            missing = [str(members[one]) for one in stage if one not in holders]
            msg = (
                f"layer {name!r} is divided among processes, but it never fired in "
                f"{', '.join(missing)}; with ranks='given' its parts are kept apart"
            )
            raise ConfigError(msg)
    return [
        Part(info, name, (one,)).apart(f"@tensor{members[one].parallel.tensor[0]}")
        for one, info in zip(holders, infos, strict=True)
    ]


def _check_same(name: str, members: Sequence[Member], holders: Sequence[int]) -> None:
    first = members[holders[0]].reader.layers[name]
    for one in holders[1:]:
        info = members[one].reader.layers[name]
        if (info.site, info.block) != (first.site, first.block):
            msg = (
                f"layer {name!r} is site {first.site!r} of block {first.block} in "
                f"{members[holders[0]]}, and {info.site!r} of {info.block} in {members[one]}: "
                "they ran different models"
            )
            raise ConfigError(msg)


def _sharded(name: str, members: Sequence[Member], holders: Sequence[int]) -> Part:
    """Give a layer of parts, in order; those that are known must make a whole."""
    shards = {one: members[one].reader.layers[name].shard for one in holders}
    known = {one: shard for one, shard in shards.items() if shard is not None}
    dims = {shard.dim for shard in known.values()}
    if len(known) < len(holders) or len(dims) > 1:
        said = "; ".join(f"{members[one]}: {shards[one]}" for one in holders)
        msg = f"processes divide layer {name!r} differently: {said}; they can't be put together"
        raise ConfigError(msg)
    order = sorted(holders, key=lambda one: known[one].offset or 0)
    return Part(members[holders[0]].reader.layers[name], name, tuple(order), dims.pop())


def _alike(name: str, members: Sequence[Member], one: int, other: int) -> bool:
    """Whether two have the same values of a layer, as its first and last common packets tell."""
    a, b = members[one].reader, members[other].reader
    mine, theirs = members[one].rows(name), members[other].rows(name)
    places = dict(zip(members[other].firings(theirs), theirs.tolist(), strict=True))
    both = [
        (row, places[fired])
        for row, fired in zip(mine.tolist(), members[one].firings(mine), strict=True)
        if fired in places
    ]
    for row, twin in dict.fromkeys([*both[:1], *both[-1:]]):
        shapes = a.table.shapes[a.table.shape[row]], b.table.shapes[b.table.shape[twin]]
        if shapes[0] != shapes[1] or a.table.dtype[row] != b.table.dtype[twin]:
            return False
        if a.values(row).tobytes() != b.values(twin).tobytes():
            return False
    return True


def _of_stages(stages: Sequence[Sequence[Part]], members: Sequence[Member]) -> list[Part]:
    """Put the layers of stages together: what several have is a container's, or the same."""
    named: dict[str, list[Part]] = {}
    for parts in stages:
        for part in parts:
            named.setdefault(part.info.name, []).append(part)
    result: list[Part] = []
    for parts in named.values():
        if len(parts) > 1:
            real = [one for one in parts if one.info.kind not in _PLACEHOLDERS]
            result += _of_several(real or parts[:1], named, members)
        else:
            result += parts
    return result


def _of_several(
    parts: Sequence[Part], named: Mapping[str, Sequence[Part]], members: Sequence[Member]
) -> list[Part]:
    """Say whose a layer is that several stages have."""
    first, others = parts[0], parts[1:]
    stem = first.own.partition("@")[0].partition("#")[0]
    if not others:
        return [first]
    if any(stem == "" or other.startswith(f"{stem}.") for other in named):
        return [first if first.own.endswith("@in") else parts[-1]]
    if all(_same(first, one, members) for one in others):
        twins = [number for one in others for number in (*one.members, *one.twins)]
        return [replace(first, twins=(*first.twins, *twins))]
    if first.info.block >= 0:
        told = " and ".join(str(members[one.members[0]]) for one in parts)
        msg = (
            f"layer {first.info.name!r} is in {told}, with other values: name the blocks of a "
            "stage as the whole model does, with Parallel(first_block=...) where they are counted "
            "from 0"
        )
        raise ConfigError(msg)
    return [one.apart(f"@pipeline{members[one.members[0]].parallel.pipeline[0]}") for one in parts]


def _same(one: Part, other: Part, members: Sequence[Member]) -> bool:
    """Whether two stages have the same values of a layer, or the same parts of it."""
    pairs = list(zip(one.members, other.members, strict=False))
    as_many = len(one.members) == len(other.members)
    return as_many and all(_alike(one.own, members, *pair) for pair in pairs)


def _warn(members: Sequence[Member], apart: Sequence[Part]) -> None:
    names, made = list(dict.fromkeys(one.own for one in apart)), [one.info.name for one in apart]
    of_parts = any(one.info.shard is not None for one in apart)
    why = "are parts or summands that can't be put together" if of_parts else (
        "differ, and nothing says which part each process has of them"
    )  # fmt: skip
    warnings.warn(
        f"{len(names)} layers of {members[apart[0].members[0]]} and the others {why}: "
        f"{_listed(names)}; they are kept apart, as layers {_listed(made)}; say how they are "
        "divided at capture, with Parallel(sharded={...: -1})",
        ActstoreWarning,
        stacklevel=2,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
