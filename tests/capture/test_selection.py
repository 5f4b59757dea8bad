"""Which modules are hooked, and which features of them ``SAMPLED_SLICES`` keeps."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FULL, Oracle, assert_equals, capturing, framework, read
from tiny_models import ARCHITECTURES, Each, build, sequential, token_ids
from torch import Tensor, nn

from actstore.capture.select import entry_modules, select
from actstore.config import HookConfig, HookGranularity
from actstore.errors import ActstoreError, ConfigError
from actstore.stream.reader import open_stream

SAMPLED = HookGranularity.SAMPLED_SLICES


def _selected(model: nn.Module, targets: Any, granularity: HookGranularity = FULL) -> list[str]:
    chosen = select(model, granularity, HookConfig(target_layers=targets))
    return [target.name for target in chosen]


# -- target_layers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["model.norm"], ["model.norm"]),
        (["lm_head", "model.norm"], ["model.norm", "lm_head"]),
        (["model.layers.*.mlp"], ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (["model.layers.[0].mlp"], ["model.layers.0.mlp"]),
        (["*.down_proj"], ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        (("",), [""]),
        (lambda name: name.endswith("0.mlp"), ["model.layers.0.mlp"]),
        (
            lambda _, module: isinstance(module, nn.Embedding),
            ["model.embed_tokens"],
        ),
        (re.compile(r"1\.mlp$").search, ["model.layers.1.mlp"]),
        (str.isdigit, None),
        ({"model.norm"}.__contains__, ["model.norm"]),
    ],
)
def test_target_layers_choose_by_name_glob_and_predicate(targets: Any, wanted: Any) -> None:
    if wanted is None:
        with pytest.raises(ConfigError, match="match none"):
            _selected(build("llama"), targets)
    else:
        assert _selected(build("llama"), targets) == wanted


def test_an_exact_name_is_meant_even_where_it_looks_like_a_glob() -> None:
    model = nn.Sequential()
    model.add_module("a[0]", nn.Identity())
    model.add_module("a0", nn.Identity())
    assert "a[0]" in _selected(model, ["a[0]"])


def test_a_target_that_matches_nothing_is_refused_and_told_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        _selected(build("llama"), ["model.norm", "model.layers.*.ffn"])
    text = str(caught.value)
    assert "model.layers.*.ffn" in text
    assert "'model.embed_tokens'" in text
    assert "'model.norm']" not in text


def test_targets_choose_among_the_modules_of_the_granularity(log: Path) -> None:
    model = build("llama")
    hooks = HookConfig(target_layers=["model.layers.1.*"])
    granularity = HookGranularity.MLP_ONLY
    with (
        Oracle(model, ["model.layers.1.mlp"]) as oracle,
        capturing(model, log, granularity, hooks=hooks),
        torch.no_grad(),
    ):
        model(input_ids=token_ids())
    assert_equals(log, oracle.fired)


def test_a_target_outside_of_the_granularity_is_refused() -> None:
    with pytest.raises(ConfigError, match="MLP_ONLY"):
        _selected(build("llama"), ["model.norm"], HookGranularity.MLP_ONLY)


def test_a_predicate_that_raises_does_not_hook_anything() -> None:
    def broken(_name: str) -> bool:
        raise ZeroDivisionError

    model = sequential()
    with pytest.raises(ZeroDivisionError):
        framework().instrument_model(model, HookConfig(target_layers=broken))


# -- granularity --------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [HookGranularity.ATTENTION_ONLY, HookGranularity.MLP_ONLY])
def test_a_model_without_such_modules_is_refused_naming_what_was_looked_for(
    granularity: HookGranularity,
) -> None:
    with pytest.raises(ValueError, match="found nothing to hook in Sequential") as caught:
        framework(granularity).instrument_model(sequential())
    assert isinstance(caught.value, ActstoreError)
    assert ("attn" if granularity is HookGranularity.ATTENTION_ONLY else "mlp") in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("make", "attention", "mlp"),
    [
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
            ["layers.0.self_attn", "layers.1.self_attn"],
            ["layers.0.linear2", "layers.1.linear2"],
        ),
        (
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1),
            ["layers.0.self_attn", "layers.0.multihead_attn"],
            ["layers.0.linear2"],
        ),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), ["self_attn"], ["linear2"]),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_plain_torch_transformers_are_understood(make: Any, attention: Any, mlp: Any) -> None:
    model = make()
    for granularity, wanted in (
        (HookGranularity.ATTENTION_ONLY, attention),
        (HookGranularity.MLP_ONLY, mlp),
    ):
        assert _selected(model, None, granularity) == wanted


@pytest.mark.parametrize("architecture", [*ARCHITECTURES])
def test_full_tensor_hooks_every_module_that_can_be_called(architecture: str) -> None:
    model = build(architecture)
    wanted = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]
    assert _selected(model, None) == wanted


def test_wrapper_prefixes_are_left_out_of_names() -> None:
    model = nn.Sequential()
    model.add_module("_orig_mod", sequential())
    assert "0" in _selected(model, None)
    assert not any("_orig_mod" in name for name in _selected(model, None))


def test_attributes_named_like_those_of_hugging_face_do_no_harm() -> None:
    model = sequential()
    model.base_model = {"not": "a module"}
    model.get_encoder = lambda: ["neither"]
    model.get_decoder = 3
    assert list(entry_modules(model).values()) == [("", "token")]


# -- sampling -----------------------------------------------------------------------------------


def _sampled(log: Path, model: nn.Module, run: Any, rate: float, seed: int = 0) -> Oracle:
    hooks = HookConfig(sampling_rate=rate, sampling_seed=seed)
    with Oracle(model) as oracle, capturing(model, log, SAMPLED, hooks=hooks):
        run()
    return oracle


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.25, 0.5, 1.0])
def test_a_sample_is_the_recorded_features_of_the_oracle_in_every_layer_and_token(
    rate: float, log: Path
) -> None:
    model = build("llama")

    def run() -> None:
        model.generate(token_ids(), max_new_tokens=3, do_sample=False, pad_token_id=0)

    oracle = _sampled(log, model, run, rate)
    packets = read(log)
    assert len(packets) == len(oracle._clones)
    with open_stream(log) as reader:
        features = dict(reader.features)
    widths = set()
    for packet, (name, whole) in zip(packets, oracle._clones, strict=True):
        assert packet.layer == name
        width = whole.shape[-1]
        widths.add(width)
        kept = features[width]
        assert packet.shape == (*whole.shape[:-1], math.ceil(rate * width))
        assert packet.values.tobytes() == whole.numpy()[..., kept].tobytes()
    assert set(features) == widths
    for width, kept in features.items():
        assert kept.size == math.ceil(rate * width)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert kept.max() < width


def test_the_seed_alone_decides_which_features_are_kept(log: Path) -> None:
    model = sequential()
    found = []
    for number, seed in enumerate((0, 0, 1)):
        path = log.with_name(f"{number}.stream")
        _sampled(path, model, lambda: model(torch.ones(2, 8)), 0.5, seed)
        with open_stream(path) as reader:
            found.append({width: kept.tolist() for width, kept in reader.features.items()})
            assert reader.header["capture"]["sampling_seed"] == seed
    assert found[0] == found[1] != found[2]


def test_scalars_are_kept_whole_and_empty_tensors_stay_empty(log: Path) -> None:
    model = Each(
        scalar=lambda x: x.sum(), empty=lambda x: x[:, :0], none=lambda x: x[:0], all=lambda x: x
    )
    oracle = _sampled(log, model, lambda: model(torch.arange(20.0).reshape(2, 10)), 0.3)
    packets = {one.layer: one.values for one in read(log)}
    assert packets["scalar"].shape == ()
    assert packets["scalar"] == oracle._clones[0][1].item()
    assert packets["empty"].shape == (2, 0)
    assert packets["none"].shape == (0, 3)
    assert packets["all"].shape == (2, 3)


@pytest.mark.parametrize(
    "name",
    [
        "bool",
        "uint8",
        "int64",
        "uint16",
        "uint64",
        "float16",
        "bfloat16",
        "complex64",
        "float8_e4m3fn",
    ],
)
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_samples_of_every_dtype_are_the_models_own_values(
    name: str, codec: str, log: Path
) -> None:
    bits = torch.randint(0, 2, (3, 4, 64), dtype=torch.uint8)
    values = bits.view(getattr(torch, name)).transpose(0, 1)
    model = Each(values=lambda _: values)
    with capturing(model, log, SAMPLED, codec, HookConfig(sampling_rate=0.5)):
        model(torch.zeros(1))
    with open_stream(log) as reader:
        kept = torch.from_numpy(reader.features[values.shape[-1]].astype(np.int64))
        for packet in reader.packets():
            wanted = values.contiguous().view(torch.uint8).reshape(*values.shape, -1)
            assert packet.dtype.name == name
            assert packet.values.tobytes() == wanted[..., kept, :].numpy().tobytes()


def test_an_alias_of_a_sampled_packet_reads_as_the_same_sample(log: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 10), nn.Identity())
    for mode in (torch.no_grad, torch.inference_mode):
        path = log.with_name(f"{mode.__name__}.stream")
        with mode():
            _sampled(path, model, lambda: model(torch.ones(2, 8)), 0.3)
        first, *others = [one.values for one in read(path)]
        assert all(np.array_equal(first, other) for other in others)


# -- sites --------------------------------------------------------------------------------------


def test_sites_and_blocks_have_their_canonical_names(log: Path) -> None:
    model = build("llama")
    with capturing(model, log), torch.no_grad():
        model(input_ids=token_ids())
    with open_stream(log) as reader:
        found = {name: (info.site, info.block) for name, info in reader.layers.items()}
    for block in (0, 1):
        assert found[f"model.layers.{block}"] == ("resid", block)
        assert found[f"model.layers.{block}.self_attn"] == ("attn", block)
        assert found[f"model.layers.{block}.mlp"] == ("mlp", block)
        inner = found[f"model.layers.{block}.mlp.act_fn"]
        assert inner == ("model.layers.mlp.act_fn", block)
    assert found["model.embed_tokens"] == ("embed", -1)
    assert found["model.norm"] == ("final_norm", -1)
    assert found["lm_head"] == ("logits", -1)


class _Named(nn.Module):
    """A block as other codes name it."""

    def __init__(self, attention: str, mlp: str) -> None:
        super().__init__()
        self.add_module(attention, nn.Linear(4, 4))
        self.add_module(mlp, nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = x + child(x)
        return x


@pytest.mark.parametrize(
    ("attention", "mlp"),
    [("attn", "mlp"), ("attention", "feed_forward"), ("self_attn", "ffn"), ("mha", "ff")],
)
def test_blocks_of_other_codes_are_found_by_name(attention: str, mlp: str) -> None:
    model = nn.Sequential(*(_Named(attention, mlp) for _ in range(2)))
    found = _selected(model, None, HookGranularity.ATTENTION_ONLY)
    assert found == [f"0.{attention}", f"1.{attention}"]
    found = _selected(model, None, HookGranularity.MLP_ONLY)
    assert found == [f"0.{mlp}", f"1.{mlp}"]
