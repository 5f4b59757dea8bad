"""A capture killed with SIGKILL at any moment keeps what it committed, and goes on from there.

By default 20 captures; 200: ``pytest -m crash`` with this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import killing
import pytest
from forks import Child


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """Give the process that forks."""
    with Child(killing.__file__) as one:
        yield one


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_capture_keeps_what_it_committed_and_resumes_to_the_same_log(
    seed: int, child: Child, tmp_path: Path
) -> None:
    with killing.quietly():
        killing.kill_and_resume(seed, tmp_path, child)


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.parametrize("seed", range(100, 300))
def test_a_capture_killed_anywhere_keeps_what_it_committed_and_resumes_to_the_same_log(
    seed: int, child: Child, tmp_path: Path
) -> None:
    with killing.quietly():
        killing.kill_and_resume(seed, tmp_path, child)
