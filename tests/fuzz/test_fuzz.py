"""No bytes get anything but an `ActstoreError` out of what reads them, nor much time or memory.

Here the fuzzers run short, and the same each time. A million executions, 25 minutes of a core, are

    pytest -m slow tests/fuzz

and more, with other seeds or with atheris, `python tests/fuzz/fuzz.py --help`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import fuzz
import legacy_pieces
import limits
import log_pieces
from limits import Finding, Target
from mutations import mutate_bytes
from targets import targets

#: Executions of each target: here, and of a million.
RUNS: Final = {
    "records": (4_000, 310_000),
    "reader": (700, 100_000),
    "skip": (700, 100_000),
    "header": (1_500, 100_000),
    "verify": (300, 30_000),
    "recover": (300, 50_000),
    "analyze": (900, 100_000),
    "dataset": (500, 60_000),
    "legacy": (300, 40_000),
    "legacy-opened": (60, 10_000),
    "checkpoint": (2_000, 50_000),
    "tokens": (1_000, 50_000),
}


@pytest.fixture(scope="module")
def known() -> dict[str, Target]:
    return targets()


@pytest.mark.parametrize("name", RUNS)
def test_mutated_files_do_no_harm(known: dict[str, Target], name: str) -> None:
    target = known[name]
    runs = RUNS[name][0] + len(target.corpus)
    tally = fuzz.hammer(target, runs, seed=1)
    assert tally.runs == runs
    assert len(tally.kinds) > 5  # it got somewhere


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_million_mutated_files_do_no_harm(known: dict[str, Target], name: str) -> None:
    fuzz.hammer(known[name], RUNS[name][1], seed=2)


def test_the_long_run_is_a_million_executions_of_all_targets(known: dict[str, Target]) -> None:
    assert sum(long for _, long in RUNS.values()) == 1_000_000
    assert list(RUNS) == list(known)


@pytest.mark.parametrize("name", RUNS)
@settings(max_examples=50)
@given(data=st.binary(max_size=300))
def test_any_bytes_do_no_harm(known: dict[str, Target], name: str, data: bytes) -> None:
    limits.check(known[name], data)


@settings(max_examples=500)
@given(
    opcode=st.integers(0, 11),
    header=st.binary(max_size=200),
    length=st.integers(0, 2**32 - 1) | st.none(),
    payload=st.binary(max_size=100),
)
def test_any_record_does_no_harm(
    known: dict[str, Target], opcode: int, header: bytes, length: int | None, payload: bytes
) -> None:
    said = len(header) if length is None else length
    data = bytes([opcode]) + said.to_bytes(4, "little") + header + payload
    limits.check(known["records"], data)


# -- the fuzzers themselves -----------------------------------------------------------------------


def test_a_log_that_is_taken_apart_and_put_together_is_the_same() -> None:
    for path in sorted(log_pieces.VECTORS.glob("good/[!t]*.stream")):  # those that aren't torn
        data = path.read_bytes()
        assert log_pieces.put_together(*log_pieces.taken_apart(data)) == data, path
    for data in legacy_pieces.vectors():
        packets = legacy_pieces.taken_apart(data)
        assert data.startswith(b"".join(legacy_pieces.packet(*one) for one in packets))
        assert packets


def _raise(error: BaseException) -> str:
    raise error


def _spend(data: bytes) -> str:
    return str(len(bytearray(limits.MEMORY + (1 << 30))))  # also where a heap has kept some


def _turn(data: bytes) -> str:
    return str(sum(1 for _ in range(10**9)))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda data: _raise(KeyError("a bug")), "KeyError: 'a bug'"),
        (lambda data: _raise(RecursionError("too deep")), "RecursionError"),
        (_spend, "wants over 64 MiB"),
        (_turn, "no end after 1 s"),
        (lambda data: str(sum(range(10**7))), "takes"),
    ],
)
def test_the_fuzzers_find_what_must_not_happen(
    run: Callable[[bytes], str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANGS_AFTER", 1)
    monkeypatch.setattr(limits, "SECONDS", 0.01)
    target = Target("made up", run, mutate_bytes, [b"x"])
    with pytest.raises(Finding, match=said):
        fuzz.hammer(target, 3, seed=0)


def test_the_same_seed_gives_the_same_inputs() -> None:
    seen: list[bytes] = []

    def run(data: bytes) -> str:
        seen.append(data)
        return str(len(data) % 7)

    for _ in range(2):
        logs = log_pieces.vectors()
        fuzz.hammer(Target("seen", run, log_pieces.mutate_log, logs), 400, seed=3)
    assert seen[:400] == seen[400:]
