"""How fast hooks and log take packets, against the floor of what must be done to their bytes.

Run by ``.venv/bin/python tests/benchmarks/log_throughput.py``; about three minutes. Packets of
bfloat16 noise shaped as activations are (normal, of log-normal scales) are handed to the hooks of
32 modules, without a model. The floor is summed: the time to copy the bytes once, to encode them
on as many threads as there are encoders, to checksum what comes out, and to write it raw to the
same place, each measured alone in the same round. Work that overlaps is faster than the sum.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch
from feeding import feed
from machine import machine

from actstore import codecs
from actstore.capture.memory import Memory
from actstore.errors import ActstoreWarning
from actstore.machine import cores
from actstore.stream.direct import DirectFile
from actstore.stream.records import crc32c

LAYERS = 32
SIZES = (2 << 10, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)
TOTAL, MOST_PACKETS = 1 << 30, 200_000
_PIECE, _FLOOR = 1 << 20, 128 << 20


def packets(nbytes: int) -> list[torch.Tensor]:
    """Give different packets of so many bytes, as many as a few passes take."""
    count = max(2, min(8 * LAYERS, _FLOOR // nbytes))
    rng = np.random.default_rng(0)
    scales = rng.lognormal(0, 1, nbytes // 2).astype(np.float32)
    made = [
        torch.from_numpy(rng.standard_normal(nbytes // 2, np.float32) * scales).to(torch.bfloat16)
        for _ in range(count)
    ]
    # a tensor that comes twice in a pass is stored once: each is an object of its own
    return made + [made[at % count][:] for at in range(count, 2 * LAYERS)]


def bytes_of(mine: list[torch.Tensor]) -> np.ndarray:
    """Give the bytes of packets, again and again, as many as the floor is measured with."""
    data = np.empty(_FLOOR, np.uint8)
    for at in range(0, _FLOOR, mine[0].nbytes):
        data[at : at + mine[0].nbytes] = mine[at // mine[0].nbytes % len(mine)].view(torch.uint8)
    return data


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def floor(data: np.ndarray, codec: str, folder: Path) -> tuple[float, dict[str, float]]:
    """Give the seconds a byte of the summed floor, and GB/s of each of its parts."""
    memory = Memory().take(data.nbytes)
    memory[:] = 0
    pieces = [data[at : at + _PIECE] for at in range(0, data.nbytes, _PIECE)]
    number = codecs.NAMES[codec]
    outs = [np.zeros(_PIECE + codecs.FRAME_BYTES, np.uint8) for _ in pieces]
    encoded: list[np.ndarray] = []

    def encode() -> None:
        with ThreadPoolExecutor(cores()) as pool:
            found = pool.map(
                lambda at: codecs.encode(number, pieces[at], 2, outs[at])[1], range(len(pieces))
            )
            encoded[:] = [np.frombuffer(one, np.uint8) for one in found]

    encode()
    parts = {"copy": timed(lambda: np.copyto(memory, data))}
    parts["encode"] = timed(encode) if number else 0.0
    parts["checksum"] = timed(lambda: [crc32c(one) for one in encoded])
    whole = np.concatenate(encoded)
    whole = whole[: whole.nbytes // 4096 * 4096]
    memory[: whole.nbytes] = whole
    path = folder / "raw"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    file = DirectFile(descriptor)

    def write() -> None:
        file.write([memoryview(memory[: whole.nbytes])])
        os.fdatasync(descriptor)

    parts["write"] = timed(write)
    os.close(descriptor)
    path.unlink()
    rates = {name: data.nbytes / took / 1e9 if took else np.inf for name, took in parts.items()}
    return sum(parts.values()) / data.nbytes, rates


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="bytes of a packet")
    parser.add_argument("--codecs", nargs="*", default=list(codecs.NAMES))
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args(argv)
    warnings.simplefilter("ignore", ActstoreWarning)
    print(f"{machine()}\n")
    print(
        "| packet | codec | packets/s | GB/s | floor GB/s | ratio | copy, encode, checksum, write "
        "alone GB/s |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        for size in given.sizes:
            mine = packets(size)
            data = bytes_of(mine)
            passes = max(1, min(TOTAL // size, MOST_PACKETS) // LAYERS)
            for codec in given.codecs:
                print(row(Path(name), size, codec, mine, data, passes, given.rounds), flush=True)


def row(
    folder: Path,
    size: int,
    codec: str,
    mine: list[torch.Tensor],
    data: np.ndarray,
    passes: int,
    rounds: int,
) -> str:
    """Measure a line of the table."""
    count, rates, ratios, floors = LAYERS * passes, [], [], []
    parts: dict[str, float] = {}
    feed(folder / "warm.stream", codec, mine, LAYERS, passes)
    (folder / "warm.stream").unlink()
    for _ in range(rounds):
        cost, parts = floor(data, codec, folder)
        seconds, _ = feed(folder / "run.stream", codec, mine, LAYERS, passes)
        (folder / "run.stream").unlink()
        rates.append(count / seconds)
        floors.append(1e-9 / cost)
        ratios.append(count * size * cost / seconds)
    alone = ", ".join(f"{rate:.1f}" for rate in parts.values())
    rate = median(rates)
    return (
        f"| {size / 1024:,.0f} KiB | {codec} | {rate:,.0f} | {rate * size / 1e9:.2f} | "
        f"{median(floors):.2f} | {median(ratios):.2f} | {alone} |"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
