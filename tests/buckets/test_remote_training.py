"""Rows of archives and logs in buckets are trained on as those of this machine are."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

import actstore
from actstore.errors import ConfigError, MissingFileError

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader  # noqa: E402

from actstore.training import Batches, RowDataset, sae_lens_provider  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import decoder_log  # noqa: E402

LAYER = "model.layers.1"
SMALL = {"batch_size": 8, "buffer_mb": 1e-3, "seed": 3}


@pytest.mark.parametrize("kind", ["zarr", "stream"])
def test_batches_of_a_url_are_those_of_the_path(
    kind: str, tmp_path: Path, url: str, said: dict[str, Any]
) -> None:
    path = there = decoder_log(tmp_path / "run.stream", prompt=(2, 40), steps=4).path
    far = f"{url}.{kind}"
    if kind == "zarr":
        path = tmp_path / "run.zarr"
        actstore.compact(there, path)
        actstore.compact(there, far, storage_options=said)
    else:
        actstore.upload(there, far, storage_options=said)
    near = Batches(path, LAYER, **SMALL)
    remote = Batches(far, LAYER, storage_options=said, **SMALL)
    wanted = [one.numpy().tobytes() for one in near]
    assert [one.numpy().tobytes() for one in remote] == wanted
    assert len(wanted) > 2
    remote.load_state_dict(near.state_dict())  # the same rows
    remote.set_epoch(0)
    assert next(sae_lens_provider(remote)).numpy().tobytes() == wanted[0]
    row = RowDataset(far, LAYER, storage_options=said)[5]
    assert row.numpy().tobytes() == RowDataset(path, LAYER)[5].numpy().tobytes()
    fork = multiprocessing.get_context("fork")
    loader = DataLoader(remote, batch_size=None, num_workers=1, multiprocessing_context=fork)
    with pytest.raises(ConfigError, match='multiprocessing_context="spawn"'):
        list(loader)


def test_a_url_of_nothing_is_missing(url: str, said: dict[str, Any]) -> None:
    with pytest.raises(MissingFileError, match="nothing at s3://bucket"):
        Batches(url, LAYER, storage_options=said)
    with pytest.raises(ConfigError, match="is no URL"):
        Batches("here.zarr", LAYER, storage_options=said)
