"""What a packet costs as a run grows: time, memory, and opening the log again.

Run by ``.venv/bin/python tests/benchmarks/growth.py``; about two minutes. Packets of 512 bytes are
handed to the hooks of so many modules, without a model, each row in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from feeding import feed
from machine import machine

import actstore
from actstore.errors import ActstoreWarning

ROWS = [(10**3, 1), (10**4, 1), (10**5, 1), (10**6, 1)]
ROWS += [(10**6, 10), (10**6, 100), (10**3, 1000), (10**4, 1000), (10**5, 1000), (10**6, 1000)]


def measure(packets: int, layers: int, log: Path) -> dict[str, float]:
    """Capture so many packets of so many layers; say what it took."""
    values = [torch.randn(256).to(torch.bfloat16) for _ in range(256)]
    feed(log.with_name("warm.stream"), "lz4", values, layers, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, _ = feed(log, "lz4", values, layers, packets // layers)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    with actstore.open_stream(log) as reader:
        opened = time.perf_counter() - began
        assert reader.packet_count == packets // layers * layers
    return {
        "us": seconds / packets * 1e6,
        "mib": (after - before) / 1024,
        "bytes": log.stat().st_size / packets,
        "open_ms": opened * 1e3,
    }


def main() -> None:
    """Print the table; given a row, measure it and print JSON."""
    if len(sys.argv) > 1:
        warnings.simplefilter("ignore", ActstoreWarning)
        with tempfile.TemporaryDirectory(dir=Path()) as folder:
            numbers = int(sys.argv[1]), int(sys.argv[2])
            print(json.dumps(measure(*numbers, Path(folder) / "run.stream")))
        return
    print(f"{machine()}\n")
    print("| packets | layers | µs a packet | memory, MiB | bytes a packet | open, ms |")
    print("|---|---|---|---|---|---|")
    for packets, layers in ROWS:
        command = [sys.executable, __file__, str(packets), str(layers)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(
            f"| {packets:,} | {layers:,} | {found['us']:.2f} | {found['mib']:.0f} | "
            f"{found['bytes']:.0f} | {found['open_ms']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
