"""Owns the way of packets from a device to the host: nobody waits for it but the encoder.

A device's packets are copied on the device into a *twin* of their group's arena, at the same
offsets, in the stream that the model runs in. When the group is sealed, what was copied crosses in
a stream of its own into the arena, which is pinned memory; the encoder waits for the event behind
it. The hooks only enqueue. Knows of groups no more than their arena.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore.capture.group import ALIGN, Group
from actstore.errors import CaptureError

__all__ = ["Crossings", "late", "pinned", "takes"]

#: Kinds of devices that have streams, events and pinned memory; others are waited for.
_STREAMING: Final = {"cuda"}
#: How many groups of a device may be open or crossing: what they take of its memory.
_TWINS: Final = 4


def takes(device: torch.device) -> bool:
    """Whether packets of a device are staged on it."""
    return device.type in _STREAMING


def pinned(nbytes: int) -> NDArray[np.uint8]:
    """Give fresh memory that devices write to while the processor does something else."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()


def _interface(device: torch.device) -> Any:
    """Give PyTorch's module of streams and events of a device.

    Raises
    ------
    CaptureError
        A graph is being captured: what its kernels copy is in no log when it is replayed.
    """
    module = torch.get_device_module(device)
    if module.is_current_stream_capturing():
        msg = (
            "a CUDA graph is being captured inside of capture_activations: hooks don't run when "
            "it is replayed, so nothing of it would be in the log; run the model without CUDA "
            "graphs"
        )
        raise CaptureError(msg)
    return module


def late(tensor: Tensor, dtype: torch.dtype) -> tuple[NDArray[Any], Any]:
    """Begin to copy a small tensor of a device, converted; give where to, and the event behind.

    The array's values are there once the event's ``synchronize`` returns.
    """
    module = _interface(tensor.device)
    with torch.inference_mode(False), torch.no_grad():
        pin = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=dtype, pin_memory=pin)
        host.copy_(tensor.detach().to(dtype), non_blocking=True)
    event = module.Event()
    event.record(module.current_stream(tensor.device))
    return host.numpy(), event


@dataclass(slots=True, eq=False)
class _Twin:
    """A group's bytes on a device.

    Attributes
    ----------
    memory : torch.Tensor
        uint8: as large as the arena.
    views : dict of torch.dtype to torch.Tensor
        The same memory as elements of a dtype.
    ranges : list of [start, stop]
        What of it was copied to.
    streams : list
        In which streams.
    event : object
        Behind its crossing; None before that is enqueued.
    """

    memory: Tensor
    views: dict[torch.dtype, Tensor] = field(default_factory=dict)
    ranges: list[list[int]] = field(default_factory=list)
    streams: list[Any] = field(default_factory=list)
    event: Any = None


@dataclass(slots=True, eq=False)
class Crossing:
    """What of one group is on devices."""

    arena: NDArray[np.uint8]
    owner: Crossings
    twins: dict[torch.device, _Twin] = field(default_factory=dict)

    def send(self) -> None:
        """Enqueue the crossing of all that was copied; the group takes no more."""
        host = torch.from_numpy(self.arena)
        for device, twin in self.twins.items():
            module = torch.get_device_module(device)
            side = self.owner.side_stream(device)
            for stream in twin.streams:
                side.wait_stream(stream)
            with module.stream(side):
                for start, stop in twin.ranges:
                    host[start:stop].copy_(twin.memory[start:stop], non_blocking=True)
                twin.event = module.Event()
                twin.event.record(side)

    def arrive(self) -> None:
        """Return when the arena holds everything."""
        for twin in self.twins.values():
            twin.event.synchronize()


class Crossings:
    """Stage packets on their devices. Its methods are called under the stage's lock.

    Attributes
    ----------
    waited_seconds : float
        How long the model waited for earlier groups to cross.
    """

    def __init__(self) -> None:
        self.waited_seconds = 0.0
        self._twins: dict[torch.device, deque[_Twin]] = {}
        self._sides: dict[torch.device, Any] = {}

    def copier(self, tensor: Tensor) -> Callable[[Group, int, int, int], None]:
        """Give what copies a part of a tensor of a device into a group.

        Parameters
        ----------
        tensor : torch.Tensor
            Contiguous, without a gradient.

        Returns
        -------
        callable
            Takes the group, an offset in its arena, and of the tensor's bytes the first and how
            many.

        Raises
        ------
        CaptureError
            A CUDA graph is being captured.
        """
        device = tensor.device
        stream = _interface(device).current_stream(device)

        def copy(group: Group, offset: int, start: int, nbytes: int) -> None:
            twin = self._twin(group, device)
            stop = offset + nbytes
            if nbytes == tensor.nbytes:  # the fewest calls of PyTorch: each takes a microsecond
                dtype = tensor.dtype
                view = twin.views.get(dtype)
                if view is None:
                    view = twin.views[dtype] = twin.memory.view(dtype)
                place = offset // tensor.itemsize
                view.as_strided(tensor.shape, tensor.stride(), place).copy_(tensor)
            else:
                source = tensor.reshape(-1).view(torch.uint8)
                twin.memory[offset:stop].copy_(source[start : start + nbytes])
            if stream not in twin.streams:
                twin.streams.append(stream)
            last = twin.ranges[-1] if twin.ranges else None
            if last is not None and 0 <= offset - last[1] < ALIGN:  # nothing else is between
                last[1] = stop
            else:
                twin.ranges.append([offset, stop])

        return copy

    def side_stream(self, device: torch.device) -> Any:
        """Give the stream that groups cross in."""
        if device not in self._sides:
            self._sides[device] = torch.get_device_module(device).Stream(device)
        return self._sides[device]

    def _twin(self, group: Group, device: torch.device) -> _Twin:
        if group.crossing is None:
            group.crossing = Crossing(group.arena, self)
        twins: dict[torch.device, _Twin] = group.crossing.twins
        if device not in twins:
            twins[device] = self._fresh(group.arena.nbytes, device)
        return twins[device]

    def _fresh(self, nbytes: int, device: torch.device) -> _Twin:
        """Give a twin that nothing is in: the oldest, once it has crossed, or another one."""
        lent = self._twins.setdefault(device, deque())
        crossed = bool(lent) and lent[0].event is not None and lent[0].event.query()
        if len(lent) < _TWINS and not crossed:
            with torch.inference_mode(False):  # whole elements of every dtype
                memory = torch.empty(-(-nbytes // ALIGN) * ALIGN, dtype=torch.uint8, device=device)
            twin = _Twin(memory)
        else:
            oldest = lent.popleft()
            began = time.monotonic()
            oldest.event.synchronize()
            self.waited_seconds += time.monotonic() - began
            twin = _Twin(oldest.memory, oldest.views)
        lent.append(twin)
        return twin
