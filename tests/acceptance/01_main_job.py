"""Part 1, the main job on a real model: what must hold, each with its figure.

Run by ``.venv/bin/python tests/acceptance/01_main_job.py``; about two minutes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests/capture")]

import kills
import numpy as np
import oracle
import tiny_models
import torch
import xarray as xr
from report import run
from transformers import AutoTokenizer, LlamaForCausalLM

import actstore
from actstore import HookGranularity as G

FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen2", "gemma2", "phi", "mixtral")
DTYPES = (torch.float32, torch.bfloat16)
KILLS = 20


def shipped(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Give the model that the repository ships."""
    return LlamaForCausalLM.from_pretrained(ROOT / "examples/tiny-llama", dtype=dtype).eval()


def tokenizer() -> Any:
    """Give its tokenizer."""
    return AutoTokenizer.from_pretrained(ROOT / "examples/tiny-llama")


def models() -> dict[str, tuple[Any, Any]]:
    """Give each model, with an input: a padded batch of ids, or floats."""
    found: dict[str, tuple[Any, Any]] = {}
    ids = tiny_models.token_ids(2, 7)
    for family in FAMILIES:
        for dtype in DTYPES:
            found[f"{family} {dtype}"] = (tiny_models.build(family, dtype), ids)
    found["nn.Sequential"] = (tiny_models.sequential(), torch.randn(3, 5, 8))
    found["shipped"] = (shipped(), tokenizer()("The Python", return_tensors="pt").input_ids)
    return found


def scratch() -> Any:
    """Give a folder that is removed at the end."""
    return tempfile.TemporaryDirectory(prefix="actstore-acceptance-")


def generate(model: Any, given: Any) -> None:
    """Run a forward pass and, where the model can, generation with a cache."""
    model(given)
    if hasattr(model, "generate"):
        mask = torch.ones_like(given)
        mask[0, :2] = 0
        model.generate(given, attention_mask=mask, max_new_tokens=4, do_sample=False)


def packets_equal_the_oracle() -> str:
    """Compare every packet with hooks that clone, for every model, granularity and codec."""
    compared = 0
    for name, (model, given) in models().items():
        for codec in ("none", "lz4", "zstd"):
            with scratch() as folder, torch.no_grad(), oracle.Oracle(model) as wanted:
                log = Path(folder, "gen.stream")
                with oracle.capturing(model, log, codec=codec):
                    generate(model, given)
                compared += len(oracle.assert_equals(log, wanted.fired))
        print(f"      {name}: equal")
    return f"{compared} packets of {len(models())} models × 3 codecs, bit for bit"


def one_packet_per_part() -> str:
    """Count packets per module and pass for ATTENTION_ONLY and MLP_ONLY."""
    counted = 0
    for family in FAMILIES:
        model = tiny_models.build(family)
        sites = tiny_models.ARCHITECTURES[family]
        for granularity, site in ((G.ATTENTION_ONLY, "attn"), (G.MLP_ONLY, "mlp")):
            names = sites[site]
            expected = [names.format(block) for block in range(2)]
            with scratch() as folder, torch.no_grad(), oracle.Oracle(model, expected) as wanted:
                log = Path(folder, "gen.stream")
                with oracle.capturing(model, log, granularity):
                    generate(model, tiny_models.token_ids())
                packets = oracle.assert_equals(log, wanted.fired)
            per = Counter((one.layer, one.pass_index) for one in packets)
            assert set(per.values()) == {1}
            assert {layer for layer, _ in per} == set(expected)
            counted += len(packets)
    return f"{counted} packets of {len(FAMILIES)} families: one a module and pass, none else"


def api_examples() -> str:
    """Run the three examples of the documented API as printed."""
    model, words = shipped(torch.float32), tokenizer()
    space: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "tokenizer": words,
        "input_ids": words("An exception is", return_tensors="pt").input_ids,
    }
    framework = actstore.InstrumentationFramework(actstore.InstrumentationConfig(G.MLP_ONLY))
    framework.instrument_model(model)
    space["framework"] = framework
    before = Path.cwd()
    with scratch() as folder:
        os.chdir(folder)
        try:
            for source in _EXAMPLES:
                exec(source, space)
            found = actstore.analyze_activations_with_tokens("gen.stream", framework)
            assert found["token_metadata"]["total_tokens"] == 64
            assert found["packets_per_token"] == found["packets"] / 64
            assert [one["packets"] for one in found["per_token"]] == [6] * 64
            assert Path("gen.stream_tokens.json").exists()
            assert not Path("long-run.stream.ckpt.json").exists()
            assert framework.analyze_activations("output.stream")["packets"] > 0
        finally:
            os.chdir(before)
    return "3 examples run; 64 tokens, 6 packets each, token table written"


_EXAMPLES = (
    """
with framework.capture_activations("output.stream"):
    _ = model.generate(input_ids, max_length=100)
""",
    """
with framework.capture_activations("gen.stream", track_per_token=True) as tracker:
    ids = input_ids
    for _ in range(64):
        out = model(ids)
        next_tok = out.logits[:, -1, :].argmax(dim=-1, keepdim=True)
        tracker.record_token(next_tok[0].item(), tokenizer.decode(next_tok[0]))
        ids = torch.cat([ids, next_tok], dim=-1)
""",
    """
with framework.capture_activations(
    "long-run.stream",
    track_per_token=True,
    checkpoint_interval_tokens=128,
    resume_from_checkpoint=True,
) as tracker:
    model(input_ids)
    tracker.record_token(1, "x")
""",
)


def rows_know_their_tokens() -> str:
    """Check ids and positions of rows in padded batches and generation, and the steps."""
    rows = 0
    with scratch() as folder, torch.no_grad():
        for side in ("left", "right"):
            rows += _padded_batch(Path(folder), side)
        for cached in (True, False):
            rows += _generation(Path(folder), cached)
    return f"{rows} rows: id, position, padding, step as the model was fed"


def _padded_batch(folder: Path, side: str) -> int:
    model, words = shipped(), tokenizer()
    words.padding_side = side
    batch = words(["Raise", "A much longer text is here"], return_tensors="pt", padding=True)
    ids, mask = batch.input_ids, batch.attention_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    log, archive = folder / f"{side}.stream", folder / f"{side}.zarr"
    with oracle.capturing(model, log, G.MLP_ONLY):
        model(ids, attention_mask=mask, position_ids=positions)
    actstore.compact(log, archive, tokenizer=words)
    for dataset in (actstore.open_dataset(log), xr.open_zarr(archive)):
        assert dataset.token_id.values.tolist() == ids.flatten().tolist()
        assert dataset.position.values.tolist() == positions.flatten().tolist()
        assert dataset.is_padding.values.tolist() == (mask == 0).flatten().tolist()
        assert dataset.batch_item.values.tolist() == [0] * ids.shape[1] + [1] * ids.shape[1]
    texts = xr.open_zarr(archive).token_text.values.tolist()
    assert texts == [words.decode([one]) for one in ids.flatten().tolist()]
    return ids.numel()


def _generation(folder: Path, cached: bool) -> int:
    model, words = shipped(), tokenizer()
    prompt = words("The following", return_tensors="pt").input_ids
    log = folder / f"generation-{cached}.stream"
    fed_ids: list[int] = []
    fed_positions: list[int] = []
    predicting: list[int] = []
    with oracle.capturing(model, log, track_per_token=True) as tracker:
        ids, cache, fed = prompt, None, prompt
        for _ in range(10):
            start = ids.shape[1] - fed.shape[1]
            out = model(fed, cache=cache, use_cache=True) if cached else model(fed)
            fed_ids += fed[0].tolist()
            fed_positions += range(start, ids.shape[1])
            predicting.append(len(fed_ids) - 1)
            following = out.logits[:, -1].argmax(-1, keepdim=True)
            tracker.record_token(following.item(), words.decode(following[0]))
            ids = torch.cat([ids, following], dim=-1)
            fed, cache = (following, out.cache) if cached else (ids, None)
    with actstore.open_dataset(log) as dataset:
        assert dataset.token_id.values.tolist() == fed_ids
        assert dataset.position.values.tolist() == fed_positions
        steps = np.full(len(fed_ids), -1)
        steps[predicting] = range(10)
        assert dataset.step.values.tolist() == steps.tolist()
        predicted = dataset.logits.values[predicting].argmax(-1)
        assert predicted.tolist() == [token["token_id"] for token in tracker.tokens]
    return len(fed_ids)


def kills_lose_nothing() -> str:
    """Kill a tracked capture at random points; what a checkpoint named is there, resume equals."""
    return kills.lose_nothing(KILLS)


def bad_input() -> str:
    """Give each bad input its documented error, with the path or value, and the fix."""
    tried = 0
    for bad in ("gzip", "", None, 3):
        tried += _refuses(lambda bad=bad: actstore.InstrumentationConfig(G.MLP_ONLY, bad), "lz4")
    for name in ("target_throughput_gbps", "max_memory_gb"):
        for bad in (0, -1, float("nan"), float("inf"), "much", True):
            tried += _refuses(
                lambda name=name, bad=bad: actstore.InstrumentationConfig(
                    G.MLP_ONLY, **{name: bad}
                ),
                name,
            )
    framework = actstore.InstrumentationFramework(actstore.InstrumentationConfig(G.MLP_ONLY))
    framework.instrument_model(tiny_models.build("llama"))
    with scratch() as folder:
        text = Path(folder, "notes.txt")
        text.write_text("no log")
        paths = {Path(folder, "missing", "a.stream"): "missing", Path(folder): folder}
        for path, said in {**paths, text: "notes.txt"}.items():
            tried += _refuses(lambda path=path: _capture(framework, path), str(said))
        assert text.read_text() == "no log"
        for options in (
            {"checkpoint_interval_tokens": 4},
            {"checkpoint_path": "x.json"},
            {"resume_from_checkpoint": True},
        ):
            path = Path(folder, "a.stream")
            tried += _refuses(
                lambda path=path, options=options: _capture(framework, path, **options),
                "track_per_token=True",
            )
            assert not path.exists()
    return f"{tried} refused with a ValueError that names the value or path and the fix"


def _capture(framework: Any, path: Path, **options: Any) -> None:
    with framework.capture_activations(str(path), **options):
        pass


def _refuses(call: Any, said: str) -> int:
    try:
        call()
    except ValueError as error:
        assert isinstance(error, actstore.ActstoreError)
        assert said in str(error), f"{error} does not say {said!r}"
        return 1
    msg = "nothing was refused"
    raise AssertionError(msg)


def the_archive_is_the_log() -> str:
    """Compare log, archive and plain xarray on the shipped model, every granularity."""
    compared = 0
    model, words = shipped(), tokenizer()
    for granularity in G:
        with scratch() as folder, torch.no_grad():
            log, archive = Path(folder, "run.stream"), Path(folder, "run.zarr")
            with oracle.capturing(model, log, granularity, "zstd"):
                ids = words("Exceptions are", return_tensors="pt").input_ids
                model.generate(ids, max_new_tokens=8, do_sample=False)
            actstore.compact(log, archive)
            with actstore.open_dataset(log) as one, xr.open_zarr(archive) as other:
                xr.testing.assert_equal(one.compute(), other.compute())
                with xr.open_dataset(archive, engine="actstore") as third:
                    xr.testing.assert_equal(third.compute(), other.compute())
                assert set(one.coords) == set(other.coords)
                compared += sum(array.size for array in other.data_vars.values())
    return f"{compared} values equal in log, archive and plain xarray.open_zarr"


def import_is_light() -> str:
    """Measure what importing costs over bare Python; check that torch is not imported."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, actstore; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert loaded.stdout.strip() == "False"
    bare, ours = [], []
    for _ in range(7):
        bare.append(_seconds("pass"))
        ours.append(_seconds("import actstore"))
    extra = 1000 * (statistics.median(ours) - statistics.median(bare))
    assert extra <= 150, f"{extra:.0f} ms"
    return f"{extra:.0f} ms over bare Python (at most 150), no torch"


def _seconds(source: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT)
    return time.perf_counter() - began


if __name__ == "__main__":
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    sys.exit(
        run(
            "Part 1: the main job, end to end, on a real model",
            {
                "every packet equals the oracle": packets_equal_the_oracle,
                "one packet per attention module and MLP": one_packet_per_part,
                "the documented examples run as printed": api_examples,
                "rows know their tokens": rows_know_their_tokens,
                f"SIGKILL at {KILLS} random points": kills_lose_nothing,
                "bad input is refused": bad_input,
                "log, archive and plain xarray agree": the_archive_is_the_log,
                "import actstore": import_is_light,
            },
        )
    )
