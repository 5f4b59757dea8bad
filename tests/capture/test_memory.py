"""The memory that captures use again."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle, assert_equals, framework, quiet
from tiny_models import build, token_ids

from actstore.capture import stage
from actstore.capture.memory import Memory
from actstore.stream.direct import PAGE
from actstore.stream.writer import StreamWriter


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


def _pieces(memory: Memory) -> list[int]:
    return [piece.nbytes for pieces in memory._free.values() for piece in pieces]


def test_a_framework_keeps_little_of_what_a_capture_used(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "GROUP_BYTES", 1 << 20)
    append, stalled, taken, take = StreamWriter.append, threading.Event(), [], Memory.take

    def slow(self: StreamWriter, *how: Any) -> None:
        if threading.current_thread().name == "actstore-write":  # else it is the log's beginning
            stalled.wait(30)
        append(self, *how)

    def counted(self: Memory, nbytes: int) -> Any:
        taken.append(nbytes)
        return take(self, nbytes)

    monkeypatch.setattr(StreamWriter, "append", slow)
    monkeypatch.setattr(Memory, "take", counted)
    model, one = torch.nn.Linear(64, 1 << 16), framework(max_memory_gb=0.05)
    one.instrument_model(model)
    with quiet(), torch.no_grad(), one.capture_activations(log):
        for _ in range(24):  # fewer than there are arenas
            model(torch.zeros(2, 64))
        stalled.set()
    assert sum(taken) > 16 << 20
    assert len(_pieces(one._memory)) == 8
    assert sum(_pieces(one._memory)) <= 8 << 20


def test_a_copy_of_a_framework_has_none_of_its_memory(log: Path) -> None:
    model, one = torch.nn.Linear(4, 4), framework(max_memory_gb=0.05)
    one.instrument_model(model)
    with quiet(), one.capture_activations(log):
        model(torch.full((1, 4), 7.0))
    assert sum(_pieces(one._memory)) > 1 << 20
    pickled = pickle.dumps(one)
    assert len(pickled) < 1 << 16
    for other in (copy.deepcopy(one), pickle.loads(pickled)):
        assert not _pieces(other._memory)
        (of_it,) = other._models
        with quiet(), other.capture_activations(log.with_name("other.stream")):
            of_it(torch.ones(1, 4))
        assert other.summary["packets"] == 1
        log.with_name("other.stream").unlink()
