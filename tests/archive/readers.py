"""Reads arrays, datasets and Blosc frames by stock software alone; prints their digests as JSON.

Run as ``python readers.py READER FOLDER`` in a process of its own, where importing actstore
raises: what it prints was read without us. It runs under whatever Python and zarr are there.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

#: Of each array its name, all of it, and a part.
Read = Iterator[tuple[str, Any, Any]]


class NoActstore:
    """Refuses to find actstore, also where it is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "actstore":
            raise ImportError(f"{name} is not to be imported")


def digest(values: Any) -> str:
    """Give what the bytes of values are told apart by."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def middle(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Give a part that begins and ends inside of chunks."""
    return tuple(slice(size // 3, max(size // 3 + 1, 2 * size // 3)) for size in shape)


def told(values: Any, part: Any) -> dict[str, Any]:
    """Say what was read of an array."""
    return {
        "dtype": values.dtype.name,
        "shape": list(values.shape),
        "whole": digest(values),
        "part": digest(part),
    }


def names(folder: Path) -> list[str]:
    """Give the names of the root's arrays that hold numbers."""
    return [
        node.parent.name
        for node in sorted(folder.glob("*/zarr.json"))
        if json.loads(node.read_bytes()).get("data_type", "string") != "string"
    ]


def by_zarr(folder: Path) -> Read:
    import zarr

    for name in names(folder):
        found = zarr.open_array(folder / name, mode="r")
        yield name, np.asarray(found[...]), np.asarray(found[middle(found.shape)])


def by_zarrs(folder: Path) -> Read:
    import zarr
    import zarrs  # noqa: F401  # registers its pipeline

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        yield from by_zarr(folder)


def by_tensorstore(folder: Path) -> Read:
    import tensorstore

    for name in names(folder):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}}
        found = tensorstore.open(spec, read=True).result()
        part = found[middle(found.shape)].read().result()
        yield name, np.asarray(found.read().result()), np.asarray(part)


def by_xarray(folder: Path) -> Read:
    import xarray

    with xarray.open_zarr(folder, chunks=None, consolidated=True) as dataset:
        for name in names(folder):
            found = dataset[name]
            yield name, found.values, found[middle(found.shape)].values


def by_numcodecs(frame: bytes) -> bytes:
    import numcodecs

    return bytes(numcodecs.get_codec({"id": "blosc"}).decode(frame))


def by_blosc2(frame: bytes) -> bytes:
    import blosc2

    return bytes(blosc2.decompress(frame))


def by_hand(frame: bytes) -> bytes:
    """Decode as the specifications of Blosc-1 and zstd say, in 20 lines."""
    import zstandard

    version, _, flags, itemsize, nbytes, blocksize, length = struct.unpack_from("<BBBBIII", frame)
    if (version, length) != (2, len(frame)):
        raise ValueError("another frame")
    if flags & 2:
        return frame[16:]
    if (flags >> 5, flags & 1, blocksize) != (4, 1, nbytes):
        raise ValueError("not one block of shuffled zstd")
    (at,) = struct.unpack_from("<i", frame, 16)
    split = not flags & 16
    planes, parts = [], itemsize if split else 1
    for _ in range(parts):
        (size,) = struct.unpack_from("<i", frame, at)
        packed, at = frame[at + 4 : at + 4 + size], at + 4 + size
        whole = size * parts == nbytes
        planes.append(packed if whole else zstandard.ZstdDecompressor().decompress(packed))
    shuffled = np.frombuffer(b"".join(planes), np.uint8)
    return np.ascontiguousarray(shuffled.reshape(itemsize, -1).T).tobytes()


ARRAY_READERS: dict[str, Callable[[Path], Read]] = {
    "zarr": by_zarr,
    "zarrs": by_zarrs,
    "tensorstore": by_tensorstore,
    "xarray": by_xarray,
}
FRAME_READERS: dict[str, Callable[[bytes], bytes]] = {
    "numcodecs": by_numcodecs,
    "blosc2": by_blosc2,
    "hand": by_hand,
}


def main(reader: str, folder: Path) -> dict[str, Any]:
    """Read all that is below a folder."""
    if reader in ARRAY_READERS:
        return {name: told(whole, part) for name, whole, part in ARRAY_READERS[reader](folder)}
    return {
        place.stem: digest(np.frombuffer(FRAME_READERS[reader](place.read_bytes()), np.uint8))
        for place in sorted(folder.glob("*.frame"))
    }


if __name__ == "__main__":
    sys.meta_path.insert(0, NoActstore())  # type: ignore[arg-type]
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
