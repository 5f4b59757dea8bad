"""Owns the hooks: what they do when a module fires, and that they go away.

A hook copies the first tensor of the output into the stage at once and returns None, so that the
model computes what it would compute without it. What is hooked is ``select.py``'s business, what
a pass is ``passes.py``'s, when groups are due ``stage.py``'s.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actstore import dtypes
from actstore.capture.passes import (
    CACHES,
    UNKNOWN,
    Entries,
    RowChoice,
    has_bytes,
    read_axes,
    read_inputs,
    read_rows,
)
from actstore.capture.select import Stack, Target
from actstore.capture.stage import Stage
from actstore.errors import CaptureError
from actstore.packet import MAIN_AXES, Axis, LayerInfo, PassInfo, axis_of_site, is_weights
from actstore.stream.records import Features

_forks = 0  # of this process from the one that imported this


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)

__all__ = ["Choice", "Hooks", "Sampling", "first_tensor"]

_CODES: dict[torch.dtype, int] = {
    getattr(torch, name): entry.code
    for name, entry in dtypes.BY_NAME.items()
    if hasattr(torch, name)
}


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output, depth first."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return
    for item in value:
        yield from tensors_of(item)


def first_tensor(value: Any) -> Tensor | None:
    """Give the first tensor of an output, depth first; None where there is none."""
    return next(tensors_of(value), None)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How ``SAMPLED_SLICES`` draws: ``ceil(rate * width)`` features a width, from a seed."""

    rate: float
    seed: int

    def draw(self, width: int) -> Features:
        """Draw the features of a width; the same for the same seed and width."""
        count = math.ceil(self.rate * width)
        generator = np.random.default_rng([self.seed, width])
        kept = np.sort(generator.choice(width, size=min(count, width), replace=False))
        return Features(width, kept.astype(np.uint32))


@dataclass(slots=True)
class _Layer:
    """A hooked module's state."""

    info: LayerInfo
    described: bool
    fired: int = 0
    kept: int = 0
    pass_index: int = -1
    calls: int = 0


class _Stop(BaseException):
    """Ends a forward when every layer has fired; never leaves the model's call."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What of the targets' firings is kept.

    Attributes
    ----------
    sampling : Sampling or None
        Only these features.
    rows : RowChoice or None
        Only these rows.
    all_outputs : bool
        Every tensor of an output, not the first alone.
    stop : bool
        End a forward when every layer has fired.
    """

    sampling: Sampling | None = None
    rows: RowChoice | None = None
    all_outputs: bool = False
    stop: bool = False


class Hooks:
    """The hooks of one capture: a context manager that attaches and removes them.

    Parameters
    ----------
    stage : Stage
        Where packets go.
    targets : sequence of Target
        What is hooked.
    entries : Entries
        The entry modules.
    stacks : sequence of Stack
        The stacks of blocks, which say how many rows there are where the entries don't.
    next_seq, next_pass : int
        Where the run stands.
    known : mapping of str to LayerInfo
        Layers that the log describes already.
    choice : Choice
        What is kept of what fires.
    known_widths : set of int
        Widths whose features the log holds already.
    tokenizer : object, optional
        With ``decode([id])``: texts of the ids that are fed.
    flush_at_pass_end : bool
        Passes are where groups may be sealed; else only recorded tokens are.

    Attributes
    ----------
    skipped : collections.Counter
        "layer: why" -> how often an output couldn't be captured.
    recomputed : int
        Firings during backward, which are ignored.
    last_pass : int
        The index of the last pass that began, or -1.
    names : list of str
        The layers that are hooked.
    """

    def __init__(  # noqa: PLR0913 - what a run begins with, given once by the session
        self,
        stage: Stage,
        targets: list[Target],
        entries: Entries,
        stacks: Sequence[Stack] = (),
        *,
        next_seq: int = 0,
        next_pass: int = 0,
        known: Mapping[str, LayerInfo] | None = None,
        choice: Choice = Choice(),
        known_widths: set[int] | None = None,
        tokenizer: Any = None,
        flush_at_pass_end: bool = True,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.recomputed = 0
        self.last_pass = next_pass - 1
        self.first_pass = next_pass
        self._stage = stage
        self._entries = entries
        self._stacks = stacks
        self._seq = next_seq
        self._forks = _forks
        self._choice = choice
        self._sampling = choice.sampling
        self._written_widths = set(known_widths or ())
        self._kept: dict[int, Tensor] = {}
        self._tokenizer = tokenizer
        self._texts: set[int] = set()
        self._flush = flush_at_pass_end
        self._annotations: dict[str, list[Any]] = {}
        self._pass: PassInfo | None = None
        self._thread = 0
        self._seen: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...], int]] = {}
        self._fed: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._known = known or {}
        self._layers: dict[str, _Layer] = {}
        for target in targets:
            self._layer(target.name, target)
        self._targets = targets
        self.names = [target.name for target in targets]
        self._waiting: set[str] = set()
        self._chosen: dict[str, tuple[Axis, Axis, NDArray[np.int64]]] = {}
        self._handles: list[Any] = []

    # -- attaching ------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            for module in self._entries.names:
                handle = module.register_forward_pre_hook(
                    self._enter_pass, with_kwargs=True, prepend=True
                )
                self._handles.append(handle)
            for stack in self._stacks:
                handle = stack.blocks[0].register_forward_pre_hook(
                    self._block_hook(stack.axis), with_kwargs=True
                )
                self._handles.append(handle)
            for target in self._targets:
                self._handles.append(self._attach(target))
            for module in self._entries.names:
                self._handles.append(
                    module.register_forward_hook(self._leave_pass, always_call=True)
                )
                if self._choice.stop:
                    self._handles.append(_Stoppable(module, self._stopped))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()
        if self._pass is not None and not self.forked:
            self._close_pass(aborted=self._entries.inside)

    def _attach(self, target: Target) -> Any:
        layer, module = self._layers[target.name], target.module
        if target.tap == "in":

            def given(_module: nn.Module, args: Any, kwargs: Any) -> None:
                self._fired(layer, args, first_tensor((args, kwargs)))
                self._stop_if_done(module)

            return module.register_forward_pre_hook(given, with_kwargs=True)
        if target.tap == "weights":

            def weighed(_module: nn.Module, args: Any, output: Any) -> None:
                self._fired(layer, args, _weights(output))
                self._stop_if_done(module)

            return module.register_forward_hook(weighed)
        every = self._choice.all_outputs

        def fired(_module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._fired(layer, args, output)
            else:
                self._fired(layer, args, first_tensor(output))
                for place, tensor in enumerate(tensors_of(output) if every else ()):
                    if place:
                        another = self._layer(f"{target.name}#{place}", target, place)
                        self._fired(another, args, tensor)
            self._stop_if_done(module)

        return module.register_forward_hook(fired)

    def _layer(self, name: str, target: Target, place: int = 0) -> _Layer:
        """Give a layer's state; of a new one with its id: the log's, else the next free one."""
        layer = self._layers.get(name)
        if layer is None:
            info = self._known.get(name)
            described = info is not None
            if info is None:
                ids = [one.id for one in self._known.values()]
                ids += [one.info.id for one in self._layers.values()]
                site = f"{target.site}#{place}" if place else target.site
                kind = type(target.module).__name__
                info = LayerInfo(max(ids, default=-1) + 1, name, site, target.block, kind)
            layer = self._layers[name] = _Layer(info, described)
        return layer

    def _stopped(self, module: nn.Module) -> bool:
        """Whether a forward that was stopped ends at this entry module: it is the outermost."""
        return self._entries.outermost is module

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    # -- what a run did -------------------------------------------------------------------------

    def annotate(self, labels: Mapping[str, list[Any]]) -> None:
        """Keep labels for the batch items of the next pass."""
        self._annotations.update(labels)

    def never_fired(self) -> list[str]:
        """Give the names of the layers that gave no packet in this capture."""
        return [name for name, layer in self._layers.items() if not layer.fired]

    @property
    def packets(self) -> int:
        """Packets of this capture so far."""
        return sum(layer.kept for layer in self._layers.values())

    # -- passes ---------------------------------------------------------------------------------

    @property
    def forked(self) -> bool:
        """Whether this is a forked child, whose forwards are not captured."""
        return self._forks != _forks

    def _enter_pass(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if torch._C._current_graph_task_id() != -1 or self._forks != _forks:
            return
        name, axis = self._entries.names[module]
        self._check_thread(name)
        outermost = self._entries.enter(module)
        if not outermost and (not axis or self._has_axis(axis)):
            return
        arguments = self._entries.arguments(module, args, kwargs)
        if outermost:
            if self._pass is not None:
                self._close_pass(aborted=self._entries.interrupted)
            self._open_pass(name, axis, arguments)
        else:
            self._add_axes(read_axes(axis, arguments), arguments)

    def _leave_pass(self, module: nn.Module, _args: Any, _output: Any) -> None:
        elsewhere = threading.get_ident() != self._thread or self._forks != _forks
        if torch._C._current_graph_task_id() != -1 or elsewhere:
            return  # a second thread was refused: its failing forward is not the pass that runs
        if self._entries.leave(module) and self._pass is not None:
            self._close_pass(aborted=self._entries.raised())

    def _block_hook(self, axis: str) -> Any:
        """Give what says how many rows a stack has, where its model was fed no tokens."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside = self._pass is not None and torch._C._current_graph_task_id() == -1
            inside = inside and self._forks == _forks
            if inside and threading.get_ident() == self._thread and not self._has_axis(axis):
                given = {str(place): one for place, one in enumerate(args)} | kwargs
                rows = read_rows(axis, given)
                self._add_axes((rows,) if rows else (), {})

        return hook

    def _has_axis(self, name: str) -> bool:
        return self._pass is not None and any(axis.name == name for axis in self._pass.axes)

    def _count(self, axis: Axis, arguments: Mapping[str, Any]) -> Axis:
        """Give rows behind a cache that can't say how much it holds the next positions."""
        cache = next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)
        if cache is None or not hasattr(cache, "__weakref__") or not isinstance(cache, Hashable):
            return axis
        before = self._fed.get(cache, 0)
        self._fed[cache] = before + axis.sequence
        if axis.rows and axis.positions[0, 0] == UNKNOWN:
            positions = np.broadcast_to(before + np.arange(axis.sequence), axis.positions.shape)
            return replace(axis, positions=positions.copy())
        return axis

    def _add_axes(self, axes: tuple[Axis, ...], arguments: Mapping[str, Any]) -> None:
        if axes and self._pass is not None:
            axes = self._choose(tuple(self._count(axis, arguments) for axis in axes))
            found = (*self._pass.axes, *axes)
            main = sorted(found, key=lambda axis: axis.name in MAIN_AXES)  # they come last
            self._pass = replace(self._pass, axes=tuple(main))
            self._stage.update_pass(self._pass, self._new_texts(self._pass))

    def _choose(self, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        """Give the axes of the rows that are kept."""
        rows = self._choice.rows
        if rows is None:
            return axes
        for axis in axes:
            self._chosen[axis.name] = (axis, *rows.choose(axis))
        return tuple(self._chosen[axis.name][1] for axis in axes)

    def _open_pass(self, entry: str, axis: str, arguments: Mapping[str, Any]) -> None:
        annotations, self._annotations = self._annotations, {}
        self._thread = threading.get_ident()
        try:
            info = read_inputs(
                self.last_pass + 1,
                entry,
                axis,
                arguments,
                annotations,
                deferred=bool(self._stacks),
            )
        except BaseException:
            self._entries.forget()
            raise
        self._chosen = {}
        axes = self._choose(tuple(self._count(axis, arguments) for axis in info.axes))
        info = replace(info, axes=axes)
        self._waiting = set(self.names) if self._choice.stop else set()
        self._stage.begin_pass(info, self._new_texts(info))
        self.last_pass = info.index
        self._pass = info

    def _close_pass(self, *, aborted: bool) -> None:
        assert self._pass is not None  # noqa: S101 - callers asked
        index, self._pass = self._pass.index, None
        self._seen.clear()
        if self._stage.failure is None:  # which has surfaced already, or will at the end
            self._stage.end_pass(index, aborted=aborted, flush=self._flush)

    def _new_texts(self, info: PassInfo) -> dict[int, str]:
        if self._tokenizer is None:
            return {}
        fed = {int(one) for axis in info.axes for one in np.unique(axis.token_ids)}
        new = sorted(fed - self._texts - {-1})
        texts = {one: str(self._tokenizer.decode([one])) for one in new}
        self._texts.update(new)
        return texts

    # -- layers ---------------------------------------------------------------------------------

    def _fired(self, layer: _Layer, args: Any, tensor: Tensor | None) -> None:
        if torch._C._current_graph_task_id() != -1:
            self.recomputed += 1  # checkpointing runs the forward again in backward
            return
        if self._forks != _forks:
            return
        self._waiting.discard(layer.info.name)
        if tensor is None:
            return
        code = _CODES.get(tensor.dtype)
        if code is None or not has_bytes(tensor):
            self._skip(layer, _kind(tensor))
            return
        if self._pass is None:
            given = {f"*{i}": value for i, value in enumerate(args)}
            self._open_pass(layer.info.name, "token", given)
        else:
            self._check_thread(layer.info.name)
        layer.fired += 1
        kept, axis = (
            self._rows_of(layer, tensor.detach()) if self._chosen else (tensor.detach(), "")
        )
        if kept is not None:
            self._put(layer, kept, code, self._alias(tensor, axis))

    def _stop_if_done(self, module: nn.Module) -> None:
        """End the forward that a module fired in, when every layer has fired."""
        outermost = self._entries.outermost
        inside = outermost is not None and outermost is not module
        if self._choice.stop and not self._waiting and inside:
            raise _Stop

    def _skip(self, layer: _Layer, why: str) -> None:
        layer.fired += 1
        self.skipped[f"{layer.info.name}: {why}"] += 1

    def _rows_of(self, layer: _Layer, tensor: Tensor) -> tuple[Tensor | None, str]:
        """Take the rows that are kept of a tensor over a token axis, and name the axis.

        None where no row is kept; the whole tensor where it is over no axis, or there is doubt.
        """
        site = layer.info.site
        fits = {
            name: fit
            for name, (axis, _, _) in self._chosen.items()
            if (fit := self._fit(axis, tensor.shape, site)) is not None
        }
        name = axis_of_site(site, fits) if len(fits) > 1 else next(iter(fits), None)
        if name is None:
            return tensor, ""
        axis, _, places = self._chosen[name]
        if not places.size:
            return None, name
        last = fits[name]
        if int(places.min()) < axis.sequence - last:
            self._skip(
                layer, f"of {axis.sequence} rows it gives the last {last}, others are asked"
            )
            return None, name
        wanted = torch.from_numpy(places - (axis.sequence - last)).to(tensor.device)
        items = torch.arange(axis.batch, device=tensor.device).unsqueeze(1)
        if tensor.shape[:2] == (axis.batch, last):
            return tensor[items, wanted], name
        picked = tensor[items * axis.sequence + wanted]
        return (picked.flatten(0, 1) if axis.flat else picked), name

    def _fit(self, axis: Axis, shape: tuple[int, ...], site: str) -> int | None:
        """Give how many rows of each item a shape over an axis holds, the last ones."""
        assert self._pass is not None  # noqa: S101 - the caller runs inside of one
        keep = self._pass.logits_to_keep
        if is_weights(site, len(shape)):
            return None
        if not axis.flat and shape[:2] == (axis.batch, axis.sequence):
            return axis.sequence
        if (axis.flat or axis.sequence > 1) and shape[:1] == (axis.rows,):
            return axis.sequence
        head = site in ("logits", "output") and 0 < keep < axis.sequence
        return keep if head and shape[:2] == (axis.batch, keep) else None

    def _put(self, layer: _Layer, tensor: Tensor, code: int, alias_of: int | None) -> None:
        width = 0
        if self._sampling is not None and tensor.ndim:
            width = tensor.shape[-1]
            tensor = tensor.index_select(-1, self._features(width, tensor.device))
        if tensor.device.type != "cpu":
            tensor = tensor.cpu()
        plain = tensor.resolve_conj().resolve_neg().contiguous()
        index = self.last_pass
        if layer.pass_index != index:
            layer.pass_index, layer.calls = index, 0
        if not layer.described:
            self._stage.add_layer(layer.info)
            layer.described = True
        nbytes = 0 if alias_of is not None else plain.nbytes
        seq, self._seq = self._seq, self._seq + 1  # not given again, even if put is interrupted
        self._stage.put(
            seq,
            layer.info.id,
            plain.data_ptr(),
            nbytes,
            dtype=code,
            shape=tuple(plain.shape),
            pass_index=index,
            call=layer.calls,
            width=width,
            alias_back=0 if alias_of is None else seq - alias_of,
        )
        layer.calls += 1
        layer.kept += 1

    def _alias(self, tensor: Tensor, axis: str) -> int | None:
        """Give the seq of the packet of this pass that holds this very tensor, unchanged.

        It is known by being the same Python object, never by its address: the allocator uses
        addresses again. The entry of an object that is gone can't match, since its weak
        reference is dead. Assigning ``.data`` changes no version: it shows in the rest. ``axis``
        is the one whose rows were taken of it.
        """
        version = None if tensor.is_inference() else tensor._version
        state = (version, tensor.dtype, tensor.shape, tensor.data_ptr(), axis)
        known = self._seen.get(id(tensor))
        if known is not None:
            reference, then, seq = known
            same = reference() is tensor and then == state
            if same and (version is not None or self._unchanged(tensor, seq)):
                return seq
        self._seen[id(tensor)] = (weakref.ref(tensor), state, self._seq)
        return None

    def _unchanged(self, tensor: Tensor, seq: int) -> bool:
        """Compare a tensor that has no version with its staged copy, byte for byte."""
        if self._sampling is not None or self._chosen or tensor.device.type != "cpu":
            return False
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        return self._stage.same_bytes(seq, plain.data_ptr(), plain.nbytes)

    def _features(self, width: int, device: torch.device) -> Tensor:
        kept = self._kept.get(width)
        if kept is None:
            assert self._sampling is not None  # noqa: S101 - the caller asked
            features = self._sampling.draw(width)
            if width not in self._written_widths:
                self._stage.add_features(features)
                self._written_widths.add(width)
            kept = torch.from_numpy(features.indices.astype(np.int64))
            self._kept[width] = kept
        return kept.to(device)

    def _check_thread(self, name: str) -> None:
        if self._entries.inside and threading.get_ident() != self._thread:
            msg = (
                f"layer {name!r} fired in a second thread while pass {self.last_pass} runs in "
                "another; run one forward of the captured models at a time"
            )
            raise CaptureError(msg)


def _kind(tensor: Tensor) -> str:
    """Say what a tensor is that can't be kept."""
    kind = "" if type(tensor) in (Tensor, nn.Parameter) else f" ({type(tensor).__name__})"
    nested = "nested" if tensor.is_nested else f"layout {tensor.layout}"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        nested += " inside of a torch.func transform"
    return f"{tensor.dtype}{kind} in {nested} on {tensor.device.type}"


def _weights(output: Any) -> Tensor | None:
    """Give the attention weights [batch, heads, queries, keys] behind an attention's output."""
    rest = output[1:] if isinstance(output, tuple | list) else ()
    found = [one for one in rest if isinstance(one, Tensor) and one.ndim == 4]
    return found[-1] if found else None  # T5's position bias stands before them


class _Stoppable:
    """Lets a module's call end in None when its forward is stopped, until it is removed."""

    def __init__(self, module: nn.Module, ends: Callable[[nn.Module], bool]) -> None:
        self._module = module
        self._own = "forward" in module.__dict__
        forward = self._before = module.forward

        @functools.wraps(forward)
        def stoppable(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except _Stop:
                if ends(module):
                    return None
                raise

        self._stoppable = module.forward = stoppable

    def remove(self) -> None:
        """Give the module its own forward again, if nobody has given it another since."""
        if self._module.__dict__.get("forward") is not self._stoppable:
            return
        if self._own:
            self._module.forward = self._before
        else:
            del self._module.forward
