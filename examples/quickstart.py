"""The main job, end to end: a real model, a log, an archive, a lazy dataset, a figure.

Runs the shipped model on a paragraph of Python's own documentation, generates 64 tokens while
everything it computes is captured, compacts the log into a Zarr archive, opens it lazily, asks
which layer changes the residual stream most at which token, and draws the answer.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib as mpl
import numpy as np
import torch
import xarray as xr
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

import actstore

mpl.use("Agg")
from matplotlib import pyplot as plt

MODEL = Path(__file__).parent / "tiny-llama"
STEPS = 64
PROMPT_TOKENS = 32


def capture(log: Path) -> actstore.InstrumentationFramework:
    """Generate ``STEPS`` tokens after a paragraph of documentation, and capture every module."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    config = actstore.InstrumentationConfig(
        actstore.HookGranularity.FULL_TENSOR, compression_algorithm="zstd", max_memory_gb=0.5
    )
    framework = actstore.InstrumentationFramework(config)
    framework.instrument_model(model, tokenizer=tokenizer)
    text = inspect.cleandoc(topics["exceptions"])
    prompt = tokenizer(text, truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt")
    ids = prompt.input_ids
    with (
        torch.no_grad(),
        framework.capture_activations(
            str(log), track_per_token=True, checkpoint_interval_tokens=16
        ) as tracker,
    ):
        framework.annotate(topic=["exceptions"])
        fed, cache = ids, None
        for _ in range(STEPS):
            out = model(fed, cache=cache, use_cache=True)
            fed, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.cache
            tracker.record_token(fed.item(), tokenizer.decode(fed[0]))
        written = [token["token_text"] for token in tracker.tokens]
    print(f"prompt:    {tokenizer.decode(ids[0])!r}\ngenerated: {''.join(written)!r}\n")
    return framework


def analyse(log: Path, framework: actstore.InstrumentationFramework) -> None:
    """Print what the log holds."""
    found = actstore.analyze_activations_with_tokens(str(log), framework)
    print(
        f"{found['packets']} packets of {len(found['per_layer'])} layers in {found['passes']} "
        f"passes: {found['total_raw_bytes'] / 1e6:.1f} MB of {', '.join(found['dtypes'])} in "
        f"{found['total_compressed_bytes'] / 1e6:.1f} MB; "
        f"{found['bytes_per_token'] / 1e3:.0f} kB a token"
    )


def change(dataset: xr.Dataset) -> xr.DataArray:
    """Give how much of the residual stream each block changes: |after - before| / |after|.

    From the second block on: the first one writes nearly all of it, whatever the token.
    """
    stream = dataset.resid.drop_vars("module")
    after, before = stream.isel(layer=slice(1, None)), stream.isel(layer=slice(None, -1))
    moved = after - before.assign_coords(layer=after.layer)
    return np.sqrt((moved**2).sum("feature")) / np.sqrt((after**2).sum("feature"))


def draw(found: xr.DataArray, figure: Path) -> None:
    """Draw layer × token, with the tokens' text."""
    texts = [str(text).replace("\n", "⏎") for text in found.token_text.values]
    plot, axes = plt.subplots(figsize=(16, 4.2), layout="constrained")
    image = axes.imshow(found.values, aspect="auto", origin="lower", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(texts)), texts, rotation=90, fontsize=7)
    axes.set_yticks(range(found.sizes["layer"]), [str(one) for one in found.layer.values])
    boundary = float((found.pass_index == 0).sum()) - 0.5
    axes.axvline(boundary, color="white", linewidth=1.5)
    axes.set_xlabel("input token (left of the line: the prompt)")
    axes.set_ylabel("block")
    axes.set_title("How much each block changes the residual stream")
    plot.colorbar(image, label="|after − before| / |after|", pad=0.01)
    plot.savefig(figure, dpi=110)
    plt.close(plot)


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("quickstart-output"))
    out: Path = parser.parse_args().out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} is there, and no empty folder: remove it, or give another")
    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    log, archive, figure = out / "run.stream", out / "run.zarr", out / "change.png"

    framework = capture(log)
    analyse(log, framework)
    report = actstore.compact(log, archive)
    print(
        f"archive: {report.rows['token']} rows in {len(report.variables)} variables, "
        f"{report.ratio:.2f}x smaller, {report.shards_verified} shards verified"
    )
    with actstore.open_dataset(archive) as dataset:
        found = change(dataset).compute()
        top = found.isel(found.argmax(["layer", "token"]))
        print(
            f"\nblock {int(top.layer)} changes most at token {str(top.token_text.item())!r} "
            f"(position {int(top.position)}): {float(top):.2f} of the stream's length after it"
        )
        draw(found, figure)
    print(f"wrote {log}, {archive} and {figure}")


if __name__ == "__main__":
    main()
