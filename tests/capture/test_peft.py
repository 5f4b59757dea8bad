"""Models with adapters of PEFT: named as the model is, exact with each adapter, merged or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FULL, Oracle, assert_equals, bytes_of, framework, quiet, tensors_of
from tiny_models import build, token_ids

from actstore.config import HookGranularity
from actstore.packet import Packet
from actstore.stream.reader import open_stream

peft = pytest.importorskip("peft")

# what PEFT still asks of transformers
pytestmark = pytest.mark.filterwarnings("ignore:.*_gradient_checkpointing:FutureWarning")
MLP = HookGranularity.MLP_ONLY


def _lora(targets: tuple[str, ...] = ("q_proj", "down_proj"), **options: Any) -> Any:
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **options
    )


def _randomized(model: Any) -> Any:
    """Give the adapters weights: new ones change nothing."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_" in name:
                one.copy_(0.2 * torch.randn(one.shape, generator=generator))
    return model


def _adapted(architecture: str = "llama", **options: Any) -> Any:
    targets = ("c_attn", "c_proj") if architecture == "gpt2" else ("q_proj", "down_proj")
    if architecture == "gpt2":
        options["fan_in_fan_out"] = True
    config = _lora(targets=targets, **options)
    return _randomized(peft.get_peft_model(build.__wrapped__(architecture), config)).eval()


def _check(
    model: Any,
    log: Path,
    run: Callable[[Any], Any],
    granularity: HookGranularity = FULL,
    names: list[str] | None = None,
) -> list[Packet]:
    """Capture a run under an oracle of the model within; compare packets and outputs."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    torch.manual_seed(4)
    wanted = [bytes_of(each) for each in tensors_of(run(model))]
    assert wanted
    one = framework(granularity)
    one.instrument_model(model)
    torch.manual_seed(4)
    with quiet(), Oracle(inner, names) as oracle, one.capture_activations(log):
        found = run(model)
    assert [bytes_of(each) for each in tensors_of(found)] == wanted
    assert one.summary["skipped"] == {}
    return assert_equals(log, oracle.fired)


def _forward(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def _generate(model: Any) -> Any:
    return model.generate(
        input_ids=token_ids(),
        attention_mask=torch.ones(2, 5, dtype=torch.long),
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
    )


def _train(model: Any) -> Any:
    model.train()
    model.zero_grad()
    loss = model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss
    loss.backward()
    model.eval()
    grads = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    return [loss.detach(), *grads]


@pytest.mark.parametrize("run", [_forward, _generate, _train])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*loss_type")
def test_an_adapted_model_equals_the_oracle_by_the_names_of_the_model(
    architecture: str, run: Callable[[Any], Any], log: Path
) -> None:
    plain = build(architecture)
    model = _adapted(architecture, lora_dropout=0.25)
    assert bytes_of(_forward(model)) != bytes_of(_forward(plain))
    packets = _check(model, log, run)
    names = {one.layer for one in packets}
    fired = {name for name, one in plain.named_modules() if not list(one.children())}
    assert {name for name in fired if name.endswith("proj")} <= names
    added = {name for name in names if name not in dict(plain.named_modules())}
    kinds = ("lora_A.default", "lora_B.default", "lora_dropout.default", "base_layer")
    assert {name.endswith(kinds) for name in added} == {True}
    assert {kind for kind in kinds if any(name.endswith(kind) for name in added)} == set(kinds)
    with open_stream(log) as reader:
        assert {info.entry for info in reader.passes} == {""}
        assert {axis.name for info in reader.passes for axis in info.axes} == {"token"}


@pytest.mark.parametrize(
    ("granularity", "part"),
    [(MLP, "mlp"), (HookGranularity.ATTENTION_ONLY, "self_attn")],
)
def test_the_parts_of_an_adapted_model_are_those_of_the_model(
    granularity: HookGranularity, part: str, log: Path
) -> None:
    names = [f"model.layers.{block}.{part}" for block in (0, 1)]
    packets = _check(_adapted(), log, _forward, granularity, names)
    assert [one.layer for one in packets] == names


def test_an_adapted_last_linear_of_a_block_is_its_mlp(log: Path) -> None:
    config = _lora(targets=("fc1", "fc2"))
    model = _randomized(peft.get_peft_model(build.__wrapped__("opt"), config)).eval()
    names = [f"model.decoder.layers.{block}.fc2" for block in (0, 1)]
    packets = _check(model, log, _forward, MLP, names)
    assert [one.layer for one in packets] == names


def test_sites_and_blocks_are_those_of_the_model(log: Path) -> None:
    _check(_adapted(), log, _forward)
    with open_stream(log) as reader:
        found = {one.name: (one.site, one.block) for one in reader.layers.values()}
    assert found["model.layers.1.mlp"] == ("mlp", 1)
    assert found["model.layers.1"] == ("resid", 1)
    assert found["lm_head"] == ("logits", -1)
    assert found[""] == ("output", -1)
    site, block = found["model.layers.1.self_attn.q_proj.lora_A.default"]
    assert (site, block) == ("model.layers.self_attn.q_proj.lora_A.default", 1)


def test_merged_unmerged_and_disabled_adapters_equal_the_oracle(log: Path) -> None:
    model, plain = _adapted(), build("llama")
    apart = bytes_of(_forward(model))
    model.merge_adapter()
    merged = _check(model, log, _forward)
    assert not any("lora_" in one.layer for one in merged)
    model.unmerge_adapter()
    again = _check(model, log.with_name("unmerged.stream"), _forward)
    assert any("lora_" in one.layer for one in again)
    assert torch.allclose(
        _forward(model), torch.frombuffer(bytearray(apart), dtype=torch.float32).view(2, 5, 64)
    )
    model = _adapted()
    with model.disable_adapter():
        without = _check(model, log.with_name("disabled.stream"), _forward)
    assert without[-1].values.tobytes() == bytes_of(_forward(plain))
    assert not any("lora_" in one.layer for one in without)


def test_a_model_whose_adapters_were_merged_for_good_is_the_plain_model_again(log: Path) -> None:
    model = _adapted().merge_and_unload()
    packets = _check(model, log, _generate)
    assert {one.layer for one in packets} <= {name for name, _ in build("llama").named_modules()}


def test_each_of_two_adapters_is_captured_as_it_is_set(log: Path) -> None:
    model = _adapted()
    model.add_adapter("other", _lora(targets=("q_proj", "up_proj")))
    _randomized(model)

    def run(model: Any) -> Any:
        model.set_adapter("default")
        first = _forward(model)
        model.set_adapter("other")
        return first, _forward(model)

    packets = _check(model, log, run)
    used = [
        {one.layer.rpartition(".")[2] for one in packets if "lora_A" in one.layer}
        & {"default", "other"}
        for packets in ([one for one in packets if one.pass_index == index] for index in (0, 1))
    ]
    assert used == [{"default"}, {"other"}]


def test_an_adapter_that_is_put_into_the_model_itself_equals_the_oracle(log: Path) -> None:
    model: Any = peft.inject_adapter_in_model(_lora(), build.__wrapped__("llama"))
    _randomized(model)

    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=token_ids()).logits

    packets = _check(model, log, run)
    assert any(one.layer.endswith("q_proj.lora_B.default") for one in packets)


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_adapted_model_with_checkpointing_counts_what_is_computed_again(
    reentrant: bool, log: Path
) -> None:
    model = _adapted().train()
    inner = model.get_base_model()
    inner.activation_checkpointing_enable({"use_reentrant": reentrant})
    wanted = [bytes_of(each) for each in _train(model.train())]
    one = framework()
    one.instrument_model(model)
    with quiet(), Oracle(inner) as oracle, one.capture_activations(log):
        found = _train(model)
    assert [bytes_of(each) for each in found] == wanted
    recomputed = one.summary["ignored_recomputed"]
    assert recomputed > 0
    assert_equals(log, oracle.fired[:-recomputed])


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.IA3Config(
            target_modules=["q_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
        lambda: _lora(use_dora=True),
        lambda: _lora(modules_to_save=["lm_head"]),
    ],
    ids=["ia3", "dora", "modules_to_save"],
)
def test_other_adapters_equal_the_oracle(config: Callable[[], Any], log: Path) -> None:
    model = peft.get_peft_model(build.__wrapped__("llama"), config()).eval()
    _check(_randomized(model), log, _forward)


def test_a_prompt_that_is_learned_makes_the_pass_one_of_embeddings_or_of_a_cache(
    log: Path,
) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build.__wrapped__("llama"), config).eval()
    one = framework()
    one.instrument_model(model)
    inner = model.get_base_model()
    with quiet(), Oracle(inner) as oracle, one.capture_activations(log), torch.no_grad():
        model(input_ids=token_ids())
    assert_equals(log, oracle.fired)
    with open_stream(log) as reader:
        (axis,) = reader.passes[-1].axes
    assert axis.token_ids.tolist() == [[-1] * 8] * 2
