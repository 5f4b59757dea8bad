"""Owns maps of what tokens attend to, of attention weights that were captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.accessor import TokenAxis, check_dataset, lazy_beneath, token_axes
from actstore.errors import ConfigError
from actstore.plots.chosen import Shown
from actstore.plots.maps import draw_map, root_scale
from actstore.plots.style import (
    SEQUENTIAL,
    blank,
    drawn,
    hatched,
    needs_matplotlib,
    note,
    scale_bar,
)
from actstore.plots.text import labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["attention"]

_MOST: Final = 200  # tokens
_PANELS: Final = 12
_PITCH: Final = 0.094  # inches of a token
_HOW: Final = (
    "attention weights are captured by HookConfig(attention_weights=True) of a model with "
    "attn_implementation='eager'"
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Packet:
    """The weights of a layer in a pass: where they begin, and [items, heads, queries, keys]."""

    layer: int
    first: int
    shape: tuple[int, int, int, int]


@needs_matplotlib
def attention(
    dataset: xr.Dataset,
    variable: str | None = None,
    *,
    layer: int | None = None,
    head: int | None = None,
    pass_index: int = 0,
    item: int = 0,
    width: float = 7.0,
) -> Figure:
    """Draw how much each token attends to each: queries below each other, keys beside.

    Colours go by the square root of weights, so that small ones are seen. Of a pass with a single
    query, as in generation, the keys' tokens are below a map of heads or layers. What a mask
    leaves at 0 after the query is white.

    Parameters
    ----------
    dataset : xarray.Dataset
        As for `norm_map`.
    variable : str, optional
        Which: that of weights, such as ``attn_weights``; the first there is if it isn't given.
    layer : int, optional
        A layer, each of its heads a panel. If it isn't given: 12 layers, evenly spread, the mean
        over heads.
    head : int, optional
        One head, from 0.
    pass_index, item : int, optional
        Of which pass, and batch item. At most 200 queries and keys are shown.
    width : float, optional
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        As `norm_map` gives it.

    Raises
    ------
    ConfigError
        It is no dataset; no weights were captured; or there is no such layer, head, pass or item.
    """
    check_dataset(dataset)
    stem = _stem(dataset, variable)
    packets = _packets(dataset, stem, pass_index)
    layers = [one.layer for one in packets]
    if layer is not None and layer not in layers:
        msg = f"{stem!r} has the layers {layers} in pass {pass_index}; got {layer!r}"
        raise ConfigError(msg)
    if layer is None:
        spread = np.linspace(0, len(packets) - 1, min(len(packets), _PANELS)).round().astype(int)
        packets = [packets[one] for one in np.unique(spread).tolist()]
    else:
        packets = [one for one in packets if one.layer == layer]
    _, heads, queries, keys = packets[0].shape
    items = packets[0].shape[0]
    for what, value, count in (("item", item, items), ("head", head, heads)):
        if value is not None and (isinstance(value, bool) or not 0 <= value < count):
            msg = f"{what} must be from 0 to {count - 1}; got {value!r}"
            raise ConfigError(msg)
    about = f"pass {pass_index}, item {item}, " + (
        "mean over heads" if layer is None and head is None else f"{stem}"
    )
    if not queries * keys:
        return blank(width, "no weights to show", about)
    maps = {
        name: values
        for one in packets
        for name, values in _maps(dataset, stem, one, item, head, each=layer is not None).items()
    }
    if queries > _MOST or keys > _MOST:
        about += f"; {_MOST} of {max(queries, keys):,} tokens"
    texts = _texts(dataset, pass_index, item, queries, keys)
    if queries == 1:
        return _of_one(maps, texts, about, width)
    return _panels(maps, texts, about, width)


def _stem(dataset: xr.Dataset, variable: str | None) -> str:
    known = [
        str(name).removesuffix("_values")
        for name, one in dataset.data_vars.items()
        if str(name).endswith("_values") and f"{str(name)[:-7]}_shape" in dataset.coords
    ]
    weights = [one for one in known if dataset[f"{one}_shape"].shape[1] == 4]
    named = [one for one in weights if "weights" in one]
    if variable is None and named:
        return named[0]
    if variable in weights:
        return str(variable)
    found = ", ".join(map(repr, weights or known)) or "none"
    msg = f"no attention weights {variable or ''!r} here; ragged variables are {found}. {_HOW}"
    raise ConfigError(msg)


def _packets(dataset: xr.Dataset, stem: str, pass_index: int) -> list[_Packet]:
    """Find the weights of a pass, by layer; of several calls, or logs, the first."""
    passes, layers, offsets, shapes = (
        np.asarray(dataset[f"{stem}_{one}"].values) for one in ("pass", "layer", "offset", "shape")
    )
    found: dict[int, _Packet] = {}
    for place in np.flatnonzero(passes == pass_index).tolist():
        layer = int(layers[place])
        items, heads, queries, keys = (int(one) for one in shapes[place])
        if keys >= 0 and layer not in found:
            found[layer] = _Packet(layer, int(offsets[place]), (items, heads, queries, keys))
    if not found:
        there = f"{passes.min()} to {passes.max()}" if passes.size else "none"
        msg = f"there are no weights of pass {pass_index!r} in {stem!r}; there are passes {there}"
        raise ConfigError(msg)
    return [found[one] for one in sorted(found)]


def _maps(
    dataset: xr.Dataset, stem: str, packet: _Packet, item: int, head: int | None, *, each: bool
) -> dict[str, Floats]:
    """Read weights [queries, keys] of the heads of a layer, or the mean of them."""
    variable = dataset.variables[f"{stem}_values"]
    beneath = lazy_beneath(variable)
    variable = variable if beneath is None else beneath
    _, heads, queries, keys = packet.shape
    rows = min(queries, _MOST)
    part = slice(max(keys - _MOST, 0), keys) if queries == 1 else slice(0, _MOST)
    found = {}
    for one in range(heads) if head is None else [head]:
        first = packet.first + (item * heads + one) * queries * keys
        values = variable[first : first + rows * keys].values.reshape(rows, keys)
        found[one] = np.asarray(values[:, part], np.float64)
    named = f"layer {packet.layer}, " if packet.layer >= 0 else ""
    if each or head is not None:
        return {f"{named}head {one}": values for one, values in found.items()}
    return {named.removesuffix(", ") or stem: np.mean(list(found.values()), axis=0)}


def _texts(
    dataset: xr.Dataset, pass_index: int, item: int, queries: int, keys: int
) -> tuple[list[str], list[str]]:
    """Give the tokens of queries and keys; their places where the rows don't tell."""
    found: dict[int, list[str]] = {}
    for count in {queries, keys}:
        found[count] = [str(one) for one in range(count)]
        for axis in token_axes(dataset).values():
            rows = _rows(axis, pass_index, item, count)
            if rows is not None:
                found[count] = labels(
                    *(_at(axis, one, rows) for one in ("token_text", "token_id"))
                )
                break
    return found[queries][:_MOST], (found[keys][-_MOST:] if queries == 1 else found[keys][:_MOST])


def _at(axis: TokenAxis, label: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Read a label of some rows: texts of a million take a second."""
    name = axis.prefix + label
    found: NDArray[Any] = axis.dataset.variables[name][rows].values
    return found


def _rows(axis: TokenAxis, pass_index: int, item: int, count: int) -> NDArray[np.int64] | None:
    """Give the rows of a pass if they are so many; else with those of the passes before it."""
    if any(one not in axis for one in ("batch_item", "token_text", "token_id")):
        return None
    passes = axis.label("pass_index").to_numpy()
    mine = axis.label("batch_item").to_numpy() == item
    here = axis.as_captured(mine & (passes == pass_index))
    if here.size == count:
        return here
    before = axis.as_captured(mine & (passes <= pass_index))[-count:]
    if before.size < count or not here.size or "position" not in axis:
        return None
    places = axis.label("position").to_numpy()[before]
    return before if (np.diff(places) == 1).all() else None


def _of_one(
    maps: dict[str, Floats], texts: tuple[list[str], list[str]], about: str, width: float
) -> Figure:
    """Draw the keys of a single query, a line for each head or layer."""
    keys = min(one.shape[1] for one in maps.values())  # of a sliding window fewer than of others
    values = np.concatenate([one[:, -keys:] for one in maps.values()])
    shown = Shown(xr.Dataset(coords={"key": np.arange(values.shape[1])}), "key", texts[1][-keys:],
                  np.zeros(0, np.intp), None, f"{about}, of {texts[0][0]}")  # fmt: skip
    common = "layer " if all(one.startswith("layer ") for one in maps) else ""
    names = [one.removeprefix(common).split("head ")[-1] for one in maps]
    kind = "head" if any("head" in one for one in maps) else "layer"
    return draw_map(values, names, shown, "attention weight", width, root=True, side=kind)


def _panels(
    maps: dict[str, Floats], texts: tuple[list[str], list[str]], about: str, width: float
) -> Figure:
    kept = dict(list(maps.items())[: 4 * _PANELS])
    about += f"; {len(kept)} of {len(maps)} heads" if len(kept) < len(maps) else ""
    columns = min(len(kept), 4 if width > 5 else 2, 3 if len(kept) in (3, 5, 6, 9) else 4)
    lines = -(-len(kept) // columns)
    size = (width - 1.1) / columns
    queries, keys = next(iter(kept.values())).shape
    high = min(size * queries / keys, size * 1.5)
    with drawn(width, (high + 0.25) * lines + 0.9) as figure:
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        norm = root_scale(np.concatenate([one.ravel() for one in kept.values()]))
        for place, (axes, (name, values)) in enumerate(zip(grid, kept.items(), strict=False)):
            after = _after(values)
            if not after.any():
                hatched(axes)
            image = axes.imshow(
                np.ma.masked_where(after | ~np.isfinite(values), values),
                cmap=SEQUENTIAL, norm=norm, aspect="auto", interpolation="nearest",
            )  # fmt: skip
            axes.set_title(name)
            axes.tick_params(length=0, pad=1.5)
            # only the outer panels: labels that aren't seen take as long to place
            below, left = place + columns >= len(kept), place % columns == 0
            _name(axes, texts[1][: values.shape[1]] if below else [], size, "x")
            _name(axes, texts[0][: len(values)] if left else [], high, "y")
            axes.set_xlabel("key" if below else "")
            axes.set_ylabel("query" if left else "")
        for axes in grid[len(kept) :]:
            axes.set_axis_off()
        label = "attention weight (square-root scale)"
        scale_bar(figure, image, list(grid), label, extend="max")
        note(figure, about)
        return figure


def _after(values: Floats) -> NDArray[np.bool_]:
    """Tell which keys come after their query, if a mask leaves all of them at 0."""
    queries, keys = values.shape
    later = np.arange(keys) > np.arange(queries)[:, np.newaxis] + max(keys - queries, 0)
    return later if not values[later].any() else np.zeros_like(later)


def _name(axes: Axes, texts: Sequence[str], size: float, axis: str) -> None:
    step = max(int(-(-len(texts) * _PITCH // size)), 1)
    places = list(range(0, len(texts), step))
    names = [texts[one] for one in places]
    if axis == "x":
        axes.set_xticks(places, names, rotation=90)
    else:
        axes.set_yticks(places, names)
