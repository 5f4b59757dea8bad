"""Fuzz what reads files from elsewhere, at length.

    python tests/fuzz/fuzz.py --runs 100000 --seed 1
    python tests/fuzz/fuzz.py reader recover --seconds 600
    python tests/fuzz/fuzz.py reader --atheris --runs 1000000
    python tests/fuzz/fuzz.py reader --input found/reader-0123456789ab

The first runs each target so often; the third lets atheris (`pip install atheris`) choose by
coverage. It ends with 1 where something was found.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))
if "--atheris" in sys.argv:
    import atheris

    imports = atheris.instrument_imports(include=["actstore"])
else:
    imports = nullcontext()
with imports:
    import limits
    from limits import Finding, Target, check
    from targets import targets

_KEPT: Final = 1 << 13  # bytes, packets: of larger inputs no others are made, they'd take long


@dataclass(slots=True)
class Tally:
    """How many runs there were, what came of them, and how long they took."""

    runs: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    findings: dict[str, bytes] = field(default_factory=dict)

    def find(self, finding: Finding, data: bytes) -> None:
        """Take a finding in: of each place the shortest input is kept."""
        if finding.place not in self.findings:
            print(f"{finding} (run {self.runs})", flush=True)
        if len(data) <= len(self.findings.get(finding.place, data)):
            self.findings[finding.place] = data
        self.kinds[finding.place] += 1


def hammer(
    target: Target, runs: int, seed: int, *, seconds: float = 1e9, stop: bool = True
) -> Tally:
    """Run a target on mutated inputs, without coverage: what gives something new is kept.

    Parameters
    ----------
    target : Target
        What to run.
    runs, seconds : int, float
        How often, and for how long at most.
    seed : int
        Of the random numbers; the same seed gives the same inputs.
    stop : bool
        Raise the first finding; else go on, and give one input for each place.
    """
    rng = random.Random(f"{target.name}{seed}")
    pool: list[bytes] = []
    begun, tally = time.monotonic(), Tally()
    while tally.runs < runs and time.monotonic() - begun < seconds:
        if tally.runs < len(target.corpus):
            data = target.corpus[tally.runs]
        else:
            data = rng.choice(pool if pool and rng.randrange(2) else target.corpus)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                data = target.mutate(data, rng)
        tally.runs += 1
        try:
            found = check(target, data)
        except Finding as finding:
            if stop:
                raise
            tally.find(finding, data)
            gc.collect()
            continue
        if found not in tally.kinds and len(data) < _KEPT > target.packets(data):
            pool.append(data)
        tally.kinds[found] += 1
    tally.seconds = time.monotonic() - begun
    return tally


def _with_atheris(target: Target, runs: int, seed: int, findings: Path | None) -> None:
    """Let atheris choose by coverage; it ends the process, at the first finding or at the end."""

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.randrange(6) == 0:
            return bytes(atheris.Mutate(data, most))
        changed = target.mutate(data, rng)
        return changed if len(changed) <= most else data

    def one(data: bytes) -> None:
        try:
            check(target, data)
        except Finding:
            _keep(findings, target, data)
            raise

    corpus = limits.folder()
    for number, data in enumerate(target.corpus):
        (corpus / f"{number:04}").write_bytes(data)
    said = [sys.argv[0], str(corpus), f"-runs={runs}", f"-seed={seed + 1}", "-max_len=65536"]
    said += ["-rss_limit_mb=0", f"-artifact_prefix={corpus}/", "-print_final_stats=1"]
    atheris.Setup(said, one, custom_mutator=mutate)
    atheris.Fuzz()


def _keep(place: Path | None, target: Target, data: bytes) -> None:
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        name = f"{target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
        (place / name).write_bytes(data)


def main(argv: Sequence[str]) -> int:
    """Fuzz as the command line says; give the exit code."""
    known = targets()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "targets", nargs="*", help=f"of {', '.join(known)}; by default all, in turn"
    )
    parser.add_argument("--runs", type=int, default=2_000, help="of each target")
    parser.add_argument("--seconds", type=float, default=1e9, help="at most, of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; one target")
    parser.add_argument("--findings", type=Path, help="a folder for what is found")
    parser.add_argument("--input", type=Path, help="a file to run instead, and no other")
    given = parser.parse_args(argv)
    found = 0
    for target in (known[name] for name in given.targets or known):
        if given.input:
            print(f"{target.name}: {check(target, given.input.read_bytes())}")
            continue
        if given.atheris:
            _with_atheris(target, given.runs, given.seed, given.findings)
        tally = hammer(target, given.runs, given.seed, seconds=given.seconds, stop=False)
        print(
            f"{target.name}: {tally.runs} runs in {tally.seconds:.0f} s, "
            f"{len(tally.kinds)} outcomes, {len(tally.findings)} findings",
            flush=True,
        )
        for data in tally.findings.values():
            _keep(given.findings, target, data)
        found += len(tally.findings)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
