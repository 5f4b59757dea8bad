"""Owns checks of what callers give that many functions take: numbers, and what is called."""

from __future__ import annotations

import sys
from numbers import Integral, Real
from typing import Any, Final

from actstore.errors import ConfigError

__all__ = ["check_callable", "check_count", "check_positive"]

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


def check_count(name: str, value: Any, least: int = 1, end: int | None = None) -> None:
    """Refuse what is no integer from the least to before the end.

    Raises
    ------
    ConfigError
        It is none.
    """
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not integer or value < least or (end is not None and value >= end):
        most = "" if end is None else f" and less than {end}"
        msg = f"{name} must be an int of at least {least}{most}; got {value!r}"
        raise ConfigError(msg)


def check_callable(name: str, value: Any, wanted: str) -> None:
    """Refuse what is neither None nor can be called.

    Raises
    ------
    ConfigError
        It is neither; ``wanted`` says what it is called with.
    """
    if value is not None and not callable(value):
        msg = f"{name} must be None or a callable ({wanted}); got {value!r}"
        raise ConfigError(msg)
