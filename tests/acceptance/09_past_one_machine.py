"""Part 9, "Past one machine": clusters, ranks, buckets, training reads.

    .venv/bin/python tests/acceptance/09_past_one_machine.py [--only NAME …] [--sae-lens PYTHON]

About fifteen minutes. ``--sae-lens`` is the interpreter of an environment with SAELens; without
one, the line that compares with it fails. Ratios want a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(ROOT / "tests" / name) for name in ("cluster", "buckets", "benchmarks", "archive")
] + [str(ROOT)]

from report import run

WORKERS, KEPT = 1.6, 0.8


def two_workers(folder: Path) -> str:
    """Compact by one worker and by two, in turn."""
    import cluster

    workers, threads, speed = cluster.two_workers(folder)
    told = (
        f"{workers:.2f} × one, {speed:.2f} GB/s (two threads of one process {threads:.2f} × one)"
    )
    assert workers >= WORKERS, told
    return told


def killed_worker(folder: Path) -> str:
    """Kill one of four workers at ten random moments."""
    import clusters

    found = clusters.kill_one_of_four(folder, kills=10, seed=9)
    assert found.kills >= 10
    return f"{found.kills} kills in {found.compactions} compactions: the same bytes"


def past_memory(folder: Path) -> str:
    """Compute statistics of more values than the workers may hold together."""
    import larger_than_memory

    found = larger_than_memory.statistics_past_memory(folder)
    peaks = ", ".join(f"{one / 1e6:.0f}" for one in found.peaks)
    return (
        f"{found.values / 1e9:.2f} GB of values by {len(found.peaks)} workers of "
        f"{found.limit / 1e6:.0f} MB, which held {peaks} MB: the bits that threads give"
    )


def united(_folder: Path) -> str:
    """Unite the logs of real processes."""
    from ranks import merged_equals_oracle

    return merged_equals_oracle()


def faults(_folder: Path) -> str:
    """Read, compact and upload through faults, and kill who writes."""
    import s3_faults

    return s3_faults.fault_runs(100)


def requests(_folder: Path) -> str:
    """Count requests at the server."""
    import s3_faults

    return s3_faults.count_requests()


def loader(sae_lens: str | None) -> str:
    """Read rows for training, in turn with reading in order and with SAELens."""
    script = ROOT / "tests" / "benchmarks" / "training_reads.py"
    command = [sys.executable, str(script), "--json"]
    command += ["--sae-lens", sae_lens] if sae_lens else []
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    told = f"{found['kept']:.2f} × reading in order"
    told += "".join(f", {one:.1f} × SAELens" for one in found["ahead"])
    assert found["kept"] >= KEPT, told
    assert found["ahead"], f"{told}; SAELens was not compared: give --sae-lens"
    assert min(found["ahead"]) > 1, told
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sae-lens", help="the interpreter of an environment with SAELens")
    parser.add_argument("--only", nargs="+", help="checks by a word of their names")
    given = parser.parse_args()
    checks: dict[str, Callable[[Path], str]] = {
        f"two workers ≥ {WORKERS} × one": two_workers,
        "one of four workers killed: same bytes": killed_worker,
        "statistics of more than the workers' memory": past_memory,
        "ranks united equal the oracle": united,
        "S3 faults: 100 runs, no row lost or doubled": faults,
        "S3 requests: opening ≤ 3, a layer of N shards ≤ N + 3": requests,
        f"the loader keeps ≥ {KEPT} × of reading in order, ahead of SAELens": (
            lambda _: loader(given.sae_lens)
        ),
    }
    chosen = {
        name: check
        for name, check in checks.items()
        if given.only is None or any(word in name for word in given.only)
    }

    def within(check: Callable[[Path], str]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            return check(Path(folder))

    return run(
        "Past one machine",
        {name: (lambda check=check: within(check)) for name, check in chosen.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
