"""Shards are what the Zarr v3 specification says: other implementations read what we write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from logs import encode_rows, random_values
from numpy.typing import NDArray

from actstore.archive import shards
from actstore.archive.shards import shard_path
from actstore.archive.store import ArchiveWriter

DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]


def fill_of(dtype: np.dtype) -> Any:
    return np.nan if dtype.kind in "fc" else dtype.type(0)


def write(
    folder: Path,
    rows: NDArray[Any],
    chunk_rows: int,
    shard_rows: int,
    profile: str,
    present: NDArray[np.bool_] | None = None,
) -> list[Path]:
    """Write an array of one layer in shards, as compaction does; give their files."""
    folder.mkdir()
    writer = ArchiveWriter(folder)
    inner = (chunk_rows, *rows.shape[1:])
    writer.add_array(
        "a",
        tuple(f"d{i}" for i in range(rows.ndim)),
        rows.shape,
        rows.dtype,
        chunks=inner,
        shards=(shard_rows, *rows.shape[1:]),
        profile=profile,
        attributes={},
    )
    paths = []
    count = shard_rows // chunk_rows
    for number, first in enumerate(range(0, len(rows), shard_rows)):
        mine = rows[first : first + shard_rows]
        there = np.arange(count) * chunk_rows < len(mine)
        if present is not None:
            there &= present[number * count : (number + 1) * count]
        shard = encode_rows(mine, chunk_rows, there, fill_of(rows.dtype), profile)
        path = shard_path(folder, "a", (number, *(0,) * (rows.ndim - 1)))
        assert shards.write_shard(path, shard) == path.stat().st_size
        paths.append(path)
    return paths


def by_zarr(folder: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_array(folder / "a", mode="r")[...])  # type: ignore[call-overload]


def by_tensorstore(folder: Path) -> NDArray[Any]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "a")}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


@pytest.mark.parametrize("profile", shards.PROFILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_python_and_tensorstore_read_every_dtype_bit_for_bit(
    tmp_path: Path, dtype: str, profile: str
) -> None:
    rows = random_values((150, 5), dtype)
    write(tmp_path / "z", rows, 32, 64, profile)
    assert same_bits(by_zarr(tmp_path / "z"), rows)
    assert same_bits(by_tensorstore(tmp_path / "z"), rows)


@pytest.mark.parametrize("profile", shards.PROFILES)
@pytest.mark.parametrize(
    ("shape", "chunk", "shard"),
    [
        ((1, 1), 1, 1),
        ((7,), 7, 7),
        ((1000, 3, 2), 256, 1024),
        ((9, 300), 4, 8),
        ((64, 64), 64, 64),
    ],
)
def test_both_read_every_shape(
    tmp_path: Path, shape: tuple[int, ...], chunk: int, shard: int, profile: str
) -> None:
    rows = random_values(shape)
    write(tmp_path / "z", rows, chunk, shard, profile)
    assert same_bits(by_zarr(tmp_path / "z"), rows)
    assert same_bits(by_tensorstore(tmp_path / "z"), rows)


@pytest.mark.parametrize("profile", ["fast", "balanced", "dense"])
def test_activations_as_bfloat16_holds_them_shrink_in_chunks_of_1_mib(
    tmp_path: Path, profile: str
) -> None:
    normal = np.random.default_rng(0).normal(size=(512, 512)).astype(ml_dtypes.bfloat16)
    rows = normal.astype(np.float32)
    (path,) = write(tmp_path / "z", rows, 512, 512, profile)
    assert path.stat().st_size < rows.nbytes / 2
    assert same_bits(by_zarr(tmp_path / "z"), rows)
    assert same_bits(by_tensorstore(tmp_path / "z"), rows)


def test_rows_that_repeat_are_found_by_every_profile_of_planes(tmp_path: Path) -> None:
    """As an embedding's do, for the same token."""
    table = random_values((64, 512))
    rows = table[np.random.default_rng(0).integers(0, 64, 1024)]
    for profile in ("balanced", "dense"):
        (path,) = write(tmp_path / profile, rows, 512, 1024, profile)
        assert path.stat().st_size < rows.nbytes / 4
        assert same_bits(by_zarr(tmp_path / profile), rows)
        assert same_bits(by_tensorstore(tmp_path / profile), rows)


def test_dense_finds_what_repeats_within_rows_that_do_not(tmp_path: Path) -> None:
    rows = random_values((1024, 512))
    rows[:, 128:] = rows[np.random.default_rng(0).integers(0, 64, 1024), 128:]
    sizes = {
        profile: write(tmp_path / profile, rows, 512, 1024, profile)[0].stat().st_size
        for profile in ("balanced", "dense")
    }
    assert sizes["dense"] < rows.nbytes / 2 < sizes["balanced"]
    assert same_bits(by_zarr(tmp_path / "dense"), rows)


def test_memory_that_was_used_before_holds_the_same_shard() -> None:
    rows = random_values((96, 40))
    for profile in shards.PROFILES:
        out = np.full(shards.room(32 * 40 * 4, 3, 4), 0xAA, np.uint8)
        chunks = ((number, rows[32 * number : 32 * number + 32]) for number in range(3))
        again = shards.encode_shard(chunks, 32, 4, np.nan, profile, out)
        there = np.arange(4) < 3
        assert np.shares_memory(again, out)
        assert again.tobytes() == encode_rows(rows, 32, there, np.nan, profile).tobytes()


def test_chunks_without_a_row_are_not_written_and_read_as_the_fill(tmp_path: Path) -> None:
    rows = random_values((8, 4), "int32")
    present = np.array([True, False, False, True])
    (path,) = write(tmp_path / "z", rows, 2, 8, "none", present)
    assert path.stat().st_size == 2 * (2 * 4 * 4 + 4) + 4 * 16 + 4
    wanted = rows.copy()
    wanted[2:6] = 0
    assert same_bits(by_zarr(tmp_path / "z"), wanted)
    assert same_bits(by_tensorstore(tmp_path / "z"), wanted)


def test_the_metadata_declares_core_codecs_only(tmp_path: Path) -> None:
    write(tmp_path / "z", random_values((4, 4)), 2, 4, "balanced")
    said = json.loads((tmp_path / "z" / "a" / "zarr.json").read_bytes())
    (sharding,) = said["codecs"]
    inner = [codec["name"] for codec in sharding["configuration"]["codecs"]]
    assert (sharding["name"], inner) == ("sharding_indexed", ["bytes", "blosc", "crc32c"])
    assert sharding["configuration"]["codecs"][1]["configuration"] == {
        "cname": "zstd",
        "clevel": 1,
        "shuffle": "shuffle",
        "typesize": 4,
        "blocksize": 2 * 4 * 4,
    }


def test_a_check_names_the_damaged_chunk_and_only_it(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "z", random_values((8, 4)), 2, 8, "none")
    whole, present, chunk = path.read_bytes(), np.ones(4, np.bool_), 2 * 4 * 4 + 4
    assert list(shards.check_shard(path, present)) == []
    for byte in range(len(whole)):
        data = bytearray(whole)
        data[byte] ^= 1 << byte % 8
        path.write_bytes(data)
        wanted = byte // chunk if byte < 4 * chunk else -1
        assert [number for number, _ in shards.check_shard(path, present)] == [wanted]


def test_a_check_tells_of_chunks_that_are_missing_and_of_a_file_cut_short(tmp_path: Path) -> None:
    rows = random_values((8, 4))
    (path,) = write(tmp_path / "z", rows, 2, 8, "none", np.array([True, False, True, True]))
    assert [number for number, _ in shards.check_shard(path, np.ones(4, np.bool_))] == [1]
    path.write_bytes(path.read_bytes()[:-30])
    assert [number for number, _ in shards.check_shard(path, np.ones(4, np.bool_))] == [-1]
    path.write_bytes(b"")
    assert [number for number, _ in shards.check_shard(path, np.ones(4, np.bool_))] == [-1]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(shards.check_shard(path, np.ones(4, np.bool_)))
