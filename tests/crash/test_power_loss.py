"""A power cut at any moment of a capture costs nothing that was on the disk, and can be resumed.

The system calls of real captures are recorded (``disks.py``), then replayed onto a disk that is
cut at every boundary between two of them, and inside writes (``power_cuts.py``). By default some
1,500 such disks; all of them: ``pytest -m crash`` with this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import power_cuts
import pytest
from forks import quick_folder
from power_cuts import CAPTURES


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    with power_cuts.one_core():
        yield


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a folder whose syncs cost nothing: what they mean is the replay's."""
    with quick_folder() as folder:
        yield folder


@pytest.mark.parametrize("name", CAPTURES)
def test_a_power_cut_between_two_calls_costs_nothing_durable(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = CAPTURES[name](place, monkeypatch)
    kinds = {call.kind for call in recorded.journal.calls}
    assert {"create", "write", "sync", "names"} <= kinds or name == "resumed"
    cuts = power_cuts.some_cuts(recorded, place)
    assert cuts.tried > 50
    cuts.assert_resumed()


@pytest.mark.parametrize("name", ["tracked", "resumed"])
def test_a_power_cut_within_a_write_costs_nothing_durable(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = power_cuts.some_cuts_within_writes(CAPTURES[name](place, monkeypatch), place)
    assert cuts.tried > 20
    cuts.assert_resumed()


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.parametrize("name", CAPTURES)
def test_every_power_cut_costs_nothing_durable_and_can_be_resumed(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = power_cuts.every_cut(CAPTURES[name](place, monkeypatch), place)
    print(f"{name}: {cuts.tried} disks, {cuts.resumes} resumed, {cuts.cleared} of them cleared")
    cuts.assert_resumed()
