"""What actstore reads of real captures is what the specification alone makes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actstore.config import HookConfig, HookGranularity
from actstore.stream.reader import open_stream

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
import independent_reader
import refeed
from oracle import FULL, Oracle, capturing, framework, quiet
from test_log import contents, read_independently
from tiny_models import Each, build, sequential, token_ids

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


class Tokenizer:
    """Says what an id stands for."""

    def decode(self, ids: list[int]) -> str:
        """Give a text for it."""
        return f"<é {ids[0]}>"


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "gen.stream"


def same(log: Path) -> dict[str, Any]:
    """Compare the two readers; give what both found, and what only one tells."""
    wanted = read_independently(log)
    with open_stream(log) as reader:
        found = contents(reader)
        for name, one in wanted.items():
            assert found[name] == one, name
        assert found == wanted
        assert reader.complete == independent_reader.read(log)["complete"]
    assert found["packets"]
    return found


def generate(model: Any) -> Any:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    return model.generate(
        token_ids(), attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0
    )


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", HookGranularity, ids=lambda one: one.name)
def test_a_generation_in_any_granularity_dtype_and_codec_reads_the_same(
    granularity: HookGranularity, dtype: Any, codec: str, log: Path
) -> None:
    model, one = build("llama", dtype), framework(granularity, codec)
    one.instrument_model(model, HookConfig(sampling_rate=0.3), tokenizer=Tokenizer())
    with quiet(), one.capture_activations(log, track_per_token=True) as tracker:
        one.annotate(topic=["science", "art"])
        for token in generate(model)[0].tolist():
            tracker.record_token(token, f"<{token}>", position=token - 3)
    found = same(log)
    name = str(dtype).removeprefix("torch.")
    assert name in {packet[4] for packet in found["packets"]}
    assert len(found["passes"]) == 3
    assert found["passes"][0][4] == {"topic": ["science", "art"]}
    assert False in found["passes"][0][5][0][6], "the prompt is padded"
    assert len(found["tokens"]) == 8
    assert found["texts"][int(token_ids()[0, 0])].startswith("<é ")
    assert bool(found["features"]) == (granularity is HookGranularity.SAMPLED_SLICES)
    aliases = any(one["alias_back"] for one in independent_reader.read(log)["packets"])
    assert aliases == (granularity in (FULL, HookGranularity.SAMPLED_SLICES))


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_values_are_those_of_plain_hooks(codec: str, log: Path) -> None:
    model = build("gpt2", torch.bfloat16)
    with Oracle(model) as oracle, capturing(model, log, codec=codec):
        generate(model)
    packets = independent_reader.read(log)["packets"]
    found = [(p["layer"], tuple(p["shape"]), p["dtype"], p["bytes"]) for p in packets]
    assert found == [(one.layer, one.shape, one.dtype, one.data) for one in oracle.fired]
    assert [(one[1], one[5], one[4], one[6]) for one in same(log)["packets"]] == found


ODD: dict[str, Callable[[Any], Any]] = {
    "scalar": lambda x: x.sum(),
    "empty": lambda x: x[:0],
    "flags": lambda x: x > 0,
    "complexes": lambda x: torch.complex(x, -x).conj(),
    "narrow": lambda x: x.to(torch.float8_e4m3fn),
    "wide": lambda x: x.repeat(1, 1 << 19),  # more than a block may hold: in parts
    "again": lambda x: x.repeat(2, 2).T,
}


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_outputs_of_any_kind_and_packets_in_parts_read_the_same(codec: str, log: Path) -> None:
    model = Each(**ODD)
    x = torch.linspace(-2, 2, 16).reshape(2, 8)
    with Oracle(model) as oracle, capturing(model, log, codec=codec):
        model(x)
        model(x[:1])
    found = [(one[1], one[5], one[4], one[6]) for one in same(log)["packets"]]
    assert found == [(one.layer, one.shape, one.dtype, one.data) for one in oracle.fired]
    assert max(one["parts"] for one in independent_reader.read(log)["packets"]) > 1


def test_a_run_that_was_interrupted_and_resumed_reads_the_same(log: Path) -> None:
    def said(line: str) -> None:
        if line == "recorded 4":
            raise ZeroDivisionError

    with quiet(), pytest.raises(ZeroDivisionError):
        refeed.run(log, 6, said=said)
    assert len(same(log)["tokens"]) == 4
    with quiet():
        refeed.run(log, 6, resume=True)
    found = same(log)
    assert [one[0] for one in found["tokens"]] == list(range(6))
    assert [one[0] for one in found["passes"]] == list(range(6))


def test_an_encoder_decoder_and_a_pass_of_it_that_raised_read_the_same(log: Path) -> None:
    model = build("t5")
    with capturing(model, log):
        with torch.no_grad():
            model(input_ids=token_ids(), decoder_input_ids=token_ids(2, 3))
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 2), 10_000), decoder_input_ids=token_ids(1, 1))
    found = same(log)
    assert [one[3] for one in found["passes"]] == [False, True]


def test_a_model_of_floats_reads_the_same(log: Path) -> None:
    model = sequential()
    with capturing(model, log), torch.inference_mode():
        model(torch.ones(3, 8))
        model(torch.ones(8))
    found = same(log)
    assert len(found["packets"]) == 14
    assert found["passes"][0][5][0][5] == [-1, -1, -1], "no ids were fed"
