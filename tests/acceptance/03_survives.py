"""Part 3, a log that survives everything: what must hold, each with its figure.

Run by ``.venv/bin/python tests/acceptance/03_survives.py``; about four minutes. ``--full`` kills
200 captures, flips every bit, and runs the long form of the crash tests.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests/capture")]

import kills
import oracle
import torch
from report import run
from tiny_models import build, token_ids

import actstore

FULL = "--full" in sys.argv[1:]
FLIPS = 1_500
MEGABYTES = 400
ROUNDS = 5


def killed() -> str:
    """Kill captures; recover and resume each."""
    return kills.lose_nothing(200 if FULL else 20)


def small_log(folder: Path) -> tuple[Path, dict[int, oracle.Fired]]:
    """Give a closed log of a few passes with tokens, and its packets by number."""
    log, model = folder / "small.stream", build("llama")
    with (
        torch.no_grad(),
        oracle.capturing(
            model,
            log,
            actstore.HookGranularity.MLP_ONLY,
            track_per_token=True,
            checkpoint_interval_tokens=1,
        ) as tracker,
    ):
        for step in range(3):
            model(input_ids=token_ids())
            tracker.record_token(step, str(step))
    return log, packets(log)


def packets(log: Path, errors: str = "raise") -> dict[int, oracle.Fired]:
    """Give a log's packets by number."""
    with actstore.open_stream(log, errors=errors) as reader:
        return {one.seq: oracle.as_fired(one) for one in reader.packets()}


def flipped() -> str:
    """Flip single bits of a closed log: each is found, and only intact data comes back."""
    with tempfile.TemporaryDirectory() as name:
        log, wanted = small_log(Path(name))
        data = log.read_bytes()
        bits = range(8 * len(data))
        chosen = bits if FULL else sorted(random.Random(2).sample(bits, FLIPS))
        found = lost = refused = 0
        for bit in chosen:
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            log.write_bytes(damaged)
            found += _is_found(log)
            try:
                left = packets(log, errors="skip")
            except actstore.ActstoreError:
                refused += 1
                continue
            assert all(wanted[seq] == one for seq, one in left.items()), f"bit {bit}"
            lost += len(wanted) - len(left)
        assert found == len(chosen), f"{len(chosen) - found} flips were not found"
    return (
        f"{found} of {len(chosen)} flips of {len(data)} bytes found; nothing wrong came back; "
        f"{lost / len(chosen):.2f} of {len(wanted)} packets lost a flip, {refused} flips (of the "
        "magic) made it no log"
    )


def _is_found(log: Path) -> bool:
    try:
        return not actstore.verify(log).ok
    except actstore.ActstoreError:
        return True


def cut() -> str:
    """Cut a log at every byte: what was committed before the cut is there."""
    with tempfile.TemporaryDirectory() as name:
        log, wanted = small_log(Path(name))
        data = log.read_bytes()
        with actstore.open_stream(log) as reader:
            commits = [(group.end, group.commit.next_seq) for group in reader.scan.groups]
        read = 0
        for length in range(commits[0][0], len(data)):
            log.write_bytes(data[:length])
            held = packets(log)
            promised = max(seq for end, seq in commits if end <= length)
            assert held == {seq: one for seq, one in wanted.items() if seq < promised}, length
            read += len(held)
    return f"{len(data) - commits[0][0]} cuts; {read} committed packets promised and read back"


def suite(*paths: str) -> Callable[[], str]:
    """Give a check that runs tests, shortened or in their long form."""

    def check() -> str:
        asked = ["-m", "crash or not crash"] if FULL else []
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "2", *paths, *asked],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        last = done.stdout.strip().splitlines()[-1]
        assert done.returncode == 0, f"{last}\n{done.stdout[-2000:]}"
        passed = re.search(r"(\d+) passed", last)
        assert passed
        return f"{passed[1]} tests in {', '.join(paths)} passed"

    return check


def verifies_fast() -> str:
    """Compare verification with reading the raw file, both from the page cache, interleaved."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "large.stream"
        framework = oracle.framework(codec="zstd")
        model = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(4)))
        framework.instrument_model(model)
        tensor = torch.randn(80, 1 << 16, generator=torch.Generator().manual_seed(0))
        with oracle.quiet(), framework.capture_activations(log):
            while log.stat().st_size < MEGABYTES * 1_000_000:
                model(tensor.roll(1, 0))
        size = log.stat().st_size
        times: dict[str, list[float]] = {"raw": [], "verify": []}
        for _ in range(ROUNDS):
            for way in times:
                began = time.perf_counter()
                if way == "raw":
                    with log.open("rb", buffering=0) as file:
                        while file.read(1 << 20):
                            pass
                else:
                    assert actstore.verify(log).ok
                times[way].append(time.perf_counter() - began)
    raw, ours = (size / 1e9 / median(one) for one in times.values())
    assert ours >= raw / 2, f"{ours:.1f} GB/s against {raw:.1f} GB/s of reading: {ours / raw:.2f}"
    return f"{ours:.1f} GB/s against {raw:.1f} GB/s of reading: {ours / raw:.2f}"


def main() -> int:
    """Run the checks."""
    return run(
        "Part 3: a log that survives everything",
        {
            "SIGKILL loses nothing that was committed": killed,
            "every single-bit flip is found": flipped,
            "a log cut anywhere keeps its commits": cut,
            "faults and power cuts": suite("tests/crash"),
            "verification is at least half as fast as reading": verifies_fast,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
