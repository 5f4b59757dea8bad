"""Owns arrays of any library as NumPy's: read piece by piece, bfloat16 without loss, no copies.

torch's tensors are known by what they can do, and torch is never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore import dtypes
from actstore.bridges.foreign import Array
from actstore.errors import ConfigError, FormatError

__all__ = ["Lazy", "as_array", "first_tensor", "memory_of"]

_DEEPEST: Final = 32


@dataclass(frozen=True, slots=True, eq=False)
class Lazy:
    """An array that is read when it is cut.

    Attributes
    ----------
    shape : tuple of int
        Its shape.
    dtype : numpy.dtype
        Its dtype.
    read : callable
        Gives what a key asks for.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Any], NDArray[Any]]

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """Read a part of it."""
        return self.read(key)


def as_array(values: Any, what: str) -> Array:
    """Give an array or a tensor as what can be cut.

    Parameters
    ----------
    values : array-like or torch.Tensor
        Anything with a dtype and a shape.
    what : str
        Its name, for messages.

    Raises
    ------
    ConfigError
        It is neither, or holds what a log can't.
    """
    if isinstance(values, np.ndarray | np.generic):
        found = np.asarray(values)
        _known(found.dtype.name, what)
        return found
    if callable(getattr(values, "detach", None)):
        return _of_torch(values, what)
    if hasattr(values, "__array__") and hasattr(values, "dtype"):
        return as_array(np.asarray(values), what)
    msg = f"{what}: wanted an array or a tensor; found {type(values).__name__}"
    raise ConfigError(msg)


def memory_of(values: Any) -> Any:
    """Give what is equal for living arrays of the same memory, None where that can't be told."""
    if callable(getattr(values, "data_ptr", None)):
        try:
            place = values.data_ptr(), tuple(values.stride())
        except (RuntimeError, NotImplementedError):
            return None
        return (str(values.device), *place) if place[0] else None
    if isinstance(values, np.ndarray):
        return values.__array_interface__["data"][0], values.strides
    return None


def first_tensor(value: Any, depth: int = 0) -> Any:
    """Give the first tensor or array of what a module returned, depth first; None if none."""
    if isinstance(value, np.ndarray) or callable(getattr(value, "detach", None)):
        return value
    inside: Any = ()
    if isinstance(value, dict) or hasattr(value, "to_tuple"):
        inside = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    if depth < _DEEPEST:
        for one in inside:
            found = first_tensor(one, depth + 1)
            if found is not None:
                return found
    return None


def _known(name: str, what: str) -> dtypes.DType:
    try:
        return dtypes.from_name(name)
    except FormatError as error:
        msg = f"{what}: {error}"
        raise ConfigError(msg) from None


def _of_torch(tensor: Any, what: str) -> Lazy:
    kind = _known(str(tensor.dtype).removeprefix("torch."), what)
    layout = str(getattr(tensor, "layout", "torch.strided"))
    if layout != "torch.strided" or getattr(tensor, "is_meta", False):
        msg = f"{what}: only dense tensors with values can be kept; found {layout}"
        raise ConfigError(msg)
    torch: Any = sys.modules["torch"]  # else there were no tensor

    def read(key: Any) -> NDArray[Any]:
        part = tensor.detach()[key].cpu().resolve_conj().resolve_neg().contiguous()
        shape = tuple(part.shape)
        if not part.numel():
            return np.zeros(shape, kind.numpy)
        data = part.reshape(-1).view(torch.uint8).numpy()
        return data.view(kind.numpy).reshape(shape)  # type: ignore[no-any-return]

    return Lazy(tuple(map(int, tensor.shape)), kind.numpy, read)
