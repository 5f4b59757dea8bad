"""A compaction that is killed at any point: no half archive, and the next one goes on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import actstore

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import decoder_log, files_of

KILLS = 3
CHILD = """
import sys
from actstore.archive import grid
grid.CHUNK_BYTES, grid.SHARD_BYTES = 1 << 12, 1 << 14
import actstore
print("begin", flush=True)
report = actstore.compact(sys.argv[1], sys.argv[2], layout=sys.argv[3])
print(report.shards_resumed, report.shards_verified, flush=True)
"""


def start(log: Path, out: Path, layout: str = "captured") -> subprocess.Popen[str]:
    """Start a compaction; return when it has begun."""
    env = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(log), str(out), layout],
        stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "begin\n"
    return child


def kill_and_resume(
    folder: Path, kills: int, seed: int = 0, layout: str = "captured"
) -> tuple[int, int]:
    """Kill compactions of one log at random points, then let each end.

    Returns
    -------
    killed, resumed : int
        The kills that struck before the end, and the shards that were not done again after them.
    """
    log = decoder_log(folder / "run.stream", steps=200, width=96, vocab=160).path
    whole = folder / "whole.zarr"
    began = time.monotonic()
    start(log, whole, layout).communicate()
    took = time.monotonic() - began
    wanted = files_of(whole)
    generator = random.Random(seed)
    killed = resumed = 0
    for number in range(kills):
        out = folder / f"{number}.zarr"
        child = start(log, out, layout)
        time.sleep(generator.uniform(0, took))
        child.kill()
        child.communicate()
        if out.exists():  # it was faster: then it is whole
            assert files_of(out) == wanted
            continue
        killed += 1
        said, _ = start(log, out, layout).communicate()
        skipped, verified = map(int, said.split())
        assert skipped <= verified
        resumed += skipped
        assert files_of(out) == wanted
        left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
        assert not left, left
    assert actstore.verify(whole).ok
    return killed, resumed


def test_a_killed_compaction_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    killed, _ = kill_and_resume(tmp_path, KILLS)
    assert killed


def test_a_killed_shuffling_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    killed, _ = kill_and_resume(tmp_path, KILLS, layout="shuffled")
    assert killed


@pytest.mark.crash
def test_shuffling_killed_at_fifteen_points(tmp_path: Path) -> None:
    killed, resumed = kill_and_resume(tmp_path, 15, seed=2, layout="shuffled")
    assert killed > 5
    assert resumed


@pytest.mark.crash
def test_killed_at_thirty_points(tmp_path: Path) -> None:
    killed, resumed = kill_and_resume(tmp_path, 30, seed=1)
    assert killed > 10
    assert resumed
