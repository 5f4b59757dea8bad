"""How small the floats of trained models become at a promised error, and how fast.

Run by ``.venv/bin/python tests/benchmarks/precision.py``; about five minutes. Prints a table for
each set of data: the hidden states of MiniLM, and what every module of `examples/tiny-llama`
returns, in float32 on documentation text. A line a precision; of all layers the smallest and the
median ratio against float32 (against bfloat16 it is half of it), the largest NMSE, how many chunks
were kept whole, and the speed of making chunks and of reading them, GB/s of float32 on one thread.

Then the limit, for a line of rms: the ratio against bfloat16 that any code could reach at a
squared error of 1e-3 if the values were independent and Gaussian (Shannon's rate-distortion bound,
1/2 log2 of rms² over the error), what a uniform step reaches with an ideal entropy coder (1/4 bit
more: Gish and Pierce, doi:10.1109/TIT.1968.1054193), and what ``mse=1e-3`` does.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import trained
from machine import machine
from numcodecs import blosc
from numpy.typing import NDArray

from actstore.archive import grid, shards
from actstore.archive.precision import Precision, decoded

PRECISIONS = (
    *("", "float16", "bfloat16", "relative=0.0078125", "relative=0.03125", "relative=0.0625"),
    *("int8", "nmse=2e-6", "nmse=2e-5", "nmse=2e-4", "nmse=1e-3", "mse=1e-3"),
)
ROUNDS = 3
PROFILE = shards.PROFILES["balanced"]


@dataclass
class Measured:
    """What became of a layer."""

    stored: int = 0
    raw: int = 0
    squares: float = 0.0
    squared_error: float = 0.0
    largest: float = 0.0
    whole: int = 0
    write: float = 0.0
    read: float = 0.0

    @property
    def ratio(self) -> float:
        """Bytes of float32 over those stored."""
        return self.raw / self.stored

    @property
    def nmse(self) -> float:
        """The squared error over the squares."""
        return self.squared_error / self.squares

    @property
    def mse(self) -> float:
        """The mean squared error."""
        return self.squared_error / (self.raw / 4)


def chunks(rows: NDArray[Any]) -> list[NDArray[Any]]:
    """Cut rows as an archive does; the last chunk, which is not whole, is left out."""
    size = grid.chunk_rows(len(rows), rows[:1].nbytes)
    return [rows[at : at + size] for at in range(0, len(rows) // size * size, size)]


def measure(rows: NDArray[Any], name: str) -> Measured:
    """Keep a layer at a precision, by what compaction and reading do."""
    found = Measured()
    out, scales = np.empty(4 << 20, np.uint8), []
    applied = shards.applied("balanced", rows)
    for chunk in chunks(rows):
        started = time.perf_counter()
        parts, codes = keep(chunk, name)
        data = parts[0].reshape(-1).view(np.uint8)
        length = shards.encode_chunk(out, data, parts[0].itemsize, applied)
        middle = time.perf_counter()
        back = np.frombuffer(blosc.decompress(out[:length]), parts[0].dtype).reshape(chunk.shape)
        values = decoded(back, parts[1], "f4") if codes else back
        found.read += time.perf_counter() - middle
        found.write += middle - started
        found.stored += length
        found.raw += chunk.nbytes
        found.whole += bool(name) and parts[0] is chunk
        scales += parts[1:] if codes and name != "mse=1e-3" else []
        off = values.astype("f8") - chunk
        found.squares += float(np.square(chunk, dtype="f8").sum())
        found.squared_error += float(np.square(off).sum())
        found.largest = max(found.largest, float(np.abs(off).max()))
    if scales:
        data = np.concatenate(scales).view(np.uint8)
        found.stored += shards.encode_chunk(out, data, 4, PROFILE)
    return found


def keep(chunk: NDArray[Any], name: str) -> tuple[list[NDArray[Any]], bool]:
    """Give what is stored of a chunk, and whether it is codes and scales."""
    if not name:
        return [chunk], False
    precision = Precision.parse(name)
    if not precision.coded:
        return [precision.rounded(chunk)[0]], False
    codes = precision.quantised(chunk)
    return ([chunk], False) if codes is None else ([codes.codes, codes.scale], True)


def layers(tokens: int) -> dict[str, dict[str, NDArray[Any]]]:
    """Give the layers of each set of data."""
    return {
        "MiniLM": trained.hidden_states(torch.float32, 4 * tokens),
        "tiny-llama": trained.modules(torch.float32, tokens),
    }


def table(data: dict[str, NDArray[Any]]) -> None:
    """Print what becomes of the layers of one set of data."""
    print(
        "| precision | ratio: least, median | worst NMSE | largest error | whole | write / read |"
    )
    print("|---|---|---|---|---|---|")
    for name in PRECISIONS:
        rounds = [[measure(rows, name) for rows in data.values()] for _ in range(ROUNDS)]
        found = rounds[0]
        raw = sum(one.raw for one in found) / 1e9
        speeds = [
            raw / median(sum(getattr(one, what) for one in mine) for mine in rounds)
            for what in ("write", "read")
        ]
        ratios = [one.ratio for one in found]
        whole = sum(one.whole for one in found)
        print(
            f"| {f'`{name}`' if name else 'all'} | {min(ratios):.2f}, {median(ratios):.2f} "
            f"| {max(one.nmse for one in found):.1e} | {max(one.largest for one in found):.3g} "
            f"| {whole} | {speeds[0]:.2f} / {speeds[1]:.2f} |",
            flush=True,
        )


def limits() -> None:
    """Print what a squared error of 1e-3 allows, by the values' rms."""
    print("| rms | Shannon's bound | uniform step, ideal coder | `mse=1e-3` |\n|---|---|---|---|")
    normal = np.random.default_rng(0).standard_normal((4096, 1024)).astype("f4")
    for rms in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        bits = math.log2(rms**2 / 1e-3) / 2
        reached = measure(normal * np.float32(rms), "mse=1e-3").ratio / 2
        ideal = 16 / uniform_bits(rms)
        print(f"| {rms} | {16 / bits:.2f} | {ideal:.2f} | {reached:.2f} |", flush=True)


def uniform_bits(rms: float) -> float:
    """Give the entropy of a Gaussian in steps of a squared error of 1e-3."""
    step = math.sqrt(12e-3) / rms
    edges = np.arange(-math.ceil(12 / step), math.ceil(12 / step) + 2) * step - step / 2
    cumulative = np.array([math.erf(one / math.sqrt(2)) for one in edges])
    share = np.diff(cumulative) / 2
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def main(argv: Sequence[str]) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="through the Llama")
    given = parser.parse_args(argv)
    blosc.use_threads = False
    torch.set_num_threads(1)
    print(f"{machine()}; one thread")
    for name, data in layers(given.tokens).items():
        print(f"\n{name}, {sum(one.nbytes for one in data.values()) / 1e6:.0f} MB\n")
        table(data)
    print("\nRatios against bfloat16 at a squared error of 1e-3, Gaussian values\n")
    limits()


if __name__ == "__main__":
    main(sys.argv[1:])
