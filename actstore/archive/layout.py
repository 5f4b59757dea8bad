"""Owns the plan of a dataset: from a log's tables to variables, rows and coordinates; pure.

A log and the archive made from it are read by the same plan, so that both are the same dataset.
What aligns is decided in ``alignment.py``; reading values and writing them is for others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore import dtypes
from actstore.archive.alignment import (
    CANONICAL,
    Aligned,
    Loose,
    Packets,
    RowTable,
    align,
    merge_aliases,
)
from actstore.archive.coordinates import (
    Coordinate,
    Runs,
    annotation_labels,
    module_labels,
    row_labels,
    row_tables,
)
from actstore.archive.grid import Segments, Shard, chunk_rows, cut, shard_rows
from actstore.archive.names import Names, plain_json
from actstore.archive.precision import EXACT, SCALE
from actstore.packet import LayerInfo, PassInfo, TokenRecord

__all__ = ["Plan", "Ragged", "Source", "Variable", "plan"]

#: Sites that live in the residual space, and share the dimension ``feature``.
RESIDUAL: Final = frozenset(
    stack + site + end
    for stack in ("", "encoder_", "decoder_")
    for site in CANONICAL
    if site != "logits"
    for end in ("", "@in")
    if (site, end) != ("embed", "@in")
)
_RAGGED_ENDS: Final = (
    *("_values", "_element", "_packet", "_axis"),
    *("_offset", "_shape", "_pass", "_call", "_layer", "_width", "_run"),
)


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
    runs : Runs
        Which log each pass is of.
    """

    layers: Sequence[LayerInfo]
    passes: Sequence[PassInfo]
    tokens: Sequence[TokenRecord]
    packets: Packets
    features: Mapping[int, NDArray[np.uint32]]
    texts: Mapping[int, str]
    runs: Runs


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
        Their lengths; none is 0.
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
        rows = chunk_rows(self.rows, self.array_row_bytes)
        return (*(1,) * self.token_axis, rows, *self.row_shape)

    @property
    def shards(self) -> tuple[int, ...]:
        """The shape of a shard: one layer, whole chunks, about 64 MiB."""
        rows = shard_rows(self.rows, self.array_row_bytes)
        return (*(1,) * self.token_axis, rows, *self.row_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer in the model's dtype."""
        return self._row_size * self.source.itemsize

    @property
    def array_row_bytes(self) -> int:
        """Bytes of one row of one layer in the array's dtype."""
        return self._row_size * self.dtype.itemsize

    @property
    def attributes(self) -> dict[str, Any]:
        """What is said of it, in an archive and over a log."""
        said = {"site": self.site, "source_dtype": self.source.name, "modules": self.modules}
        return dict(plain_json(said))

    @property
    def _row_size(self) -> int:
        return int(np.prod(self.row_shape, dtype=np.int64))

    def cut(self, place: int) -> Iterator[Shard]:
        """Give the shards of one place on ``layer`` that hold any row."""
        segments, axis = self.segments[place], self.token_axis
        if segments is not None:
            yield from cut(self.rows, self.chunks[axis], self.shards[axis], segments)

    def present(self) -> Coordinate:
        """Give which rows there are: bool, of the leading dimensions."""
        found = np.zeros((len(self.segments), self.rows), np.bool_)
        for mine, one in zip(found, self.segments, strict=True):
            if one is not None:
                steps = np.zeros(self.rows + 1, np.int8)
                np.add.at(steps, one.start, 1)
                np.add.at(steps, one.start + one.count, -1)
                mine[:] = np.cumsum(steps[:-1], dtype=np.int8) > 0
        dims = self.dims[: self.token_axis + 1]
        return Coordinate(f"{self.name}_present", dims, found if self.layered else found[0])


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
    modules : mapping of int to str
        Block index (-1: none) -> the module's name.
    features : mapping of int to numpy.ndarray
        Width -> the features that were kept, of the widths that were sampled.
    """

    name: str
    site: str
    source: dtypes.DType
    packets: NDArray[np.int64]
    offsets: NDArray[np.int64]
    size: int
    modules: Mapping[int, str]
    features: Mapping[int, NDArray[np.uint32]]

    @property
    def values_name(self) -> str:
        """The name of the variable."""
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
        return (shard_rows(self.size, self.source.array.itemsize),)

    @property
    def attributes(self) -> dict[str, Any]:
        """What is said of it, in an archive and over a log."""
        modules = {str(block): name for block, name in sorted(self.modules.items())}
        said = {"site": self.site, "source_dtype": self.source.name, "modules": modules}
        kept = {str(width): indices.tolist() for width, indices in self.features.items()}
        return dict(plain_json(said | ({"features": kept} if kept else {})))

    def cut(self) -> Iterator[Shard]:
        """Give its shards."""
        return cut(self.size, self.chunks[0], self.shards[0])


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
        Labels of rows, layers, features and ragged packets: small arrays, whole.
    rows : mapping of str to int
        The token dimensions and their lengths.
    aliases : mapping of str to str
        Site -> the site that holds the same values.
    """

    variables: tuple[Variable, ...]
    ragged: tuple[Ragged, ...]
    coordinates: tuple[Coordinate, ...]
    rows: Mapping[str, int]
    aliases: Mapping[str, str]


def plan(source: Source) -> Plan:
    """Plan the dataset of a run."""
    names = Names(("layer", "feature", "vocab"))
    layers = _unambiguous(source.layers)
    aliases = merge_aliases(layers, source.packets)
    kept = [info for info in layers if info.site not in aliases]
    blocks = sorted({info.block for info in kept if info.block >= 0})
    tables = row_tables(source.passes, names, several=source.runs.several)
    labels = row_labels(tables, source.passes, source.tokens, source.texts, source.runs)
    labels += module_labels(blocks, layers, names)
    names.reserve("module")
    found = align(kept, source.passes, tables, source.packets)
    groups = _name_groups(found.aligned, names)
    width = _residual_width(groups)
    variables = tuple(
        _variable(name, mine, tables, blocks, width) for name, mine in groups.items()
    )
    ragged = [_ragged(names, one, source) for one in found.loose]
    features = _feature_coordinates(groups, variables, source.features)
    names.reserve(*aliases)
    return Plan(
        variables,
        tuple(one for one, _ in ragged),
        (
            *labels,
            *annotation_labels(tables, source.passes, names),
            *features,
            *(one for _, mine in ragged for one in mine),
        ),
        {table.dim: table.rows for table in tables.values()},
        aliases,
    )


def _unambiguous(layers: Sequence[LayerInfo]) -> list[LayerInfo]:
    """Give a site of its own to a layer whose place in its site is taken.

    A site either repeats in blocks or doesn't; the first of its layers decides.
    """
    seen: set[tuple[str, int]] = set()
    repeats: dict[str, bool] = {}
    result = []
    for info in layers:
        site, block, number = info.site, info.block, 1
        while (site, block) in seen or repeats.get(site, block >= 0) != (block >= 0):
            site, block = info.name if number == 1 else f"{info.name}_{number}", -1
            number += 1
        seen.add((site, block))
        repeats[site] = block >= 0
        result.append(replace(info, site=site, block=block))
    return result


def _name_groups(aligned: Sequence[Aligned], names: Names) -> dict[str, list[Aligned]]:
    """Put together what makes one variable, and name it: the usual form has the site's name."""
    by_site: dict[tuple[str, int], list[Aligned]] = {}
    for one in aligned:
        by_site.setdefault((one.info.site, one.call), []).append(one)
    groups: dict[str, list[Aligned]] = {}
    for (site, call), mine in by_site.items():
        weight = Counter[tuple[Any, ...]]()
        for one in mine:
            weight[one.form] += one.segments.rows
        usual = weight.most_common(1)[0][0]
        stem = site if call == 0 else f"{site}_call{call}"
        for form in sorted(weight, key=lambda form: form != usual):
            beside = ("", "_present", SCALE, EXACT, f"{EXACT}_present")
            ends = (*beside, *(f"_feature{number or ''}" for number in range(len(form[1]))))
            name = names.give(stem + _suffix(form, usual), ends)
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
    """Give the size of ``feature``, and the width it was sampled from: the residual sites' own.

    The width of a site ``resid`` decides where there is one, else the most common.
    """
    sizes: dict[bool, Counter[tuple[int, int]]] = {True: Counter(), False: Counter()}
    for one in (one for mine in groups.values() for one in mine):
        if one.info.site in RESIDUAL and len(one.trailing) == 1:
            sizes[one.info.site.endswith("resid")][one.trailing[0], one.width] += 1
    decisive = sizes[True] or sizes[False]
    return decisive.most_common(1)[0][0] if decisive else None


def _variable(
    name: str,
    mine: Sequence[Aligned],
    tables: Mapping[str, RowTable],
    blocks: Sequence[int],
    width: tuple[int, int] | None,
) -> Variable:
    first, table = mine[0], tables[mine[0].axis]
    layered = first.info.block >= 0
    places = list(blocks) if layered else [-1]
    segments: list[Segments | None] = [None] * len(places)
    modules = [""] * len(places)
    for one in mine:
        place = places.index(one.info.block)
        segments[place] = one.segments
        modules[place] = one.info.name
    dims = (table.dim, *_feature_dims(name, first, width))
    shape = (table.rows, *first.trailing)
    if layered:
        dims, shape = ("layer", *dims), (len(places), *shape)
    source = dtypes.from_code(first.dtype)
    return Variable(name, first.info.site, dims, shape, source, tuple(segments), tuple(modules))


def _feature_dims(name: str, one: Aligned, width: tuple[int, int] | None) -> tuple[str, ...]:
    """Name the dimensions behind the token's."""
    if len(one.trailing) == 1:
        if one.info.site in RESIDUAL and (one.trailing[0], one.width) == width:
            return ("feature",)
        if one.info.site == name == "logits":
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
        kept = features.get(groups[one.name][0].width)
        if kept is not None and one.row_shape[-1:] == kept.shape:
            name = one.dims[-1]
            found[name] = Coordinate(name, (name,), kept.astype(np.int64))
    return tuple(found.values())


def _ragged(names: Names, loose: Loose, source: Source) -> tuple[Ragged, tuple[Coordinate, ...]]:
    kind, rows, packets = dtypes.from_code(loose.dtype), loose.rows, source.packets
    shapes = [packets.shapes[index] for index in packets.shape[rows].tolist()]
    sizes = np.array([int(np.prod(shape, dtype=np.int64)) for shape in shapes], np.int64)
    padded = np.full((len(shapes), max(map(len, shapes))), -1, np.int64)
    for row, shape in zip(padded, shapes, strict=True):
        row[: len(shape)] = shape
    stem = loose.site
    if any(f"{stem}{end}" in names for end in _RAGGED_ENDS):
        stem = f"{stem}_{kind.name}"
    name = names.give(stem, _RAGGED_ENDS)
    offsets, widths = np.cumsum(sizes) - sizes, packets.width[rows]
    packet = (f"{name}_packet",)
    columns = [
        Coordinate(f"{name}_offset", packet, offsets),
        Coordinate(f"{name}_shape", (*packet, f"{name}_axis"), padded),
        Coordinate(f"{name}_pass", packet, source.runs.own(packets.pass_index[rows])),
        Coordinate(f"{name}_call", packet, packets.call[rows]),
        Coordinate(f"{name}_layer", packet, loose.blocks),
    ]
    if widths.any():
        columns.append(Coordinate(f"{name}_width", packet, widths))
    if source.runs.several:
        columns.append(Coordinate(f"{name}_run", packet, source.runs.of(packets.pass_index[rows])))
    kept = {width: source.features[width] for width in set(widths.tolist()) & {*source.features}}
    size = int(sizes.sum())
    made = Ragged(name, loose.site, kind, rows, offsets, size, loose.modules, kept)
    return made, tuple(columns)
