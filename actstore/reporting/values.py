"""Owns what a page shows of the activations: a bounded sample of rows, and a strip of tokens.

Of each variable some runs of rows, spread over all, say how its layers' values are distributed;
of one sequence every layer's norms are given, and the features that differ most in it. How much is
read is bounded by bytes, whatever the size of the dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore.accessor import TokenAxis, token_axes
from actstore.analysis.moments import cosines, row_squares
from actstore.analysis.sketch import every
from actstore.analysis.source import Source, flat, source_of
from actstore.arguments import check_count, check_memory
from actstore.errors import ActstoreError, ConfigError
from actstore.reporting.sequences import Sequences

__all__ = [
    "FAULTS",
    "QUANTILES",
    "SAMPLE_VALUES",
    "Found",
    "Limits",
    "about",
    "begin_of",
    "described",
    "feature_labels",
    "finite",
    "label_of",
    "labels_of",
    "no_sequence",
    "on_strip",
    "runs_of",
    "sampled",
    "shown_sources",
]

Floats = NDArray[np.float64]

QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
#: The sites that a page begins with.
_FIRST: Final = ("resid", "mlp", "attn", "embed", "final_norm", "logits")
_SAMPLE_BYTES: Final = 256 << 20
_STRIP_BYTES: Final = 768 << 20
_NUMBERS: Final = 450_000  # of the strips, 7 bytes each
SAMPLE_VALUES: Final = 1 << 18  # of a layer, that quantiles are of
_RUNS: Final = 8  # of rows
_RUN_ROWS: Final = 64
_MOST_ROWS: Final = 1 << 14
_FEATURES: Final = 8
_LABELS: Final = 12
_TEXT: Final = 120  # characters of a token, or of a label's value
_VARIABLES: Final = 64
_LAYERS: Final = 512
_COPIES: Final = 8
_WHY: Final = "since none differs in the sequence, or a row is too wide for max_memory_gb"
_OWN: Final = ("token_text", "token_id", "position", "step", "is_padding", "pass_index")
#: What reading damaged or odd files may raise.
FAULTS: Final = (ActstoreError, OSError, ValueError, RuntimeError, TypeError, IndexError)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a page shows, and how much may be held.

    Parameters
    ----------
    max_tokens : int
        Tokens of a strip.
    sequence : (int, int) or None
        The pass with which the strip begins, and the batch item; None: the longest there is.
    max_memory_gb : float
        What may be held, in 10^9 bytes.
    """

    max_tokens: int
    sequence: tuple[int, int] | None
    max_memory_gb: float

    def __post_init__(self) -> None:
        check_count("max_tokens", self.max_tokens)
        given = self.sequence
        if given is not None and not (
            isinstance(given, tuple) and len(given) == 2 and all(_is_count(n, 0) for n in given)
        ):
            msg = f"sequence must be (pass, batch item), such as (0, 0); got {given!r}"
            raise ConfigError(msg)
        check_memory(self.max_memory_gb)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(slots=True)
class Found:
    """What is being put together: variables, strips by their axis, and what was left out."""

    variables: list[dict[str, Any]] = field(default_factory=list)
    strips: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def finite(values: Any, digits: int = 4) -> Any:
    """Give floats as lists of rounded ones, None for what isn't finite."""
    with np.errstate(invalid="ignore"):  # NaNs that signal
        found = np.asarray(values, np.float64)
    if found.ndim > 1:
        return [finite(one, digits) for one in found]
    if found.ndim:
        return [float(f"{one:.{digits}g}") if isfinite(one) else None for one in found.tolist()]
    return finite(found[np.newaxis], digits)[0]


def described(dataset: xr.Dataset, limits: Limits) -> dict[str, Any]:
    """Say what the page shows of a dataset's values.

    Parameters
    ----------
    dataset : xarray.Dataset
        As it was opened, or chosen from that.
    limits : Limits
        How much.

    Returns
    -------
    dict
        ``variables`` (name, layers, sample, quantiles, norms, cosines, strip), ``strips`` (token
        axis -> its tokens), and ``notes``: what was left out, in words. No NaN, no NumPy.

    Raises
    ------
    ConfigError
        There is no such sequence.
    """
    found = Found()
    sources = shown_sources(dataset, found)
    share = _SAMPLE_BYTES // max(len(sources), 1)
    for source in sources:
        found.variables.append(about(source))
    axes = token_axes(dataset)
    shown = [one for dim, one in axes.items() if not sources or dim in {s.dim for s in sources}]
    rows = {axis.dim: _sequence(axis, limits, found) for axis in shown}
    if shown and limits.sequence is not None and not any(one.size for one in rows.values()):
        raise ConfigError(no_sequence(shown[0], *limits.sequence))
    rows, features = _fitting(sources, rows, found)
    for source, said in zip(sources, found.variables, strict=True):
        try:
            with np.errstate(all="ignore"):  # values are any, NaNs that signal among them
                said |= sampled(source, share, limits)
                if rows[source.dim].size and not said["cut"]:
                    said |= on_strip(source, rows[source.dim], features, limits)
            if features and "features" in said and not any(said["features"]) and source.width > 1:
                found.notes.append(f"{source.name}: no features are shown, {_WHY}")
        except FAULTS as error:
            found.notes.append(f"{source.name}: its values can't be read: {error}"[:500])
    found.strips = {dim: labels_of(axes[dim], mine, found) for dim, mine in rows.items()}
    return {"variables": found.variables, "strips": found.strips, "notes": found.notes}


# -- which ----------------------------------------------------------------------------------------


def shown_sources(dataset: xr.Dataset, found: Found) -> list[Source]:
    """Give the variables that are shown, those first that are known."""
    axes, sources = token_axes(dataset), []
    for name, array in dataset.data_vars.items():
        if array.dtype.kind != "f" or not any(dim in axes for dim in array.dims):
            continue
        try:
            sources.append(source_of(dataset, str(name)))
        except ConfigError:
            continue
    codes = [
        str(name)
        for name, array in dataset.data_vars.items()
        if "code_offset" in array.attrs or "scale_factor" in array.attrs
    ]
    if codes:
        told = ", ".join(codes[:8])
        found.notes.append(f"stored as codes, open with actstore to see their values: {told}")
    sources.sort(key=_rank)
    if len(sources) > _VARIABLES:
        found.notes.append(f"{len(sources)} variables: the first {_VARIABLES} are shown")
    return sources[:_VARIABLES]


def _rank(source: Source) -> int:
    """Give where a variable stands: what has rows in many layers, and is known, first."""
    site = source.name.removeprefix("encoder_").removeprefix("decoder_")
    return _FIRST.index(site) if site in _FIRST else len(_FIRST)


def about(source: Source) -> dict[str, Any]:
    """Say what a variable is called, and its layers."""
    labels: list[int | str] = []
    if source.layer_dims:
        known = source.array.coords.get("layer")
        given = range(len(source.places)) if known is None else known.values.tolist()
        labels = [one if isinstance(one, int) else str(one) for one in given]
    modules = source.array.attrs.get("modules")
    modules = list(modules) if isinstance(modules, list | tuple) else []
    modules = modules if len(modules) == len(source.places) else []
    return {
        "name": source.name[:_TEXT],
        "dim": source.dim,
        "layers": labels[:_LAYERS],
        "modules": [str(one)[:_TEXT] for one in modules[:_LAYERS]],
        "cut": False,
    }


# -- the sample -----------------------------------------------------------------------------------


def runs_of(source: Source, total: int, share: int, limits: Limits) -> list[slice]:
    """Give runs of so many rows, spread evenly, of about so many bytes over all layers."""
    each = source.row_bytes * min(len(source.places), _LAYERS)
    held = int(limits.max_memory_gb * 1e9) // (_COPIES * max(source.width, 1) * 8)
    wanted = max(min(share // max(each, 1), held, _MOST_ROWS), 1)
    if wanted >= total:
        return [slice(0, total)]
    runs = max(min(wanted // _RUN_ROWS, _RUNS), 1)
    length = wanted // runs
    starts = np.linspace(0, total - length, runs).astype(np.int64)
    return [slice(int(first), int(first) + length) for first in starts]


def sampled(source: Source, share: int, limits: Limits) -> dict[str, Any]:
    """Say how the values of the layers of a variable are distributed in the sample."""
    runs = runs_of(source, source.rows, share, limits)
    if source.width == 0 or source.rows == 0 or not source.places:
        return {"sample": {"rows": 0, "of": source.rows}}
    keep = np.concatenate([source.keep[:, run] for run in runs], axis=1)
    layers: list[dict[str, Any]] = []
    before: NDArray[Any] | None = None
    for number, place in enumerate(source.places[:_LAYERS]):
        rows = _read(source, place, runs)
        said = _distribution(rows[keep[number]])
        if before is not None:
            both = keep[number] & keep[number - 1]
            turned = cosines(before[both], rows[both])
            said["cosine"] = _mean(turned)
        layers.append(said)
        before = rows
    columns = ("quantiles", "mean", "norm", "norm_max", "nonfinite", "zeros", "cosine")
    kept = int(keep.any(axis=0).sum())
    return {
        "sample": {"rows": kept, "of": source.rows, "padding": source.padding},
        **{name: [one.get(name) for one in layers] for name in columns},
    }


def _read(source: Source, place: int | None, runs: list[slice]) -> NDArray[Any]:
    """Read runs of rows of one layer: [n, width]."""
    pick = [run if place is None else (place, run) for run in runs]
    return np.concatenate([flat(source.variable[one]) for one in pick])


def _distribution(rows: NDArray[Any]) -> dict[str, Any]:
    """Say how values are distributed, [n, width]; None of what there are none."""
    values = rows.reshape(-1)
    stride = every(values.size, rows.shape[1], SAMPLE_VALUES)  # which favours no feature
    values = values[::stride].astype(np.float64)
    there = values[np.isfinite(values)]
    norms = np.sqrt(row_squares(rows)) if rows.size else np.zeros(0)
    norms = norms[np.isfinite(norms)]
    quantiles = np.quantile(there, QUANTILES) if there.size else np.full(len(QUANTILES), None)
    return {
        "quantiles": finite(quantiles.astype(np.float64)),
        "mean": _mean(there),
        "norm": _mean(norms),
        "norm_max": finite(norms.max()) if norms.size else None,
        "nonfinite": int(rows.size - np.isfinite(rows).sum()),
        "zeros": _mean(values == 0),
    }


def _mean(values: NDArray[Any]) -> Any:
    there = values[np.isfinite(values)]
    return finite(there.mean()) if there.size else None


# -- the strip ------------------------------------------------------------------------------------


def _sequence(axis: TokenAxis, limits: Limits, found: Found) -> NDArray[np.int64]:
    """Give the rows of a strip: one batch item, through the passes while positions go on."""
    known = Sequences.of(axis)
    begun = begin_of(known, limits.sequence)
    if begun is None:
        if axis.rows and not len(known):
            found.notes.append(f"{axis.dim}: all rows are padding, no sequence is shown")
        return np.zeros(0, np.int64)
    number, first = begun
    rows = known.tokens(number) - first
    if rows > limits.max_tokens:
        found.notes.append(
            f"{axis.dim}: the sequence has {rows:,} tokens, the first {limits.max_tokens:,} are "
            "shown"
        )
    return known.rows(number, first, limits.max_tokens)


def begin_of(known: Sequences, wanted: tuple[int, int] | None) -> tuple[int, int] | None:
    """Give the sequence that is shown first, and the place in it; None if there is none."""
    if wanted is not None:
        return known.find(*wanted)
    longest = known.longest()
    return None if longest is None else (longest, 0)


def no_sequence(axis: TokenAxis, index: int, item: int) -> str:
    """Say that a pass has no such item, and which there are."""
    if not axis.rows or "pass_index" not in axis or "batch_item" not in axis:
        return f"there are no rows of pass {index}, batch item {item} on {axis.dim!r}"
    passes, items = axis.label("pass_index"), axis.label("batch_item")
    return (
        f"there are no rows of pass {index}, batch item {item} on {axis.dim!r}, which has passes "
        f"{passes.min()} to {passes.max()}, items {items.min()} to {items.max()}"
    )


def _fitting(
    sources: list[Source], rows: Mapping[str, NDArray[np.int64]], found: Found
) -> tuple[dict[str, NDArray[np.int64]], int]:
    """Cut tokens, variables and features so that little is read, and the page stays small.

    Returns
    -------
    rows : dict
        Of each axis those that are shown.
    features : int
        How many of each layer.
    """
    shown = dict(rows)
    first = sources[0] if sources else None
    if first is not None:
        layers = min(len(first.places), _LAYERS)
        size = int(shown[first.dim].size)
        most = max(min(_STRIP_BYTES // (first.row_bytes * max(layers, 1)),
                       _NUMBERS // max(layers, 1)), 1)  # fmt: skip
        if size > most:
            found.notes.append(f"{most} of {size} tokens are shown, since a row is wide or deep")
            shown = {dim: one[:most] for dim, one in shown.items()}
    nbytes = numbers = 0
    left = []
    for source, said in zip(sources, found.variables, strict=True):
        cells = int(shown[source.dim].size) * min(len(source.places), _LAYERS)
        fits = nbytes + cells * source.row_bytes <= _STRIP_BYTES and numbers + cells <= _NUMBERS
        if source is first or fits:
            nbytes, numbers = nbytes + cells * source.row_bytes, numbers + cells
        else:
            said["cut"] = True
            left.append(source.name)
    if left:
        told = ", ".join(left[:6]) + (", …" if len(left) > 6 else "")
        found.notes.append(f"{len(left)} variables are not in the strip, to stay small: {told}")
    features = min(_FEATURES, _NUMBERS // max(numbers, 1) - 1) if numbers else _FEATURES
    if features < _FEATURES:
        found.notes.append(f"{features} of {_FEATURES} features of each layer are in the strip")
    return shown, features


def on_strip(
    source: Source, rows: NDArray[np.int64], features: int, limits: Limits
) -> dict[str, Any]:
    """Give the norms of the rows of a strip in each layer, and the features that differ most."""
    held = int(limits.max_memory_gb * 1e9) // (_COPIES * max(source.width, 1) * 8)
    norms, tops = [], []
    labels = feature_labels(source)
    for number, place in enumerate(source.places[:_LAYERS]):
        keep = source.keep[number, rows]
        mine = np.full(rows.size, np.nan)
        blocks = []
        for part in _pieces(rows, max(held, 1)):
            block = flat(source.variable[rows[part] if place is None else (place, rows[part])])
            mine[part] = np.sqrt(row_squares(block)) if source.width else 0.0
            blocks.append(block if held >= rows.size else block[:, :0])
        mine[~keep] = np.nan
        norms.append(finite(mine))
        values = np.concatenate(blocks).astype(np.float64)
        values[~keep] = np.nan
        tops.append([
            {"feature": label_of(labels[column]), "values": finite(values[:, column])}
            for column in _differing(values, features)
        ])  # fmt: skip
    return {"norms": norms, "features": tops}


def feature_labels(source: Source) -> NDArray[Any]:
    """Give what the features of a variable are called: their places, where nothing says it."""
    dim = source.trailing[0] if len(source.trailing) == 1 else None
    if dim is not None and dim in source.array.coords:
        return np.asarray(source.array[dim].values)
    return np.arange(source.width)


def _pieces(rows: NDArray[np.int64], most: int) -> Iterator[slice]:
    for first in range(0, rows.size, most):
        yield slice(first, first + most)


def _differing(values: Floats, count: int) -> list[int]:
    """Give the columns with the largest standard deviation over the rows where it is finite."""
    there = np.isfinite(values)
    some = there.sum(axis=0)
    clean = np.where(there, values, 0.0)
    mean = clean.sum(axis=0) / some
    spread = (np.where(there, values - mean, 0.0) ** 2).sum(axis=0) / some
    spread = np.where(np.isfinite(spread) & (some > 0), spread, -1.0)
    order = np.argsort(-spread, kind="stable")[:count]
    return [int(one) for one in order if spread[one] > 0]


def label_of(value: Any) -> Any:
    """Give a label as JSON has it: an int, or a short text."""
    found = value.item() if hasattr(value, "item") else value
    return found if isinstance(found, int) else str(found)[:_TEXT]


def labels_of(axis: TokenAxis, rows: NDArray[np.int64], found: Found) -> dict[str, Any]:
    """Give what is known of the tokens of a strip, by columns."""
    said: dict[str, Any] = {"count": int(rows.size), "row": rows.tolist(), "labels": {}}
    others = []
    for name in axis.names:
        label = name.removeprefix(axis.prefix)
        if label in _OWN or label == "batch_item":
            said[label] = [_told(one) for one in _at(axis, name, rows)]
        else:
            others.append(name)
    for name in others[:_LABELS]:
        said["labels"][name[:_TEXT]] = [_told(one) for one in _at(axis, name, rows)]
    if len(others) > _LABELS:
        found.notes.append(f"{axis.dim}: {len(others)} labels, {_LABELS} are shown")
    return said


def _at(axis: TokenAxis, name: str, rows: NDArray[np.int64]) -> list[Any]:
    values = axis.dataset.variables[name]
    found: list[Any] = np.asarray(values[rows].values).tolist()
    return found


def _told(value: Any) -> Any:
    """Give a label's value as JSON has it."""
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return finite(value, 6)
    text = str(value)
    return text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"
