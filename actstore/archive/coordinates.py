"""Owns what labels rows, layers and features: small arrays, made from passes and tokens; pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.archive.alignment import RowTable
from actstore.packet import Axis, LayerInfo, PassInfo, TokenRecord

if TYPE_CHECKING:
    from actstore.archive.layout import Source

__all__ = ["STRING", "Coordinate", "coordinates", "row_tables"]

_TAKEN: Final = [
    "pass_index",
    "batch_item",
    "position",
    "token_id",
    "token_text",
    "is_padding",
    "step",
    "layer",
    "module",
    "feature",
    "vocab",
    "token",
    "encoder_token",
    "decoder_token",
    "embed",
    "resid",
    "attn",
    "mlp",
    "final_norm",
    "logits",
    "output",
]
#: How text is held: as `xarray.open_zarr` gives it.
STRING: Final = np.dtypes.StringDType()


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


def row_tables(passes: Sequence[PassInfo]) -> dict[str, RowTable]:
    """Give each token axis its rows: where each pass begins."""
    rows: dict[str, int] = {}
    starts: dict[str, dict[int, int]] = {}
    shapes: dict[str, dict[int, Axis]] = {}
    for info in passes:
        for axis in info.axes:
            starts.setdefault(axis.name, {})[info.index] = rows.get(axis.name, 0)
            shapes.setdefault(axis.name, {})[info.index] = axis
            rows[axis.name] = rows.get(axis.name, 0) + axis.rows
    return {name: RowTable(name, rows[name], starts[name], shapes[name]) for name in rows}


def coordinates(
    tables: Mapping[str, RowTable],
    source: Source,
    blocks: Sequence[int],
    layers: Sequence[LayerInfo],
) -> list[Coordinate]:
    """Give the coordinates of rows and layers."""
    found = []
    texts = {one.token_id: one.token_text for one in source.tokens} | dict(source.texts)
    steps = _steps(source.tokens, source.passes, tables)
    for name, table in tables.items():
        prefix = "" if name == "token" else name.removesuffix("token")
        columns = _columns(table, texts)
        columns["step"] = steps[name]
        for label, values in _annotations(table, source.passes).items():
            label = "_".join(label.split())
            columns[f"annotation_{label}" if label in _TAKEN else label] = values
        found += [Coordinate(prefix + label, (name,), values) for label, values in columns.items()]
    if blocks:
        found.append(Coordinate("layer", ("layer",), np.array(blocks, np.int64)))
        modules = [_module(block, layers) for block in blocks]
        found.append(Coordinate("module", ("layer",), np.array(modules, STRING)))
    return found


def _columns(table: RowTable, texts: Mapping[int, str]) -> dict[str, NDArray[Any]]:
    axes = list(table.shapes.items())
    ids = _joined([axis.token_ids.ravel() for _, axis in axes])
    unique, inverse = np.unique(ids, return_inverse=True)
    known = np.array([texts.get(int(one), "") for one in unique], STRING)
    return {
        "pass_index": np.repeat(
            np.array([index for index, _ in axes], np.int64),
            np.array([axis.rows for _, axis in axes], np.int64),
        ),
        "batch_item": _joined(
            [np.repeat(np.arange(axis.batch), axis.sequence) for _, axis in axes]
        ),
        "position": _joined([axis.positions.ravel() for _, axis in axes]),
        "token_id": ids,
        "token_text": known[inverse.reshape(-1)] if ids.size else np.zeros(0, STRING),
        "is_padding": ~_joined([axis.mask.ravel() for _, axis in axes], np.bool_),
    }


def _joined(parts: Sequence[NDArray[Any]], kind: Any = np.int64) -> NDArray[Any]:
    return np.concatenate(parts).astype(kind) if parts else np.zeros(0, kind)


def _steps(
    tokens: Sequence[TokenRecord], passes: Sequence[PassInfo], tables: Mapping[str, RowTable]
) -> dict[str, NDArray[np.int64]]:
    """Put each step on the row that predicted it: the item's last unpadded row of the pass.

    The k-th token that was recorded after one pass is batch item k's; the decoder's axis is the
    last.
    """
    steps = {name: np.full(table.rows, -1, np.int64) for name, table in tables.items()}
    axis_of = {info.index: info.axes[-1] for info in passes if info.axes}
    taken: dict[int, int] = {}
    for record in tokens:
        item = taken.get(record.pass_index, 0)
        taken[record.pass_index] = item + 1
        axis = axis_of.get(record.pass_index)
        if axis is None or item >= axis.batch or not axis.sequence:
            continue
        real = np.flatnonzero(axis.mask[item])
        column = int(real[-1]) if real.size else axis.sequence - 1
        start = tables[axis.name].start[record.pass_index]
        steps[axis.name][start + item * axis.sequence + column] = record.step
    return steps


def _annotations(table: RowTable, passes: Sequence[PassInfo]) -> dict[str, NDArray[Any]]:
    """Give each annotation's value on the rows of its batch item; what lacks one is filled."""
    labels = dict.fromkeys(
        label for info in passes if info.index in table.shapes for label in info.annotations
    )
    return {label: _annotation(label, table, passes) for label in labels}


def _annotation(label: str, table: RowTable, passes: Sequence[PassInfo]) -> NDArray[Any]:
    rows: list[Any] = []
    for info in passes:
        axis = table.shapes.get(info.index)
        if axis is None:
            continue
        given = info.annotations.get(label)
        values = list(given) if isinstance(given, list) and len(given) == axis.batch else None
        for item in range(axis.batch):
            rows += [values[item] if values else None] * axis.sequence
    return _typed(rows)


def _typed(rows: Sequence[Any]) -> NDArray[Any]:
    """Give annotation values one dtype.

    bool or int64 where every row has one, float64 for numbers otherwise (missing: NaN), text for
    all else (missing: "").
    """
    present = [one for one in rows if one is not None]
    missing = len(present) < len(rows)
    kinds = {type(one) for one in present}
    if kinds <= {bool} and not missing:
        return np.array(rows, np.bool_)
    if kinds <= {int} and not missing and all(-(1 << 63) <= one < 1 << 63 for one in present):
        return np.array(rows, np.int64)
    if kinds <= {int, float, bool}:
        return np.array([np.nan if one is None else float(one) for one in rows], np.float64)
    texts = [one if isinstance(one, str) else json.dumps(one) for one in present]
    filled = iter(texts)
    return np.array(["" if one is None else next(filled) for one in rows], STRING)


def _module(block: int, layers: Sequence[LayerInfo]) -> str:
    """Give the name of a block's module: the residual site's layer, else what its layers share."""
    mine = [info for info in layers if info.block == block]
    for info in mine:
        if info.site.endswith("resid"):
            return info.name
    parts = mine[0].name.split(".")
    ends = [place for place, part in enumerate(parts) if part == str(block)]
    return ".".join(parts[: ends[0] + 1]) if ends else mine[0].name
