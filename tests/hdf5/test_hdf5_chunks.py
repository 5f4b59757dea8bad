"""HDF5's own filters decode our chunks, and ours refuse what isn't just the bytes declared."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actstore.errors import ConfigError
from actstore.hdf5 import chunks

DTYPES = ["i1", "<i2", "<f2", "<f4", "<i8", "<f8", "<c8", "<c16"]
COMPRESSIONS = ["gzip", "zstd", "none"]


def kinds(size: int, itemsize: int) -> dict[str, NDArray[np.uint8]]:
    """Give bytes of ``size`` elements: noise, one value, planes of all kinds, rows that repeat."""
    noise = np.random.default_rng(size).integers(0, 256, size * itemsize, np.uint8)
    mixed = noise.reshape(size, itemsize).copy()
    mixed[:, ::2] &= 3
    if itemsize > 2:
        mixed[:, 1] = 7
    again = np.resize(noise[: 64 * itemsize], noise.size)
    return {
        "noise": noise,
        "zeros": np.zeros_like(noise),
        "mixed": mixed.reshape(-1),
        "again": again,
    }


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", chunks.fletcher32(body))


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_encoded_decodes_to_the_same(dtype: str, compression: str, repeats: bool) -> None:
    size = np.dtype(dtype).itemsize
    for count in (1, 2, 127, 129, 1001, (1 << 17) + 1):
        for name, data in kinds(count, size).items():
            encoded = chunks.encode(data, size, compression, repeats=repeats)
            out = np.empty_like(data)
            chunks.decode(encoded, out, size, compression)
            assert np.array_equal(out, data), (name, count)
            assert len(encoded) <= data.nbytes + data.nbytes // 64 + chunks.SLACK


@pytest.mark.parametrize("compression", ["gzip", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_filters_of_hdf5_decode_every_chunk(
    tmp_path: Path, dtype: str, compression: str
) -> None:
    kind, count = np.dtype(dtype), (1 << 17) + 1
    options: dict[str, Any] = {"fletcher32": True}
    if compression == "gzip":
        options |= {"shuffle": True, "compression": "gzip", "compression_opts": 1}
    written = {}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, data in kinds(count, kind.itemsize).items():
            made = file.create_dataset(name, (count,), kind, chunks=(count,), **options)
            encoded = chunks.encode(data, kind.itemsize, compression)
            made.id.write_direct_chunk((0,), encoded)
            written[name] = data
    with h5py.File(tmp_path / "a.h5") as file:
        for name, data in written.items():
            assert file[name][...].tobytes() == data.tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_hdf5_wrote_itself_is_decoded(tmp_path: Path, dtype: str) -> None:
    kind = np.dtype(dtype)
    data = kinds(1001, kind.itemsize)["mixed"]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset(
            *("a", (1001,), kind), chunks=(1001,), shuffle=True, compression=4, fletcher32=True
        )
        made[...] = data.view(kind)
        _, encoded = made.id.read_direct_chunk((0,))
    out = np.empty_like(data)
    chunks.decode(encoded, out, kind.itemsize, "gzip")
    assert np.array_equal(out, data)


@settings(max_examples=50, deadline=None)
@given(
    data=st.binary(max_size=300)
    | st.builds(lambda n, b: bytes([b]) * n, st.integers(0, 70_000), st.sampled_from([0, 1, 255]))
)
def test_the_checksum_is_that_of_hdf5(tmp_path_factory: Any, data: bytes) -> None:
    if not data:
        assert chunks.fletcher32(data) == 0
        return
    with h5py.File.in_memory() as file:
        made = file.create_dataset("a", (len(data),), "u1", chunks=(len(data),), fletcher32=True)
        made[...] = np.frombuffer(data, np.uint8)
        file.flush()
        _, stored = made.id.read_direct_chunk((0,))
    assert stored == sealed(data)


def test_the_checksum_of_a_long_chunk_is_that_of_hdf5(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, (9 << 20) + 1, np.uint8)
    with h5py.File.in_memory() as file:
        made = file.create_dataset("a", data.shape, "u1", chunks=data.shape, fletcher32=True)
        made[...] = data
        file.flush()
        _, stored = made.id.read_direct_chunk((0,))
    assert stored == sealed(data.tobytes())


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_any_flipped_bit_is_found(compression: str) -> None:
    data = kinds(64, 4)["mixed"]
    encoded = chunks.encode(data, 4, compression)
    out = np.empty_like(data)
    for bit in range(8 * len(encoded)):
        flipped = bytearray(encoded)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(chunks.ChunkError):
            chunks.decode(bytes(flipped), out, 4, compression)


def test_a_bomb_takes_no_more_memory_than_the_chunk_declares() -> None:
    bombs = {
        "gzip": zlib.compress(bytes(1 << 28), 9),
        "zstd": zstandard.ZstdCompressor().compress(bytes(1 << 28)),
        "none": bytes(1 << 16),
    }
    out = np.empty(1 << 12, np.uint8)
    for compression, bomb in bombs.items():
        encoded = sealed(bomb)
        tracemalloc.start()
        with pytest.raises(chunks.ChunkError):
            chunks.decode(encoded, out, 4, compression)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21, compression
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("compression", "body"),
    [
        ("gzip", b""),
        ("gzip", b"nothing of the kind"),
        ("gzip", zlib.compress(bytes(4095))),
        ("gzip", zlib.compress(bytes(4096))[:-1]),
        ("gzip", zlib.compress(bytes(4096)) + b"more"),
        ("zstd", b""),
        ("zstd", b"nothing of the kind"),
        ("zstd", zstandard.ZstdCompressor().compress(bytes(4095))),
        ("zstd", zstandard.ZstdCompressor().compress(bytes(4096))[:-1]),
        ("none", bytes(4095)),
    ],
)
def test_what_is_no_chunk_of_its_size_is_refused(compression: str, body: bytes) -> None:
    with pytest.raises(chunks.ChunkError):
        chunks.decode(sealed(body), np.empty(4096, np.uint8), 4, compression)
    with pytest.raises(chunks.ChunkError):
        chunks.decode(b"abc", np.empty(4096, np.uint8), 4, compression)


@pytest.mark.parametrize("name", ["GZIP", "lzf", None, 1])
def test_an_unknown_compression_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="'gzip', 'zstd', 'none'"):
        chunks.check_compression(name)
