"""Owns what every foreign source is read as: passes of named arrays; and the checks they share.

What a format's files look like is its own module's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ConfigError, FormatError
from actstore.packet import Axis

__all__ = [
    "Array",
    "Firing",
    "Foreign",
    "ForeignPass",
    "Options",
    "axis_of",
    "files_in",
    "integers",
    "natural",
    "number",
    "pieces",
    "read_json",
    "wanted_tokens",
    "within",
]

#: What a packet of a file that is read piece by piece has at most.
PACKET_BYTES: Final = 16 << 20
#: From this size of one sequence on, it is several passes.
SEQUENCE_BYTES: Final = 64 << 20
_MOST_ITEMS: Final = 1024
_JSON_BYTES: Final = 16 << 20
_MOST_FILES: Final = 1 << 20
_NAME_LENGTH: Final = 200


class Array(Protocol):
    """What can be cut like an array, and is read when it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Its dtype, bfloat16 as that of `ml_dtypes`."""

    def __getitem__(self, key: Any, /) -> NDArray[Any]:
        """Read a part of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Firing:
    """One packet to be.

    Attributes
    ----------
    layer : str
        Its layer's name.
    values : numpy.ndarray
        Its values.
    call : int
        The how-manieth of the layer in the pass.
    same_as : hashable, optional
        Equal for arrays of the same memory: they are kept once.
    """

    layer: str
    values: NDArray[Any]
    call: int = 0
    same_as: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class ForeignPass:
    """A pass to be: its token axis, its packets, and labels of its batch items."""

    axis: Axis | None
    firings: Iterable[Firing]
    annotations: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Foreign:
    """A foreign source, before any value is read.

    Attributes
    ----------
    layout : str
        Which package's, and which version's or document's layout it was read by.
    files : sequence of Path
        All of its files.
    passes : iterable of ForeignPass
        Read as they are taken.
    about : mapping
        What the source says of itself, as JSON.
    """

    layout: str
    files: Sequence[Path]
    passes: Iterable[ForeignPass]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """What a caller says that the files don't: see `actstore.import_activations`."""

    layers: Sequence[int] | None = None
    tokens: NDArray[np.int64] | None = None


def axis_of(
    shape: tuple[int, int],
    *,
    ids: NDArray[np.int64] | None = None,
    mask: NDArray[np.bool_] | None = None,
    positions: NDArray[np.int64] | None = None,
    start: int = 0,
    flat: bool = False,
) -> Axis:
    """Give the token axis of a pass: ids are -1, and positions count from ``start``, if not given.

    Parameters
    ----------
    shape : (int, int)
        Batch and sequence.
    ids, mask, positions : numpy.ndarray, optional
        As many as that.
    start : int
        The first position.
    flat : bool
        As for `Axis`.
    """
    batch, sequence = shape
    if positions is None:
        positions = np.broadcast_to(np.arange(start, start + sequence, dtype=np.int64), shape)
    return Axis(
        "token",
        batch,
        sequence,
        np.full(shape, -1, np.int64) if ids is None else ids.reshape(shape),
        positions.reshape(shape),
        np.ones(shape, np.bool_) if mask is None else mask.reshape(shape),
        flat,
    )


def pieces(items: int, length: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Cut sequences into passes: of whole ones, or of a part of one that is very long.

    Yields
    ------
    (slice, slice)
        Items, and positions in them.
    """
    if not items or not length:
        return
    row_bytes = max(row_bytes, 1)
    item_bytes = length * row_bytes
    if item_bytes <= SEQUENCE_BYTES:
        step = min(max(PACKET_BYTES // item_bytes, 1), _MOST_ITEMS)
        for first in range(0, items, step):
            yield slice(first, min(first + step, items)), slice(0, length)
        return
    step = max(PACKET_BYTES // row_bytes, 1)
    for item in range(items):
        for first in range(0, length, step):
            yield slice(item, item + 1), slice(first, min(first + step, length))


def integers(values: Any, what: str, where: object) -> NDArray[np.int64]:
    """Give token ids or positions as int64.

    Raises
    ------
    FormatError
        They are no integers, or too large.
    """
    found = np.asarray(values)
    if found.dtype.kind not in "iu":
        msg = f"{where}: {what} must be integers; found {found.dtype}"
        raise FormatError(msg)
    if found.dtype == np.uint64 and found.size and found.max() > np.iinfo(np.int64).max:
        msg = f"{where}: {what} must be below 2**63; found {found.max()}"
        raise FormatError(msg)
    return found.astype(np.int64)


# -- files --------------------------------------------------------------------------------------


def within(folder: Path, name: object) -> Path:
    """Give the path of a file that another file names, which must be inside its folder.

    Raises
    ------
    FormatError
        It leads out of the folder, or there is no such file.
    """
    plain = isinstance(name, str) and 0 < len(name) < _NAME_LENGTH and "\0" not in name
    if not plain or PurePosixPath(str(name)).name != name or name == "..":
        msg = f"{folder} names the file {name!r:.200}; wanted the name of one beside it"
        raise FormatError(msg)
    path = folder / str(name)
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        msg = f"{folder} names the file {name!r:.200}, which is not in it"
        raise FormatError(msg)
    return path


def files_in(folder: Path, *endings: str, deep: bool = False) -> list[Path]:
    """Give the files of a folder with one of some endings, sorted as people count.

    Raises
    ------
    FormatError
        One leads out of the folder, by a link.
    """
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = [one for one in folders if deep and not one.startswith(".")]
        found += [
            Path(base, name)
            for name in names
            if name.endswith(endings) and not name.startswith(".")
        ]
        if len(found) > _MOST_FILES:
            msg = f"{folder} has more than {_MOST_FILES} files; import parts of it"
            raise FormatError(msg)
    root = folder.resolve()
    for path in found:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            msg = f"{path} is a link that leads out of its folder; copy the file there"
            raise FormatError(msg)
    return sorted(found, key=lambda path: natural(path.relative_to(folder).as_posix()))


def natural(name: str) -> list[tuple[int, int, str]]:
    """Give what sorts ``layer_10`` behind ``layer_9``."""
    return [
        (1, int(part), "") if part.isdecimal() else (0, 0, part)
        for part in re.split(r"(\d+)", name)
    ]


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file of limited size, whose value is of one type.

    Raises
    ------
    FormatError
        It is larger, no JSON, or another value.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _JSON_BYTES else b""
    except OSError as error:
        msg = f"{path} can't be read ({error.strerror}); is {path.parent} of this kind?"
        raise FormatError(msg) from error
    if size > _JSON_BYTES:
        msg = f"{path} has {size} bytes; a JSON of {_JSON_BYTES} is the largest that is read"
        raise FormatError(msg)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        msg = f"{path} holds no JSON: {error!s:.200}"
        raise FormatError(msg) from error
    if not isinstance(found, kind):
        msg = f"{path} holds a JSON {type(found).__name__}; wanted {kind.__name__}"
        raise FormatError(msg)
    return found


def number(found: Mapping[str, Any], names: Sequence[str], where: Path) -> int:
    """Give a number of a JSON object, from 0, by the first of its names that is there.

    Raises
    ------
    FormatError
        It isn't there, or is no such number.
    """
    value = next((found[name] for name in names if name in found), None)
    if type(value) is not int or not 0 <= value < 1 << 48:
        msg = f"{where}: {names[0]!r} must be an integer from 0; found {value!r:.80}"
        raise FormatError(msg)
    return value


def wanted_tokens(tokens: Any) -> NDArray[np.int64] | None:
    """Give the ids that a caller told, [rows] or [batch, sequence].

    Raises
    ------
    ConfigError
        They are neither.
    """
    if tokens is None:
        return None
    try:
        found = np.asarray(tokens.detach().cpu() if hasattr(tokens, "detach") else tokens)
    except ValueError:  # lists of several lengths
        found = np.empty(0, object)
    if found.dtype.kind not in "iu" or found.ndim not in (1, 2):
        msg = (
            "tokens must be integers [rows] or [batch, sequence]; "
            f"got {found.dtype} of shape {found.shape}"
        )
        raise ConfigError(msg)
    return found.astype(np.int64)
