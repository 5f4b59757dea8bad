"""Part 4, capture that keeps up with the model: what must hold, each with its figure.

Run by ``.venv/bin/python tests/acceptance/04_keeps_up.py`` on a machine that does nothing else;
about twenty minutes. What is compared with peers needs `tests/benchmarks/peers.py --install`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "tests/benchmarks"
sys.path[:0] = [str(ROOT), str(BENCHMARKS), str(ROOT / "tests/acceptance")]

import log_throughput
import speed_kept
from feeding import feed
from report import run
from speed_kept import BLOCKS, FULL, PARTS, Case, Kept

from actstore.errors import ActstoreWarning

ROUNDS = 3
DTYPES = ("float32", "bfloat16")
#: (phase, what is captured, codecs) -> the speed that must be kept, the final drain included.
KEPT = {
    ("decode", PARTS, ("none", "lz4", "zstd")): 0.98,
    ("decode", FULL, ("none",)): 0.94,
    ("prefill", BLOCKS, ("none", "lz4", "zstd")): 0.97,
    ("prefill", PARTS, ("none",)): 0.96,
    ("prefill", PARTS, ("lz4",)): 0.92,
    ("prefill", PARTS, ("zstd",)): 0.93,
    ("prefill", FULL, ("none",)): 0.87,
    ("prefill", FULL, ("lz4", "zstd")): 0.70,
}
BUDGET, OVER = 200_000_000, 100_000_000


@cache
def measured() -> list[Kept]:
    """Measure the speed that is kept in all cases, once."""
    cases = [
        Case("llama-1024", dtype, phase, sites, codec)
        for dtype, wanted in product(DTYPES, ("prefill", "decode"))
        for (phase, sites, codecs) in KEPT
        if phase == wanted
        for codec in codecs
    ]
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        return speed_kept.measure(cases, Path(folder), ROUNDS)


def named(kept: Kept) -> str:
    """Give a case its dtype and codec as a name."""
    return f"{kept.case.dtype} {kept.case.codec}"


def keeps(phase: str, sites: str, codecs: tuple[str, ...], least: float) -> str:
    """Look at the speed that is kept, in both dtypes."""
    found = [
        one
        for one in measured()
        if (one.case.phase, one.case.sites) == (phase, sites) and one.case.codec in codecs
    ]
    said = "; ".join(
        f"{named(one)} {median(one.drained):.3f} (bare {median(one.bare):.3f}, control "
        f"{median(one.control):.3f} ± {max(abs(x - 1) for x in one.control):.2f})"
        for one in found
    )
    missed = [one for one in found if median(one.drained) < least]
    forbidden = ", ".join(named(one) for one in missed if median(one.bare) < least)
    but = f"; bare hooks miss it, too: {forbidden}" if forbidden else ""
    assert not missed, f"{said}; wanted {least}{but}"
    return said


def takes(codec: str, least: int) -> str:
    """Count 4 KiB packets a second, from the hooks to the disk."""
    mine = log_throughput.packets(4096)
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        log = Path(folder) / "run.stream"
        rates = []
        for _ in range(ROUNDS + 1):
            seconds, summary = feed(log, codec, mine, log_throughput.LAYERS, 20_000)
            rates.append(summary["packets_written"] / seconds)
            log.unlink()
    rate = median(rates[1:])
    assert rate >= least, f"{rate:,.0f} packets a second; wanted {least:,}"
    return f"{rate:,.0f} packets a second"


def beats_the_floor() -> str:
    """Hold large packets against the sum of what must be done to their bytes."""
    said, worst = [], 9.0
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        for size in (64 << 10, 1 << 20, 16 << 20):
            mine = log_throughput.packets(size)
            data = log_throughput.bytes_of(mine)
            passes = max(1, (1 << 30) // size // log_throughput.LAYERS)
            for codec in ("none", "lz4", "zstd"):
                line = log_throughput.row(Path(folder), size, codec, mine, data, passes, ROUNDS)
                ratio = float(line.split("|")[6])
                worst = min(worst, ratio)
                said.append(f"{size >> 10} KiB {codec} {ratio:.2f}")
    text = ", ".join(said)
    assert worst >= 1, text
    return text


def stays_in_memory() -> str:
    """Capture far more than the budget, also onto a disk that stalls; look at what it took."""
    said = []
    for codec in ("none", "zstd"):
        for stall in (0.0, 0.2):
            command = [sys.executable, __file__, "--memory", codec, str(stall)]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1]
            )
            over = found["peak"] - found["before"] - BUDGET
            said.append(
                f"{codec}{', stalled,' if stall else ''} {found['raw'] / 1e9:.1f} GB in "
                f"{(found['peak'] - found['before']) / 1e6:.0f} MB"
            )
            assert over <= OVER, said[-1]
            assert not stall or found["waited"] > 0, "the disk was meant to be too slow"
    return f"of a budget of {BUDGET / 1e6:.0f} MB: {'; '.join(said)}"


def memory(codec: str, stall: float) -> None:
    """Capture in this process; print what memory it took."""
    import time

    import feeding

    import actstore

    def high_water() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(one for one in lines if one.startswith("VmHWM")).split()[1]) * 1024

    real = os.writev

    def writev(descriptor: int, buffers: object) -> int:
        time.sleep(stall)  # the slow disk itself
        return real(descriptor, buffers)  # type: ignore[arg-type]

    os.writev = writev  # type: ignore[assignment]
    config = actstore.InstrumentationConfig(
        actstore.HookGranularity.FULL_TENSOR, codec, 1e-6, BUDGET / 1e9
    )
    feeding._frameworks.clear()
    framework = actstore.InstrumentationFramework(config)
    feeding.framework_of = lambda _: framework
    mine = log_throughput.packets(1 << 20)
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        before = high_water()
        passes = 10 if stall else 60
        _, summary = feed(Path(folder) / "run.stream", codec, mine, log_throughput.LAYERS, passes)
    print(
        json.dumps(
            {
                "before": before,
                "peak": high_water(),
                "raw": summary["raw_bytes"],
                "waited": summary["waited_seconds"],
            }
        )
    )


def stays_constant() -> str:
    """Measure what a packet costs in runs of 10^4 to 10^6."""
    costs = {}
    for packets in (10**4, 10**5, 10**6):
        command = [sys.executable, str(BENCHMARKS / "growth.py"), str(packets), "100"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        costs[packets] = found["us"]
    said = ", ".join(f"{packets:,} packets {us:.2f} µs each" for packets, us in costs.items())
    assert costs[10**6] <= 1.2 * costs[10**5], said
    return said


def main() -> int:
    """Run the checks."""
    if sys.argv[1:2] == ["--memory"]:
        warnings.simplefilter("ignore", ActstoreWarning)
        memory(sys.argv[2], float(sys.argv[3]))
        return 0
    warnings.simplefilter("ignore", ActstoreWarning)
    checks = {
        f"{phase}, {sites}, {' and '.join(codecs)}: at least {least} of the speed": (
            lambda phase=phase, sites=sites, codecs=codecs, least=least: keeps(
                phase, sites, codecs, least
            )
        )
        for (phase, sites, codecs), least in KEPT.items()
    }
    checks |= {
        "4 KiB packets, none: at least 250,000 a second": lambda: takes("none", 250_000),
        "4 KiB packets, zstd: at least 200,000 a second": lambda: takes("zstd", 200_000),
        "packets from 64 KiB on: at least as fast as the summed floor": beats_the_floor,
        "memory stays within the budget and 100 MB": stays_in_memory,
        "a packet costs the same in a long run": stays_constant,
    }
    failed = run("Part 4: capture that keeps up with the model", checks)
    print(f"\n{speed_kept.HEAD}", *map(speed_kept.row, measured()), sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
