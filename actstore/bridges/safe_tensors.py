"""Owns safetensors files: read by the safetensors library; written tensor by tensor, in pieces.

The layout is that of https://github.com/huggingface/safetensors (README, "Format"; 0.8.0): eight
bytes of length, a JSON header, the tensors without gaps. The library has no writer that doesn't
hold all of them at once, so the header is written here, and read back by the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from actstore import dtypes
from actstore.bridges.foreign import Array
from actstore.errors import ConfigError, FormatError

__all__ = ["NAMES", "opened", "write"]

#: dtype -> its name in safetensors.
NAMES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
_KINDS: Final = {mine: name for name, mine in NAMES.items()}
_ALIGN: Final = 8


def library() -> Any:
    """Give the safetensors library.

    Raises
    ------
    ConfigError
        It isn't installed.
    """
    try:
        import safetensors
    except ImportError:
        msg = "safetensors files need the package safetensors: pip install 'actstore[safetensors]'"
        raise ConfigError(msg) from None
    return safetensors


@contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, Array], dict[str, str]]]:
    """Open a file, whose header the library checks against its size.

    Yields
    ------
    (dict, dict)
        Name -> tensor, read when it is cut, in the order of the names; and the metadata.

    Raises
    ------
    FormatError
        It is no safetensors file, or damaged.
    """
    api = library()
    try:
        handle = api.safe_open(path, framework="numpy")
    except (api.SafetensorError, OSError, ValueError) as error:
        msg = f"{path} is no whole safetensors file: {error}"
        raise FormatError(msg) from error
    with handle as file:
        metadata = file.metadata() or {}
        yield _mapped(file, path), dict(metadata)


def _mapped(file: Any, path: Path) -> dict[str, Array]:
    """Map the tensors, which follow each other without gaps: the library has checked that.

    By itself it gives NumPy no float8, and copies.

    Raises
    ------
    FormatError
        A dtype is none that logs have, or the sizes are not the file's.
    """
    with path.open("rb") as start:
        begin = 8 + int.from_bytes(start.read(8), "little")
    places = {}
    end = begin
    for name in file.offset_keys():
        part = file.get_slice(name)
        kind = _KINDS.get(str(part.get_dtype()))
        if kind is None:
            msg = f"{path}: {name!r} is of {part.get_dtype()}; wanted one of {', '.join(_KINDS)}"
            raise FormatError(msg)
        dtype, shape = dtypes.from_name(kind).numpy, tuple(part.get_shape())
        first, end = end, end + math.prod(shape) * dtype.itemsize
        places[name] = slice(first, end), dtype, shape
    if end != path.stat().st_size:
        msg = f"{path} has {path.stat().st_size} bytes; its tensors end at {end}"
        raise FormatError(msg)
    data = np.memmap(path, np.uint8, "r")
    return {
        name: np.frombuffer(data[place], dtype).reshape(shape)
        if place.start < place.stop
        else np.zeros(shape, dtype)
        for name, (place, dtype, shape) in sorted(places.items())
    }


def write(
    file: BinaryIO,
    tensors: Mapping[str, tuple[str, Sequence[int], Callable[[], Iterator[NDArray[Any]]]]],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors, piece by piece.

    Parameters
    ----------
    file : file
        Open for writing, empty.
    tensors : mapping
        Name -> dtype, shape, and what gives its values in order, in pieces.
    metadata : mapping of str to str
        What is said of the file.

    Raises
    ------
    ConfigError
        The format has no such dtype.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # larger elements first, so that each tensor begins at a multiple of its element
    order = sorted(tensors, key=lambda one: -dtypes.from_name(tensors[one][0]).itemsize)
    for name in order:
        kind, shape, _ = tensors[name]
        if kind not in NAMES:
            msg = f"{name!r} is of {kind}, which safetensors files can't hold; leave it out"
            raise ConfigError(msg)
        start = end
        end += int(np.prod(shape, dtype=np.int64)) * dtypes.from_name(kind).itemsize
        header[name] = {"dtype": NAMES[kind], "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode("utf-8", "replace")
    head += b" " * (-len(head) % _ALIGN)
    file.write(len(head).to_bytes(8, "little"))
    file.write(head)
    for name in order:
        kind, shape, read = tensors[name]
        left = int(np.prod(shape, dtype=np.int64))
        for values in read():
            left -= values.size
            if values.size:
                file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        if left:
            msg = f"{name!r} gave {-left} values more than its shape {tuple(shape)} has"
            raise ConfigError(msg)
