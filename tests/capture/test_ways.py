"""Ways to run a model: each is captured as plain hooks see it, and computes what it would."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from oracle import (
    Fired,
    Oracle,
    assert_equals,
    bytes_of,
    capturing,
    framework,
    hooks_of,
    quiet,
    tensors_of,
)
from tiny_models import VOCABULARY, build, sequential, token_ids
from torch import Tensor, nn

from actstore.packet import Packet, PassInfo
from actstore.stream.reader import open_stream

Run = Callable[[Any], Any]


@contextmanager
def _fed(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Note the tensors that a model is called with, by name, as they were then."""
    calls: list[dict[str, Any]] = []

    def note(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input_ids",), args, strict=False)) | kwargs
        calls.append({key: one.clone() for key, one in given.items() if isinstance(one, Tensor)})

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _bytes(value: Any) -> list[bytes]:
    return [bytes_of(one) for one in tensors_of(value)]


def _seeded(run: Run, model: nn.Module) -> Any:
    torch.manual_seed(4)
    return run(model)


def _check(model: nn.Module, log: Path, run: Run) -> tuple[list[Packet], tuple[PassInfo, ...]]:
    """Capture a run under the oracle; compare packets, outputs and the next random number."""
    wanted = _bytes(_seeded(run, model))
    drawn = torch.rand(1)
    hooked = hooks_of(
        model
    )  # transformers has hooks of its own, where hidden states are asked for
    with Oracle(model) as oracle, capturing(model, log):
        output = _seeded(run, model)
    assert torch.equal(torch.rand(1), drawn)
    assert _bytes(output) == wanted
    assert wanted
    assert hooks_of(model) == hooked
    packets = assert_equals(log, oracle.fired)
    return packets, _passes(log)


def _passes(log: Path) -> tuple[PassInfo, ...]:
    with open_stream(log) as reader:
        passes = reader.passes
    assert [one.index for one in passes] == list(range(len(passes)))
    assert not any(one.aborted for one in passes)
    return passes


# -- generation ---------------------------------------------------------------------------------


@cache
def _assistant(architecture: str, noise: float) -> Any:
    """Give a model that says nearly what the model says, or something else."""
    model = build.__wrapped__(architecture)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model


def _generate(batch: int = 2, padding: slice | None = None, **options: Any) -> Run:
    ids, mask = token_ids(batch), torch.ones(batch, 5, dtype=torch.long)
    if padding is not None:
        ids[0, padding], mask[0, padding] = 0, 0
    how = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return lambda model: model.generate(ids, **how | options)


def _assisted(noise: float) -> Run:
    def run(model: Any) -> Any:
        name = next(
            one for one in ("llama", "gpt2", "gemma2") if one in type(model).__name__.lower()
        )
        return _generate(1, assistant_model=_assistant(name, noise), max_new_tokens=6)(model)

    return run


def _from_embeddings(model: Any) -> Any:
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight[token_ids()]
    mask = torch.ones(2, 5, dtype=torch.long)
    return model.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )


GENERATIONS: dict[str, Run] = {
    "sampling": _generate(do_sample=True, top_k=7, temperature=1.3),
    "several_sequences": _generate(do_sample=True, num_return_sequences=3),
    "beams": _generate(num_beams=3),
    "sampled_beams": _generate(num_beams=3, do_sample=True),
    "beams_without_a_cache": _generate(num_beams=2, use_cache=False),
    "static_cache": _generate(cache_implementation="static"),
    "static_cache_and_beams": _generate(cache_implementation="static", num_beams=2),
    "left_padded": _generate(padding=slice(0, 2)),
    "right_padded": _generate(padding=slice(3, 5)),
    "left_padded_beams": _generate(padding=slice(0, 2), num_beams=2),
    "prompt_lookup": _generate(1, prompt_lookup_num_tokens=2, max_new_tokens=6),
    "assisted": _assisted(0.0),
    "assisted_in_vain": _assisted(0.5),
    "guided": _generate(guidance_scale=1.5),
    "chunked_prefill": _generate(prefill_chunk_size=2),
    "ends_early": _generate(eos_token_id=list(range(0, VOCABULARY, 2)), max_new_tokens=8),
    "with_scores": _generate(
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
        use_cache=False,
    ),
    "embeddings": _from_embeddings,
}
ARCHITECTURES = ["llama", "gpt2", "gemma2"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("way", GENERATIONS)
@pytest.mark.filterwarnings("ignore:A decoder-only architecture is being used")
def test_a_generation_equals_the_oracle_and_has_a_pass_for_what_each_call_is_fed(
    way: str, architecture: str, log: Path
) -> None:
    model = build(architecture)
    with _fed(model) as calls:
        _seeded(GENERATIONS[way], model)
    _, passes = _check(model, log, GENERATIONS[way])
    assert len(passes) == len(calls)
    for info, call in zip(passes, calls, strict=True):
        assert info.entry == ""
        (axis,) = info.axes
        ids = call.get("input_ids")
        if ids is None:
            ids = torch.full(call["inputs_embeds"].shape[:2], -1)
        np.testing.assert_array_equal(axis.token_ids, ids)
        assert (axis.name, axis.batch, axis.sequence) == ("token", *ids.shape)
        if (positions := call.get("position_ids")) is not None:
            np.testing.assert_array_equal(
                axis.positions, np.broadcast_to(positions, axis.positions.shape)
            )
        if (mask := call.get("attention_mask")) is not None and mask.ndim == 2:
            np.testing.assert_array_equal(axis.mask, mask[:, mask.shape[1] - axis.sequence :] != 0)


@pytest.mark.parametrize("way", ["prompt_lookup", "assisted", "assisted_in_vain"])
def test_what_a_speculating_generation_fed_last_at_each_position_is_what_it_returns(
    way: str, log: Path
) -> None:
    found: list[Tensor] = []

    def run(model: Any) -> Any:
        found.append(GENERATIONS[way](model))
        return found[-1]

    _, passes = _check(build("llama"), log, run)
    fed: dict[int, int] = {}
    for info in passes:
        (axis,) = info.axes
        assert min(axis.positions[0]) <= len(fed)  # a rejected candidate is fed over
        fed.update(zip(axis.positions[0].tolist(), axis.token_ids[0].tolist(), strict=True))
    sequence = found[-1][0].tolist()
    last = len(sequence) - 1
    assert [fed[position] for position in range(last)] == sequence[:last]


def test_an_assistant_that_is_not_instrumented_leaves_no_trace(log: Path) -> None:
    model, assistant = build("llama"), build.__wrapped__("gpt2")
    _, passes = _check(model, log, _generate(1, assistant_model=assistant, max_new_tokens=6))
    with open_stream(log) as reader:
        assert set(reader.layers) <= {name for name, _ in model.named_modules()}
    assert max(info.axes[0].sequence for info in passes[1:]) > 1
    assert not hooks_of(assistant)


def test_beams_are_the_rows_in_the_models_order(log: Path) -> None:
    packets, passes = _check(build("llama"), log, _generate(num_beams=3))
    assert len(passes) == 4
    prompt, *others = [info.axes[0] for info in passes]
    np.testing.assert_array_equal(prompt.token_ids, token_ids().repeat_interleave(3, dim=0))
    assert [axis.token_ids.shape for axis in others] == [(6, 1)] * 3
    assert {one.shape[0] for one in packets if one.layer.endswith("mlp")} == {6}


def test_several_generations_in_one_capture_follow_each_other(log: Path) -> None:
    ways = ["beams", "static_cache", "sampling", "left_padded", "embeddings"]

    def run(model: Any) -> Any:
        return [GENERATIONS[way](model) for way in ways]

    _, passes = _check(build("llama"), log, run)
    starts = [info.axes[0].sequence for info in passes].count(5)
    assert (starts, len(passes)) == (5, 20)


@pytest.mark.parametrize("word", ["cache", "past_key_values"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_a_static_cache_handed_on_by_hand_moves_the_positions(
    architecture: str, word: str, log: Path
) -> None:
    def run(model: Any) -> Any:
        kept = transformers.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            first = model(token_ids(), **{word: kept}).logits
            return first, model(token_ids(2, 3), **{word: kept}).logits

    _, (_, second) = _check(build(architecture), log, run)
    np.testing.assert_array_equal(second.axes[0].positions, [[5, 6, 7]] * 2)
    np.testing.assert_array_equal(second.axes[0].token_ids, token_ids(2, 3))


@pytest.mark.parametrize("keep", [0, 1, 2, 5])
def test_logits_that_are_kept_for_the_last_rows_alone_equal_the_oracle(
    keep: int, log: Path
) -> None:
    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=token_ids(), logits_to_keep=keep).logits

    packets, (info,) = _check(build("llama"), log, run)
    assert info.logits_to_keep == keep
    shapes = {one.layer: one.shape for one in packets}
    assert shapes["lm_head"] == (2, keep or 5, VOCABULARY)
    assert shapes["model.norm"] == (2, 5, 32)


def test_logits_that_are_kept_by_index_equal_the_oracle(log: Path) -> None:
    def run(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=token_ids(), logits_to_keep=torch.tensor([1, 3])).logits

    packets, (info,) = _check(build("llama"), log, run)
    assert info.logits_to_keep == 0
    assert {one.shape for one in packets if one.layer == "lm_head"} == {(2, 2, VOCABULARY)}


# -- encoders and decoders ----------------------------------------------------------------------


@cache
def _bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    torch.manual_seed(13)
    return transformers.BartForConditionalGeneration(config).eval()


BOTH: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "t5": (lambda: build("t5"), "encoder"),
    "bart": (_bart, "model.encoder"),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("way", "rows"),
    [
        ({}, 2),
        ({"do_sample": True}, 2),
        ({"num_beams": 3}, 6),
        ({"cache_implementation": "static"}, 2),
        ({"use_cache": False}, 2),
        ({"padding": slice(3, 5)}, 2),
    ],
    ids=str,
)
def test_an_encoder_decoder_that_generates_has_a_pass_of_its_encoder_then_of_its_decoder(
    way: dict[str, Any], rows: int, name: str, log: Path
) -> None:
    make, entry = BOTH[name]
    model = make()
    # the end of T5's sequences is 1: the shorter ones would end earlier
    run = _generate(**way, eos_token_id=None, max_new_tokens=4)
    with _fed(model) as calls:
        _seeded(run, model)
    _, (first, *others) = _check(model, log, run)
    assert first.entry == entry
    assert [axis.name for axis in first.axes] == ["encoder_token"]
    ids = token_ids()
    if "padding" in way:
        ids[0, way["padding"]] = 0
    np.testing.assert_array_equal(first.axes[0].token_ids, ids)
    np.testing.assert_array_equal(first.axes[0].mask, ids != 0)
    assert len(others) == len(calls) == 4
    for number, (info, call) in enumerate(zip(others, calls, strict=True)):
        assert info.entry == ""
        (axis,) = info.axes
        assert (axis.name, axis.batch) == ("decoder_token", rows)
        np.testing.assert_array_equal(axis.token_ids, call["decoder_input_ids"])
        start = 0 if "use_cache" in way else number
        np.testing.assert_array_equal(axis.positions, [list(range(start, number + 1))] * rows)


@pytest.mark.parametrize("name", BOTH)
def test_an_encoder_and_a_decoder_called_by_themselves_have_their_own_axes(
    name: str, log: Path
) -> None:
    def run(model: Any) -> Any:
        with torch.no_grad():
            encoded = model.get_encoder()(input_ids=token_ids()).last_hidden_state
            decoder = model.get_decoder()
            alone = decoder(input_ids=token_ids(2, 3), encoder_hidden_states=encoded)
            both = model(input_ids=token_ids(), decoder_input_ids=token_ids(2, 3))
            return encoded, alone.last_hidden_state, both.logits

    _, passes = _check(BOTH[name][0](), log, run)
    found = [[(axis.name, axis.sequence) for axis in info.axes] for info in passes]
    encoder, decoder = ("encoder_token", 5), ("decoder_token", 3)
    assert found == [[encoder], [decoder], [encoder, decoder]]


# -- training -----------------------------------------------------------------------------------


def _train(model: Any, autocast: bool = False, marks: Callable[[], None] = lambda: None) -> Any:
    """Take two steps; give losses, gradients and weights. The model is left as it was."""
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss
        marks()
        loss.backward()
        marks()
        optimizer.step()
        grads = [one.grad.clone() for one in model.parameters() if one.grad is not None]
        found += [loss.detach(), *grads]
    found += [one.detach().clone() for one in model.parameters()]
    optimizer.zero_grad()
    model.load_state_dict(before)
    return found


def _training_model(name: str) -> Any:
    model = _bart.__wrapped__() if name == "bart" else build.__wrapped__(name)
    model.train()
    if name == "gpt2":
        model.config.loss_type = "ForCausalLM"
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "bart"])
def test_training_has_the_same_losses_gradients_and_weights(
    name: str, autocast: bool, log: Path
) -> None:
    packets, passes = _check(_training_model(name), log, lambda model: _train(model, autocast))
    assert len(passes) == 2
    assert any(one.values.dtype.name == "bfloat16" for one in packets) is autocast


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "bart"])
def test_what_checkpointing_computes_again_is_ignored_and_counted(
    name: str, reentrant: bool, log: Path
) -> None:
    model = _training_model(name)
    plain = _bytes(_seeded(_train, model))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    wanted = _bytes(_seeded(_train, model))
    # the gradients of tied weights may be added up in another order
    assert wanted[0] == plain[0]
    one, marks, hooked = framework(), [0], hooks_of(model)
    one.instrument_model(model)
    with quiet(), Oracle(model) as oracle, one.capture_activations(log):
        found = _seeded(lambda m: _train(m, marks=lambda: marks.append(len(oracle.fired))), model)
    assert _bytes(found) == wanted
    assert hooks_of(model) == hooked
    start, forward, backward, again, end = marks
    fired = oracle.fired
    assert_equals(log, fired[start:forward] + fired[backward:again])
    assert one.summary["ignored_recomputed"] == (backward - forward) + (end - again) > 0
    assert len(_passes(log)) == 2
    assert one.summary["skipped"] == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_every_second_block_is_captured_once(reentrant: bool, log: Path) -> None:
    model, marks = _training_model("llama"), [0]
    model.activation_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=2)
    one = framework()
    one.instrument_model(model)
    with quiet(), Oracle(model) as oracle, one.capture_activations(log):
        _train(model, marks=lambda: marks.append(len(oracle.fired)))
    fired = oracle.fired
    assert_equals(log, fired[: marks[1]] + fired[marks[2] : marks[3]])
    assert one.summary["ignored_recomputed"] == marks[2] - marks[1] + marks[4] - marks[3] > 0


def test_gradients_of_a_gradient_are_the_same(log: Path) -> None:
    def run(model: nn.Module) -> Any:
        x = torch.linspace(-1, 1, 24).reshape(3, 8).requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), list(model.parameters())[:2])
        return first, second

    _check(sequential(), log, run)


# -- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "bert"])
def test_autocast_keeps_what_each_module_computes_in_its_dtype(
    mode: Any, name: str, log: Path
) -> None:
    def run(model: nn.Module) -> Any:
        with mode(), torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=token_ids()).logits

    packets, _ = _check(build(name), log, run)
    assert {"bfloat16", "float32"} <= {one.values.dtype.name for one in packets}


def test_modes_may_change_from_pass_to_pass(log: Path) -> None:
    def run(model: nn.Module) -> Any:
        with torch.inference_mode():
            first = model(input_ids=token_ids()).logits.clone()
        with torch.no_grad():
            second = model(input_ids=token_ids()).logits
        with torch.autocast("cpu", torch.bfloat16):
            third = model(input_ids=token_ids()).logits
        return first, second, third, model(input_ids=token_ids()).logits

    _, passes = _check(build("llama"), log, run)
    assert len(passes) == 4


def test_generation_in_inference_mode_and_autocast_equals_the_oracle(log: Path) -> None:
    def run(model: nn.Module) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return _generate(num_beams=2)(model)

    _check(build("llama"), log, run)


def test_parts_of_a_model_called_directly_equal_the_oracle(log: Path) -> None:
    def run(model: Any) -> Any:
        with torch.no_grad():
            hidden = model.model(input_ids=token_ids()).last_hidden_state
            part = model.model.layers[1].mlp(hidden)
            logits = model.lm_head(hidden[:, -1])
            return hidden, part, logits, model(input_ids=token_ids(1, 3)).logits

    packets, passes = _check(build("llama"), log, run)
    assert [one.entry for one in passes] == ["model", "model.layers.1.mlp.gate_proj", ""]
    assert Counted(packets).layers("lm_head") == [1, 2]


class Counted:
    """The passes in which a layer fired."""

    def __init__(self, packets: list[Packet]) -> None:
        self._packets = packets

    def layers(self, name: str) -> list[int]:
        """Give them in order."""
        return [one.pass_index for one in self._packets if one.layer == name]


def test_a_functional_call_with_other_weights_equals_the_oracle(log: Path) -> None:
    weights = {name: one.detach() + 0.25 for name, one in sequential().named_parameters()}

    def run(model: nn.Module) -> Any:
        return torch.func.functional_call(model, weights, (torch.ones(3, 8),))

    _check(sequential(), log, run)


# -- several models -----------------------------------------------------------------------------


class Merged(Oracle):
    """Sees several models, each module under its model's name, in the order of firing."""

    def __init__(self, **models: nn.Module) -> None:
        super().__init__(nn.Identity(), ())
        self._models = models

    def __enter__(self) -> Merged:
        for prefix, model in self._models.items():
            for name, module in model.named_modules():
                hook = self._hook(f"{prefix}.{name}".rstrip("."))
                self._handles.append(module.register_forward_hook(hook))
        return self


def _check_several(log: Path, run: Callable[[], Any], **models: nn.Module) -> list[Fired]:
    torch.manual_seed(4)
    wanted, both = _bytes(run()), framework()
    for name, model in models.items():
        both.instrument_model(model, name=name)
    torch.manual_seed(4)
    with quiet(), Merged(**models) as oracle, both.capture_activations(log):
        found = _bytes(run())
    assert found == wanted
    assert_equals(log, oracle.fired)
    return oracle.fired


def test_an_assistant_that_is_instrumented_too_has_passes_between_the_models(log: Path) -> None:
    model, assistant = build("llama"), _assistant("llama", 0.01)
    run = _generate(1, assistant_model=assistant, max_new_tokens=6)
    _check_several(log, lambda: run(model), target=model, draft=assistant)
    entries = [one.entry for one in _passes(log)]
    assert entries[0] == "draft"
    assert entries.count("draft") > 1
    assert entries.count("target") > 1
    with open_stream(log) as reader:
        sites = {info.site for info in reader.layers.values()}
        assert [one["name"] for one in reader.header["models"]] == ["target", "draft"]
    assert {"target.attn", "draft.attn", "target.logits", "draft.logits"} <= sites


def test_a_teacher_and_a_student_that_train_are_kept_apart(log: Path) -> None:
    teacher, student = build("gpt2"), build.__wrapped__("llama")

    def run() -> Any:
        student.zero_grad()
        with torch.no_grad():
            wanted = teacher(input_ids=token_ids()).logits
        (student(input_ids=token_ids()).logits - wanted).square().mean().backward()
        return [one.grad for one in student.parameters() if one.grad is not None]

    fired = _check_several(log, run, teacher=teacher, student=student)
    assert {one.layer.partition(".")[0] for one in fired} == {"teacher", "student"}
    assert [one.entry for one in _passes(log)] == ["teacher", "student"]


def test_models_of_different_kinds_have_their_own_axes_in_one_log(log: Path) -> None:
    encoder, both = build("bert"), build("t5")

    def run() -> Any:
        with torch.no_grad():
            first = encoder(input_ids=token_ids(2, 4)).logits
            return first, both.generate(token_ids(), max_new_tokens=2, do_sample=False)

    _check_several(log, run, bert=encoder, t5=both)
    found = [(one.entry, [axis.name for axis in one.axes]) for one in _passes(log)]
    assert found[:3] == [
        ("bert", ["token"]),
        ("t5.encoder", ["encoder_token"]),
        ("t5", ["decoder_token"]),
    ]


def test_a_model_called_inside_of_another_belongs_to_its_pass(log: Path) -> None:
    inner, outer = sequential(), nn.Sequential()

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return inner(x) * 2

    outer.add_module("calls", Calls())
    _check_several(log, lambda: outer(torch.ones(3, 8)), outer=outer, inner=inner)
    assert [one.entry for one in _passes(log)] == ["outer"]
