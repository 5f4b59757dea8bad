"""Owns what labels rows, layers and features: small arrays, made from passes and tokens; pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.archive.alignment import CANONICAL, RowTable, axes_of
from actstore.archive.names import Names, clean, plain_text
from actstore.packet import Axis, LayerInfo, PassInfo, TokenRecord

__all__ = [
    "ROW_LABELS",
    "RUN",
    "SOURCE_ROW",
    "STRING",
    "Coordinate",
    "Runs",
    "annotation_labels",
    "module_labels",
    "pass_columns",
    "prefix_of",
    "row_labels",
    "row_tables",
    "texts_of",
    "token_columns",
]

#: How text is held: as `xarray.open_zarr` gives it.
STRING: Final = np.dtypes.StringDType()
#: What every token axis has, and one of several runs besides.
ROW_LABELS: Final = (
    *("pass_index", "batch_item", "position", "token_id", "token_text", "is_padding", "step"),
)
RUN: Final = "run"
#: And of a shuffled archive: which row it was as captured.
SOURCE_ROW: Final = "source_row"
_EXACT: Final = 1 << 53  # up to here float64 holds every integer
_INT64: Final = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True, slots=True, eq=False)
class Coordinate:
    """A small array that labels a dimension.

    Attributes
    ----------
    name : str
        Its name; the same as its dimension's where it is that dimension's index.
    dims : tuple of str
        Its dimensions.
    values : numpy.ndarray
        Its values.
    """

    name: str
    dims: tuple[str, ...]
    values: NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """The logs of a dataset: their passes are numbered through, and labelled as each had them.

    Attributes
    ----------
    starts : numpy.ndarray
        int64: the first pass of each.
    """

    starts: NDArray[np.int64]

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.starts.size > 1

    def of(self, passes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give which log passes are of."""
        return np.searchsorted(self.starts, passes, side="right") - 1

    def own(self, passes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the indices that passes have in their log; -1 stays."""
        return np.where(passes < 0, passes, passes - self.starts[self.of(passes).clip(0)])


def texts_of(values: Iterable[str]) -> NDArray[Any]:
    """Give text as an array of strings."""
    return np.array([plain_text(one) for one in values], STRING)


def row_tables(
    passes: Sequence[PassInfo], names: Names, *, several: bool = False
) -> dict[str, RowTable]:
    """Give each token axis its rows and its name, by what the log calls it."""
    found: dict[str, list[tuple[int, Axis]]] = {}
    for info in passes:
        for name, axis in axes_of(info).items():
            found.setdefault(name, []).append((info.index, axis))
    tables = {}
    for name, mine in found.items():
        dim = names.give(name)
        counts = np.array([axis.rows for _, axis in mine], np.int64)
        tables[name] = RowTable(
            dim,
            _prefix(dim, names, (*ROW_LABELS, *(RUN,) * several, SOURCE_ROW)),
            int(counts.sum()),
            np.array([index for index, _ in mine], np.int64),
            np.cumsum(counts) - counts,
            tuple(axis for _, axis in mine),
        )
    return tables


def _prefix(dim: str, names: Names, labels: Sequence[str]) -> str:
    """Give what the names of a dimension's labels begin with: nothing where it is ``token``."""
    if dim == "token":
        names.reserve(*labels)
        return ""
    ends = tuple(f"_{label}" for label in labels)
    return f"{names.give(dim.removesuffix('_token'), ends)}_"


def prefix_of(labels: Iterable[str]) -> str | None:
    """Give what the names of a token axis's labels begin with; None of no token axis's."""
    passes = [one for one in labels if f"_{one}".endswith("_pass_index")]
    return min(passes, key=len).removesuffix("pass_index") if passes else None


def row_labels(
    tables: Mapping[str, RowTable],
    passes: Sequence[PassInfo],
    tokens: Sequence[TokenRecord],
    texts: Mapping[int, str],
    runs: Runs,
) -> list[Coordinate]:
    """Give what labels every row: its pass, place and token, and the step that it predicted."""
    known = {one.token_id: one.token_text for one in tokens} | dict(texts)
    steps = _steps(tokens, passes, tables)
    found = []
    for name, table in tables.items():
        index, *rest = _columns(table, known)
        columns = dict(zip(ROW_LABELS, (runs.own(index), *rest, steps[name]), strict=True))
        if runs.several:
            columns[RUN] = runs.of(index)
        found += [
            Coordinate(table.prefix + label, (table.dim,), values)
            for label, values in columns.items()
        ]
    return found


def _columns(table: RowTable, texts: Mapping[int, str]) -> tuple[NDArray[Any], ...]:
    axes = table.axes
    ids = np.concatenate([axis.token_ids.ravel() for axis in axes])
    unique, inverse = np.unique(ids, return_inverse=True)
    known = texts_of(texts.get(one, "") for one in unique.tolist())
    counts = np.array([axis.rows for axis in axes], np.int64)
    return (
        np.repeat(table.passes, counts),
        np.concatenate([np.repeat(np.arange(axis.batch), axis.sequence) for axis in axes]),
        np.concatenate([axis.positions.ravel() for axis in axes]),
        ids,
        known[inverse.reshape(-1)],
        ~np.concatenate([axis.mask.ravel() for axis in axes]),
    )


def _steps(
    tokens: Sequence[TokenRecord], passes: Sequence[PassInfo], tables: Mapping[str, RowTable]
) -> dict[str, NDArray[np.int64]]:
    """Put each step on the row that predicted it: the item's last unpadded row of the pass.

    The k-th token that was recorded after one pass is batch item k's; the decoder's axis is the
    last.
    """
    steps = {name: np.full(table.rows, -1, np.int64) for name, table in tables.items()}
    axis_of = {info.index: axes_of(info).get(info.axes[-1].name) for info in passes if info.axes}
    taken: dict[int, int] = {}
    for record in tokens:
        item = taken.get(record.pass_index, 0)
        taken[record.pass_index] = item + 1
        axis = axis_of.get(record.pass_index)
        if axis is None or item >= axis.batch:
            continue
        real = np.flatnonzero(axis.mask[item])
        column = int(real[-1]) if real.size else axis.sequence - 1
        (start,) = tables[axis.name].start_of(np.array([record.pass_index])).tolist()
        steps[axis.name][start + item * axis.sequence + column] = record.step
    return steps


def annotation_labels(
    tables: Mapping[str, RowTable], passes: Sequence[PassInfo], names: Names
) -> list[Coordinate]:
    """Give each annotation's value on the rows of its batch item; what lacks one is filled.

    Called when all else has its name: an annotation whose name is taken, or canonical for
    something else, becomes ``annotation_<name>``.
    """
    labels = {info.index: info.annotations for info in passes if info.annotations}
    found = []
    for table in tables.values():
        for label in dict.fromkeys(
            label for index in table.passes.tolist() for label in labels.get(index, ())
        ):
            wanted = table.prefix + clean(label)
            if label in CANONICAL or wanted in names:
                wanted = f"{table.prefix}annotation_{clean(label)}"
            values = _annotation(label, table, labels)
            found.append(Coordinate(names.give(wanted), (table.dim,), values))
    return found


def _annotation(
    label: str, table: RowTable, labels: Mapping[int, Mapping[str, Any]]
) -> NDArray[Any]:
    items: list[Any] = []
    counts: list[int] = []
    for index, axis in zip(table.passes.tolist(), table.axes, strict=True):
        given = labels.get(index, {}).get(label)
        whole = isinstance(given, list) and len(given) == axis.batch
        items += given if isinstance(given, list) and whole else [None] * axis.batch
        counts += [axis.sequence] * axis.batch
    return np.repeat(_typed(items), counts)


def _typed(items: Sequence[Any]) -> NDArray[Any]:
    """Give annotation values one dtype that holds each of them exactly.

    bool or int64 where every item has one; float64 for numbers otherwise (missing: NaN); text for
    all else (missing: ""), what isn't a string as its JSON.
    """
    present = [one for one in items if one is not None]
    missing = len(present) < len(items)
    kinds = {type(one) for one in present}
    if kinds == {bool} and not missing:
        return np.array(items, np.bool_)
    integers = [one for one in present if isinstance(one, int)]
    if kinds == {int} and not missing and all(one in _INT64 for one in integers):
        return np.array(items, np.int64)
    exact = all(-_EXACT <= one <= _EXACT for one in integers)
    if kinds and kinds <= {int, float, bool} and exact:
        return np.array([np.nan if one is None else float(one) for one in items], np.float64)
    return texts_of(_text(one) for one in items)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def module_labels(
    blocks: Sequence[int], layers: Sequence[LayerInfo], names: Names
) -> list[Coordinate]:
    """Give the index of ``layer``, and its blocks' modules: a column for each stack of blocks."""
    if not blocks:
        return []
    stacks: dict[str, dict[int, str]] = {}
    for info in layers:
        stack = _stack(info)
        if info.block >= 0 and stack is not None:
            known = stacks.setdefault(stack, {})
            if info.site == f"{stack}resid" or info.block not in known:
                known[info.block] = _block_name(info, whole=info.site == f"{stack}resid")
    if len(stacks) < 2:
        anything = {info.block: _block_name(info) for info in reversed(layers)}
        stacks = {"": anything | next(iter(stacks.values()), {})}
    found = [Coordinate("layer", ("layer",), np.array(blocks, np.int64))]
    for stack, known in stacks.items():
        column = texts_of(known.get(block, "") for block in blocks)
        found.append(Coordinate(names.give(f"{stack}module"), ("layer",), column))
    return found


def _stack(info: LayerInfo) -> str | None:
    """Give what a canonical site says of its stack: ``"encoder_"``; None of any other site."""
    for site in ("resid", "cross_attn", "attn", "mlp"):
        if info.site.endswith(site):
            stack = info.site.removesuffix(site)
            return stack if stack in ("", "encoder_", "decoder_") else None
    return None


def _block_name(info: LayerInfo, *, whole: bool = False) -> str:
    """Give the name of a layer's block: its own, or its name up to the block's index."""
    parts = info.name.split(".")
    if whole or str(info.block) not in parts:
        return info.name
    return ".".join(parts[: parts.index(str(info.block)) + 1])


def token_columns(tokens: Sequence[TokenRecord], runs: Runs) -> dict[str, NDArray[Any]]:
    """Give what ``record_token`` was told, as columns; a position that was not given is NaN."""
    places = [np.nan if one.position is None else one.position for one in tokens]
    passes = np.array([one.pass_index for one in tokens], np.int64)
    steps = np.array([one.step for one in tokens], np.int64)
    columns = {
        "step": steps,
        "token_id": np.array([one.token_id for one in tokens], np.int64),
        "token_text": texts_of(one.token_text for one in tokens),
        "position": np.array(places, np.float64),
        "pass_index": runs.own(passes),
        "time": np.array([one.time for one in tokens], np.float64),
    }
    return columns | ({RUN: runs.of(passes)} if runs.several else {})


def pass_columns(passes: Sequence[PassInfo], runs: Runs) -> dict[str, NDArray[Any]]:
    """Give the passes, as columns."""
    index = np.array([one.index for one in passes], np.int64)
    columns = {
        "index": runs.own(index),
        "entry": texts_of(one.entry for one in passes),
        "aborted": np.array([one.aborted for one in passes], np.bool_),
        "logits_to_keep": np.array([one.logits_to_keep for one in passes], np.int64),
    }
    return columns | ({RUN: runs.of(index)} if runs.several else {})
