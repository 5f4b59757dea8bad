"""Owns bringing a table of the user's to rows by their labels, and columns to arrays of labels.

Tables in, arrays out: whose rows they are, and where the labels go, is the business of others.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from actstore.archive.coordinates import STRING, texts_of
from actstore.errors import ConfigError

__all__ = ["MISSING", "as_label", "as_table", "matches", "picked"]

#: Nothing was given for the rows without a value.
MISSING: Final = object()
_EXACT: Final = 1 << 53  # up to here float64 holds every integer
_SHOWN: Final = 5
#: What pandas calls the content of a column -> what it can be compared with.
_KINDS: Final = {
    "string": "text",
    "boolean": "bools",
    "integer": "numbers",
    "floating": "numbers",
    "mixed-integer-float": "numbers",
    "decimal": "decimals",
    "empty": "nothing",
}


def as_table(given: Any) -> pd.DataFrame:
    """Give a table whose columns are the table's, and the levels of its index that have a name.

    Raises
    ------
    ConfigError
        It is neither a DataFrame nor columns of the same length.
    """
    if isinstance(given, pd.DataFrame):
        named = [name for name in given.index.names if name is not None]
        table = given.reset_index(level=named) if named else given
    elif isinstance(given, Mapping):
        try:
            table = pd.DataFrame(dict(given))
        except (ValueError, TypeError) as error:
            msg = f"the table's columns are no columns of the same length: {error}"
            raise ConfigError(msg) from error
    else:
        msg = f"a table is a pandas.DataFrame, or a mapping of columns; got {type(given)!r}"
        raise ConfigError(msg)
    odd = [name for name in table.columns if not isinstance(name, str)]
    twice = table.columns[table.columns.duplicated()].tolist()
    if odd or twice:
        msg = f"a table's columns have names, each its own; found {(odd or twice)[:_SHOWN]}"
        raise ConfigError(msg)
    return table.reset_index(drop=True)


def matches(
    rows: Sequence[pd.Series], lines: Sequence[pd.Series], names: Sequence[str]
) -> NDArray[np.intp]:
    """Find the line of a table that each row is of, by one key or several.

    Parameters
    ----------
    rows, lines : sequence of pandas.Series
        For each key the labels of the rows, and the table's column.
    names : sequence of str
        The keys' names, for messages.

    Returns
    -------
    numpy.ndarray
        int [rows]: the line, or -1 where there is none; a row whose label is NaN has none.

    Raises
    ------
    ConfigError
        A key of the table is missing, is there twice, or can't be equal to a label.
    """
    pairs = [_comparable(*one) for one in zip(rows, lines, names, strict=True)]
    table = pd.MultiIndex.from_arrays([line for _, line in pairs])
    if not table.is_unique:
        twice = table[table.duplicated()].unique()[:_SHOWN].tolist()
        said = ", ".join(map(repr, [one[0] for one in twice] if len(names) == 1 else twice))
        msg = f"the table has several lines of the same {_and(names)}: {said}; one each is wanted"
        raise ConfigError(msg)
    if len(pairs) == 1:
        row, line = pairs[0]
        return np.asarray(pd.Index(line).get_indexer(pd.Index(row)), np.intp)
    mine = pd.MultiIndex.from_arrays([row for row, _ in pairs])
    return np.asarray(table.get_indexer(mine), np.intp)


def as_label(column: Any, name: str, fill: Any = MISSING) -> NDArray[Any]:
    """Give values as an array of labels: bools, numbers, or text.

    Parameters
    ----------
    column : array_like
        One for each row. None, NaN, NaT and `pandas.NA` are missing.
    name : str
        Whose they are, for messages.
    fill : scalar, optional
        What is put where one is missing. If it isn't given that is NaN, for which bools and
        integers become float64, or ``""``.

    Raises
    ------
    ConfigError
        They are neither; or integers beyond 2^53 of which some are missing.
    """
    series = _plain(column if isinstance(column, pd.Series) else _series(column, name))
    missing = series.isna().to_numpy()
    kind, given = _kind(series[~missing], name), series.dtype
    if given.kind == "c":
        return np.asarray(series.to_numpy())
    if kind not in ("text", "bools", "numbers", "nothing"):
        msg = f"{name!r} holds {kind}; labels are numbers, bools or text: convert it"
        raise ConfigError(msg)
    if missing.any() and fill is not MISSING:
        floats = isinstance(given, np.dtype) and given.kind == "f"
        series = (series if floats else series.astype(object)).where(~missing, fill)
        missing, kind = series.isna().to_numpy(), _kind(series[~series.isna()], name)
    if kind == "text":
        return texts_of(series.where(~missing, "").tolist())
    if not missing.any() and isinstance(given, np.dtype) and given.kind in "biuf":
        return np.asarray(series.to_numpy())
    return _numbers(series, name)


def picked(
    values: NDArray[Any], lines: NDArray[np.intp], name: str, fill: Any = MISSING
) -> NDArray[Any]:
    """Give each row its line's label; -1 is no line, of which what is missing is `as_label`'s.

    Raises
    ------
    ConfigError
        As for `as_label`; or the dtype of the labels can't hold ``fill``.
    """
    if lines.size and lines.min() >= 0:
        return values[lines]
    text = values.dtype == STRING
    if fill is not MISSING:
        last = np.array([fill], STRING if text and isinstance(fill, str) else None)
        with np.errstate(invalid="ignore"):
            cast = last.astype(values.dtype) if last.dtype.kind not in "OU" else last
        kinds = "biufcT"
        same = last.dtype.kind in kinds and (last.dtype.kind == "T") == text
        if not same or not np.array_equal(cast, last, equal_nan=cast.dtype.kind in "fc"):
            msg = f"{name!r} is of dtype {values.dtype}; fill is {fill!r}, which that can't hold"
            raise ConfigError(msg)
    elif text:
        cast = np.array([""], STRING)
    elif values.dtype.kind in "fc":
        cast = np.array([np.nan], values.dtype)
    else:
        values = _numbers(pd.Series([*values.tolist(), None], dtype=object), name)
        return values[lines]
    return np.append(values, cast)[lines]


def _numbers(series: pd.Series, name: str) -> NDArray[Any]:
    """Give bools or numbers of which some may be missing, each exactly."""
    if isinstance(series.dtype, np.dtype) and series.dtype.kind == "f":
        return np.asarray(series.to_numpy())
    missing = series.isna().to_numpy()
    there = series[~missing].tolist()
    bools = all(isinstance(one, bool | np.bool_) for one in there)
    whole = all(isinstance(one, int | np.integer) for one in there)  # bools are, too
    if not missing.any() and whole and there:
        try:
            return np.array(there, np.bool_ if bools else np.int64)
        except OverflowError:
            msg = f"{name!r} has integers beyond 64 bits"
            raise ConfigError(msg) from None
    if any(isinstance(one, int | np.integer) and abs(int(one)) > _EXACT for one in there):
        msg = (
            f"{name!r} has integers beyond 2^53, and rows without one: float64, which has NaN for "
            "those, can't hold them; say what they get with fill"
        )
        raise ConfigError(msg)
    found = np.full(missing.shape, np.nan)
    found[~missing] = [float(one) for one in there]
    return found


def _series(column: Any, name: str) -> pd.Series:
    if isinstance(column, list | tuple):  # else NumPy makes text of what is partly text
        values: NDArray[Any] = np.empty(len(column), object)
        values[:] = column
    else:
        values = np.asarray(column)
    if values.ndim != 1:
        msg = f"{name!r} has shape {values.shape}; a label has one value a row"
        raise ConfigError(msg)
    if values.dtype.kind in "TUS":
        values = values.astype("U" if values.dtype.kind == "S" else object).astype(object)
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    try:
        return pd.Series(values, dtype=values.dtype)  # object stays, whatever text is in it
    except (ValueError, TypeError) as error:
        msg = f"{name!r} is of dtype {values.dtype}; labels are numbers, bools or text"
        raise ConfigError(msg) from error


def _plain(series: pd.Series) -> pd.Series:
    """Give categories as what they are categories of."""
    if isinstance(series.dtype, pd.CategoricalDtype):
        return series.astype(series.cat.categories.dtype if series.size else object)
    return series


def _kind(series: pd.Series, name: str) -> str:
    """Say what a column without missing values holds."""
    if not series.size:
        return "nothing"
    found: str = pd.api.types.infer_dtype(series, skipna=False)
    if found in ("mixed", "mixed-integer"):
        kinds = sorted({type(one).__name__ for one in series})
        msg = f"{name!r} holds {' and '.join(kinds)}; one kind is wanted"
        raise ConfigError(msg)
    return _KINDS.get(found, found)


def _comparable(row: pd.Series, line: pd.Series, name: str) -> tuple[pd.Series, pd.Series]:
    """Give labels and a table's column as what only equal ones are equal in."""
    row, line = _plain(row), _plain(line)
    if line.isna().any():
        where = np.flatnonzero(line.isna().to_numpy())[:_SHOWN].tolist()
        msg = f"the table has lines without {name!r}: {where}; drop them, or fill them in"
        raise ConfigError(msg)
    mine, theirs = _kind(row[~row.isna()], name), _kind(line, name)
    if "nothing" in (mine, theirs):
        return row.astype(object), line.astype(object)
    if mine != theirs or mine not in ("text", "bools", "numbers"):
        msg = (
            f"{name!r} is {mine} on the rows, such as {row[~row.isna()].iloc[0]!r}, and {theirs} "
            f"in the table, such as {line.iloc[0]!r}: they are never equal; convert the column"
        )
        raise ConfigError(msg)
    if mine == "text":
        return row.astype(object), line.astype(object)
    if mine == "bools":
        return row.astype(np.bool_), line.astype(np.bool_)
    return _same_numbers(row, line, name)


def _same_numbers(row: pd.Series, line: pd.Series, name: str) -> tuple[pd.Series, pd.Series]:
    """Give numbers in one dtype: int64, where the rows' are integers, else float64."""
    values = line.to_numpy(object)
    whole = np.array([int(one) if one == one // 1 else 0 for one in values.tolist()], object)
    if row.dtype.kind in "iuO":
        odd = values != whole
        if odd.any():
            msg = f"{name!r} is integers on the rows, and {values[odd][0]!r} in the table"
            raise ConfigError(msg)
        if not all(-(1 << 63) <= one < 1 << 63 for one in whole.tolist()):
            msg = f"{name!r} has numbers in the table that are beyond 64 bits"
            raise ConfigError(msg)
        if row.dtype == np.uint64 or row.dtype.kind == "O":
            return row.astype(object), pd.Series(whole, dtype=object)
        return row.astype(np.int64), pd.Series(whole.astype(np.int64))
    if any(abs(one) > _EXACT for one in whole.tolist()):
        msg = f"{name!r} has integers beyond 2^53 in the table, and is float64 on the rows"
        raise ConfigError(msg)
    return row.astype(np.float64), pd.Series(values.astype(np.float64))


def _and(names: Sequence[Hashable]) -> str:
    return " and ".join(map(repr, names))
