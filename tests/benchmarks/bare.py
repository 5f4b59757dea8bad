"""Owns the least that any capture in Python does to a model: what speed that leaves is a floor.

Every hook copies what its module returned into memory that was used before, and nothing else: what
it is of, whether it is one that can be copied, and who else has it is not asked. With a codec the
bytes of some passes are encoded behind them on all cores, since the model leaves none of them
free. Nothing is written, and nothing could be read again.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from actstore import codecs

__all__ = ["Bare"]

#: Bytes of memory, and how many are used before the first are used again.
_ARENA, _ENOUGH = 512 << 20, 64 << 20
_SMALL = 32 << 10
#: Bytes that wait for the codec, and that a thread encodes at a time.
_DUE, _BLOCK = 4 << 20, 1 << 20

_move_small: Any = ctypes.PyDLL(None).memmove
_move_small.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_move_small.restype = None


@cache
def _memory() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Give memory that is there: for what is copied, and for a frame of each block of it."""
    frames = np.ones((_ARENA // _BLOCK, _BLOCK + codecs.FRAME_BYTES), np.uint8)
    return np.ones(_ARENA, np.uint8), frames


class Bare:
    """Hooks that copy, while it is entered.

    Parameters
    ----------
    model : torch.nn.Module
        The end of its call is that of a pass.
    modules : sequence of torch.nn.Module
        What is hooked; each returns a tensor, or something whose first is one.
    codec : str
        "none", "lz4" or "zstd".
    itemsize : int
        Bytes of a value.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[nn.Module], codec: str, itemsize: int
    ) -> None:
        self._model, self._modules = model, modules
        self._codec, self._itemsize = codecs.NAMES[codec], itemsize
        self._memory, self._rooms = _memory()
        self._begin = self._used = 0
        self._last: Any = None

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._pool = self._open.enter_context(ThreadPoolExecutor(os.cpu_count()))
        hook = self._hook()
        for module in self._modules:
            self._open.callback(module.register_forward_hook(hook).remove)
        self._open.callback(self._model.register_forward_hook(self._leave).remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._encode()
        self._open.close()

    def _hook(self) -> Any:
        base, move_large, move_small = self._memory.ctypes.data, ctypes.memmove, _move_small

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple | dict) else output
            if tensor is self._last:
                return
            self._last = tensor
            nbytes, place = tensor.nbytes, self._used
            if place + nbytes > _ARENA:
                raise MemoryError(f"a pass of more than {_ARENA - _ENOUGH} bytes")
            move = move_small if nbytes < _SMALL else move_large
            move(base + place, tensor.data_ptr(), nbytes)
            self._used = place + nbytes

        return hook

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._last = None
        if self._codec and self._used - self._begin >= _DUE:
            self._encode()
        if self._used > _ENOUGH:
            self._begin = self._used = 0

    def _encode(self) -> None:
        if self._codec:
            places = range(self._begin, self._used, _BLOCK)
            list(self._pool.map(self._block, places))
        self._begin = self._used

    def _block(self, place: int) -> int:
        data = self._memory[place : min(place + _BLOCK, self._used)]
        return codecs.encode(self._codec, data, self._itemsize, self._rooms[place // _BLOCK])[0]
