"""Every packet equals what a plain hook sees, bit for bit; the model computes what it would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FULL, Oracle, assert_equals, bytes_of, capturing, hooks_of, tensors_of
from tiny_models import ARCHITECTURES, DECODERS, Each, build, sequential, token_ids
from torch import Tensor, nn

from actstore.config import HookGranularity

ATTENTION, MLP = HookGranularity.ATTENTION_ONLY, HookGranularity.MLP_ONLY
CODECS = ["none", "lz4", "zstd"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def _no_grad(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def _with_grad(model: nn.Module) -> Any:
    return model(input_ids=token_ids()).logits


def _inference(model: nn.Module) -> Any:
    with torch.inference_mode():
        return model(input_ids=token_ids()).logits


def _padded(left: bool) -> Callable[[nn.Module], Any]:
    def run(model: nn.Module) -> Any:
        ids, mask = token_ids(), torch.ones(2, 5, dtype=torch.long)
        places = slice(0, 2) if left else slice(3, 5)
        ids[0, places], mask[0, places] = 0, 0
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits

    return run


def _generate(use_cache: bool) -> Callable[[nn.Module], Any]:
    def run(model: nn.Module) -> Any:
        return model.generate(
            token_ids(),
            attention_mask=torch.ones(2, 5, dtype=torch.long),
            max_new_tokens=3,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
        )

    return run


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "no_grad": _no_grad,
    "grad": _with_grad,
    "inference_mode": _inference,
    "left_padded": _padded(left=True),
    "right_padded": _padded(left=False),
    "generate_cached": _generate(use_cache=True),
    "generate_uncached": _generate(use_cache=False),
}


def _check(
    model: nn.Module,
    log: Path,
    run: Callable[[nn.Module], Any],
    names: list[str] | None = None,
    **how: Any,
) -> list[Any]:
    """Capture a run under the oracle, and compare its packets and what the model returns."""
    wanted = [bytes_of(one) for one in tensors_of(run(model))]
    with Oracle(model, names) as oracle, capturing(model, log, **how):
        output = run(model)
    assert [bytes_of(one) for one in tensors_of(output)] == wanted
    assert not hooks_of(model)
    assert oracle.fired
    return assert_equals(log, oracle.fired)


def _names(architecture: str, site: str) -> list[str]:
    return [ARCHITECTURES[architecture][site].format(block) for block in (0, 1)]


@pytest.mark.parametrize("architecture", DECODERS)
def test_packets_equal_the_oracle_in_every_way_of_running(architecture: str, log: Path) -> None:
    model = build(architecture)
    for number, (way, run) in enumerate(WAYS.items()):
        codec = CODECS[(number + len(architecture)) % 3]
        _check(model, log.with_name(f"{way}.stream"), run, codec=codec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_packets_equal_the_oracle_in_every_dtype_and_codec(
    dtype: torch.dtype, codec: str, log: Path
) -> None:
    _check(build("llama", dtype), log, _generate(use_cache=True), codec=codec)
    _check(build("gpt2", dtype), log.with_name("other.stream"), _inference, codec=codec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("granularity", "site"), [(ATTENTION, "attn"), (MLP, "mlp")])
def test_one_part_of_a_block_equals_the_oracle_in_every_dtype(
    dtype: torch.dtype, granularity: HookGranularity, site: str, log: Path
) -> None:
    names = _names("llama", site)
    _check(
        build("llama", dtype),
        log,
        _generate(use_cache=True),
        names,
        granularity=granularity,
        codec="zstd",
    )


@pytest.mark.parametrize("architecture", [*DECODERS, "bert"])
@pytest.mark.parametrize(("granularity", "site"), [(ATTENTION, "attn"), (MLP, "mlp")])
def test_a_block_gives_one_attention_and_one_mlp_packet_a_pass(
    architecture: str, granularity: HookGranularity, site: str, log: Path
) -> None:
    names = _names(architecture, site)
    run = _no_grad if architecture == "bert" else _generate(use_cache=True)
    packets = _check(build(architecture), log, run, names, granularity=granularity)
    passes = 1 if architecture == "bert" else 3
    found = [(one.pass_index, one.layer, one.call) for one in packets]
    assert found == [(index, name, 0) for index in range(passes) for name in names]


def test_an_encoder_decoder_gives_self_and_cross_attention_of_every_block(log: Path) -> None:
    names = [
        *(f"encoder.block.{block}.layer.0.SelfAttention" for block in (0, 1)),
        *(
            f"decoder.block.{block}.layer.{part}"
            for block in (0, 1)
            for part in ("0.SelfAttention", "1.EncDecAttention")
        ),
    ]

    def run(model: nn.Module) -> Any:
        with torch.no_grad():
            return model(input_ids=token_ids(), decoder_input_ids=token_ids(2, 3)).logits

    packets = _check(build("t5"), log, run, names, granularity=ATTENTION)
    assert [one.layer for one in packets] == names


def test_an_encoder_decoder_that_generates_equals_the_oracle(log: Path) -> None:
    _check(build("t5"), log, _generate(use_cache=True))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_sequential_with_in_place_and_identity_modules_equals_the_oracle(
    codec: str, mode: Any, log: Path
) -> None:
    def run(model: nn.Module) -> Tensor:
        with mode():
            return model(torch.linspace(-1, 1, 24).reshape(3, 8))

    _check(sequential(), log, run, codec=codec)


def _noise(dtype: torch.dtype) -> Tensor:
    """Give every kind of value: random bits, so NaNs of any payload, infinities, subnormals."""
    generator = torch.Generator().manual_seed(5)
    if dtype is torch.bool:
        return torch.randint(0, 2, (3, 4, 32), generator=generator).bool()
    bits = torch.randint(0, 256, (3, 4, 512), generator=generator).to(torch.uint8)
    return bits.view(dtype)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "name",
    [
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "complex128",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    ],
)
def test_every_dtype_keeps_any_bits(name: str, codec: str, log: Path) -> None:
    values = _noise(getattr(torch, name))
    model = Each(noise=lambda _: values)
    with capturing(model, log, codec=codec):
        model(torch.zeros(1))
    with Oracle(model) as oracle:
        model(torch.zeros(1))
    assert [one.data for one in oracle.fired] == [bytes_of(values)] * 2
    assert_equals(log, oracle.fired)


def test_nan_and_infinities_of_a_model_are_kept(log: Path) -> None:
    model = build("llama")
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    with torch.no_grad():
        embedding[5, 0], embedding[6, 0] = torch.nan, torch.inf
    try:
        with Oracle(model) as oracle, capturing(model, log), torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]))
    finally:
        with torch.no_grad():
            embedding.copy_(before)
    packets = assert_equals(log, oracle.fired)
    assert np.isnan(packets[-1].values).any()


def test_gradients_are_the_same_with_and_without_capture(log: Path) -> None:
    model = build("llama")

    def gradients() -> list[bytes]:
        model.zero_grad()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        found = [bytes_of(one.grad) for one in model.parameters() if one.grad is not None]
        model.zero_grad()
        return found

    wanted = gradients()
    with Oracle(model) as oracle, capturing(model, log):
        found = gradients()
    assert len(wanted) > 10
    assert found == wanted
    assert_equals(log, oracle.fired)


def test_dropout_draws_the_same_numbers_with_and_without_capture(log: Path) -> None:
    model = sequential().train()

    def run(model: nn.Module) -> Tensor:
        torch.manual_seed(2)
        return model(torch.ones(3, 8))

    _check(model, log, run)


def test_sampled_generation_is_the_same_with_and_without_capture(log: Path) -> None:
    def run(model: nn.Module) -> Tensor:
        torch.manual_seed(2)
        return model.generate(token_ids(), max_new_tokens=4, do_sample=True, pad_token_id=0)

    _check(
        build("llama"),
        log,
        run,
        granularity=HookGranularity.MLP_ONLY,
        names=_names("llama", "mlp"),
    )


def test_recomputation_in_backward_gives_no_packets(log: Path) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    model = Checkpointed()
    with capturing(model, log):
        model(torch.ones(2, 4)).sum().backward()
    with Oracle(model) as oracle:
        model(torch.ones(2, 4))
    assert_equals(log, oracle.fired)


def test_two_models_in_one_log_are_told_apart(log: Path) -> None:
    from oracle import framework, quiet

    one, two, both = sequential(), sequential(), framework(FULL)
    both.instrument_model(one, name="teacher")
    both.instrument_model(two, name="student")
    with quiet(), both.capture_activations(log), Oracle(one) as first, Oracle(two) as second:
        two(torch.ones(2, 8))
        one(torch.zeros(2, 8))
    renamed = [
        type(fired)(f"{prefix}.{fired.layer}".rstrip("."), fired.shape, fired.dtype, fired.data)
        for prefix, oracle in (("student", second), ("teacher", first))
        for fired in oracle.fired
    ]
    packets = assert_equals(log, renamed)
    assert Counter(one.pass_index for one in packets) == {0: 7, 1: 7}
