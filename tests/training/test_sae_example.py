"""The example trains an autoencoder that explains far more than an untrained one does."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import actstore

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


def test_the_example_trains_an_autoencoder(tmp_path: Path) -> None:
    out = tmp_path / "sae"
    command = [sys.executable, str(ROOT / "examples" / "train_sae.py"), "--out", str(out)]
    command += ["--tokens", "4096", "--features", "512", "--batch-size", "256", "--epochs", "4"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, cwd=tmp_path)
    with (out / "sae.csv").open(encoding="utf-8") as file:
        lines = [{name: float(one) for name, one in line.items()} for line in csv.DictReader(file)]
    untrained, *_, last = lines
    assert last["explained_variance"] > max(untrained["explained_variance"], 0) + 0.25
    assert last["explained_variance"] > 0.5
    assert last["loss"] < untrained["loss"] / 2
    assert 0 < last["l0"] <= 16
    assert actstore.verify(out / "run.zarr", against=out / "run.stream").ok
