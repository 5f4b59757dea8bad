"""What opening an archive of a million rows and 64 layers takes, and choosing rows of it.

Run by ``.venv/bin/python tests/benchmarks/opening.py``; half a minute. The archive has all of its
metadata and labels, and no values: neither opening nor choosing reads any.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

import actstore
from actstore.archive import grid, store
from actstore.archive.coordinates import STRING, Coordinate
from actstore.archive.root import FORMAT, VERSION

ROWS, LAYERS, WIDTH, ITEM = 1_000_000, 64, 4096, 512


def write(folder: Path, sites: int) -> None:
    """Write an archive without values: so many sites, and texts of 50,000 tokens."""
    writer, row_bytes = store.ArchiveWriter(folder), WIDTH * 4
    folder.mkdir()
    for site in ["resid", "attn", "mlp", *(f"model.layers.m{place}" for place in range(3, sites))]:
        writer.add_array(
            site,
            ("layer", "token", "feature"),
            (LAYERS, ROWS, WIDTH),
            np.dtype(np.float32),
            chunks=(1, grid.chunk_rows(ROWS, row_bytes), WIDTH),
            shards=(1, grid.shard_rows(ROWS, row_bytes), WIDTH),
            profile="balanced",
            attributes={
                "site": site,
                "source_dtype": "bfloat16",
                "modules": [f"model.layers.{block}.{site}" for block in range(LAYERS)],
            },
        )
    row = np.arange(ROWS)
    ids = np.random.default_rng(0).integers(0, 50_000, ROWS)
    labels: dict[str, Any] = {
        "pass_index": row // (8 * ITEM),
        "batch_item": row // ITEM % 8,
        "position": row % ITEM,
        "token_id": ids,
        "token_text": np.array([f" w{one}" for one in range(50_000)], STRING)[ids],
        "is_padding": row % ITEM < 3,
        "step": np.full(ROWS, -1),
    }
    for name, values in labels.items():
        writer.add_small(Coordinate(name, ("token",), values))
    writer.add_small(Coordinate("layer", ("layer",), np.arange(LAYERS)))
    about = {"coordinates": " ".join(labels), "rows": {"token": ROWS}, "aliases": {}}
    writer.finish({"format": FORMAT, "format_version": VERSION, **about})


def timed(call: Callable[[], Any]) -> str:
    """Give the median seconds of five calls."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return f"{statistics.median(seconds):.3f}"


def measure(archive: Path, chunks: Any, opened: list[str]) -> str:
    """Give the columns of one row."""
    with actstore.open_dataset(archive, chunks) as dataset:
        opened.clear()
        took = timed(lambda: actstore.open_dataset(archive, chunks))
        files = sum(str(archive) in one for one in opened) // 5
        rows = dataset.actstore
        choices = (lambda: rows.tokens("w77"), rows.drop_padding, rows.table)
        return " | ".join((took, str(files), *map(timed, choices)))


def main() -> None:
    """Print a row for each number of sites, with dask's arrays and without."""
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    print(f"{machine()}\n")
    print("| sites | arrays | open, s | files | tokens(text), s | drop_padding, s | table, s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=Path()) as name:
        for sites in (3, 20, 100):
            archive = Path(name).absolute() / f"{sites}.zarr"
            write(archive, sites)
            print(f"| {sites} | dask | {measure(archive, 'auto', opened)} |")
            print(f"| {sites} | xarray | {measure(archive, None, opened)} |")


if __name__ == "__main__":
    main()
