"""What a capture would take is told before it runs, and it is what it takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, feed, ids
from oracle import FULL, capturing, hooks_of
from tiny_models import sequential
from torch import nn

import actstore
from actstore.config import HookConfig, HookGranularity
from actstore.errors import ConfigError
from actstore.stream.reader import open_stream

SITES = Path(__file__).parents[2] / "schemas/sites.md"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_description_names_what_every_granularity_captures(name: str, log: Path) -> None:
    model = build(name)
    found = actstore.describe(model)
    for granularity in HookGranularity:
        if not found.layers[granularity.name]:
            with pytest.raises(ConfigError), capturing(model, log, granularity):
                pass
            continue
        with torch.no_grad(), capturing(model, log, granularity):
            model(**feed(name))
        with open_stream(log) as reader:
            fired = set(reader.layers)
            missed = set(reader.summary["never_fired"])
        assert fired | missed == set(found.layers[granularity.name])
        log.unlink()
    for site, pattern in FAMILIES[name].sites.items():
        if site in found.sites:
            assert found.sites[site] == pattern


def test_a_description_is_a_table_of_sites_and_granularities() -> None:
    lines = str(actstore.describe(build("Llama"))).splitlines()
    assert lines[0] == "LlamaForCausalLM (llama): 2 blocks at 'model.layers'"
    assert lines[1].split() == ["site", "module", *(one.name for one in HookGranularity)]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert rows["mlp"] == ["model.layers.{}.mlp", "2", "2", "2"]
    assert rows["embed"] == ["model.embed_tokens", "1", "1"]
    assert rows["all"][0] == str(len(list(build("Llama").named_modules())) - 1)  # but for the list
    assert "not computed by 'sdpa' attention" in lines[-1]


def test_fused_experts_are_named_in_the_description_and_in_the_summary(log: Path) -> None:
    model = build("Mixtral")
    wanted = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    found = actstore.describe(model)
    assert list(found.fused) == wanted
    assert wanted[1] in str(found).splitlines()[-1]
    with torch.no_grad(), capturing(model, log):
        model(**feed("Mixtral"))
    with open_stream(log) as reader:
        assert reader.summary["fused_experts"] == wanted


def test_the_routing_of_experts_is_kept_with_all_outputs(log: Path) -> None:
    model, seen = build("Mixtral"), []
    gate = model.get_submodule("model.layers.0.mlp.gate")
    handle = gate.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad(), capturing(model, log, hooks=HookConfig(outputs="all")):
        model(**feed("Mixtral"))
    handle.remove()
    with open_stream(log) as reader:
        for place, wanted in enumerate(seen[0]):
            name = "model.layers.0.mlp.gate" + (f"#{place}" if place else "")
            (packet,) = reader.packets(name)
            assert packet.values.tobytes() == wanted.numpy().tobytes()
            assert packet.values.shape == tuple(wanted.shape)


@pytest.mark.parametrize("granularity", [FULL, HookGranularity.MLP_ONLY], ids=lambda one: one.name)
def test_an_estimate_is_what_a_capture_writes(granularity: HookGranularity, log: Path) -> None:
    model, given = build("Llama"), ids(4, 60)
    found = actstore.estimate(model, granularity, inputs={"input_ids": given})
    assert not hooks_of(model)
    with torch.no_grad(), capturing(model, log, granularity, "zstd"):
        model(input_ids=given)
        model(input_ids=given.flip(1))
    with open_stream(log) as reader:
        raw = int(reader.table.nbytes.sum())
        encoded = int(reader.table.encoded.sum())
    assert found.bytes(2 * given.numel(), passes=2) == pytest.approx(raw)
    assert found.bytes(2 * given.numel(), "zstd", passes=2) == pytest.approx(encoded, rel=0.1)
    assert found.packets_per_pass == found.layers


def test_an_estimate_draws_its_own_ids_and_says_so_where_it_can_not() -> None:
    found = actstore.estimate(build("GPT-2"))
    assert found.bytes_per_token > 32 * 4
    lines = str(found).splitlines()
    assert lines[0].startswith(f"{found.layers} layers, ")
    assert [line.split()[0] for line in lines[2:]] == ["1,000", "1,000,000", "1,000,000,000"]
    for model in (sequential(), build("T5")):
        with pytest.raises(ConfigError, match="give inputs="):
            actstore.estimate(model)
    plain = actstore.estimate(sequential(), inputs=torch.ones(3, 8))
    # the linear, the ReLU in its place, the norm and the last linear; the others return what they
    # are given
    assert plain.bytes_per_token == 4 * (16 + 16 + 16 + 4)


@pytest.mark.parametrize("model", [None, "llama", 3])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"wants a torch\.nn\.Module"):
        actstore.describe(model)
    with pytest.raises(ConfigError, match=r"wants a torch\.nn\.Module"):
        actstore.estimate(model)


def test_an_estimate_of_an_unknown_codec_is_refused() -> None:
    found = actstore.estimate(sequential(), inputs=torch.ones(3, 8))
    with pytest.raises(ConfigError, match="'zstd'"):
        found.bytes(10, "gzip")


def test_a_description_sees_through_wrappers() -> None:
    assert str(actstore.describe(nn.DataParallel(build("Llama")))) == str(
        actstore.describe(build("Llama"))
    )


def test_the_documented_table_of_families_is_what_is_tested() -> None:
    rows = dict(
        re.findall(r"^\| ([^|]+?) \| ([^\n]+) \|$", SITES.read_text(encoding="utf-8"), re.M)
    )
    for name, family in FAMILIES.items():
        shown = set(re.findall(r"`([^`]*)`", rows.get(name, "")))
        assert shown == set(family.sites.values()), name


@pytest.mark.parametrize(
    ("purpose", "granularity", "codec"),
    [
        ("interpretability", HookGranularity.ATTENTION_ONLY, "lz4"),
        ("debugging", FULL, "none"),
        ("performance_analysis", FULL, "zstd"),
        ("full_capture", FULL, "lz4"),
    ],
)
def test_a_config_is_suggested_by_what_it_is_for(
    purpose: str, granularity: HookGranularity, codec: str
) -> None:
    found = actstore.suggest_config(build("Llama"), purpose)
    assert (found.granularity, found.compression_algorithm) == (granularity, codec)


def test_a_suggestion_is_never_of_a_granularity_that_the_model_does_not_have(log: Path) -> None:
    model = sequential()
    config = actstore.suggest_config(model)
    assert config.granularity is FULL
    with torch.no_grad(), capturing(model, log, config.granularity):
        model(torch.ones(2, 8))
    with pytest.raises(ConfigError, match="purpose must be one of 'interpretability'"):
        actstore.suggest_config(model, "speed")
    assert actstore.describe(model).architecture == "unknown"
    assert actstore.describe(build("Llama")).architecture == "llama"
