"""The oracle of capture: plain forward hooks that clone, and nothing of actstore's."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from actstore.config import HookConfig, HookGranularity, InstrumentationConfig
from actstore.errors import ActstoreWarning
from actstore.framework import InstrumentationFramework
from actstore.packet import Packet
from actstore.stream.reader import open_stream

FULL = HookGranularity.FULL_TENSOR


@dataclass(frozen=True)
class Fired:
    """What a hook saw."""

    layer: str
    shape: tuple[int, ...]
    dtype: str
    data: bytes


def bytes_of(tensor: Tensor) -> bytes:
    """Give a tensor's elements as bytes, in C order."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_of(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors_of(one)


class Oracle:
    """Clones what every module of a model returns, while the context is open.

    Clones are turned into bytes only when asked for: what the model does to a tensor after it
    was returned must not be seen.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        self._model = model
        self._names = None if names is None else set(names)
        self._clones: list[tuple[str, Tensor]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            if self._names is None or name in self._names:
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = next(tensors_of(output), None)
            if tensor is not None:
                self._clones.append((name, tensor.detach().clone()))

        return hook

    @property
    def fired(self) -> list[Fired]:
        """What fired, in order."""
        return [
            Fired(
                name, tuple(clone.shape), str(clone.dtype).removeprefix("torch."), bytes_of(clone)
            )
            for name, clone in self._clones
        ]


def as_fired(packet: Packet) -> Fired:
    """Give a packet as the oracle has it."""
    values = packet.values
    return Fired(packet.layer, values.shape, values.dtype.name, values.tobytes())


def read(log: Path) -> list[Packet]:
    """Give every packet of a log that must be whole."""
    with open_stream(log) as reader:
        assert reader.complete
        packets = list(reader.packets())
        assert len(packets) == reader.packet_count
    return packets


def assert_equals(log: Path, fired: list[Fired]) -> list[Packet]:
    """Compare a log with what fired: count, order, names, shapes, dtypes, bytes, calls."""
    packets = read(log)
    assert [one.layer for one in packets] == [one.layer for one in fired]
    for packet, wanted in zip(packets, fired, strict=True):
        found = as_fired(packet)
        assert (found.layer, found.shape, found.dtype) == (
            wanted.layer,
            wanted.shape,
            wanted.dtype,
        )
        assert found.data == wanted.data, f"values of {wanted.layer!r}, seq {packet.seq}"
    assert [one.seq for one in packets] == list(range(len(packets)))
    calls = Counter[tuple[str, int]]()
    for packet in packets:
        assert packet.call == calls[packet.layer, packet.pass_index]
        calls[packet.layer, packet.pass_index] += 1
    return packets


def assert_sampled(log: Path, fired: list[Fired]) -> None:
    """Compare a log of sampled slices with the features of what fired that it says it has."""
    with open_stream(log) as reader:
        for packet, wanted in zip(reader.packets(), fired, strict=True):
            whole = np.frombuffer(wanted.data, wanted.dtype).reshape(wanted.shape)
            kept = reader.features[wanted.shape[-1]]
            np.testing.assert_array_equal(packet.values, whole[..., kept])


def framework(
    granularity: HookGranularity = FULL, codec: str = "lz4", **settings: Any
) -> InstrumentationFramework:
    """Give a framework with little to write by default."""
    return InstrumentationFramework(InstrumentationConfig(granularity, codec, **settings))


@contextmanager
def quiet() -> Iterator[None]:
    """Leave the warnings out that a run of little models always gives."""
    with warnings.catch_warnings():
        for text in (".*never fired", ".*GB/s were reached"):
            warnings.filterwarnings("ignore", text, ActstoreWarning)
        yield


@contextmanager
def capturing(
    model: nn.Module,
    log: Path,
    granularity: HookGranularity = FULL,
    codec: str = "lz4",
    hooks: HookConfig | None = None,
    **options: Any,
) -> Iterator[Any]:
    """Capture a model into a log; yield the tracker."""
    one = framework(granularity, codec)
    one.instrument_model(model, hooks)
    with quiet(), one.capture_activations(str(log), **options) as tracker:
        yield tracker


def hooks_of(model: nn.Module) -> list[str]:
    """Give the names of modules that have any hooks, but for those that transformers leaves.

    It records hidden states by hooks of its own, and never takes them away.
    """
    return [
        name
        for name, module in model.named_modules()
        if any(
            not str(getattr(hook, "__module__", "")).startswith("transformers.")
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
    ]
