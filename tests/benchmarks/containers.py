"""How fast archives become one file, how large that is, and how fast it is read.

Run by ``.venv/bin/python tests/benchmarks/containers.py``; about three minutes. The data are the
hidden states of MiniLM in bfloat16, as an archive has them: float32. Prints one table: speeds in
GB/s of those float32 bytes, medians of ``ROUNDS``, the containers taking turns; the ratio is
against bfloat16. Ours are verified as they are written; "stock" is h5py's own shuffle and gzip 1
in the same chunks, which nobody verifies. Read are all layers, whole, by actstore and by h5py
(Zstandard with ``hdf5plugin``, where that is installed).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))

import h5py
import numpy as np
import torch
import trained
from logs import LogBuilder, axis
from machine import machine
from numpy.typing import NDArray

import actstore
from actstore.hdf5 import chunks

ROUNDS = 3
PLUGIN = find_spec("hdf5plugin") is not None
if PLUGIN:
    import hdf5plugin  # noqa: F401 - registers its filters


def write_log(path: Path, states: Sequence[NDArray[Any]]) -> Path:
    """Write the log of a run that returned these states."""
    log = LogBuilder(path, compression="none")
    for block in range(len(states)):
        log.layer(f"h.{block}", "resid", block)
    for start in range(0, len(states[0]), 1024):
        log.begin(axis(1, len(states[0][start : start + 1024])))
        for block, rows in enumerate(states):
            log.put(f"h.{block}", rows[np.newaxis, start : start + 1024])
        log.commit()
    return log.close()


def stock(source: Path, target: Path) -> None:
    """Write what h5py alone makes of an archive's values."""
    with actstore.open_dataset(source, None) as found, h5py.File(target, "w") as file:
        made = file.create_dataset(
            "resid",
            found.resid.shape,
            "f4",
            chunks=found.resid.encoding["chunks"],
            shuffle=True,
            compression="gzip",
            compression_opts=1,
        )
        for layer in range(len(made)):
            made[layer] = found.resid[layer].values


def by_actstore(path: Path) -> int:
    """Read all layers, one after the other."""
    with actstore.open_dataset(path, None) as found:
        return sum(found.resid[layer].values.nbytes for layer in range(len(found.resid)))


def by_h5py(path: Path) -> int:
    """Read all layers, one after the other."""
    with h5py.File(path) as file:
        return sum(file["resid"][layer].nbytes for layer in range(len(file["resid"])))


def size_of(path: Path) -> int:
    """Give the bytes of a file, or of a folder's files."""
    return sum(one.stat().st_size for one in [path, *path.rglob("*")] if one.is_file())


def timed(work: Callable[[Path], Any], path: Path) -> float:
    """Give what something takes."""
    started = time.perf_counter()
    work(path)
    return time.perf_counter() - started


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    given = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="containers-"))
    try:
        states = list(trained.hidden_states(torch.bfloat16, given.tokens).values())
        log = write_log(folder / "run.stream", states)
        archive = actstore.compact(log, folder / "source.zarr").path
        raw = 2 * sum(one.nbytes for one in states)
        containers: dict[str, tuple[str, Callable[[Path], Any], bool]] = {
            "archive (`balanced`)": ("zarr", lambda path: actstore.compact(log, path), False),
            "`.zarr.zip`": ("zarr.zip", lambda path: actstore.export(archive, path), False),
            '`.h5`, `"gzip"`': ("h5", lambda path: actstore.export(archive, path), True),
            '`.h5`, `"zstd"`': (
                "h5",
                lambda path: actstore.export(archive, path, compression="zstd"),
                PLUGIN,
            ),
            '`.h5`, `"none"`': (
                "h5",
                lambda path: actstore.export(archive, path, compression="none"),
                True,
            ),
            "stock h5py, shuffle and gzip 1": ("h5", lambda path: stock(archive, path), True),
        }
        times: dict[str, list[list[float]]] = {name: [[], [], []] for name in containers}
        sizes = {}
        for number in range(ROUNDS):
            for place, (name, (suffix, write, stock_reads)) in enumerate(containers.items()):
                path = folder / f"{number}-{place}.{suffix}"
                to, ours, theirs = times[name]
                to.append(timed(write, path))
                sizes[name] = size_of(path)
                if "stock" not in name:
                    ours.append(timed(by_actstore, path))
                if stock_reads:
                    theirs.append(timed(by_h5py, path))
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                print(".", end="", file=sys.stderr, flush=True)
        inflate = "isal" if "isal" in chunks._decompressobj.__module__ else "zlib"
        print(f"\n{machine()}, h5py {h5py.__version__}; inflate of actstore: {inflate}\n")
        print("| | ratio | write | read by actstore | read by h5py |\n|---|---|---|---|---|")
        for name, mine in times.items():
            speeds = [f"{raw / 1e9 / median(one):.2f}" if one else "–" for one in mine]
            print(f"| {name} | {raw / 2 / sizes[name]:.3f} | {' | '.join(speeds)} |")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
