"""Owns the memory that captures stage and encode in: large pieces, used again and again.

Fresh memory costs more than copying into it does, on a virtual machine ten times more. So what
one capture has used is kept for the next: a little of it, as long as its framework lives.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Memory"]

#: Pieces of each size that outlive a capture: as many as one that keeps up uses in turn.
_KEPT: Final = 4


class Memory:
    """Pieces of memory that each begin at a page. Safe to use from several threads.

    A copy of it, pickled or not, is empty.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._fresh: Callable[[int], NDArray[np.uint8]] = _fresh

    def use(self, fresh: Callable[[int], NDArray[np.uint8]]) -> None:
        """Take memory of another sort from now on, from where it is given fresh."""
        if fresh is not self._fresh:
            self._free.clear()
            self._fresh = fresh

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Give a piece of so many bytes: the one that was given back last, or a fresh one."""
        try:
            return self._free[nbytes].pop()
        except (KeyError, IndexError):
            return self._fresh(nbytes)

    def give_back(self, piece: NDArray[np.uint8]) -> None:
        """Keep a piece that is not used any more for the next who takes one of its size."""
        self._free.setdefault(piece.nbytes, []).append(piece)

    def trim(self) -> None:
        """Let go of what a capture that has ended used, but for a few pieces of each size."""
        for pieces in self._free.values():
            del pieces[:-_KEPT]

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()


def _fresh(nbytes: int) -> NDArray[np.uint8]:
    """Give fresh memory in huge pages, where there are: they fault in far less often."""
    pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # no such pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)
