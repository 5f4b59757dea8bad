"""Owns giving up precision at a stated bound: what values become, and how far off that is; pure.

Some methods give floats again, with fewer bits that are not zero; they are stored as any floats
are. The others give integer codes: a value is its row's scale times the code, and chunks that
can't be given so are kept as they were. Which arrays hold what of them is ``jobs.py``'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from actstore.errors import ConfigError

__all__ = ["CODING", "EXACT", "SCALE", "Codes", "Errors", "Precision", "decoded"]

#: How the names end of the arrays beside one of codes: its scales, and rows that have no code.
SCALE: Final = "_scale"
EXACT: Final = "_exact"

#: Attributes of an array of codes, but not of its values.
CODING: Final = ("scale_factor", "add_offset", "_FillValue", "code_offset")

Floats = NDArray[np.floating[Any]]
_FLOATS: Final = {"float16": np.dtype("f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
#: Of a cast: the largest relative error, and the largest where numbers are subnormal.
_CASTS: Final = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}
#: Method -> whether it takes a bound.
_METHODS: Final = {
    "relative": True,
    "float16": False,
    "bfloat16": False,
    "int8": False,
    "mse": True,
    "nmse": True,
}
_INT8: Final = 252  # a row's largest value over this is the largest error; scales are rounded up
#: Codes are counted from here, so that small ones of both signs have the same upper byte.
_MIDDLE: Final = {1: 128, 2: 32896}
_LEAST_ROW: Final = 32  # elements of a row that are worth a scale
#: Of the squared error that a step is expected to make: chunks vary by a few thousandths.
_MARGIN: Final = 0.99
#: The parts of a step that are tried. With half of it no error is over a quarter of the step, so
#: that the squared error is at most step² / 16, and the bound is step² / 12.
_PARTS: Final = {"int8": (1.0,), "mse": (1.0, 0.5), "nmse": (1.0, 0.9, 0.5)}
_PIECE: Final = 1 << 15  # values that are compared at a time
_SQUARES: Final = 1e-60, 1e60  # what a float32 can be the step for
_LEAST_SCALE: Final = float(np.finfo(np.float32).smallest_normal)


@dataclass(frozen=True, slots=True)
class Precision:
    """How much of floats is kept, by name: ``"relative=0.01"``, ``"bfloat16"``, ``"nmse=2e-4"``.

    Parameters
    ----------
    method : {"relative", "float16", "bfloat16", "int8", "mse", "nmse"}
        What is promised of every chunk; see `compact`.
    bound : float, optional
        The bound, of those that have one: between 0 and 1, or of ``mse`` over 0.

    Raises
    ------
    ConfigError
        There is no such method, or it takes another bound.
    """

    method: str
    bound: float | None = None

    def __post_init__(self) -> None:
        wanted = _METHODS.get(self.method) if isinstance(self.method, str) else None
        if wanted is None:
            names = ", ".join(f"{name}=…" if takes else name for name, takes in _METHODS.items())
            msg = f"precision must be one of {names}; got {str(self)!r}"
            raise ConfigError(msg)
        if not wanted and self.bound is not None:
            msg = f"precision {self.method!r} takes no bound; got {self.bound!r}"
            raise ConfigError(msg)
        if wanted:
            low, high = _SQUARES if self.method == "mse" else (0.0, 1.0)
            if not isinstance(self.bound, float) or not low < self.bound < high:
                msg = (
                    f"precision {self.method!r} takes a bound over {low:g} and under {high:g}, "
                    f"such as '{self.method}=1e-3'; got {self.bound!r}"
                )
                raise ConfigError(msg)

    def __str__(self) -> str:
        return self.method if self.bound is None else f"{self.method}={self.bound!r}"

    @classmethod
    def parse(cls, given: str | Precision) -> Precision:
        """Read what `str` gives.

        Raises
        ------
        ConfigError
            It is no precision.
        """
        if isinstance(given, Precision):
            return given
        if not isinstance(given, str):
            msg = f"a precision is a str such as 'relative=0.01', or a Precision; got {given!r}"
            raise ConfigError(msg)
        method, equals, bound = given.partition("=")
        try:
            return cls(method.strip(), float(bound) if equals else None)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            msg = f"the bound of precision {given!r} is no number"
            raise ConfigError(msg) from error

    @property
    def coded(self) -> bool:
        """Whether values become codes."""
        return self.method in ("int8", "mse", "nmse")

    @property
    def code_dtype(self) -> np.dtype:
        """The dtype of the codes."""
        return np.dtype("u1" if self.method == "int8" else "u2")

    @property
    def scaled(self) -> bool:
        """Whether every row has a scale of its own."""
        return self.method in ("int8", "nmse")

    @property
    def step(self) -> float:
        """The step between the values of all codes, of ``mse``: a float32.

        Half of what a squared error of step² / 12 asks for: most chunks have even codes only.
        """
        return float(np.float32(math.sqrt(12 * _MARGIN * (self.bound or 0)) / 2))

    def applies(self, dtype: np.dtype, row_shape: tuple[int, ...]) -> bool:
        """Whether values of that dtype, in rows of that shape, are given fewer bits."""
        large = not self.scaled or math.prod(row_shape) >= _LEAST_ROW
        return dtype.kind == "f" and large and dtype.name != self.method

    def decoded_dtype(self, dtype: np.dtype) -> np.dtype:
        """Give the dtype of the values, of an array of floats of that dtype."""
        return np.result_type(dtype, np.float32) if self.coded else dtype

    def attributes(self) -> dict[str, Any]:
        """Give what an array of values says of it; ``mse`` in the words of the CF conventions."""
        said: dict[str, Any] = {"precision": str(self)}
        if self.scaled:
            said["code_offset"] = _MIDDLE[self.code_dtype.itemsize]
        elif self.coded:
            middle = _MIDDLE[self.code_dtype.itemsize]
            said |= {
                "scale_factor": self.step,
                "add_offset": -middle * self.step,
                "_FillValue": 0,
            }
        return said

    # -- floats that stay floats ----------------------------------------------------------------

    def rounded(self, rows: Floats) -> tuple[Floats, Errors]:
        """Give floats with fewer bits, and how far off they are: none where the bound would break.

        What is no finite number stays, bit for bit.
        """
        if self.method == "relative":
            found = _bit_rounded(rows, self.bound or 0)
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                cast = rows.astype(_FLOATS[self.method]).astype(rows.dtype)
            found = np.where(np.isfinite(rows), cast, rows)
        errors = self.checked(rows, found)
        if not self._holds(errors):
            return rows, self.checked(rows, rows).kept()
        return found, errors

    # -- floats that become codes ---------------------------------------------------------------

    def quantised(self, rows: Floats) -> Codes | None:
        """Give the codes of rows; None where the bound can't be kept, or a value is not finite.

        A row of NaN alone has the code 0, which stands for no value.
        """
        rows = rows.astype(self.decoded_dtype(rows.dtype), copy=False)
        there: NDArray[np.bool_] = np.ones(len(rows), np.bool_)
        if not np.isfinite(rows).all():
            there = np.logical_not(np.isnan(_flat(rows)).all(1))
            if not np.isfinite(rows[there]).all():
                return None
        mine = rows if there.all() else rows[there]
        for part in _PARTS[self.method]:
            found = self._quantised(mine, part)
            if found is None:
                return None
            errors = self.checked(mine, decoded(*found, rows.dtype))
            if self._holds(errors):
                return Codes.spread(*found, errors, there)
        return None

    def _quantised(
        self, rows: Floats, part: float
    ) -> tuple[NDArray[Any], NDArray[np.float32]] | None:
        """Give codes and scales; None where a code is none."""
        middle, scale = _MIDDLE[self.code_dtype.itemsize], self._scales(rows, part)
        if not np.isfinite(scale).all():
            return None
        divisor = np.where(scale > 0, scale, 1).astype(rows.dtype, copy=False)
        unit = 2 if self.method == "mse" and part == 1.0 else 1
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = rows / _by_row(divisor * unit, rows.ndim)
            np.rint(numbers, out=numbers)
            numbers *= unit
            numbers += middle
        if numbers.size and not (
            numbers.min() >= 1 and numbers.max() < 256**self.code_dtype.itemsize
        ):
            return None
        return numbers.astype(self.code_dtype), scale

    def _scales(self, rows: Floats, part: float) -> NDArray[np.float32]:
        """Give the step of each row: float32 [n], with the bits of a bfloat16, which are few."""
        if self.method == "mse":
            return np.full(len(rows), self.step, np.float32)
        flat = _flat(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.method == "int8":
                largest = np.abs(flat).max(1).astype(np.float64)
                return _to_bfloat16(largest / 127, up=True)
            square = np.square(flat, dtype=np.float64).mean(1)
            steps = np.sqrt(12 * _MARGIN * (self.bound or 0) * square) * part
            return _to_bfloat16(np.where(steps < _LEAST_SCALE, 0, steps), up=False)

    # -- the promise ----------------------------------------------------------------------------

    def checked(self, rows: Floats, found: Floats) -> Errors:
        """Compare rows with what they became; where that breaks the bound the errors say so."""
        size = max(_PIECE // max(rows[:1].size, 1), 1)  # what a processor's cache holds
        starts = range(0, len(rows), size)
        pieces = [self._compare(rows[at : at + size], found[at : at + size]) for at in starts]
        return sum(pieces, Errors())

    def _compare(self, rows: Floats, found: Floats) -> Errors:
        finite = np.isfinite(rows)
        with np.errstate(invalid="ignore"):  # of NaNs that signal
            wide, off = rows.astype(np.float64), found.astype(np.float64)
        if not finite.all():  # these stay, bit for bit
            if not np.array_equal(finite, np.isfinite(found)):
                return Errors(broken=1)
            wide, off = wide[finite], off[finite]
        off -= wide
        np.abs(off, out=off)
        largest = float(off.max(initial=0.0))
        if not math.isfinite(largest):
            return Errors(broken=1)
        broken, total = not self._within(off, wide), float(off.sum())
        with np.errstate(over="ignore", under="ignore"):
            squared = float(np.square(off, out=off).sum())
            squares = float(np.square(wide, out=wide).sum())
        return Errors(wide.size, squares, squared, total, largest, broken=int(broken))

    def _within(self, off: Floats, wide: Floats) -> bool:
        """Whether each error is within what its value, or row, allows."""
        if self.method in ("mse", "nmse"):
            return True
        size = np.abs(wide)
        if self.method == "int8":
            size = _flat(size)
            limit = size.max(1, initial=0)[:, np.newaxis] / _INT8
            return bool((off.reshape(size.shape) <= limit).all())
        if self.method == "relative":
            size *= self.bound or 0
        else:
            relative, least = _CASTS[self.method]
            size *= relative
            np.maximum(size, least, out=size)
        return bool((off <= size).all())

    def _holds(self, errors: Errors) -> bool:
        """Whether a chunk with these errors is within the bound."""
        reached = {"mse": errors.mse, "nmse": errors.nmse}.get(self.method, 0.0)
        return not errors.broken and reached <= (self.bound or 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """The codes of rows.

    Attributes
    ----------
    codes : numpy.ndarray
        Unsigned integers [n, *row_shape]; 0: no value.
    scale : numpy.ndarray
        float32 [n]: the step of each row; NaN where it has no values.
    errors : Errors
        How far off what they decode to is.
    """

    codes: NDArray[Any]
    scale: NDArray[np.float32]
    errors: Errors

    @classmethod
    def spread(
        cls,
        codes: NDArray[Any],
        scale: NDArray[np.float32],
        errors: Errors,
        there: NDArray[np.bool_],
    ) -> Self:
        """Put the codes of rows that are there between rows that are not."""
        if len(codes) < len(there):
            every = cls.none((len(there), *codes.shape[1:]), codes.dtype)
            every.codes[there], every.scale[there] = codes, scale
            codes, scale = every.codes, every.scale
        return cls(codes, scale, errors)

    @classmethod
    def none(cls, shape: tuple[int, ...], dtype: np.dtype) -> Self:
        """Give rows that have no codes."""
        return cls(np.zeros(shape, dtype), np.full(shape[0], np.nan, np.float32), Errors())


def decoded(
    codes: NDArray[Any],
    scale: NDArray[np.float32],
    dtype: DTypeLike,
    middle: int | None = None,
) -> Floats:
    """Give the values of codes: ``(code - middle) * scale``, and NaN for the code 0.

    Parameters
    ----------
    codes : numpy.ndarray
        uint8 or uint16 [n, *row_shape].
    scale : numpy.ndarray
        float32 [n], or of one element.
    dtype : dtype
        Of the values, float32 or float64: what the product is rounded to.
    middle : int, optional
        The code of 0, if it isn't the usual.
    """
    values: Floats = codes.astype(dtype)
    values -= _MIDDLE[codes.dtype.itemsize] if middle is None else middle
    with np.errstate(over="ignore"):  # where codes are made it is seen, and they are not kept
        values *= _by_row(scale.astype(dtype), codes.ndim)
    if codes.size:
        values[_flat(codes)[:, 0] == 0] = np.nan
    return values


def _flat(rows: NDArray[Any]) -> NDArray[Any]:
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def _by_row(column: NDArray[Any], ndim: int) -> NDArray[Any]:
    return column.reshape(-1, *(1,) * (ndim - 1))


def _bit_rounded(rows: Floats, bound: float) -> Floats:
    """Round to as few mantissa bits as keep a relative error, to even (bit-rounding).

    By Klöwer et al., doi:10.1038/s43588-021-00156-2. Numbers that are not normal, or would become
    infinite, stay.
    """
    kept = max(math.ceil(-math.log2(bound)) - 1, 0)  # the error is under 2**-(kept + 1)
    kind = np.finfo(rows.dtype)
    dropped = kind.nmant - kept
    if dropped <= 0:
        return rows
    unsigned = np.dtype(f"u{rows.dtype.itemsize}").type
    bits = rows.view(unsigned)
    found = bits >> unsigned(dropped)
    found &= unsigned(1)
    found += unsigned((1 << (dropped - 1)) - 1)
    found += bits
    found &= unsigned(~((1 << dropped) - 1) & (1 << 8 * rows.dtype.itemsize) - 1)
    values: Floats = found.view(rows.dtype)
    size = np.abs(rows)
    stays = ~(size >= kind.smallest_normal) | ~np.isfinite(values)
    if stays.any():
        values[stays] = rows[stays]
    return values


def _to_bfloat16(values: NDArray[np.float64], *, up: bool) -> NDArray[np.float32]:
    """Round positive numbers to float32 whose lower half is 0: none is smaller, or larger."""
    with np.errstate(over="ignore", under="ignore"):
        near = values.astype(np.float32)
    bits = near.view(np.uint32)
    low = bits & np.uint32(0xFFFF0000)
    if up:
        low = np.where(low.view(np.float32) < values, low + np.uint32(1 << 16), low)
    else:
        low = np.where(low.view(np.float32) > values, low - np.uint32(1 << 16), low)
    return low.astype(np.uint32).view(np.float32)


@dataclass(frozen=True, slots=True)
class Errors:
    """How far off values are, added up; non-finite ones, which are exact, not counted.

    Attributes
    ----------
    elements : int
        How many were looked at.
    squares, squared_error, absolute_error : float
        Sums: of their squares, and of the errors'; of the errors' sizes.
    largest : float
        The largest error.
    lossless : int
        Elements of the chunks that would have broken the bound, and are as they were.
    broken : int
        Chunks in which a value is further off than its bound allows.
    """

    elements: int = 0
    squares: float = 0.0
    squared_error: float = 0.0
    absolute_error: float = 0.0
    largest: float = 0.0
    lossless: int = 0
    broken: int = 0

    def __add__(self, other: Errors) -> Errors:
        names = [one.name for one in fields(self)]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Errors(**sums | {"largest": max(self.largest, other.largest)})

    def kept(self) -> Errors:
        """Give the errors of a chunk that is as it was."""
        return replace(self, lossless=self.elements)

    @property
    def mse(self) -> float:
        """The mean squared error."""
        return self.squared_error / self.elements if self.elements else 0.0

    @property
    def nmse(self) -> float:
        """The squared error over the squares."""
        if self.squares:
            return self.squared_error / self.squares
        return math.inf if self.largest else 0.0

    def said(self) -> dict[str, Any]:
        """Give what an archive says of a layer."""
        return {
            "mse": self.mse,
            "nmse": self.nmse,
            "mean_error": self.absolute_error / self.elements if self.elements else 0.0,
            "largest_error": self.largest,
            "elements": self.elements,
            "lossless_elements": self.lossless,
        }
