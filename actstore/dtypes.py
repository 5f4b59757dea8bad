"""Owns the dtype names and codes of the formats, and how NumPy holds each of them.

The one place that knows how bfloat16 (and float8) is represented: as its own `ml_dtypes` scalar
in a packet, as float32 with the same values in datasets and archives. Leaves torch's dtypes to
``actstore.capture``.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from actstore.errors import FormatError

__all__ = ["BY_CODE", "BY_NAME", "DType", "array_dtype", "from_code", "from_name"]


@dataclass(frozen=True, slots=True)
class DType:
    """A tensor element type of the formats.

    Attributes
    ----------
    code : int
        The byte that stands for it in a log (``schemas/stream.md``).
    name : str
        Its name, as torch and NumPy have it (``"bfloat16"``, ``"float32"``).
    numpy : numpy.dtype
        What a packet's values have.
    array : numpy.dtype
        What datasets and archives have: the same, or float32 where NumPy's own types can't say it.
    """

    code: int
    name: str
    numpy: np.dtype
    array: np.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.numpy.itemsize


def _table() -> tuple[DType, ...]:
    native = [
        "bool",
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "complex128",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    ]
    rows = []
    for code, name in enumerate(native, start=1):
        extension = hasattr(ml_dtypes, name)
        kind = np.dtype(getattr(ml_dtypes, name)) if extension else np.dtype(name)
        rows.append(DType(code, name, kind, np.dtype("float32") if extension else kind))
    return tuple(rows)


#: Every known dtype by its code in a log.
BY_CODE: dict[int, DType] = {entry.code: entry for entry in _table()}
#: Every known dtype by its name.
BY_NAME: dict[str, DType] = {entry.name: entry for entry in BY_CODE.values()}


def from_code(code: int) -> DType:
    """Give the dtype of a code in a log.

    Raises
    ------
    FormatError
        The code stands for no dtype.
    """
    try:
        return BY_CODE[code]
    except KeyError:
        msg = f"dtype code {code} is unknown; known are 1 to {max(BY_CODE)} (schemas/stream.md)"
        raise FormatError(msg) from None


def from_name(name: str) -> DType:
    """Give the dtype of a name such as ``"bfloat16"``.

    Raises
    ------
    FormatError
        The name is of no dtype that a log can hold.
    """
    try:
        return BY_NAME[name]
    except KeyError:
        msg = f"dtype {name!r} can't be kept in a log; known are {', '.join(BY_NAME)}"
        raise FormatError(msg) from None


def array_dtype(dtype: np.dtype) -> np.dtype:
    """Give the dtype in which datasets and archives hold a packet's values.

    bfloat16 and float8 become float32, which holds each of their values exactly; everything
    else stays as it is.
    """
    return from_name(dtype.name).array
