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
    """

    info: LayerInfo
    own: str
    members: tuple[int, ...]
    dim: int = 0


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
    apart: dict[str, list[int]] = {}
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
        parts = [_of_stage(*held, members, mine, apart, whole=whole) for held in holders.items()]
        found.append([part for several in parts for part in several])
    result = _of_stages(found, members, apart)
    if apart:
        _warn(members, apart)
    return result


def _of_stage(
    name: str,
    holders: Sequence[int],
    members: Sequence[Member],
    stage: Sequence[int],
    apart: dict[str, list[int]],
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
            return [Part(first, name, (holders[0],))]
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
    return _apart(name, members, holders, "tensor", apart)


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
    """Whether two have the same values of a layer, as far as its first and last packets tell."""
    mine, theirs = members[one].rows(name), members[other].rows(name)
    a, b = members[one].reader, members[other].reader
    ends = min(len(mine), len(theirs))
    for place in {0, ends - 1} if ends else ():
        row, twin = int(mine[place]), int(theirs[place])
        shapes = a.table.shapes[a.table.shape[row]], b.table.shapes[b.table.shape[twin]]
        if shapes[0] != shapes[1] or a.table.dtype[row] != b.table.dtype[twin]:
            return False
        if a.values(row).tobytes() != b.values(twin).tobytes():
            return False
    return True


def _apart(
    name: str,
    members: Sequence[Member],
    holders: Sequence[int],
    axis: str,
    apart: dict[str, list[int]],
) -> list[Part]:
    """Keep each one's packets as a layer of its own."""
    apart[name] = list(holders)
    parts = []
    for one in holders:
        info = members[one].reader.layers[name]
        end = f"@{axis}{getattr(members[one].parallel, axis)[0]}"
        named = replace(info, name=f"{info.name}{end}", site=f"{info.site}{end}")
        parts.append(Part(named, name, (one,)))
    return parts


def _of_stages(
    stages: Sequence[Sequence[Part]], members: Sequence[Member], apart: dict[str, list[int]]
) -> list[Part]:
    """Put the layers of stages together: what several have is a container's, or the same."""
    named: dict[str, list[Part]] = {}
    for parts in stages:
        for part in parts:
            named.setdefault(part.info.name, []).append(part)
    result: list[Part] = []
    for name, parts in named.items():
        if len(parts) > 1:
            real = [one for one in parts if one.info.kind not in _PLACEHOLDERS]
            result += _of_several(name, real or parts[:1], named, members, apart)
        else:
            result += parts
    return result


def _of_several(
    name: str,
    parts: Sequence[Part],
    named: Mapping[str, Sequence[Part]],
    members: Sequence[Member],
    apart: dict[str, list[int]],
) -> list[Part]:
    """Say whose a layer is that several stages have."""
    first, leaders = parts[0], [one.members[0] for one in parts]
    stem = name.partition("@")[0].partition("#")[0]
    if len(parts) == 1:
        return [first]
    if any(stem == "" or other.startswith(f"{stem}.") for other in named):
        return [first if name.endswith("@in") else parts[-1]]
    if all(_alike(first.own, members, leaders[0], one) for one in leaders[1:]):
        return [first]
    if first.info.block >= 0:
        told = " and ".join(str(members[one]) for one in leaders)
        msg = (
            f"layer {name!r} is in {told}, with other values: name the blocks of a stage as the "
            "whole model does, with Parallel(first_block=...) where they are counted from 0"
        )
        raise ConfigError(msg)
    return _apart(first.own, members, leaders, "pipeline", apart)


def _warn(members: Sequence[Member], apart: Mapping[str, Sequence[int]]) -> None:
    names = list(apart)
    shown = ", ".join(map(repr, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
    holders = next(iter(apart.values()))
    said = [one for name, several in apart.items() for one in several
            if members[one].reader.layers[name].shard is not None]  # fmt: skip
    why = "are parts or summands that can't be put together" if said else (
        "differ, and nothing says which part each process has of them"
    )  # fmt: skip
    warnings.warn(
        f"{len(names)} layers of {members[holders[0]]} and the others {why}: {shown}; they are "
        "kept apart, as layers named ...@tensor0, ...@tensor1; say how they are divided at "
        "capture, with Parallel(sharded={...: -1})",
        ActstoreWarning,
        stacklevel=2,
    )
