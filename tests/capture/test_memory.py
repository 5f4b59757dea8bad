"""The memory that captures use again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from oracle import Oracle, assert_equals, framework, quiet
from tiny_models import build, token_ids

from actstore.capture.memory import Memory
from actstore.stream.direct import PAGE


def test_a_piece_begins_at_a_page_and_is_given_again() -> None:
    memory = Memory()
    first, second = memory.take(100_000), memory.take(100_000)
    assert first.nbytes == second.nbytes == 100_000
    assert first.ctypes.data % PAGE == second.ctypes.data % PAGE == 0
    assert not np.shares_memory(first, second)
    memory.give_back(first)
    assert np.shares_memory(memory.take(100_000), first)
    memory.give_back(second)
    assert not np.shares_memory(memory.take(200_000), second)


def test_a_framework_captures_again_and_again_in_the_same_memory(tmp_path: Path) -> None:
    model, one = build("llama"), framework(codec="zstd", max_memory_gb=0.05)
    one.instrument_model(model)
    used = []
    for number in range(3):
        log = tmp_path / f"{number}.stream"
        with quiet(), torch.no_grad(), Oracle(model) as oracle, one.capture_activations(str(log)):
            model(token_ids() + number)
        assert_equals(log, oracle.fired)
        free = one._memory._free
        used.append(sorted(piece.ctypes.data for pieces in free.values() for piece in pieces))
    assert used[0] == used[1] == used[2]
    assert used[0]
