"""SAELens' own trainer trains on batches of an archive; skipped where it is not installed.

In an environment of its own that has SAELens, pytest and what actstore needs:
``PYTHONPATH=. VENV/bin/python -m pytest --noconftest -c /dev/null --rootdir=. -W ignore`` and this
file.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import actstore
from actstore.errors import ConfigError

torch = pytest.importorskip("torch")

from actstore.training import Batches, sae_lens_provider  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis  # noqa: E402

WIDTH = 16


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give rows that are sums of few of some directions."""
    folder = tmp_path_factory.mktemp("run")
    log = LogBuilder(folder / "run.stream")
    for block in range(2):
        log.layer(f"model.layers.{block}", "resid", block)
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(24, WIDTH))
    for _ in range(8):
        log.begin(axis(8, 64))
        for block in range(2):
            codes = generator.exponential(size=(8, 64, 24)) * (generator.random((8, 64, 24)) < 0.1)
            log.put(f"model.layers.{block}", (codes @ directions).astype(np.float32))
        log.commit()
    actstore.compact(log.close(), folder / "run.zarr", layout="shuffled")
    return folder / "run.zarr"


def test_a_provider_gives_batches_without_an_end(archive: Path) -> None:
    batches = Batches(archive, "model.layers.1", batch_size=100)
    provider = sae_lens_provider(batches)
    assert iter(provider) is provider
    found = list(islice(provider, 2 * len(batches)))
    batches.set_epoch(0)
    wanted = [one for _ in range(2) for one in batches]
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_a_provider_goes_on_where_another_was(archive: Path) -> None:
    first = sae_lens_provider(Batches(archive, "model.layers.1", batch_size=100))
    list(islice(first, 7))
    second = sae_lens_provider(Batches(archive, "model.layers.1", batch_size=100))
    second.load_state_dict(first.state_dict())
    for one, two in islice(zip(first, second, strict=True), 60):
        assert torch.equal(one, two)


def test_several_layers_are_given_by_name(archive: Path) -> None:
    names = {"model.layers.0": "blocks.0.hook_resid_post"}
    provider = sae_lens_provider(Batches(archive, "resid", batch_size=10), hook_names=names)
    batch = next(provider)
    assert {name: one.shape for name, one in batch.items()} == {
        "blocks.0.hook_resid_post": (10, WIDTH),
        "model.layers.1": (10, WIDTH),
    }


def test_rows_that_are_no_vectors_are_refused(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("heads", "heads")
    log.begin(axis(2, 8))
    log.put("heads", np.zeros((2, 8, 3, 4), np.float32))
    log.commit()
    path = log.close()
    with pytest.raises(ConfigError, match=r"rows of shape \(3, 4\)"):
        sae_lens_provider(Batches(path, "heads"))
    with pytest.raises(ConfigError, match="takes Batches"):
        sae_lens_provider(path)


def test_labels_are_refused(archive: Path) -> None:
    with pytest.raises(ConfigError, match="without labels"):
        sae_lens_provider(Batches(archive, "model.layers.1", labels=["token_id"]))


def test_sae_lens_trains_on_an_archive(archive: Path) -> None:
    pytest.importorskip("sae_lens", reason="SAELens is not installed here")
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=WIDTH, d_sae=64, k=6, device="cpu"))
    batches = Batches(archive, "model.layers.1", batch_size=256)
    samples = 256 * 400
    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
        total_training_samples=samples, device="cpu", autocast=False, lr=3e-3, lr_end=3e-4,
        lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999,
        lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=256,
        dead_feature_window=1000, feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    batch = next(iter(Batches(archive, "model.layers.1", batch_size=2048)))

    def left() -> float:
        with torch.no_grad():
            made = sae.decode(sae.encode(batch))
        return ((made - batch).square().sum() / (batch - batch.mean(0)).square().sum()).item()

    before = left()
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=sae_lens_provider(batches))
    trainer.fit()
    assert left() < before / 4
