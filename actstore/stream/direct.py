"""Owns writing whole pages past the page cache, where the file system can: O_DIRECT.

It costs a fifth of the processor time of a buffered write, which the model would have had. What
is written, and that it is whole pages, is ``writer.py``'s business.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from typing import Final

import numpy as np

__all__ = ["PAGE", "PAGED_BYTES", "DirectFile", "paged"]

#: What offsets, addresses and lengths of direct writes are multiples of.
PAGE: Final = 4096
#: From this size on, bytes that begin at a page are written from where they are.
PAGED_BYTES: Final = 256 << 10
_CALL: Final = 8 << 20  # bytes that a call writes, at least
_COPIED: Final = 2 << 20
_DIRECT: Final = getattr(os, "O_DIRECT", 0)  # 0 where the system has no such writes


def paged(part: memoryview) -> bool:
    """Whether a buffer can be written from where it is: large, and beginning at a page."""
    return len(part) >= PAGED_BYTES and np.frombuffer(part, np.uint8).ctypes.data % PAGE == 0


class DirectFile:
    """Write whole pages to an open file.

    Parameters
    ----------
    descriptor : int
        The file, at whose end is written; its end is at a page.

    Attributes
    ----------
    works : bool
        False once the file system has refused.

    Raises
    ------
    OSError
        The file system has no direct writes.
    """

    def __init__(self, descriptor: int) -> None:
        if not _DIRECT:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        self._descriptor = descriptor
        self._flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        self.works = True
        self._set(direct=True)
        self._set(direct=False)
        memory = np.empty(_COPIED + PAGE, np.uint8)
        start = -memory.ctypes.data % PAGE
        self._memory = memory[start : start + _COPIED]
        self._copied = memoryview(self._memory)

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Append buffers that together are whole pages, copying all but what is paged.

        A paged one must come where a page begins.
        """
        self._set(direct=True)
        try:
            self._gather(buffers)
        finally:
            self._set(direct=False)

    def _gather(self, buffers: Sequence[memoryview]) -> None:
        """Write in few calls: a small direct write takes as long as a large one."""
        pages: list[memoryview] = []
        nbytes = start = end = 0  # of pages; of what is copied, and not yet in pages
        for part in buffers:
            rest = part
            if end % PAGE == 0 and paged(part):
                whole = len(part) // PAGE * PAGE
                pages += [self._copied[start:end], part[:whole]]
                nbytes, start, rest = nbytes + end - start + whole, end, part[whole:]
                if nbytes >= _CALL:
                    self._put(pages)
                    pages, nbytes, start, end = [], 0, 0, 0
            while len(rest):
                length = min(len(rest), _COPIED - end)
                # NumPy lets the interpreter's lock go, a memoryview doesn't
                np.copyto(self._memory[end : end + length], np.frombuffer(rest[:length], np.uint8))
                end, rest = end + length, rest[length:]
                if end == _COPIED:
                    self._put([*pages, self._copied[start:]])
                    pages, nbytes, start, end = [], 0, 0, 0
        self._put([*pages, self._copied[start:end]])

    def _put(self, pages: Sequence[memoryview]) -> None:
        pages = [part for part in pages if len(part)]
        while pages:
            try:
                written = os.writev(self._descriptor, pages)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.works:
                    raise
                written = 0  # it takes the flag, and no such write
            if written % PAGE or not written:  # the next wouldn't begin at a page
                self.works = False
                self._set(direct=False)
            while pages and written >= len(pages[0]):
                written -= len(pages.pop(0))
            if written:
                pages[0] = pages[0][written:]

    def _set(self, *, direct: bool) -> None:
        flags = self._flags | _DIRECT if direct else self._flags & ~_DIRECT
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)
