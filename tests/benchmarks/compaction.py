"""How fast a log becomes an archive and is read again, against floors and against zarr's writers.

Run by ``.venv/bin/python tests/benchmarks/compaction.py``; about three minutes. The log has 8
layers of ``--passes`` × 512 rows of 1,024 bfloat16 values shaped as activations are (normal, of
log-normal scales), compressed by "zstd". The floor is summed: to decode the log's blocks, to
encode the chunks, to decode them again, each alone on as many threads as compaction has, and to
write the shards' bytes raw to the same place. zarr-python and tensorstore write the same rows of
the same log, a shard at a time, as float32 in the same shards and chunks, by their own Blosc (zstd
1, shuffle, a block a chunk); they verify nothing. All end on the disk. GB are of the model's
values (bfloat16).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/archive")]

import ml_dtypes
import numpy as np
import tensorstore
import xarray as xr
import zarr
from logs import LogBuilder, axis
from machine import machine
from numcodecs import blosc
from zarr.codecs import BloscCodec, Crc32cCodec

import actstore
from actstore import codecs, dtypes, files
from actstore.stream.rows import widen

LAYERS, ROWS, WIDTH = 8, 512, 1024
PASS_BYTES = LAYERS * ROWS * WIDTH * 2
THREADS = 2
_MEGA = 1 << 20


def make_log(path: Path, passes: int) -> Path:
    """Write a log."""
    log = LogBuilder(path)
    for block in range(LAYERS):
        log.layer(f"model.layers.{block}", "resid", block)
    rng = np.random.default_rng(0)
    scales = np.exp(rng.standard_normal(WIDTH)).astype(np.float32)
    pool = [
        (rng.standard_normal((1, ROWS, WIDTH), np.float32) * scales).astype(ml_dtypes.bfloat16)
        for _ in range(2 * LAYERS)
    ]
    for number in range(passes):
        log.begin(axis(1, ROWS))
        for block in range(LAYERS):
            log.put(f"model.layers.{block}", pool[(number * LAYERS + block) % len(pool)])
        log.commit()
    log.close()
    return path


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Floor:
    """What must be done to the log's bytes, each part alone, in memory that is used again.

    Encoding and decoding are measured on the first 256 chunks, again and again.
    """

    def __init__(self, log: Path, folder: Path) -> None:
        self._log, self._path = log, folder / "raw"
        source = dtypes.from_name("bfloat16")
        with actstore.open_stream(log) as reader:
            blocks = len(reader.table.blocks)
            self._chunks = [
                widen(one[at : at + _MEGA // 2].view(source.numpy), source).view(np.uint8)
                for one in map(reader.read_block, range(128))
                for at in range(0, one.nbytes, _MEGA // 2)
            ]
        self._times = blocks * len(self._chunks) // 128 // len(self._chunks)
        self._encoded = [codecs.plane_split(one, 4) for one in self._chunks]

    def measure(self) -> dict[str, float]:
        """Give the seconds of each of the parts."""
        with actstore.open_stream(self._log) as reader, ThreadPoolExecutor(THREADS) as pool:

            def run(work: Callable[[Any], object], things: Sequence[Any]) -> None:
                for _ in pool.map(work, things):
                    pass

            blocks = range(len(reader.table.blocks))
            return {
                "decode log": timed(lambda: run(reader.read_block, blocks)),
                "encode": timed(lambda: run(self._encode, self._chunks * self._times)),
                "verify": timed(lambda: run(self._decode, self._encoded * self._times)),
                "write": timed(self._write),
            }

    def _encode(self, chunk: Any) -> int:
        out = codecs.scratch("floor", chunk.nbytes + codecs.FRAME_BYTES)
        return codecs.plane_split_into(out, chunk, 4)

    def _decode(self, frame: bytes) -> None:
        blosc.decompress(frame, codecs.scratch("floor", _MEGA))

    def _write(self) -> None:
        with self._path.open("wb", buffering=0) as file:
            for _ in range(self._times):
                for start in range(0, len(self._encoded), 64):
                    file.writelines(self._encoded[start : start + 64])
            os.fsync(file.fileno())
        self._path.unlink()


def by_zarr(values: xr.DataArray, folder: Path) -> None:
    """Write the rows by zarr-python."""
    array = zarr.create_array(
        folder, shape=values.shape, dtype="float32", chunks=(1, 256, WIDTH),
        shards=(1, 16384, WIDTH), zarr_format=3,
        compressors=[
            BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=4, blocksize=_MEGA),
            Crc32cCodec(),
        ],
    )  # fmt: skip
    for layer in range(values.shape[0]):
        for start in range(0, values.shape[1], 16384):
            array[layer, start : start + 16384] = values[layer, start : start + 16384].values


def by_tensorstore(values: xr.DataArray, folder: Path) -> None:
    """Write the rows by tensorstore."""
    blosc_codec = {
        "name": "blosc",
        "configuration": {
            "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": 4, "blocksize": _MEGA,
        },
    }  # fmt: skip
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, 256, WIDTH],
            "codecs": [little, blosc_codec, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
        },
    }
    array = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder)},
            "metadata": {
                "shape": list(values.shape),
                "data_type": "float32",
                "chunk_grid": {
                    "name": "regular", "configuration": {"chunk_shape": [1, 16384, WIDTH]},
                },
                "codecs": [sharding],
            },
            "create": True,
            "context": {"data_copy_concurrency": {"limit": THREADS}},
        }
    ).result()  # fmt: skip
    for layer in range(values.shape[0]):
        for start in range(0, values.shape[1], 16384):
            rows = values[layer, start : start + 16384].values
            array[layer, start : start + 16384].write(rows).result()


def measure(log: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Measure everything in turn; give the seconds of each, and "floor" of its parts' sum."""
    found: dict[str, list[float]] = {}
    archive, floor = folder / "a.zarr", Floor(log, folder)
    for _ in range(rounds):
        for name, took in (parts := floor.measure()).items():
            found.setdefault(name, []).append(took)
        found.setdefault("floor", []).append(sum(parts.values()))
        shutil.rmtree(archive, ignore_errors=True)
        found.setdefault("compact", []).append(timed(lambda: actstore.compact(log, archive)))
        with actstore.open_dataset(log, chunks=None) as dataset:
            for name, write in (("zarr", by_zarr), ("tensorstore", by_tensorstore)):
                took = timed(partial(write, dataset.resid, folder / name))
                took += timed(partial(synced, folder / name))
                found.setdefault(name, []).append(took)
                shutil.rmtree(folder / name)
        with actstore.open_dataset(archive, chunks=None) as dataset:
            values = dataset.resid
            plain: Any = zarr.open_array(archive / "resid", mode="r")
            rows = np.sort(np.random.default_rng(0).integers(0, values.shape[1], 1000))
            for name, read in (
                ("layer", lambda values=values: values[3].values),
                ("layer by zarr", lambda plain=plain: plain[3]),
                ("gather", lambda values=values, rows=rows: values[3, rows].values),
                ("gather by zarr", lambda plain=plain, rows=rows: plain.oindex[3, rows]),
            ):
                found.setdefault(name, []).append(timed(read))
    return found


def synced(folder: Path) -> None:
    """Bring a folder's files to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            files.fsync_file(path)


def peak(log: Path, out: Path, gigabytes: float) -> int:
    """Give the bytes that a process takes at most over what it had, compacting in a budget."""
    code = (
        "import sys, actstore\n"
        "from pathlib import Path\n"
        "def high():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(x for x in lines if x.startswith('VmHWM')).split()[1]) * 1024\n"
        "import xarray, zarr, numcodecs.blosc, actstore.compaction\n"
        "before = high()\n"
        "actstore.compact(sys.argv[1], sys.argv[2], max_memory_gb=float(sys.argv[3]))\n"
        "print(high() - before)\n"
    )
    command = [sys.executable, "-c", code, str(log), str(out), str(gigabytes)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    shutil.rmtree(out)
    return int(said)


def table(found: dict[str, list[float]], nbytes: int) -> str:
    """Give what was measured as a table."""
    gb = {name: nbytes / 1e9 / median(took) for name, took in found.items()}
    layer, gather = nbytes / 1e9 / LAYERS, 1e3 * median(found["gather"])
    parts = ", ".join(
        f"{name} {gb[name]:.2f}" for name in ("decode log", "encode", "verify", "write")
    )
    return "\n".join(
        (
            "| | GB/s | against |",
            "|---|---|---|",
            f"| compact | {gb['compact']:.2f} | {gb['compact'] / gb['floor']:.2f} of the floor, "
            f"{gb['floor']:.2f} ({parts}) |",
            *(
                f"| | | {gb['compact'] / gb[name]:.2f} × {peer} writing it, {gb[name]:.2f} |"
                for name, peer in (("zarr", "zarr-python"), ("tensorstore", "tensorstore"))
            ),
            f"| read a layer | {layer / median(found['layer']):.2f} | "
            f"{median(found['layer by zarr']) / median(found['layer']):.2f} × zarr-python |",
            f"| 1,000 random rows of a layer | {gather:.0f} ms | "
            f"{median(found['gather by zarr']) / median(found['gather']):.2f} × zarr-python |",
        )
    )


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        log = make_log(folder / "run.stream", given.passes)
        found = measure(log, folder, given.rounds)
        nbytes = given.passes * PASS_BYTES
        print(f"{machine()}; {nbytes / 1e9:.2f} GB\n\n{table(found, nbytes)}\n")
        over = peak(log, folder / "b.zarr", nbytes / 10e9)
        print(json.dumps({"budget": nbytes / 10, "peak": over}))


if __name__ == "__main__":
    main(sys.argv[1:])
