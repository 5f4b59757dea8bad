"""Packets that cross from a device: the same pipeline, with a CPU as the device.

Its streams are real queues here: what is enqueued on another stream than the model's happens when
somebody waits for it, and no sooner. So a group that is encoded before it has arrived, or a twin
that is used again too early, shows in the bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FULL, Oracle, assert_equals, assert_sampled, capturing, framework, quiet
from tiny_models import build, token_ids
from torch import Tensor, nn
from transformers import AutoTokenizer

from actstore.capture import device
from actstore.config import HookConfig, HookGranularity
from actstore.errors import CaptureError
from actstore.stream.reader import open_stream

_copy = Tensor.copy_


class Queue:
    """A stream: what is enqueued happens when it is waited for."""

    def __init__(self, _device: object = None) -> None:
        self.pending: list[Callable[[], object]] = []
        self.waited_for: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited_for.append(other)

    def run(self) -> None:
        while self.pending:
            self.pending.pop(0)()


class Event:
    """Has passed once its stream has run."""

    def __init__(self) -> None:
        self.stream: Queue | None = None

    def record(self, stream: Queue) -> None:
        self.stream = stream

    def query(self) -> bool:
        return self.stream is not None and not self.stream.pending

    def synchronize(self) -> None:
        assert self.stream is not None, "nobody has recorded it"
        self.stream.run()


class Device:
    """What `torch.cuda` is to a GPU, for a CPU that lags behind."""

    Stream, Event = Queue, Event

    def __init__(self) -> None:
        self.main = Queue()
        self.graph = False
        self.crossed = 0

    def current_stream(self, _device: object) -> Queue:
        return self.main

    def is_current_stream_capturing(self) -> bool:
        return self.graph

    @contextmanager
    def stream(self, side: Queue) -> Iterator[None]:
        assert self.main in side.waited_for, "it would read what is not computed yet"

        def enqueue(target: Tensor, source: Tensor, non_blocking: bool = False) -> None:
            assert non_blocking, "the model would wait"
            self.crossed += source.nbytes
            side.pending.append(lambda: _copy(target, source))

        Tensor.copy_ = enqueue  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Tensor.copy_ = _copy  # type: ignore[method-assign]


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Let the CPU be a device of its own."""
    made = Device()
    monkeypatch.setattr(device, "_STREAMING", {"cpu"})
    monkeypatch.setattr(torch, "get_device_module", lambda _device: made)
    return made


def _forward(model: nn.Module) -> None:
    with torch.no_grad():
        model(input_ids=token_ids(), attention_mask=torch.ones(2, 5, dtype=torch.long))


def _inference(model: nn.Module) -> None:
    with torch.inference_mode():
        model(input_ids=token_ids())


def _generate(model: Any) -> None:
    mask = torch.ones(2, 5, dtype=torch.long)
    model.generate(token_ids(), attention_mask=mask, max_new_tokens=6, pad_token_id=0)


#: Not the fast way, which keeps what is in the host's memory.
SLOW = HookConfig(outputs="all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("run", [_forward, _inference, _generate])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_crosses_is_what_plain_hooks_see(
    lagging: Device, architecture: str, run: Any, codec: str, dtype: torch.dtype, log: Path
) -> None:
    model = copy.deepcopy(build(architecture)).to(dtype)
    with Oracle(model) as oracle, capturing(model, log, FULL, codec=codec, hooks=SLOW):
        run(model)
        run(model)
    layers = set(dict(model.named_modules()))
    with open_stream(log) as reader:
        found = [one for one in reader.packets() if one.layer in layers]
    wanted = oracle.fired
    assert [one.layer for one in found] == [one.layer for one in wanted]
    for packet, fired in zip(found, wanted, strict=True):
        assert packet.values.tobytes() == fired.data
    assert lagging.crossed


def test_groups_and_parts_of_a_small_budget_cross_in_few_twins(
    lagging: Device, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)), nn.Linear(256, 40_000))
    made = []
    fresh = torch.empty

    def empty(*args: Any, **how: Any) -> Tensor:
        if how.get("dtype") is torch.uint8 and "device" in how:
            made.append(args)
        return fresh(*args, **how)

    monkeypatch.setattr(torch, "empty", empty)
    one = framework(FULL, max_memory_gb=0.012)
    one.instrument_model(model, SLOW)
    with quiet(), Oracle(model) as oracle, one.capture_activations(str(log)):
        for number in range(30):
            model(torch.randn(24, 256, generator=torch.manual_seed(number)))
    assert_equals(log, oracle.fired)
    assert 1 < len(made) <= device._TWINS


def test_what_was_fed_is_read_when_it_has_come(lagging: Device, log: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("examples/tiny-llama")
    model = build("llama")
    ids, mask = token_ids(), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    one = framework(FULL)
    one.instrument_model(model, SLOW, tokenizer=tokenizer)
    with quiet(), one.capture_activations(str(log)), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(3, 8)[None])
    with open_stream(log) as reader:
        (axis,) = reader.passes[0].axes
        texts = reader.token_texts
    np.testing.assert_array_equal(axis.token_ids, ids.numpy())
    np.testing.assert_array_equal(axis.positions, np.broadcast_to(np.arange(3, 8), (2, 5)))
    np.testing.assert_array_equal(axis.mask, mask.numpy() == 1)
    assert texts == {one: tokenizer.decode([one]) for one in set(ids.flatten().tolist())}


@pytest.mark.parametrize("rows", ["last", "generated", slice(1, 3)])
def test_rows_that_are_chosen_cross(lagging: Device, rows: Any, log: Path, tmp_path: Path) -> None:
    model = build("llama")
    hooks = HookConfig(target_layers=["model.layers.*"], rows=rows)
    with capturing(model, log, FULL, hooks=hooks):
        _generate(model)
    lagging_free = tmp_path / "plain.stream"
    device._STREAMING.clear()  # type: ignore[attr-defined]
    with capturing(model, lagging_free, FULL, hooks=hooks):
        _generate(model)
    with open_stream(log) as one, open_stream(lagging_free) as other:
        assert one.packet_count == other.packet_count > 0
        for mine, its in zip(one.packets(), other.packets(), strict=True):
            assert mine.values.tobytes() == its.values.tobytes()


def test_sampled_slices_cross(lagging: Device, log: Path) -> None:
    model = build("llama")
    with Oracle(model) as oracle, capturing(model, log, HookGranularity.SAMPLED_SLICES):
        _forward(model)
    assert_sampled(log, oracle.fired)


def test_a_graph_that_is_being_captured_is_refused(lagging: Device, log: Path) -> None:
    model = build("llama")
    with (
        pytest.raises(CaptureError, match="CUDA graph is being captured"),
        capturing(model, log, FULL, hooks=SLOW),
    ):
        lagging.graph = True
        _forward(model)
