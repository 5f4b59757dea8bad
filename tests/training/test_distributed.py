"""Ranks that torch.distributed knows read their own rows, equally many batches each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import actstore

pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis, random_values

ROOT = Path(__file__).parents[2]
RANKS = 2
CHILD = """
import json, sys
import torch.distributed as ranks
from actstore.training import Batches
folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ranks.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=world)
batches = Batches(f"{folder}/run.zarr", "model.norm", batch_size=10, labels=["source_row"])
print(json.dumps([batch["source_row"].tolist() for batch in batches]))
ranks.barrier()
ranks.destroy_process_group()
"""


def test_ranks_read_disjoint_rows(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("model.norm", "final_norm")
    for number in range(7):
        log.begin(axis(3, 11))
        log.put("model.norm", random_values((3, 11, 8), seed=number))
    actstore.compact(log.close(), tmp_path / "run.zarr", layout="shuffled")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path), str(rank), str(RANKS)],
            stdout=subprocess.PIPE, text=True, env=env,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    found = [json.loads(child.communicate()[0]) for child in children]
    assert [child.returncode for child in children] == [0] * RANKS
    assert len({len(one) for one in found}) == 1
    rows = [row for one in found for batch in one for row in batch]
    assert sorted(rows) == np.arange(7 * 3 * 11).tolist()
