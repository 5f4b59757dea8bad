"""Owns checks of what many functions take: numbers, names, and what they call."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, Final

from actstore.errors import ConfigError

__all__ = [
    "check_callable",
    "check_count",
    "check_memory",
    "check_positive",
    "check_strings",
    "check_tokenizer",
    "count_fitting",
    "enough_gb",
]

#: So that 10^9 of it is a finite number, too.
_MOST: Final = sys.float_info.max / 10**9


def check_positive(name: str, value: Any, wanted: str) -> None:
    """Refuse what is no positive, finite number.

    Raises
    ------
    ConfigError
        It is none; ``wanted`` says what is.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value <= _MOST:  # NaN compares as neither
        msg = f"{name} must be a positive, finite number ({wanted}); got {value!r}"
        raise ConfigError(msg)


def check_memory(gigabytes: Any) -> None:
    """Refuse what is no ``max_memory_gb``; raises as `check_positive` does."""
    check_positive("max_memory_gb", gigabytes, "GB, such as 1.0")


def enough_gb(nbytes: float) -> str:
    """Give a ``max_memory_gb`` that so many bytes fit into: rounded up, unlike those of a file."""
    return f"{math.ceil((nbytes + 1) / 1e7) / 100:.2f}"


def count_fitting(what: str, nbytes: int, max_memory_gb: float, beside: int) -> int:
    """Give how many of what takes so many bytes fit into memory, with others beside them.

    Raises
    ------
    ConfigError
        Not even one does.
    """
    count = (int(max_memory_gb * 1e9) - beside) // nbytes
    if count < 1:
        msg = (
            f"a {what} of this archive needs {enough_gb(nbytes + beside)} GB of memory; "
            f"max_memory_gb is {max_memory_gb:.4g}: give that much"
        )
        raise ConfigError(msg)
    return count


def check_count(name: str, value: Any, least: int = 1, end: int | None = None) -> None:
    """Refuse what is no integer from the least to before the end.

    Raises
    ------
    ConfigError
        It is none.
    """
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < least or (end is not None and value >= end):
        most = "" if end is None else f" and less than {end}"
        msg = f"{name} must be an int of at least {least}{most}; got {value!r}"
        raise ConfigError(msg)


def check_strings(name: str, value: Any) -> None:
    """Refuse what is no sequence of str; a str, which is one of its letters, too.

    Raises
    ------
    ConfigError
        It is none.
    """
    several = isinstance(value, Sequence) and not isinstance(value, str)
    if not several or not all(isinstance(one, str) for one in value):
        msg = f"{name} must be a sequence of str, such as ['a', 'b']; got {value!r}"
        raise ConfigError(msg)


def check_callable(name: str, value: Any) -> None:
    """Refuse what is neither None nor can be called.

    Raises
    ------
    ConfigError
        It is neither.
    """
    if value is not None and not callable(value):
        msg = f"{name} must be a callable, or None; got {value!r}"
        raise ConfigError(msg)


def check_tokenizer(value: Any) -> None:
    """Refuse what is neither None nor decodes ids.

    Raises
    ------
    ConfigError
        It is neither.
    """
    if value is not None and not callable(getattr(value, "decode", None)):
        msg = f"tokenizer must be an object with decode([id]), or None; got {value!r:.200}"
        raise ConfigError(msg)
