"""Part 3, a log that survives everything: what must hold, each with its figure.

Run by ``.venv/bin/python tests/acceptance/03_survives.py``; about two minutes. ``--full`` kills
200 captures, cuts the power everywhere, tries every fault, flips every bit and reads a million
mutated files.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
sys.path[:0] = [
    str(ROOT),
    *(str(TESTS / one) for one in ("acceptance", "capture", "crash", "fuzz")),
]

import fault_cases
import killing
import oracle
import power_cuts
import pytest
import test_fuzz
import torch
from fault_cases import Case, NoMountError, Sufferer
from forks import Child, quick_folder
from power_cuts import CAPTURES, Cuts
from report import run
from tiny_models import build, token_ids

import actstore

FULL = "--full" in sys.argv[1:]
FLIPS = 1_500
MEGABYTES = 400
ROUNDS = 5


def killed() -> str:
    """Kill captures until so many kills have struck; read, recover and resume each."""
    wanted, kills, packets, seed = (200 if FULL else 20), 0, 0, 0
    with killing.quietly(), Child(killing.__file__) as child:
        while kills < wanted:
            with tempfile.TemporaryDirectory() as folder:
                found = killing.kill_and_resume(seed, Path(folder), child)
            kills, packets, seed = kills + found.kills, packets + found.packets, seed + 1
    return (
        f"{kills} kills of {seed} captures; {packets} packets read back and recovered equal, 0 "
        f"committed ones lost; {seed} of {seed} resumed runs equal those that were left alone"
    )


def power_cut() -> str:
    """Replay captures onto disks that lose power; read each, and go on with some."""
    found: list[Cuts] = []
    for name, record in CAPTURES.items():
        with (
            power_cuts.one_core(),
            quick_folder() as folder,
            pytest.MonkeyPatch.context() as patch,
        ):
            recorded = record(folder, patch)
            if FULL:
                found.append(power_cuts.every_cut(recorded, folder))
                continue
            found.append(power_cuts.some_cuts(recorded, folder))
            if name in ("tracked", "resumed"):
                found.append(power_cuts.some_cuts_within_writes(recorded, folder))
    for cuts in found:
        cuts.assert_resumed()
    tried, gone_on, cleared = (
        sum(getattr(cuts, what) for cuts in found) for what in ("tried", "resumes", "cleared")
    )
    return (
        f"{tried} disks of {len(CAPTURES)} captures, 0 durable packets lost; {gone_on} of "
        f"{gone_on} resumed equal ({cleared} after a file that was no log yet was moved away)"
    )


def faulted() -> str:
    """Let captures suffer faults: one clear error, a clean model, a log that reads and resumes."""
    kinds: dict[str, list[Case]] = {
        kind: [*cases, *(fault_cases.MORE.get(kind, []) if FULL else [])]
        for kind, cases in fault_cases.CASES.items()
    }
    failed, left_out, tried = [], 0, 0
    with quick_folder() as folder, Sufferer(folder) as child:
        for kind, cases in kinds.items():
            for case in cases:
                tried += 1
                try:
                    child.survive(case, folder / str(tried))
                except NoMountError:
                    left_out, tried = left_out + 1, tried - 1
                except AssertionError as error:
                    failed.append(f"{kind}: {case}: {str(error)[:300]}")
    assert not failed, f"{len(failed)} of {tried} not survived: {failed}"
    counts = ", ".join(f"{kind} {len(cases)}" for kind, cases in kinds.items())
    note = f"; {left_out} left out, for no file system can be mounted here" if left_out else ""
    return f"{tried} of {tried} survived ({counts}){note}"


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


def mutated() -> str:
    """Read mutated logs and sidecars, in a process whose memory and time are limited."""
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS / "fuzz")]
    found = subprocess.run(
        [*command, *(["-m", ""] if FULL else [])], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout[-2000:]
    runs = sum(one[FULL] for one in test_fuzz.RUNS.values())
    return (
        f"{runs:,} executions of {len(test_fuzz.RUNS)} targets, and the hostile logs: no crash, "
        "none over a second, no memory beyond what was validly declared and 64 MiB"
    )


def main() -> int:
    """Run the checks."""
    return run(
        "Part 3: a log that survives everything",
        {
            "SIGKILL loses nothing that was committed": killed,
            "every single-bit flip is found": flipped,
            "a log cut anywhere keeps its commits": cut,
            "a power cut costs nothing that was on the disk": power_cut,
            "faults while capturing are told and survived": faulted,
            "files from elsewhere do no harm": mutated,
            "verification is at least half as fast as reading": verifies_fast,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
