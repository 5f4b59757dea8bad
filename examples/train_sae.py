"""Train a small sparse autoencoder on the shipped model's activations, from text to features.

Captures what a block adds up to (the residual stream) over Python's own documentation, compacts
the log with its rows shuffled, and trains a TopK autoencoder on batches of the archive: each row
is written as a sum of k of many directions. Reports the loss, the explained variance and L0 on
rows that were not trained on.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

import actstore
from actstore.training import Batches

MODEL = Path(__file__).parent / "tiny-llama"
LAYER = "model.layers.3"
LENGTH, ITEMS = 128, 16
HELD_OUT = 16  # one row of so many is for testing


class TopKSAE(torch.nn.Module):
    """x ≈ b + W_dec · (the k largest of relu(W_enc · (x − b))), as in arXiv:2406.04093."""

    def __init__(self, width: int, features: int, k: int) -> None:
        super().__init__()
        decoder = torch.nn.functional.normalize(torch.randn(features, width), dim=1)
        self.decoder = torch.nn.Parameter(decoder)
        self.encoder = torch.nn.Parameter(decoder.T.clone())
        self.bias = torch.nn.Parameter(torch.zeros(width))
        self.k = k

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give what is made of the codes, and those: [rows, width], [rows, features]."""
        strengths = torch.relu((x - self.bias) @ self.encoder)
        values, places = strengths.topk(self.k, dim=1)
        codes = torch.zeros_like(strengths).scatter(1, places, values)
        return codes @ self.decoder + self.bias, codes

    @torch.no_grad()
    def normalise(self) -> None:
        """Keep the directions at length 1."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True))


def capture(log: Path, tokens: int) -> None:
    """Feed the model text, and capture one layer."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, model_max_length=1 << 30)
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    framework = actstore.InstrumentationFramework(
        actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR)
    )
    framework.instrument_model(model, actstore.HookConfig(target_layers=[LAYER]))
    ids = tokenizer("\n".join(topics.values()), return_tensors="pt").input_ids[0, :tokens]
    ids = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    with torch.no_grad(), framework.capture_activations(str(log)):
        for batch in ids.split(ITEMS):
            model(batch)


@torch.no_grad()
def tested(sae: TopKSAE, batches: Batches, scale: float) -> dict[str, float]:
    """Test on rows: the loss, how much of their variance is explained, and codes a row."""
    batches.set_epoch(0)
    rows = torch.cat(list(batches)) * scale
    made, codes = sae(rows)
    left = (made - rows).square().sum(1)
    around = (rows - rows.mean(0)).square().sum(1)
    return {
        "loss": left.mean().item(),
        "explained_variance": 1 - (left.sum() / around.sum()).item(),
        "l0": (codes > 0).sum(1).float().mean().item(),
    }


def train(
    archive: Path, *, features: int, k: int, epochs: int, batch_size: int, seed: int
) -> tuple[TopKSAE, list[dict[str, float]]]:
    """Train on all rows but those held out; give the autoencoder, and the test of each epoch."""
    torch.manual_seed(seed)
    with actstore.open_dataset(archive, chunks=None) as dataset:
        held_out = np.arange(dataset.sizes["token"]) % HELD_OUT == 0
    training = Batches(archive, LAYER, rows=~held_out, batch_size=batch_size, seed=seed)
    testing = Batches(archive, LAYER, rows=held_out, batch_size=batch_size, shuffle=False)
    first = next(iter(training))
    training.set_epoch(0)
    scale = len(first[0]) ** 0.5 / first.norm(dim=1).mean().item()
    sae = TopKSAE(training.shape[0], features, k)
    with torch.no_grad():
        sae.bias.copy_(first.mean(0) * scale)
    optimiser = torch.optim.Adam(sae.parameters(), lr=2e-3)
    history = [{"epoch": 0, **tested(sae, testing, scale)}]
    for epoch in range(1, epochs + 1):
        for batch in training:
            rows = batch * scale
            loss = (sae(rows)[0] - rows).square().sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            sae.normalise()
        history.append({"epoch": epoch, **tested(sae, testing, scale)})
    return sae, history


def main() -> None:
    """Do all of it in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("sae"), help="a new folder, or an empty one"
    )
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        parser.error(f"{given.out} is there, and no empty folder: remove it, or give another")
    logging.disable_progress_bar()
    given.out.mkdir(parents=True, exist_ok=True)
    log, archive = given.out / "run.stream", given.out / "run.zarr"
    capture(log, given.tokens)
    report = actstore.compact(log, archive, layout="shuffled", seed=given.seed)
    print(f"{report.rows['token']:,} rows of {LAYER}, {report.ratio:.2f} times smaller, shuffled")
    sae, history = train(
        archive, features=given.features, k=given.k, epochs=given.epochs,
        batch_size=given.batch_size, seed=given.seed,
    )  # fmt: skip
    print("epoch    loss  explained variance    L0")
    for line in history:
        print(
            f"{line['epoch']:5.0f} {line['loss']:7.2f} {line['explained_variance']:19.3f}"
            f" {line['l0']:5.1f}"
        )
    torch.save(sae.state_dict(), given.out / "sae.pt")
    with (given.out / "sae.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(history[0]))
        table.writeheader()
        table.writerows(history)
    print(f"in {given.out}: the log, the archive, sae.pt and sae.csv")


if __name__ == "__main__":
    main()
