"""Owns the plan of a dataset: from a log's tables to variables, rows and coordinates; pure.

A log and the archive made from it are read by the same plan, so that both are the same dataset.
What aligns is decided in ``alignment.py``; reading values and writing them is for others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore import dtypes
from actstore.archive.alignment import Aligned, Packets, RowTable, align, merge_aliases
from actstore.archive.coordinates import Coordinate, coordinates, row_tables
from actstore.packet import LayerInfo, PassInfo, TokenRecord

__all__ = ["Plan", "Ragged", "Segments", "Source", "Variable", "chunk_rows", "plan"]

CHUNK_BYTES: Final = 1 << 20
SHARD_BYTES: Final = 64 << 20
#: Sites that live in the residual space, and share the dimension ``feature``.
RESIDUAL: Final = ("embed", "resid", "attn", "mlp", "final_norm")
_DIMENSIONS: Final = ("layer", "feature", "vocab")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The tables of a run: all that planning needs to know of it.

    Attributes
    ----------
    layers : sequence of LayerInfo
        Those that fired.
    passes : sequence of PassInfo
        In order.
    tokens : sequence of TokenRecord
        In order.
    packets : Packets
        The columns of the packet table.
    features : mapping of int to numpy.ndarray
        Width -> the features that a sampled capture kept.
    texts : mapping of int to str
        Token id -> text.
    """

    layers: Sequence[LayerInfo]
    passes: Sequence[PassInfo]
    tokens: Sequence[TokenRecord]
    packets: Packets
    features: Mapping[int, NDArray[np.uint32]]
    texts: Mapping[int, str]


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Where the rows of one layer of a variable come from; int64 columns, sorted by ``start``.

    Attributes
    ----------
    packet : numpy.ndarray
        Row of the packet table.
    source : numpy.ndarray
        First row within the packet.
    start : numpy.ndarray
        First row of the variable.
    count : numpy.ndarray
        Number of rows.
    """

    packet: NDArray[np.int64]
    source: NDArray[np.int64]
    start: NDArray[np.int64]
    count: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """How many rows they fill."""
        return int(self.count.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Variable:
    """A dense array: ``[layer,] token, features…``.

    Attributes
    ----------
    name, site : str
        Its name, and the site that it holds.
    dims : tuple of str
        Their names.
    shape : tuple of int
        Their lengths.
    source : dtypes.DType
        The model's dtype.
    segments : tuple of Segments or None
        For each place on ``layer`` (or the only one) where its rows come from.
    modules : tuple of str
        For each place the module's name; ``""`` where there is none.
    """

    name: str
    site: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    source: dtypes.DType
    segments: tuple[Segments | None, ...]
    modules: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array."""
        return self.source.array

    @property
    def layered(self) -> bool:
        """Whether it has the dimension ``layer``."""
        return self.dims[0] == "layer"

    @property
    def token_axis(self) -> int:
        """The place of the token dimension."""
        return int(self.layered)

    @property
    def rows(self) -> int:
        """The length of the token dimension."""
        return self.shape[self.token_axis]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row of one layer."""
        return self.shape[self.token_axis + 1 :]

    @property
    def fill(self) -> Any:
        """What a missing row holds: NaN, or 0."""
        return np.nan if self.dtype.kind in "fc" else self.dtype.type(0)

    @property
    def partial(self) -> bool:
        """Whether rows are missing."""
        return any(one is None or one.rows < self.rows for one in self.segments)

    @property
    def chunks(self) -> tuple[int, ...]:
        """The shape of an inner chunk: one layer, all features, about 1 MiB."""
        rows = chunk_rows(self.rows, self._row_bytes)
        return (1,) * self.token_axis + (rows, *map(_at_least_1, self.row_shape))

    @property
    def shards(self) -> tuple[int, ...]:
        """The shape of a shard: one layer, whole chunks, about 64 MiB."""
        rows = self.chunks[self.token_axis]
        most = max(1, SHARD_BYTES // max(rows * self._row_bytes, 1))
        count = min(most, max(1, -(-self.rows // rows)))
        return (1,) * self.token_axis + (rows * count, *map(_at_least_1, self.row_shape))

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize

    def present(self) -> NDArray[np.bool_]:
        """Give which rows there are: bool, of the leading dimensions."""
        found = np.zeros((len(self.segments), self.rows), np.bool_)
        for mine, one in zip(found, self.segments, strict=True):
            if one is not None:
                steps = np.zeros(self.rows + 1, np.int64)
                np.add.at(steps, one.start, 1)
                np.add.at(steps, one.start + one.count, -1)
                mine[:] = np.cumsum(steps[:-1]) > 0
        return found if self.layered else found[0]


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Packets that align with no token axis, kept one after the other.

    Attributes
    ----------
    name, site : str
        The stem of its variables' names, and the site.
    source : dtypes.DType
        The model's dtype.
    packets : numpy.ndarray
        Rows of the packet table, in capture order.
    offsets : numpy.ndarray
        int64: the first element of each.
    size : int
        Elements in all.
    """

    name: str
    site: str
    source: dtypes.DType
    packets: NDArray[np.int64]
    offsets: NDArray[np.int64]
    size: int

    @property
    def values_name(self) -> str:
        """The name of the variable, which is also the stem of its dimension's."""
        return f"{self.name}_values"

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimension of the values."""
        return (f"{self.name}_element",)

    @property
    def chunks(self) -> tuple[int, ...]:
        """The length of an inner chunk, about 1 MiB."""
        return (chunk_rows(self.size, self.source.array.itemsize),)

    @property
    def shards(self) -> tuple[int, ...]:
        """The length of a shard: whole chunks, about 64 MiB."""
        length = self.chunks[0]
        most = max(1, SHARD_BYTES // (length * self.source.array.itemsize))
        return (length * min(most, max(1, -(-self.size // length))),)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A dataset, before any value is read.

    Attributes
    ----------
    variables : tuple of Variable
        The dense arrays.
    ragged : tuple of Ragged
        What doesn't align.
    coordinates : tuple of Coordinate
        Labels of rows, layers and features; small arrays, present.
    aliases : mapping of str to str
        Site -> the site that holds the same values.
    """

    variables: tuple[Variable, ...]
    ragged: tuple[Ragged, ...]
    coordinates: tuple[Coordinate, ...]
    aliases: Mapping[str, str]


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Give the rows of an inner chunk: a power of two, about 1 MiB, no more than there are."""
    fitting = max(1, CHUNK_BYTES // max(row_bytes, 1))
    return max(1, min(1 << (fitting.bit_length() - 1), rows))


def plan(source: Source) -> Plan:
    """Plan the dataset of a run."""
    tables = row_tables(source.passes)
    layers = _unambiguous(source.layers)
    aliases = merge_aliases(layers, source.packets)
    kept = [info for info in layers if info.site not in aliases]
    found = align(kept, source.passes, tables, source.packets)
    blocks = sorted({info.block for info in kept if info.block >= 0})
    labels = coordinates(tables, source, blocks, layers)
    names = _Names({*_DIMENSIONS, *tables, *(one.name for one in labels)})
    groups = _name_groups(found.aligned, names)
    width = _residual_width(groups)
    variables = tuple(
        _variable(name, mine, tables, blocks, width) for name, mine in groups.items()
    )
    ragged = [_ragged(names, mine, source.packets) for mine in found.ragged]
    features = _feature_coordinates(groups, variables, source.features)
    columns = (one for _, mine in ragged for one in mine)
    return Plan(
        variables, tuple(one for one, _ in ragged), (*labels, *features, *columns), aliases
    )


def _unambiguous(layers: Sequence[LayerInfo]) -> list[LayerInfo]:
    """Give a site of its own to a layer whose place in its site is taken."""
    seen: set[tuple[str, int]] = set()
    result = []
    for info in layers:
        if (info.site, info.block) in seen:
            info = LayerInfo(info.id, info.name, info.name, -1, info.kind)
        seen.add((info.site, info.block))
        result.append(info)
    return result


@dataclass(slots=True)
class _Names:
    """Gives each array a name of its own, that a Zarr store and a dataset can have."""

    taken: set[str]

    def give(self, wanted: str) -> str:
        wanted = "_".join(wanted.replace("/", "_").split()).strip("._") or "unnamed"
        name, number = wanted, 1
        while name in self.taken:
            number += 1
            name = f"{wanted}_{number}"
        self.taken.add(name)
        return name


def _name_groups(aligned: Sequence[Aligned], names: _Names) -> dict[str, list[Aligned]]:
    """Put together what makes one variable, and name it: the usual form has the site's name."""
    by_site: dict[tuple[str, int], list[Aligned]] = {}
    for one in aligned:
        by_site.setdefault((one.info.site, one.call), []).append(one)
    groups: dict[str, list[Aligned]] = {}
    for (site, call), mine in by_site.items():
        weight = Counter[tuple[Any, ...]]()
        for one in mine:
            weight[one.form] += len(one.segments[0])
        usual = weight.most_common(1)[0][0]
        stem = site if call == 0 else f"{site}_call{call}"
        for form in weight:
            name = names.give(stem + _suffix(form, usual))
            groups[name] = [one for one in mine if one.form == form]
    return groups


def _suffix(form: tuple[Any, ...], usual: tuple[Any, ...]) -> str:
    """Say in what a variable differs from the usual form of its site."""
    (axis, trailing, code, width), (axis0, trailing0, code0, width0) = form, usual
    return "".join(
        (
            f"_{axis}" if axis != axis0 else "",
            f"_{dtypes.from_code(code).name}" if code != code0 else "",
            f"_d{'x'.join(map(str, trailing))}" if trailing != trailing0 else "",
            f"_of{width}" if width != width0 else "",
        )
    )


def _residual_width(groups: Mapping[str, list[Aligned]]) -> tuple[int, int] | None:
    """Give the size of ``feature``, and the width it was sampled from: the residual sites' own."""
    sizes = Counter[tuple[int, int]]()
    for mine in groups.values():
        for one in mine:
            if one.info.site in RESIDUAL and len(one.trailing) == 1:
                sizes[one.trailing[0], one.width] += 1 + 1000 * (one.info.site == "resid")
    return sizes.most_common(1)[0][0] if sizes else None


def _variable(
    name: str,
    mine: Sequence[Aligned],
    tables: Mapping[str, RowTable],
    blocks: Sequence[int],
    width: tuple[int, int] | None,
) -> Variable:
    first = mine[0]
    layered = any(one.info.block >= 0 for one in mine)
    places = list(blocks) if layered else [first.info.block]
    segments: list[Segments | None] = [None] * len(places)
    modules = [""] * len(places)
    for one in mine:
        place = places.index(one.info.block)
        segments[place] = Segments(*one.segments)
        modules[place] = one.info.name
    rows = tables[first.axis].rows
    dims = (first.axis, *_feature_dims(name, first, width))
    shape = (rows, *first.trailing)
    if layered:
        dims, shape = ("layer", *dims), (len(places), *shape)
    source = dtypes.from_code(first.dtype)
    return Variable(name, first.info.site, dims, shape, source, tuple(segments), tuple(modules))


def _feature_dims(name: str, one: Aligned, width: tuple[int, int] | None) -> tuple[str, ...]:
    """Name the dimensions behind the token's."""
    if len(one.trailing) == 1:
        if one.info.site in RESIDUAL and (one.trailing[0], one.width) == width:
            return ("feature",)
        if one.info.site == "logits" and name == "logits":
            return ("vocab",)
    return tuple(f"{name}_feature{number or ''}" for number in range(len(one.trailing)))


def _feature_coordinates(
    groups: Mapping[str, list[Aligned]],
    variables: Iterable[Variable],
    features: Mapping[int, NDArray[np.uint32]],
) -> tuple[Coordinate, ...]:
    """Give the kept features of sampled variables, as coordinates of their last dimension."""
    found: dict[str, Coordinate] = {}
    for one in variables:
        width = groups[one.name][0].width
        if width in features and one.row_shape:
            name = one.dims[-1]
            found[name] = Coordinate(name, (name,), features[width].astype(np.int64))
    return tuple(found.values())


def _ragged(
    names: _Names, mine: tuple[str, int, NDArray[np.int64], NDArray[np.int64]], packets: Packets
) -> tuple[Ragged, tuple[Coordinate, ...]]:
    site, code, rows, blocks = mine
    source = dtypes.from_code(code)
    shapes = [packets.shapes[index] for index in packets.shape[rows].tolist()]
    sizes = np.array([int(np.prod(shape, dtype=np.int64)) for shape in shapes], np.int64)
    padded = np.full((len(shapes), max(map(len, shapes), default=0)), -1, np.int64)
    for row, shape in zip(padded, shapes, strict=True):
        row[: len(shape)] = shape
    name = site
    if any(f"{site}{end}" in names.taken for end in ("_values", "_packet")):
        name = f"{site}_{source.name}"
    name = names.give(f"{name}_values").removesuffix("_values")
    offsets = np.cumsum(sizes) - sizes
    packet = (f"{name}_packet",)
    columns = (
        Coordinate(f"{name}_offset", packet, offsets),
        Coordinate(f"{name}_shape", (*packet, f"{name}_axis"), padded),
        Coordinate(f"{name}_pass", packet, packets.pass_index[rows]),
        Coordinate(f"{name}_call", packet, packets.call[rows]),
        Coordinate(f"{name}_layer", packet, blocks),
    )
    return Ragged(name, site, source, rows, offsets, int(sizes.sum())), columns


def _at_least_1(length: int) -> int:
    return max(1, length)
