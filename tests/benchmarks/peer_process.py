"""Owns how one peer is measured, in a process and an environment of its own.

Run by ``peers.py``. Without ``--oracle`` it runs the model plain, captured and plain again, a
round, and leaves the last capture in ``--out``; with it, it times how soon one layer of a capture
is an array again, then compares all layers with the oracle's. It prints one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peer_captures import LAYERS, PEERS, Peer, Work

ONE_LAYER = "model.layers.3"


def durable(out: Path) -> int:
    """Have all files and folders on disk; give the bytes of the files."""
    paths = [out, *out.rglob("*")]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return sum(path.stat().st_size for path in paths if path.is_file())


def memory(key: str) -> float:
    """Give this process' VmRSS or VmHWM in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(one.split()[1]) for one in lines if one.startswith(key)) * 1024 / 1e6


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Give the seconds that a call takes, and the peak of the RSS meanwhile, in MB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # starts the peak anew
    began = time.perf_counter()
    run()
    return time.perf_counter() - began, memory("VmHWM")


def measure(peer: Peer, work: Work, out: Path, rounds: int) -> dict[str, Any]:
    """Measure rounds of plain, captured, plain."""

    def plain() -> None:
        work.run(peer.model.config, peer.plain)

    def captured() -> None:
        peer.capture(work, out)
        durable(out)

    short = Work(work.phase, 1)
    short.run(peer.model.config, peer.plain)
    loaded = memory("VmRSS")
    warm = out.with_name(out.name + ".warm")
    warm.mkdir()
    peer.capture(short, warm)
    shutil.rmtree(warm)
    ratios, speeds, plain_speeds, peaks, plain_peaks = [], [], [], [], []
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (before, peak_before), (seconds, peak), (after, _) = map(timed, (plain, captured, plain))
        ratios.append((before + after) / 2 / seconds)
        speeds.append(work.tokens / seconds)
        plain_speeds += [work.tokens / before, work.tokens / after]
        peaks.append(peak - loaded)
        plain_peaks.append(peak_before - loaded)
    return {
        "kept": median(ratios), "kept_low": min(ratios), "kept_high": max(ratios),
        "tokens_per_second": median(speeds), "plain_tokens_per_second": median(plain_speeds),
        "bytes": durable(out), "peak_mb": max(peaks), "plain_peak_mb": max(plain_peaks),
        "torch": torch.__version__, "transformers": version("transformers"),
    }  # fmt: skip


def compare(peer: type[Peer], out: Path, oracle: Path) -> dict[str, Any]:
    """Time the reading of one layer; compare all with the oracle's, as the model's own dtype."""
    try:
        peer.read(out, LAYERS[0])  # imports what reading needs
    except LookupError:
        return {"missing": LAYERS[0]}
    began = time.perf_counter()
    peer.read(out, ONE_LAYER)
    seconds = time.perf_counter() - began
    whole, equal, off, dtype = hashlib.sha256(), 0, 0.0, ""
    for layer in LAYERS:
        values, wanted = peer.read(out, layer), Peer.read(oracle, layer)
        dtype = str(values.dtype).removeprefix("torch.")
        whole.update(values.to(wanted.dtype).contiguous().view(torch.uint8).numpy())
        if values.shape != wanted.shape:
            off = float("inf")
        elif torch.equal(values.float(), wanted.float()):
            equal += 1
        else:
            off = max(off, (values.float() - wanted.float()).abs().max().item())
    return {
        "seconds": seconds, "dtype": dtype, "digest": whole.hexdigest(), "equal": equal,
        "off": off,
    }  # fmt: skip


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--oracle", type=Path, help="read, and compare with what is here")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--phase", default="prefill")
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    kind = PEERS[given.peer]
    if given.oracle:
        said = compare(kind, given.out, given.oracle)
    elif given.phase not in kind.phases:
        said = {"skipped": f"no {given.phase}"}
    else:
        work = Work(given.phase, given.passes)
        said = measure(kind(given.model, given.dtype), work, given.out, given.rounds)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
