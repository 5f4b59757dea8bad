"""With requests that fail, and writers that are killed, no row is lost and none is doubled."""

from __future__ import annotations

import pytest
import s3_faults


@pytest.mark.crash
def test_no_row_is_lost_or_doubled() -> None:
    assert "no row lost or doubled" in s3_faults.fault_runs(len(s3_faults.KINDS))


@pytest.mark.slow
def test_no_row_is_lost_or_doubled_in_many_runs() -> None:
    assert "no row lost or doubled" in s3_faults.fault_runs(100, seed=2)
