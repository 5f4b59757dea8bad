"""Owns which packets are rows of a token axis, which are ragged, and which sites are aliases.

A packet aligns by its leading dimensions alone, and only where they leave no doubt; nothing is
guessed by size where two axes match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.packet import Axis, LayerInfo, PassInfo

__all__ = ["Aligned", "Alignment", "Packets", "RowTable", "align", "merge_aliases"]

Integers = NDArray[np.int64]

#: Sites whose packets may hold only the last ``logits_to_keep`` positions.
_HEADS: Final = ("logits", "output")
#: Of sites that hold the same, the first of these names it.
_CANONICAL: Final = ("embed", "resid", "attn", "cross_attn", "mlp", "final_norm", "logits")


class Packets(Protocol):
    """The columns of a packet table that planning needs; see the log's ``PacketTable``."""

    @property
    def seq(self) -> Integers: ...  # noqa: D102
    @property
    def pass_index(self) -> Integers: ...  # noqa: D102
    @property
    def call(self) -> Integers: ...  # noqa: D102
    @property
    def layer(self) -> Integers: ...  # noqa: D102
    @property
    def dtype(self) -> Integers: ...  # noqa: D102
    @property
    def shape(self) -> Integers: ...  # noqa: D102
    @property
    def width(self) -> Integers: ...  # noqa: D102
    @property
    def alias_of(self) -> Integers: ...  # noqa: D102
    @property
    def part(self) -> Integers: ...  # noqa: D102
    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]: ...  # noqa: D102


@dataclass(frozen=True, slots=True, eq=False)
class RowTable:
    """The rows of a token axis: pass, batch item, position in the sequence.

    Attributes
    ----------
    axis : str
        Its name.
    rows : int
        How many, in all passes.
    start : mapping of int to int
        Pass -> its first row.
    shapes : mapping of int to Axis
        Pass -> its axis.
    """

    axis: str
    rows: int
    start: Mapping[int, int]
    shapes: Mapping[int, Axis]


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """The packets of one layer, of one form, that are rows.

    Attributes
    ----------
    info : LayerInfo
        The layer.
    axis : str
        The token axis.
    trailing : tuple of int
        The shape of a row.
    dtype : int
        dtype code.
    width : int
        The width before sampling, or 0.
    call : int
        The how-manieth firing in its pass.
    segments : tuple of numpy.ndarray
        Packet, source, start, count; sorted by start.
    """

    info: LayerInfo
    axis: str
    trailing: tuple[int, ...]
    dtype: int
    width: int
    call: int
    segments: tuple[Integers, Integers, Integers, Integers]

    @property
    def form(self) -> tuple[str, tuple[int, ...], int, int]:
        """What all packets of a variable have in common."""
        return self.axis, self.trailing, self.dtype, self.width


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """What aligns, and what doesn't: (site, dtype code, packets, block of each)."""

    aligned: tuple[Aligned, ...]
    ragged: tuple[tuple[str, int, Integers, Integers], ...]


@dataclass(frozen=True, slots=True)
class _Fit:
    """How packets of one shape lie on an axis."""

    axis: Axis
    last: int
    trailing: tuple[int, ...]


def align(
    layers: Sequence[LayerInfo],
    passes: Sequence[PassInfo],
    tables: Mapping[str, RowTable],
    packets: Packets,
) -> Alignment:
    """Sort the packets of some layers into rows of the token axes, and ragged ones."""
    whole = np.flatnonzero(packets.part == 0)
    kinds = _pass_kinds(passes)
    kind_of_pass = np.full(max((one.index for one in passes), default=-1) + 2, -1, np.int64)
    for index, (kind, _) in kinds.items():
        kind_of_pass[index] = kind
    example = dict(kinds.values())
    aligned: list[Aligned] = []
    ragged: dict[tuple[str, int], list[tuple[Integers, int]]] = {}
    for info in layers:
        rows = whole[packets.layer[whole] == info.id]
        kind = kind_of_pass[np.minimum(packets.pass_index[rows], kind_of_pass.size - 1)]
        columns = (kind, packets.shape[rows], packets.dtype[rows], packets.width[rows])
        keys = np.stack((*columns, packets.call[rows]), axis=1)
        forms: dict[tuple[object, ...], list[tuple[Integers, _Fit]]] = {}
        unique, inverse = np.unique(keys, axis=0, return_inverse=True)
        for number, (one, shape, code, width, call) in enumerate(unique.tolist()):
            mine = rows[inverse.reshape(-1) == number]
            fit = _fit(packets.shapes[shape], example.get(one), info)
            if fit is None:
                ragged.setdefault((info.site, code), []).append((mine, info.block))
            else:
                form = (fit.axis.name, fit.trailing, code, width, call)
                forms.setdefault(form, []).append((mine, fit))
        for (axis, trailing, code, width, call), found in forms.items():
            table = tables[str(axis)]
            segments = _segments(found, table, packets)
            aligned.append(Aligned(info, axis, trailing, code, width, call, segments))  # type: ignore[arg-type]
    return Alignment(tuple(aligned), tuple(_ragged(key, mine) for key, mine in ragged.items()))


def _pass_kinds(passes: Sequence[PassInfo]) -> dict[int, tuple[int, PassInfo]]:
    """Sort the passes by what their packets can align with: axes and ``logits_to_keep``."""
    numbers: dict[object, int] = {}
    kinds = {}
    for info in passes:
        axes = tuple((one.name, one.batch, one.sequence, one.flat) for one in info.axes)
        kinds[info.index] = (numbers.setdefault((axes, info.logits_to_keep), len(numbers)), info)
    return kinds


def _fit(shape: tuple[int, ...], info: PassInfo | None, layer: LayerInfo) -> _Fit | None:
    """Lay a shape on the one axis of a pass that it fits; None where there is doubt."""
    if info is None:
        return None
    found = [fit for axis in info.axes if (fit := _lay(shape, axis, info, layer.site))]
    if len(found) > 1:  # of two axes of one size, the site's own name decides
        side = layer.site.partition("_")[0]
        found = [fit for fit in found if fit.axis.name == f"{side}_token"]
    return found[0] if len(found) == 1 else None


def _lay(shape: tuple[int, ...], axis: Axis, info: PassInfo, site: str) -> _Fit | None:
    batch, sequence = axis.batch, axis.sequence
    if not axis.flat and shape[:2] == (batch, sequence):
        return _Fit(axis, sequence, shape[2:])
    if (axis.flat or sequence > 1) and shape[:1] == (batch * sequence,):
        return _Fit(axis, sequence, shape[1:])
    keep = info.logits_to_keep
    if site in _HEADS and 0 < keep < sequence and shape[:2] == (batch, keep):
        return _Fit(axis, keep, shape[2:])
    return None


def _segments(
    found: Sequence[tuple[Integers, _Fit]], table: RowTable, packets: Packets
) -> tuple[Integers, Integers, Integers, Integers]:
    """Give where the rows of packets come from; of a head with the last rows only, per item."""
    parts = []
    for mine, fit in found:
        batch, sequence, last = fit.axis.batch, fit.axis.sequence, fit.last
        starts = np.array([table.start[index] for index in packets.pass_index[mine].tolist()])
        items, count = (1, batch * sequence) if last == sequence else (batch, last)
        item = np.arange(items)
        source = np.broadcast_to(item * last, (mine.size, items))
        offset = item * sequence + sequence - last
        start = starts.reshape(-1, 1) + offset
        packet = np.broadcast_to(mine.reshape(-1, 1), start.shape)
        parts.append((packet.ravel(), source.ravel(), start.ravel(), np.full(start.size, count)))
    columns = [np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[2], kind="stable")
    order = order[columns[3][order] > 0]
    return columns[0][order], columns[1][order], columns[2][order], columns[3][order]


def _ragged(
    key: tuple[str, int], mine: Sequence[tuple[Integers, int]]
) -> tuple[str, int, Integers, Integers]:
    rows = np.concatenate([rows for rows, _ in mine])
    blocks = np.concatenate([np.full(rows.size, block, np.int64) for rows, block in mine])
    order = np.argsort(rows, kind="stable")
    return *key, rows[order], blocks[order]


def merge_aliases(layers: Sequence[LayerInfo], packets: Packets) -> dict[str, str]:
    """Find the sites that hold, packet by packet, what another site holds.

    Returns
    -------
    dict
        Site -> the site that is written for it; the canonical name wins.
    """
    whole = np.flatnonzero(packets.part == 0)
    info_of = {info.id: info for info in layers}
    pairs: dict[str, str] = {}
    sites: dict[str, list[LayerInfo]] = {}
    for info in layers:
        sites.setdefault(info.site, []).append(info)
    for site, mine in sites.items():
        target = _only_target(mine, sites, info_of, packets, whole)
        if target is not None:
            pairs[site] = target
    groups: dict[str, list[str]] = {}
    for site in pairs:
        end = site
        while end in pairs:
            end = pairs[end]
        groups.setdefault(end, [end]).append(site)
    result: dict[str, str] = {}
    for group in groups.values():
        keeper = next((name for name in _CANONICAL if name in group), group[0])
        result |= {name: keeper for name in group if name != keeper}
    return result


def _only_target(
    mine: Sequence[LayerInfo],
    sites: Mapping[str, Sequence[LayerInfo]],
    info_of: Mapping[int, LayerInfo],
    packets: Packets,
    whole: Integers,
) -> str | None:
    """Give the one site whose packets a site's packets all alias, one for one, block by block."""
    targets = [_target(info, info_of, packets, whole) for info in mine]
    names = {target.site if target else None for target in targets}
    if len(names) != 1 or None in names or mine[0].site in names:
        return None
    (name,) = names
    return name if name is not None and len(targets) == len(sites[name]) else None


def _target(
    info: LayerInfo, info_of: Mapping[int, LayerInfo], packets: Packets, whole: Integers
) -> LayerInfo | None:
    """Give the layer of the same block whose packets a layer's packets all alias, one for one."""
    rows = whole[packets.layer[whole] == info.id]
    alias_of = packets.alias_of[rows]
    if not rows.size or np.any(alias_of < 0):
        return None
    places = np.searchsorted(packets.seq, alias_of).clip(max=packets.seq.size - 1)
    target = info_of.get(int(packets.layer[places[0]]))
    if target is None or target.block != info.block:
        return None
    holds = (
        np.array_equal(packets.seq[places], alias_of)
        and bool(np.all(packets.layer[places] == target.id))
        and np.array_equal(packets.call[places], packets.call[rows])
        and np.unique(alias_of).size == alias_of.size
        and int((packets.layer[whole] == target.id).sum()) == rows.size
    )
    return target if holds else None
