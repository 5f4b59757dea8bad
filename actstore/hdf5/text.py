"""Owns reading variable-length strings from HDF5's global heap, and small attributes, safely.

HDF5 itself loops for ever over a heap in which an object has no length, so that a single flipped
bit would hang whoever reads a label. The heap's form is simple: collections of objects, each with
its number and length. Every length is checked here, and no byte is gone through twice.
"""

from __future__ import annotations

import os
import struct
from typing import Any, Final

import h5py
import numpy as np

__all__ = ["TextError", "read_attribute", "read_strings"]

_REFERENCE: Final = np.dtype([("length", "<u4"), ("heap", "<u8"), ("number", "<u4")])
_COLLECTION: Final = struct.Struct("<4sB3xQ")
_OBJECT: Final = struct.Struct("<H6xQ")
_MOST_ATTRIBUTE: Final = 64


class TextError(Exception):
    """Strings aren't there as HDF5 has them."""


def read_attribute(made: Any, name: str) -> str | None:
    """Read a short string of fixed length, in an object's header; None for anything else."""
    key = name.encode()
    if not h5py.h5a.exists(made.id, key):
        return None
    attribute = h5py.h5a.open(made.id, key)
    kind = attribute.get_type()
    plain = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
    if not plain or attribute.shape != () or kind.get_size() > _MOST_ATTRIBUTE:
        return None
    return bytes(made.attrs[name]).rstrip(b"\0").decode("utf-8", "replace")


def read_strings(descriptor: int, dataset: Any) -> list[str]:
    """Read all strings of a contiguous dataset, in C order.

    Parameters
    ----------
    descriptor : int
        The file.
    dataset : h5py.h5d.DatasetID
        Of variable-length strings.

    Raises
    ------
    TextError
        They are none, or what they refer to isn't there.
    """
    size = os.fstat(descriptor).st_size
    count = int(np.prod(dataset.shape, dtype=np.int64))
    place, nbytes = dataset.get_offset(), count * _REFERENCE.itemsize
    if place is None or dataset.get_storage_size() != nbytes or place + nbytes > size:
        msg = f"{count} strings have {dataset.get_storage_size()} bytes at {place}"
        raise TextError(msg)
    references = np.frombuffer(os.pread(descriptor, nbytes, place), _REFERENCE)
    if len(references) != count or int(references["length"].sum(dtype=np.int64)) > size:
        msg = "strings are longer together than the file"
        raise TextError(msg)
    heap, found = _Heap(descriptor, size), list[str]()
    for length, address, number in references.tolist():
        data = heap.get(address, number) if length else b""
        if len(data) != length:
            msg = f"string {len(found)} has {len(data)} bytes at {address}, not {length}"
            raise TextError(msg)
        try:
            found.append(data.decode())
        except UnicodeDecodeError as error:
            raise TextError(str(error)) from error
    return found


class _Heap:
    """The collections of a global heap, each read once."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = self._left = size
        self._known: dict[int, dict[int, bytes]] = {}

    def get(self, address: int, number: int) -> bytes:
        if address not in self._known:
            self._known[address] = self._read(address)
        return self._known[address].get(number, b"")

    def _read(self, address: int) -> dict[int, bytes]:
        head = os.pread(self._descriptor, _COLLECTION.size, min(address, self._size))
        if len(head) != _COLLECTION.size:
            msg = f"the file has no heap at {address}"
            raise TextError(msg)
        mark, version, size = _COLLECTION.unpack(head)
        if (
            mark != b"GCOL"
            or version != 1
            or not 0 < size <= min(self._left, self._size - address)
        ):
            msg = f"there is no heap at {address}"
            raise TextError(msg)
        self._left -= size
        data = os.pread(self._descriptor, size, address)
        found: dict[int, bytes] = {}
        at = _COLLECTION.size
        while at + _OBJECT.size <= len(data):
            number, length = _OBJECT.unpack_from(data, at)
            at += _OBJECT.size
            if number == 0:  # what is free, at the end
                break
            if at + length > len(data) or number in found:
                msg = f"object {number} of the heap at {address} is not in it"
                raise TextError(msg)
            found[number] = data[at : at + length]
            at += -(-length // 8) * 8
        return found
