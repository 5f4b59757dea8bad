"""Families of models: what is captured of each equals the oracle, and is what the family calls so.

DESIGN's sites are checked against names written by hand in ``families.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, build, feed, modules
from oracle import FULL, Oracle, assert_equals, capturing, hooks_of

from actstore.config import HookConfig, HookGranularity
from actstore.dataset import open_dataset
from actstore.errors import ConfigError
from actstore.stream.reader import open_stream

ATTENTION, MLP = HookGranularity.ATTENTION_ONLY, HookGranularity.MLP_ONLY
SAMPLED = HookGranularity.SAMPLED_SLICES
NO_PARTS = ("Mamba", "Mamba 2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_module_of_a_family_equals_the_oracle_and_its_rows_align(
    name: str, dtype: torch.dtype, log: Path
) -> None:
    model, given, family = build(name, dtype), feed(name, dtype), FAMILIES[name]
    with torch.no_grad():
        with Oracle(model) as oracle:
            wanted = model(**given)
        with capturing(model, log):
            found = model(**given)
    assert torch.equal(wanted[0], found[0])
    assert not hooks_of(model)
    assert_equals(log, oracle.fired)
    with open_stream(log) as reader:
        (info,) = reader.passes
        assert {one.name: (one.batch, one.sequence) for one in info.axes} == family.axes
        assert info.axes[-1].name in ("token", "decoder_token")
        sites = {one.site: one for one in reader.layers.values()}
        for site, pattern in family.sites.items():
            if site in sites:
                assert sites[site].name == pattern.format(sites[site].block)
    with open_dataset(log, chunks=None) as dataset:
        for site in family.sites:
            variable = dataset[dataset.attrs["aliases"].get(site, site)]
            side = site.partition("_")[0]
            axis = f"{side}_token" if f"{side}_token" in family.axes else [*family.axes][-1]
            assert axis in variable.dims
            assert variable.sizes[axis] == family.axes[axis][0] * family.axes[axis][1]
            assert ("layer" in variable.dims) == ("{}" in family.sites[site])


@pytest.mark.parametrize("granularity", [ATTENTION, MLP], ids=lambda one: one.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_attention_and_mlp_are_the_modules_that_the_family_calls_so(
    name: str, granularity: HookGranularity, log: Path
) -> None:
    model, given = build(name), feed(name)
    wanted = (
        modules(name, "attn", "cross_attn") if granularity is ATTENTION else modules(name, "mlp")
    )
    if name in NO_PARTS:
        with (
            pytest.raises(ConfigError, match=f"{granularity.name} found nothing to hook"),
            capturing(model, log, granularity),
        ):
            pass
        return
    with torch.no_grad():
        with Oracle(model, wanted) as oracle:
            model(**given)
        with capturing(model, log, granularity):
            model(**given)
    packets = assert_equals(log, oracle.fired)
    assert sorted(packet.layer for packet in packets) == sorted(set(wanted))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_of_a_family_is_the_oracle_s_features(name: str, log: Path) -> None:
    model, given = build(name), feed(name)
    with torch.no_grad():
        with Oracle(model) as oracle:
            model(**given)
        with capturing(model, log, SAMPLED, hooks=HookConfig(sampling_rate=0.3)):
            model(**given)
    with open_stream(log) as reader:
        kept = reader.features
        packets = list(reader.packets())
        assert [one.layer for one in packets] == [one.layer for one in oracle.fired]
        for packet, fired in zip(packets, oracle.fired, strict=True):
            whole = np.frombuffer(fired.data, fired.dtype).reshape(fired.shape)
            if whole.ndim:
                whole = whole[..., kept[whole.shape[-1]]]
            assert packet.values.tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    "name", [name for name, one in FAMILIES.items() if one.model.endswith(("LM", "LMHeadModel"))]
)
def test_a_family_that_generates_does_so_unchanged_and_is_captured(name: str, log: Path) -> None:
    model, prompt = build(name), feed(name)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    if name in ("BERT", "RoBERTa", "DistilBERT"):
        pytest.skip("a masked model generates nothing")
    with Oracle(model) as oracle:
        wanted = model.generate(**prompt, **settings)
    with capturing(model, log, FULL):
        found = model.generate(**prompt, **settings)
    assert torch.equal(wanted, found)
    assert_equals(log, oracle.fired)
    with open_stream(log) as reader:
        places = [info.axes[-1].positions[0].tolist() for info in reader.passes]
    assert places == [[0, 1, 2, 3, 4], [5], [6]]
