"""What grows with rows, passes and layers, and what that comes to at up to 10^12 tokens.

Run by ``.venv/bin/python tests/benchmarks/scale.py``; about four minutes and 1 GB of disk; with
``--reckon`` only the reckoning of ``scale.md`` is printed, from the constants below. Each line is
measured in a process of its own. The archive of 10^9 rows has the metadata of one, and
none of its chunks but those of 4,096 rows: what a reader finds missing is a row of NaN.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "archive"))

from logs import LogBuilder
from machine import machine

import actstore
from actstore.archive import store
from actstore.archive.grid import chunk_rows, shard_rows
from actstore.packet import Axis

LAYERS, WIDTH, SEEN = 32, 4096, 4096  # a shard of each layer
LABELS = [(4_000_000, 2048), (4_000_000, 32), (400_000, 1)]
ROWS = (10**6, 10**7, 10**8, 10**9)

#: What the reckoning goes by: measured figures, on two cores (README.md), and list prices.
RATIO = 1.47  # stored bytes of bfloat16, "balanced", MiniLM
LABEL_BYTES = 7.6  # a row, in the archive
COMPACT = 0.63e9  # bytes of values a second
READ = 2.5e9  # the same, of one layer
MEMORY = 179  # bytes a row that compaction holds of one archive
SEARCH = 3.1e-8  # seconds a row that finding an id takes
GB_MONTH, PUT, GET = 0.023, 0.005 / 1000, 0.0004 / 1000  # dollars; S3 Standard, us-east-1
SHARD_ROWS = shard_rows(10**9, WIDTH * 4)


def peak() -> int:
    """Give the most bytes that the process has held."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def narrow_log(path: Path, rows: int, sequence: int) -> Path:
    """Write a log of one layer of two features: nearly all of it is what labels its rows."""
    log = LogBuilder(path, compression="lz4")
    log.layer("model.norm", "final_norm")
    log.texts({number: f" word{number}" for number in range(5000)})
    random, values = np.random.default_rng(0), np.zeros((1, sequence, 2), np.float32)
    places, mask = np.arange(sequence)[np.newaxis], np.ones((1, sequence), np.bool_)
    for number in range(rows // sequence):
        ids = random.integers(0, 5000, (1, sequence))
        log.begin(Axis("token", 1, sequence, ids, places, mask, flat=False))
        log.put("model.norm", values)
        if number % 64 == 63:
            log.commit()
    return log.close()


def labels(folder: Path, rows: int, sequence: int) -> dict[str, float]:
    """Compact a narrow log; say what its rows cost beside their values."""
    log = folder / "narrow.stream"
    begun, before = time.perf_counter(), peak()
    with actstore.open_stream(log) as reader:
        assert len(reader.passes) == rows // sequence
        opened, held = time.perf_counter() - begun, peak() - before
    begun = time.perf_counter()
    archive = actstore.compact(log, folder / "narrow.zarr", max_memory_gb=0.5).path
    seconds = time.perf_counter() - begun
    stored = sum(one.stat().st_size for one in archive.rglob("*") if one.is_file())
    return {
        "log": log.stat().st_size / rows,
        "open_us": opened / rows * 1e6,
        "open_memory": held / rows,
        "compact_us": seconds / rows * 1e6,
        "memory": (peak() - before) / rows,
        "stored": stored / rows,
    }


def wide_archive(folder: Path) -> Path:
    """Make an archive of few rows, of a model of usual size."""
    log = LogBuilder(folder / "wide.stream", compression="lz4")
    names = [f"model.layers.{block}" for block in range(LAYERS)]
    for block, name in enumerate(names):
        log.layer(name, "resid", block)
    random = np.random.default_rng(0)
    log.texts({number: f" word{number}" for number in range(100)})
    passes = 4
    shape = (1, SEEN // passes)
    values, mask = np.ones((*shape, WIDTH), np.float32), np.ones(shape, np.bool_)
    places = np.arange(shape[1])[np.newaxis]
    for _ in range(passes):
        ids = random.integers(0, 100, shape)
        log.begin(Axis("token", *shape, ids, places, mask, flat=False))
        for name in names:
            log.put(name, values)
    return actstore.compact(log.close(), folder / "wide.zarr").path


def pretend(archive: Path, target: Path, rows: int) -> Path:
    """Give an archive the metadata that it would have of so many rows."""
    shutil.copytree(archive, target, copy_function=shutil.copy)
    root = json.loads((target / "zarr.json").read_bytes())
    nodes = root["consolidated_metadata"]["metadata"]
    for name, said in nodes.items():
        dims = said.get("dimension_names") or []
        if "/" in name or "token" not in dims:
            continue
        axis, grid = dims.index("token"), said["chunk_grid"]["configuration"]
        said["shape"][axis] = rows
        if name == "resid":
            grid["chunk_shape"][axis] = shard_rows(rows, WIDTH * 4)
            sharding = said["codecs"][0]["configuration"]
            sharding["chunk_shape"][axis] = chunk_rows(rows, WIDTH * 4)
        else:
            grid["chunk_shape"][axis] = 1 << 20
            shutil.rmtree(target / name / "c")
        (target / name / "zarr.json").write_text(json.dumps(said))
    attributes = root["attributes"] | {"rows": {"token": rows}}
    store.ArchiveWriter(target).write_root(attributes, nodes)
    return target


def opening(archive: Path, rows: int) -> dict[str, float]:
    """Open an archive and find rows in it."""
    before, found = peak(), dict[str, float]()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        made = work()
        found[name] = time.perf_counter() - begun
        return made

    dataset = timed("open", lambda: actstore.open_dataset(archive, chunks=None))
    there = timed("hundred", lambda: dataset.resid.isel(layer=3, token=slice(100, 200)).values)
    assert np.isfinite(there).all()
    places = np.sort(np.random.default_rng(0).integers(SEEN * 16, rows, 100))
    timed("scattered", lambda: dataset.resid.isel(layer=3, token=places).values)
    found["open_memory"] = peak() - before
    chosen = timed("by_id", lambda: dataset.actstore.tokens([7]))
    assert chosen.sizes["token"] == 0
    found["search_memory"] = peak() - before
    lazy = timed("chunked", lambda: actstore.open_dataset(archive).resid.isel(layer=3))
    found["shards"] = lazy.data.npartitions
    found["metadata"] = (archive / "zarr.json").stat().st_size
    return found


def reckoned(tokens: int) -> tuple[str, ...]:
    """Say what an archive of one site of a model of 32 layers of 4,096 in bfloat16 comes to."""
    layer = tokens * WIDTH * 2
    stored = LAYERS * layer / RATIO + LABEL_BYTES * tokens
    shards = -(-tokens // SHARD_ROWS)
    return (
        f"10^{len(str(tokens)) - 1}",
        amount(LAYERS * layer, "B"),
        amount(stored, "B"),
        amount(shards * LAYERS),
        f"{stored / 1e9 * GB_MONTH:,.0f}",
        f"{shards * LAYERS * PUT:,.2f}",
        f"{short(LAYERS * layer / COMPACT / 3600)} h",
        amount(tokens * MEMORY, "B"),
        amount(shards + 3),
        f"{(shards + 3) * GET:,.2f}",
        f"{short(layer / READ / 3600)} h",
        f"{short(tokens * SEARCH)} s",
    )


def amount(number: float, unit: str = "") -> str:
    """Give a number with three digits and a prefix of a thousand."""
    prefixes = iter(("", "k", "M", "G", "T", "P", "E"))
    prefix = next(prefixes)
    while number >= 999.5:
        number, prefix = number / 1000, next(prefixes)
    return f"{number:.3g} {prefix}{unit}".rstrip()


def short(number: float) -> str:
    """Give a number with two digits, or as a whole one."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def reckon() -> None:
    """Print what a capture of so many tokens comes to."""
    heads = (
        *("tokens", "values", "stored", "objects", "$ a month", "$ to write", "to compact"),
        *("memory", "GETs, a layer", "$", "to read it", "to find an id"),
    )
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for exponent in range(6, 13):
        print(f"| {' | '.join(reckoned(10**exponent))} |")


def apart(*given: object) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print the tables; given a line, measure it and print JSON."""
    if sys.argv[1:] == ["--reckon"]:
        reckon()
        return
    if len(sys.argv) > 1:
        kind, place, *numbers = sys.argv[1:]
        measure = {"labels": labels, "opening": opening}[kind]
        print(json.dumps(measure(Path(place), *map(int, numbers))))
        return
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        place = Path(folder).absolute()
        print(
            "| rows | rows a pass | log, B a row | opening it: µs, B a row | compacting, µs a row "
            "| peak memory, B a row | stored, B a row |"
        )
        print("|---|---|---|---|---|---|---|")
        for rows, sequence in LABELS:
            narrow_log(place / "narrow.stream", rows, sequence)
            one = apart("labels", place, rows, sequence)
            print(
                f"| {rows:,} | {sequence:,} | {one['log']:.1f} | {one['open_us']:.2f}, "
                f"{one['open_memory']:.0f} | {one['compact_us']:.2f} | {one['memory']:.0f} "
                f"| {one['stored']:.1f} |"
            )
            (place / "narrow.stream").unlink()
            shutil.rmtree(place / "narrow.zarr")
        archive = wide_archive(place)
        print(
            "\n| rows | shards a layer | root, kB | open, ms | 100 rows, ms | 100 scattered, ms "
            "| memory, MB | find an id, s | memory, MB | as dask, ms |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for rows in ROWS:
            target = pretend(archive, place / "pretended.zarr", rows)
            one = apart("opening", target, rows)
            print(
                f"| {rows:,} | {one['shards']:,} | {one['metadata'] / 1e3:.0f} "
                f"| {one['open'] * 1e3:.0f} | {one['hundred'] * 1e3:.0f} "
                f"| {one['scattered'] * 1e3:.0f} | {one['open_memory'] / 1e6:.0f} "
                f"| {one['by_id']:.1f} | {one['search_memory'] / 1e6:.0f} "
                f"| {one['chunked'] * 1e3:.0f} |"
            )
            shutil.rmtree(target)


if __name__ == "__main__":
    main()
