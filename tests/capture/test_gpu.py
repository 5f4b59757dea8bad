"""Capture of models on a CUDA device: equal to plain hooks, and nobody waits in a hook.

Run on a machine that has one by ``.venv/bin/pytest -m gpu``; the same pipeline is tested without
one in ``test_device.py``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FULL, Oracle, assert_equals, assert_sampled, capturing, framework, quiet, read
from tiny_models import build, token_ids
from torch import nn

from actstore.config import HookConfig, HookGranularity
from actstore.errors import CaptureError
from actstore.stream.reader import open_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _on_gpu(architecture: str, dtype: torch.dtype) -> Any:
    return copy.deepcopy(build(architecture)).to("cuda", dtype).eval()


def _forward(model: nn.Module) -> None:
    mask = torch.ones(2, 5, dtype=torch.long, device="cuda")
    with torch.no_grad():
        model(input_ids=token_ids().cuda(), attention_mask=mask)


def _generate(model: Any) -> None:
    mask = torch.ones(2, 5, dtype=torch.long, device="cuda")
    model.generate(token_ids().cuda(), attention_mask=mask, max_new_tokens=6, pad_token_id=0)


@contextmanager
def _no_synchronising() -> Iterator[None]:
    """Let whatever waits for the device raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it doesn't see everything
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("run", [_forward, _generate])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packets_equal_what_plain_hooks_see(
    architecture: str, run: Any, codec: str, dtype: torch.dtype, log: Path
) -> None:
    model = _on_gpu(architecture, dtype)
    with Oracle(model) as oracle, capturing(model, log, FULL, codec=codec):
        run(model)
        run(model)
    assert_equals(log, oracle.fired)


def test_no_hook_waits_for_the_device(log: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 64), *(nn.Linear(64, 64) for _ in range(4))).cuda()
    ids = token_ids().remainder(50).cuda()
    with capturing(model, log, FULL), torch.no_grad():
        model(ids)  # memory is allocated once, which waits
        with _no_synchronising():
            model(ids)
    assert len(read(log)) == 2 * len(list(model.modules()))


def test_groups_of_a_small_budget_cross_from_several_streams(log: Path) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)), nn.Linear(256, 40_000)).cuda()
    one = framework(FULL, max_memory_gb=0.012)
    one.instrument_model(model)
    streams = [torch.cuda.Stream() for _ in range(3)]
    with quiet(), Oracle(model) as oracle, one.capture_activations(str(log)), torch.no_grad():
        for number in range(60):
            stream = streams[number % 3]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                model(torch.randn(24, 256, device="cuda"))
            torch.cuda.current_stream().wait_stream(stream)
    assert_equals(log, oracle.fired)


def test_packets_of_host_and_device_share_groups(log: Path) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here, self.there = nn.Linear(64, 3), nn.Linear(3, 64).cuda()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.there(self.here(x).cuda()).cpu()

    model = Split()
    with Oracle(model) as oracle, capturing(model, log, FULL), torch.no_grad():
        for _ in range(50):
            model(torch.randn(1, 64))
    assert_equals(log, oracle.fired)


def test_what_was_fed_and_rows_come_over(log: Path) -> None:
    model = _on_gpu("llama", torch.float32)
    with capturing(model, log, FULL, hooks=HookConfig(rows="last")):
        _generate(model)
    with open_stream(log) as reader:
        assert all(one.axes[0].token_ids.shape == (2, 1) for one in reader.passes)
        np.testing.assert_array_equal(
            reader.passes[0].axes[0].token_ids[:, 0], token_ids()[:, -1].numpy()
        )


def test_sampled_slices_come_over(log: Path) -> None:
    model = _on_gpu("llama", torch.float32)
    with Oracle(model) as oracle, capturing(model, log, HookGranularity.SAMPLED_SLICES):
        _forward(model)
    assert_sampled(log, oracle.fired)


def test_a_graph_that_is_being_captured_is_refused(log: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).cuda()
    x = torch.randn(2, 8, device="cuda")
    with torch.no_grad():
        model(x)
        with pytest.raises(CaptureError, match="CUDA graph"), capturing(model, log, FULL):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(x)
