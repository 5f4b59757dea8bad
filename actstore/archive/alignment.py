"""Owns which packets are rows of a token axis, which are ragged, and which sites are aliases.

A packet aligns by its leading dimensions alone, and only where they leave no doubt; nothing is
guessed by size where two axes match.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore import dtypes
from actstore.archive.grid import Segments
from actstore.packet import Axis, LayerInfo, PassInfo, axis_of_site, is_weights

__all__ = [
    "CANONICAL",
    "Aligned",
    "Alignment",
    "Loose",
    "Packets",
    "RowTable",
    "align",
    "axes_of",
    "merge_aliases",
    "packets_of",
]

Integers = NDArray[np.int64]

#: Of sites that hold the same, the first of these names it.
CANONICAL: Final = ("embed", "resid", "attn", "cross_attn", "mlp", "final_norm", "logits")
#: Sites whose packets may hold only the last ``logits_to_keep`` positions.
_HEADS: Final = ("logits", "output")
_ROW_LIMIT: Final = 1 << 30  # bytes: an inner chunk holds at least one row, and Blosc 2 GiB


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
    dim, prefix : str
        The dimension's name, and what its coordinates' names begin with.
    rows : int
        How many, in all passes.
    passes, starts : numpy.ndarray
        int64: the passes that have rows, ascending, and the first row of each.
    axes : tuple of Axis
        The axis of each.
    """

    dim: str
    prefix: str
    rows: int
    passes: Integers
    starts: Integers
    axes: tuple[Axis, ...]

    def start_of(self, passes: Integers) -> Integers:
        """Give the first rows of passes that have rows."""
        return self.starts[np.searchsorted(self.passes, passes)]


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """The packets of one layer, of one form, that are rows.

    Attributes
    ----------
    info : LayerInfo
        The layer.
    axis : str
        The token axis, as the log names it.
    trailing : tuple of int
        The shape of a row.
    dtype : int
        dtype code.
    width : int
        The width before sampling, or 0.
    call : int
        The how-manieth firing in its pass.
    segments : Segments
        Where the rows come from; at least one.
    """

    info: LayerInfo
    axis: str
    trailing: tuple[int, ...]
    dtype: int
    width: int
    call: int
    segments: Segments

    @property
    def form(self) -> tuple[str, tuple[int, ...], int, int]:
        """What all packets of a variable have in common."""
        return self.axis, self.trailing, self.dtype, self.width


@dataclass(frozen=True, slots=True, eq=False)
class Loose:
    """Packets of one site and dtype that don't align.

    Attributes
    ----------
    site : str
        The site.
    dtype : int
        dtype code.
    rows : numpy.ndarray
        int64: rows of the packet table, in capture order.
    blocks : numpy.ndarray
        int64: the block index of each one's layer, or -1.
    modules : mapping of int to str
        Block index -> the layer's name.
    """

    site: str
    dtype: int
    rows: Integers
    blocks: Integers
    modules: Mapping[int, str]


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """What aligns, and what doesn't."""

    aligned: tuple[Aligned, ...]
    loose: tuple[Loose, ...]


@dataclass(frozen=True, slots=True)
class _Fit:
    """How packets of one shape lie on an axis: of each item, the last ``last`` rows."""

    axis: Axis
    last: int
    trailing: tuple[int, ...]


def axes_of(info: PassInfo) -> dict[str, Axis]:
    """Give the axes of a pass by name: those that have rows, the first of a name."""
    found: dict[str, Axis] = {}
    for axis in info.axes:
        if axis.rows:
            found.setdefault(axis.name, axis)
    return found


def packets_of(packets: Packets) -> dict[int, Integers]:
    """Give each layer's packets: rows of the table, in capture order, one for each packet."""
    whole = np.flatnonzero(packets.part == 0)
    order = whole[np.argsort(packets.layer[whole], kind="stable")]
    ids, starts = np.unique(packets.layer[order], return_index=True)
    return dict(zip(ids.tolist(), np.split(order, starts[1:]), strict=False))


def align(
    layers: Sequence[LayerInfo],
    passes: Sequence[PassInfo],
    tables: Mapping[str, RowTable],
    packets: Packets,
) -> Alignment:
    """Sort the packets of some layers into rows of the token axes, and loose ones.

    Parameters
    ----------
    layers : sequence of LayerInfo
        No two of them with the same site and block.
    passes : sequence of PassInfo
        In the order of their indices.
    tables : mapping of str to RowTable
        The rows of each axis, by the name that the log gives it.
    packets : Packets
        Their table.
    """
    kinds = _Kinds(passes)
    rows_of = packets_of(packets)
    aligned: list[Aligned] = []
    loose: dict[tuple[str, int], list[tuple[Integers, LayerInfo]]] = {}
    for info in layers:
        forms: dict[tuple[str, tuple[int, ...], int, int, int], list[tuple[Integers, _Fit]]] = {}
        for mine, example, shape, code, width, call in _alike(info, rows_of, packets, kinds):
            fit = _fit(packets.shapes[shape], example, info.site)
            if fit is None or not _holds_rows(fit, code):
                loose.setdefault((info.site, code), []).append((mine, info))
            else:
                form = (fit.axis.name, fit.trailing, code, width, call)
                forms.setdefault(form, []).append((mine, fit))
        for (axis, trailing, code, width, call), found in forms.items():
            segments = _segments(found, tables[axis], packets)
            aligned.append(Aligned(info, axis, trailing, code, width, call, segments))
    return Alignment(tuple(aligned), tuple(_loose(*key, mine) for key, mine in loose.items()))


class _Kinds:
    """Sorts passes by what their packets can align with: axes and ``logits_to_keep``."""

    def __init__(self, passes: Sequence[PassInfo]) -> None:
        numbers: dict[object, int] = {}
        self.examples: dict[int, PassInfo] = {}
        kinds = []
        for info in passes:
            axes = tuple((one.name, one.batch, one.sequence, one.flat) for one in info.axes)
            kind = numbers.setdefault((axes, info.logits_to_keep), len(numbers))
            self.examples.setdefault(kind, info)
            kinds.append(kind)
        self._index = np.array([info.index for info in passes], np.int64)
        self._kinds = np.array(kinds, np.int64)

    def of(self, passes: Integers) -> Integers:
        """Give the kinds of passes; -1 where a pass is not known."""
        if not self._index.size:
            return np.full(passes.size, -1, np.int64)
        place = np.searchsorted(self._index, passes).clip(max=self._index.size - 1)
        return np.where(self._index[place] == passes, self._kinds[place], -1)


def _alike(
    info: LayerInfo, rows_of: Mapping[int, Integers], packets: Packets, kinds: _Kinds
) -> list[tuple[Integers, PassInfo | None, int, int, int, int]]:
    """Put a layer's packets together by all that decides where they go.

    Of two packets that claim to be the same firing, the later goes with no pass.
    """
    rows = rows_of.get(info.id, np.zeros(0, np.int64))
    index, calls = packets.pass_index[rows], packets.call[rows]
    order = np.lexsort((rows, calls, index))
    again = np.zeros(rows.size, np.bool_)
    again[order[1:]] = (np.diff(index[order]) == 0) & (np.diff(calls[order]) == 0)
    kind = np.where(again, -1, kinds.of(index))
    columns = (kind, packets.shape[rows], packets.dtype[rows], packets.width[rows], calls)
    unique, inverse = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    return [
        (rows[inverse.reshape(-1) == number], kinds.examples.get(one), shape, code, width, call)
        for number, (one, shape, code, width, call) in enumerate(unique.tolist())
    ]


def _fit(shape: tuple[int, ...], info: PassInfo | None, site: str) -> _Fit | None:
    """Lay a shape on the one axis of a pass that it fits; None where there is doubt."""
    if info is None:
        return None
    axes = axes_of(info).values()
    found = [fit for axis in axes if (fit := _lay(shape, axis, info.logits_to_keep, site))]
    if len(found) > 1:  # of two axes of one size, the site's own name decides
        side = axis_of_site(site, (fit.axis.name for fit in found))
        found = [fit for fit in found if fit.axis.name == side]
    return found[0] if len(found) == 1 else None


def _lay(shape: tuple[int, ...], axis: Axis, keep: int, site: str) -> _Fit | None:
    batch, sequence = axis.batch, axis.sequence
    if is_weights(site, len(shape)):
        return None
    if not axis.flat and shape[:2] == (batch, sequence):
        return _Fit(axis, sequence, shape[2:])
    if (axis.flat or sequence > 1) and shape[:1] == (batch * sequence,):
        return _Fit(axis, sequence, shape[1:])
    if site in _HEADS and 0 < keep < sequence and shape[:2] == (batch, keep):
        return _Fit(axis, keep, shape[2:])
    return None


def _holds_rows(fit: _Fit, code: int) -> bool:
    """Whether a row is something that an array can hold: neither nothing nor beyond a chunk."""
    size = math.prod(fit.trailing) * dtypes.from_code(code).array.itemsize
    return 0 < size <= _ROW_LIMIT


def _segments(
    found: Sequence[tuple[Integers, _Fit]], table: RowTable, packets: Packets
) -> Segments:
    """Give where the rows of packets come from; of a head with the last rows only, per item."""
    parts = []
    for mine, fit in found:
        batch, sequence, last = fit.axis.batch, fit.axis.sequence, fit.last
        items, count = (1, batch * sequence) if last == sequence else (batch, last)
        item = np.arange(items)
        source = np.broadcast_to(item * last, (mine.size, items))
        starts = table.start_of(packets.pass_index[mine])
        start = starts.reshape(-1, 1) + (item * sequence + sequence - last)
        packet = np.broadcast_to(mine.reshape(-1, 1), start.shape)
        parts.append((packet.ravel(), source.ravel(), start.ravel(), np.full(start.size, count)))
    columns = [np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[2], kind="stable")
    return Segments(*(column[order] for column in columns))


def _loose(site: str, code: int, mine: Sequence[tuple[Integers, LayerInfo]]) -> Loose:
    rows = np.concatenate([rows for rows, _ in mine])
    blocks = np.concatenate([np.full(rows.size, info.block, np.int64) for rows, info in mine])
    order = np.argsort(rows, kind="stable")
    modules = {info.block: info.name for _, info in mine}
    return Loose(site, code, rows[order], blocks[order], modules)


def merge_aliases(layers: Sequence[LayerInfo], packets: Packets) -> dict[str, str]:
    """Find the sites that hold, packet by packet, what another site holds.

    Returns
    -------
    dict
        Site -> the site that is written for it; the canonical name wins.
    """
    rows_of = packets_of(packets)
    info_of = {info.id: info for info in layers}
    sites: dict[str, list[LayerInfo]] = {}
    for info in layers:
        sites.setdefault(info.site, []).append(info)
    pairs: dict[str, str] = {}
    for site, mine in sites.items():
        targets = [_target(info, info_of, packets, rows_of) for info in mine]
        names = {target.site if target else None for target in targets}
        name = names.pop() if len(names) == 1 else None
        if name is not None and name != site and len(targets) == len(sites[name]):
            pairs[site] = name
    groups: dict[str, list[str]] = {}
    for site in pairs:
        end = site
        while end in pairs:
            end = pairs[end]
        groups.setdefault(end, [end]).append(site)
    result: dict[str, str] = {}
    for group in groups.values():
        known = sorted(_rank(name) for name in group)
        keeper = known[0][1] if known[0][0] < len(CANONICAL) else group[0]
        result |= {name: keeper for name in group if name != keeper}
    return result


def _rank(site: str) -> tuple[int, str]:
    """Give a site's place among the canonical ones, also of one stack (``encoder_attn``)."""
    ends = (
        place for place, one in enumerate(CANONICAL) if site == one or site.endswith(f"_{one}")
    )
    return next(ends, len(CANONICAL)), site


def _target(
    info: LayerInfo,
    info_of: Mapping[int, LayerInfo],
    packets: Packets,
    rows_of: Mapping[int, Integers],
) -> LayerInfo | None:
    """Give the layer of the same block whose packets a layer's packets all alias, one for one."""
    rows = rows_of.get(info.id, np.zeros(0, np.int64))
    alias_of = packets.alias_of[rows]
    if not rows.size or np.any(alias_of < 0):
        return None
    places = np.searchsorted(packets.seq, alias_of).clip(max=packets.seq.size - 1)
    target = info_of.get(int(packets.layer[places[0]]))
    if target is None or target.block != info.block:
        return None
    holds = np.array_equal(places, rows_of[target.id]) and all(
        np.array_equal(column[places], column[rows])
        for column in (
            packets.pass_index,
            packets.call,
            packets.dtype,
            packets.shape,
            packets.width,
        )
    )
    return target if holds and np.array_equal(packets.seq[places], alias_of) else None
