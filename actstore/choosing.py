"""Owns choosing how much of floats an archive keeps: measures a sample by each method, and says.

What the methods are is ``archive.precision``'s; it is `compact` that applies them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore import dtypes
from actstore.accessor import check_dataset
from actstore.archive import grid, shards
from actstore.archive.precision import Errors, Precision, decoded
from actstore.errors import ConfigError

__all__ = ["PrecisionChoice", "choose_precision"]

_LAYERS, _PIECES = 8, 2  # of each variable, and of each of these layers
_BITS: Final = range(1, 13)  # mantissa bits that are tried
_PROFILE: Final = "balanced"
_LOSSLESS: Final = ""


@dataclass(frozen=True, slots=True, eq=False)
class PrecisionChoice:
    """What is recommended, and what was measured.

    Attributes
    ----------
    precision : dict of str to str
        For `compact`'s ``precision``: of each variable that can be smaller, the precision that
        makes it smallest.
    table : xarray.Dataset
        (variable, precision): ``ratio``, the model's own bytes over those stored; and of the layer
        that it is worst for ``nmse``, ``feature_nmse`` (of the median feature, by itself) and
        ``largest_error``. The precision ``""`` is full. NaN where one can't be applied.
    """

    precision: dict[str, str]
    table: xr.Dataset

    def __str__(self) -> str:
        lines = []
        for name in self.table["variable"].values.tolist():
            chosen = self.precision.get(name, _LOSSLESS)
            mine = self.table.sel(variable=name, precision=chosen)
            said = f"{float(mine.ratio):5.2f}x  NMSE {float(mine.nmse):.1e}"
            lines.append(f"{name:<40} {chosen or 'lossless':<16} {said}")
        return "\n".join(lines)


def choose_precision(
    dataset: xr.Dataset,
    *,
    nmse: float,
    variables: str | Iterable[str] | None = None,
    plain: bool = False,
    features: float = 10.0,
) -> PrecisionChoice:
    """Measure a sample of each variable by each method, and recommend the smallest that will do.

    Parameters
    ----------
    dataset : xarray.Dataset
        Of a log, or of an archive at full precision.
    nmse : float
        The squared error over the values' squares that is allowed in every layer that is sampled;
        between 0 and 1.
    variables : str or iterable of str, optional
        Which; all of floats with rows on a token axis, if it isn't given.
    plain : bool
        Only what is stored as plain floats, which every reader of Zarr decodes.
    features : float
        What the NMSE of the median feature, by itself, may be, over ``nmse``. Where a few features
        are far larger than all others, ``nmse`` and ``int8`` are exact about those alone.

    Returns
    -------
    PrecisionChoice
        What to give to `compact`, and the measurements.

    Raises
    ------
    ConfigError
        It is no dataset; a bound is none; or there is no such variable, or it has no floats.
    """
    check_dataset(dataset)
    tried = _candidates(nmse, plain=plain)
    names = _names(dataset, variables)
    columns = ("ratio", "nmse", "feature_nmse", "largest_error")
    found = {one: np.full((len(names), len(tried)), np.nan) for one in columns}
    for row, name in enumerate(names):
        sample = list(_sample(dataset[name]))
        for column, precision in enumerate(tried):
            measured = _measure(sample, precision, dataset[name].attrs["source_dtype"])
            for one, value in zip(columns, measured or (), strict=bool(measured)):
                found[one][row, column] = value
    labels = [_LOSSLESS if one is None else str(one) for one in tried]
    table = xr.Dataset(
        {one: (("variable", "precision"), values) for one, values in found.items()},
        {"variable": names, "precision": labels},
        {"nmse": nmse, "features": features},
    )
    good = (found["nmse"] <= nmse) & (found["feature_nmse"] <= features * nmse)
    best = np.where(good, found["ratio"], 0).argmax(1)
    chosen = {
        name: labels[column] for name, column in zip(names, best, strict=True) if labels[column]
    }
    return PrecisionChoice(chosen, table)


def _candidates(nmse: float, *, plain: bool) -> list[Precision | None]:
    floats = [Precision("relative", 2.0 ** -(kept + 1)) for kept in _BITS]
    casts = [Precision("float16"), Precision("bfloat16")]
    codes = [Precision("int8"), Precision("nmse", float(nmse) if isinstance(nmse, Real) else nmse)]
    return [None, *casts, *floats, *(codes if not plain else [])]


def _names(dataset: xr.Dataset, variables: str | Iterable[str] | None) -> list[str]:
    able = [str(name) for name, one in dataset.data_vars.items() if _is_able(one)]
    wanted = [variables] if isinstance(variables, str) else variables
    names = able if wanted is None else list(wanted)
    for name in names:
        if name not in able:
            msg = f"{name!r} is no variable of floats with rows of tokens; there are {able}"
            raise ConfigError(msg)
    return names


def _is_able(one: xr.DataArray) -> bool:
    ragged = isinstance(one.attrs.get("modules"), dict)
    return one.dtype.kind == "f" and "source_dtype" in one.attrs and not ragged and one.size > 0


def _sample(array: xr.DataArray) -> Iterator[NDArray[Any]]:
    """Give for some layers some chunks of rows, as an archive would be cut."""
    axis = int(array.dims[0] == "layer")
    total = array.shape[axis]
    size = grid.chunk_rows(total, math.prod(array.shape[axis + 1 :]) * array.dtype.itemsize)
    chunks = -(-total // size)
    starts = sorted({chunks * one // _PIECES * size for one in range(_PIECES)})
    places = np.unique(np.linspace(0, len(array) - 1, _LAYERS).astype(int)) if axis else [None]
    for place in places:
        layer = array if place is None else array.isel(layer=int(place))
        pieces = [layer[start : start + size].values for start in starts]
        yield np.concatenate(pieces)


def _measure(
    sample: Sequence[NDArray[Any]], precision: Precision | None, source: str
) -> tuple[float, float, float, float] | None:
    """Give the ratio, and of the worst layer NMSE, its median feature's, and the largest error."""
    raw = stored = 0
    worst = Errors(), 0.0, 0.0
    for rows in sample:
        if precision is not None and not precision.applies(rows.dtype, rows.shape[1:]):
            return None
        parts, values, errors = _kept(rows, precision)
        raw += rows.size * dtypes.from_name(source).itemsize
        stored += sum(map(_encoded_bytes, parts))
        worst = (
            max(worst[0], errors, key=lambda one: one.nmse),
            max(worst[1], _of_features(rows, values)),
            max(worst[2], errors.largest),
        )
    return raw / stored, worst[0].nmse, worst[1], worst[2]


def _kept(
    rows: NDArray[Any], precision: Precision | None
) -> tuple[list[NDArray[Any]], NDArray[Any], Errors]:
    """Give the arrays that are stored of rows, what they are read as, and how far off that is."""
    if precision is None:
        return [rows], rows, Errors()
    if not precision.coded:
        values, errors = precision.rounded(rows)
        return [values], values, errors
    found = precision.quantised(rows)
    if found is None:
        return [rows], rows, Errors()
    values = decoded(found.codes, found.scale, precision.decoded_dtype(rows.dtype))
    return [found.codes, found.scale], values, found.errors


def _encoded_bytes(rows: NDArray[Any]) -> int:
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    room = np.empty(shards.room(data.nbytes, 1, 1), np.uint8)
    return shards.encode_chunk(room, data, rows.itemsize, shards.applied(_PROFILE, rows))


def _of_features(rows: NDArray[Any], values: NDArray[Any]) -> float:
    """Give the NMSE of the median feature by itself."""
    with np.errstate(invalid="ignore", divide="ignore"):
        wide = rows.reshape(len(rows), -1).astype(np.float64)
        off = values.reshape(len(rows), -1) - wide
        squares = np.nansum(np.square(wide, out=wide), 0)
        own = np.nansum(np.square(off, out=off), 0) / squares
    return float(np.median(own[squares > 0])) if (squares > 0).any() else 0.0
