"""Owns the hooks: what they do when a module fires, and that they go away.

A hook hands what the module returned on at once and returns None, so that the model computes what
it would compute without it. What is hooked is ``select.py``'s business, what becomes of a tensor
``outputs.py``'s, what a pass is ``passes.py``'s, when groups are due ``stage.py``'s.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from actstore.capture.device import Crossings
from actstore.capture.outputs import Choice, LayerState, Outputs, first_tensor, tensors_of
from actstore.capture.passes import (
    Entries,
    Fed,
    FedAxis,
    cache_of,
    is_filled,
    read_axes,
    read_inputs,
    read_rows,
)
from actstore.capture.select import Stack, Target
from actstore.capture.sharding import Sharding, local_of
from actstore.capture.stage import Stage
from actstore.errors import CaptureError
from actstore.packet import MAIN_AXES, Axis, LayerInfo

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")  # how a module's attributes begin
_STATE: Final = 2  # its place in what an object is reduced to
#: Bound here, since between two tokens every look into a large module costs.
_identify, _in_backward = threading.get_ident, torch._C._current_graph_task_id
_forks = 0  # of this process from the one that imported this
_attached: weakref.WeakSet[Hooks] = weakref.WeakSet()


def _forked() -> None:
    global _forks
    _forks += 1
    for hooks in _attached:
        hooks._outputs.live.thread = 0


os.register_at_fork(after_in_child=_forked)

__all__ = ["Hooks"]


class _Stop(BaseException):
    """Ends a forward when every layer has fired; never leaves the model's call."""


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
    next_pass : int
        Where the run stands.
    known : mapping of str to LayerInfo
        Layers that the log describes already.
    choice : Choice
        What is kept of what fires.
    known_widths : set of int
        Widths whose features the log holds already.
    crossings : Crossings
        How packets of devices come to the host.
    tokenizer : object, optional
        With ``decode([id])``: texts of the ids that are fed.
    sharding : Sharding, optional
        Says which part of a layer's output this process has.
    flush_at_pass_end : bool
        Passes are where groups may be sealed; else only recorded tokens are.

    Attributes
    ----------
    recomputed : int
        Firings during backward, which are ignored.
    last_pass : int
        The index of the last pass that began, or -1.
    names : list of str
        The layers that are hooked.
    without_text : dict of int to Exception
        Ids that were fed and that the tokenizer gave no text of, and what it raised.
    """

    def __init__(  # noqa: PLR0913 - what a run begins with, given once by the session
        self,
        stage: Stage,
        targets: list[Target],
        entries: Entries,
        stacks: Sequence[Stack] = (),
        *,
        next_pass: int = 0,
        known: Mapping[str, LayerInfo] | None = None,
        choice: Choice | None = None,
        known_widths: set[int] | None = None,
        crossings: Crossings | None = None,
        tokenizer: Any = None,
        sharding: Sharding | None = None,
        flush_at_pass_end: bool = True,
    ) -> None:
        self.recomputed = 0
        self.last_pass = next_pass - 1
        self.first_pass = next_pass
        self._stage = stage
        self._first_packet = stage.packets
        self._slow_seconds = 0.0
        self._entries = entries
        self._stacks = stacks
        self._forks = _forks
        self._choice = choice or Choice()
        self._outputs = Outputs(stage, self._choice, known_widths, crossings)
        self._tokenizer = tokenizer
        self._sharding = sharding
        self._modules = {target.name: target for target in targets}
        self.without_text: dict[int, Exception] = {}
        self._texts: set[int] = set()
        self._unread: deque[FedAxis | Axis] = deque()  # whose texts are wanted
        self._flush = flush_at_pass_end
        self._annotations: dict[str, list[Any]] = {}
        #: cache, or what an encoder gave -> the labels of its batch items
        self._labelled: MutableMapping[Any, Mapping[str, list[Any]]] = WeakIdKeyDictionary()
        self._pass: Fed | None = None
        self._thread = 0
        self._fed: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._known = known or {}
        self._layers: dict[str, LayerState] = {}
        for target in targets:
            self._layer(target.name, target)
        self._targets = targets
        self.names = [target.name for target in targets]
        self._waiting: set[str] = set()
        self._handles: list[Any] = []
        self._returning: dict[nn.Module, LayerState] = {}
        self._hook = self._outputs.hook(self._returning, self._returned)

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
            ids = {one.id for one in self._handles if not isinstance(one, _Stoppable)}
            hooked = {*self._entries.names, *(stack.blocks[0] for stack in self._stacks)}
            for module in hooked | {target.module for target in self._targets}:
                self._handles.append(_Uncopied(module, ids))
        except BaseException:
            self._remove()
            raise
        _attached.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()
        _attached.discard(self)
        if self.forked:
            return
        if self._pass is not None:
            self._close_pass(aborted=self._entries.inside)
        texts = self._new_texts((), wait=True)
        if texts and not self._stage.over:
            self._stage.add_texts(texts)

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
        self._returning[module] = layer
        return module.register_forward_hook(self._hook)

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep what a module returned, where it isn't like what it returned before."""
        layer = self._returning[module]
        if isinstance(output, Tensor):
            self._fired(layer, args, output)
        else:
            self._fired(layer, args, first_tensor(output))
            for place, tensor in enumerate(tensors_of(output) if self._choice.all_outputs else ()):
                if place:
                    target = self._modules[layer.info.name]
                    another = self._layer(f"{target.name}#{place}", target, place)
                    self._fired(another, args, tensor)
        self._stop_if_done(module)

    def _layer(self, name: str, target: Target, place: int = 0) -> LayerState:
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
            layer = self._layers[name] = LayerState(info, described)
        return layer

    def _stopped(self, module: nn.Module) -> bool:
        """Whether a forward that was stopped ends at this entry module: it is the outermost."""
        return self._entries.outermost is module

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    # -- what a run did -------------------------------------------------------------------------

    def annotate(self, labels: Mapping[str, list[Any]]) -> None:
        """Keep labels for the batch items of the next pass, and of those that go on from it."""
        self._annotations.update(labels)

    @property
    def unused_labels(self) -> list[str]:
        """Labels that wait for a pass."""
        return list(self._annotations)

    def never_fired(self) -> list[str]:
        """Give the names of the layers that gave no packet in this capture."""
        return [name for name, layer in self._layers.items() if not layer.fired]

    @property
    def skipped(self) -> Counter[str]:
        """What couldn't be captured: "layer: why" -> how often."""
        return self._outputs.skipped

    @property
    def packets(self) -> int:
        """Packets of this capture so far."""
        return self._stage.packets - self._first_packet

    @property
    def seconds(self) -> float:
        """How long the hooks of layers took, those that were not timed like those that were."""
        live, slow = self._outputs.live, self._outputs.slow
        each = live.seconds / max(live.firings, 1)
        return self._slow_seconds + each * (self.packets - slow)

    # -- passes ---------------------------------------------------------------------------------

    @property
    def forked(self) -> bool:
        """Whether this is a forked child, whose forwards are not captured."""
        return self._forks != _forks

    def _enter_pass(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if _in_backward() != -1 or self._forks != _forks:
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
            self._add_axes(read_axes(axis, arguments))

    def _leave_pass(self, module: nn.Module, _args: Any, output: Any) -> None:
        elsewhere = _identify() != self._thread or self._forks != _forks
        if _in_backward() != -1 or elsewhere:
            return  # a second thread was refused: its failing forward is not the pass that runs
        if self._entries.leave(module) and self._pass is not None:
            if self._pass.annotations and isinstance(output, Mapping):
                self._label(cache_of(output), self._pass.annotations)
                self._label(output, self._pass.annotations)
            self._close_pass(aborted=self._entries.raised())

    def _block_hook(self, axis: str) -> Any:
        """Give what says how many rows a stack has, where its model was fed no tokens."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside = self._pass is not None and _in_backward() == -1
            inside = inside and self._forks == _forks
            if inside and _identify() == self._thread and not self._has_axis(axis):
                given = {str(place): one for place, one in enumerate(args)} | kwargs
                rows = read_rows(axis, given)
                self._add_axes((rows,) if rows else ())

        return hook

    def _has_axis(self, name: str) -> bool:
        for axis in self._pass.axes if self._pass is not None else ():
            if axis.name == name:
                return True
        return False

    def _count(self, axis: FedAxis) -> None:
        """Give rows behind a cache that can't say how much it holds the next positions."""
        cache, axis.silent = axis.silent, None
        if cache is None or not hasattr(cache, "__weakref__") or not isinstance(cache, Hashable):
            return
        before = self._fed.get(cache, 0)
        self._fed[cache] = before + axis.sequence
        if axis.positions is None:
            axis.before = before

    def _add_axes(self, axes: tuple[FedAxis, ...]) -> None:
        if axes and self._pass is not None:
            for axis in axes:
                self._count(axis)
            found = (*self._pass.axes, *self._outputs.choose(axes))
            self._pass.axes = tuple(sorted(found, key=lambda axis: axis.name in MAIN_AXES))
            self._stage.update_pass(self._pass, self._new_texts(self._pass.axes))

    def _open_pass(self, entry: str, axis: str, arguments: Mapping[str, Any]) -> None:
        annotations, self._annotations = self._annotations, {}
        self._thread = _identify()
        try:
            axes, keep = read_inputs(
                self.last_pass + 1, axis, arguments, annotations, deferred=bool(self._stacks)
            )
        except BaseException:
            self._entries.forget()
            raise
        if annotations or self._labelled:
            annotations = {**self._labels_of(arguments, axes), **annotations}
            self._label(cache_of(arguments), annotations)
        self._outputs.begin_pass(ends=self._entries.inside)
        for one in axes:
            self._count(one)
        kept = self._outputs.choose(axes)
        fed = Fed(self.last_pass + 1, kept, annotations, entry, keep)
        self._waiting = set(self.names) if self._choice.stop else set()
        self._stage.begin_pass(fed, self._new_texts(fed.axes))
        self.last_pass = fed.index
        self._pass = fed
        self._outputs.live.thread = self._thread if self._choice.plain else 0

    def _label(self, what: Any, labels: Mapping[str, list[Any]]) -> None:
        """Keep the labels of the batch items that a cache, or what an encoder gave, is of."""
        with contextlib.suppress(TypeError):  # what can't be referred to weakly, such as a tuple
            self._labelled[what] = labels

    def _labels_of(
        self, arguments: Mapping[str, Any], axes: Sequence[FedAxis]
    ) -> Mapping[str, list[Any]]:
        """Give the labels of the batch items that a pass goes on with."""
        cache, encoded = cache_of(arguments), arguments.get("encoder_outputs")
        for what in (cache, encoded):
            with contextlib.suppress(TypeError):  # as above
                labels = self._labelled.get(what, {})
                fits = axes and all(len(one) == axes[-1].batch for one in labels.values())
                if labels and fits and (what is encoded or is_filled(what)):
                    return labels
        return {}

    def _close_pass(self, *, aborted: bool) -> None:
        assert self._pass is not None  # noqa: S101 - callers asked
        index, self._pass = self._pass.index, None
        self._outputs.end_pass()
        # a failure has surfaced already, or will at the end; what a signal's handler raised while
        # the hooks were taken away may have closed the stage before
        if not self._stage.over:
            self._stage.end_pass(index, aborted=aborted, flush=self._flush)

    def _new_texts(
        self, axes: Iterable[FedAxis | Axis], *, wait: bool = False
    ) -> Mapping[int, str]:
        """Give the texts of ids that are fed for the first time, once they are on the host."""
        if self._tokenizer is None:
            return {}
        self._unread.extend(axes)
        fed: set[int] = set()
        while self._unread:
            axis = self._unread[0]
            if isinstance(axis, FedAxis):
                if not wait and not all(event.query() for event in axis.events):
                    break
                axis = axis.axis()
            fed |= set(np.unique(axis.token_ids).tolist())
            self._unread.popleft()
        new = [one for one in sorted(fed - self._texts) if one >= 0]  # others stand for no token
        self._texts.update(new)
        texts = {}
        for one in new:
            try:
                texts[one] = str(self._tokenizer.decode([one]))
            except Exception as error:  # the user's: no reason to end the model's forward
                self.without_text[one] = error
        return texts

    # -- layers ---------------------------------------------------------------------------------

    def _fired(self, layer: LayerState, args: Any, tensor: Tensor | None) -> None:
        began = time.perf_counter()
        if _in_backward() != -1:
            self.recomputed += 1  # checkpointing runs the forward again in backward
            return
        if self._forks != _forks:
            return
        self._waiting.discard(layer.info.name)
        whole = tensor
        if tensor is not None and type(tensor) is not Tensor:
            tensor = local_of(tensor)
        if tensor is None or whole is None or not self._outputs.can_keep(layer, tensor):
            return
        if self._sharding is not None and not layer.described:
            self._describe(layer, whole, tensor, args)
        if self._pass is None:
            given = {f"*{i}": value for i, value in enumerate(args)}
            self._open_pass(layer.info.name, "token", given)
            assert self._pass is not None  # noqa: S101 - just opened
        else:
            self._check_thread(layer.info.name)
        self._outputs.keep(layer, tensor, self._pass)
        self._slow_seconds += time.perf_counter() - began

    def _describe(self, layer: LayerState, whole: Tensor, local: Tensor, args: Any) -> None:
        """Say which part of a layer's output is here, before the log describes it."""
        info = layer.info
        target = self._modules.get(info.name)
        if self._sharding is not None:
            module, tap = (target.module, target.tap) if target is not None else (None, "further")
            shard = self._sharding.shard_of(info.name, module, tap, whole, local, args)
            layer.info = replace(info, shard=shard)

    def _stop_if_done(self, module: nn.Module) -> None:
        """End the forward that a module fired in, when every layer has fired."""
        outermost = self._entries.outermost
        inside = outermost is not None and outermost is not module
        if self._choice.stop and not self._waiting and inside:
            raise _Stop

    def _check_thread(self, name: str) -> None:
        if self._entries.inside and _identify() != self._thread:
            msg = (
                f"layer {name!r} fired in a second thread while pass {self.last_pass} runs in "
                "another; run one forward of the captured models at a time"
            )
            raise CaptureError(msg)


def _weights(output: Any) -> Tensor | None:
    """Give the attention weights [batch, heads, queries, keys] behind an attention's output."""
    rest = output[1:] if isinstance(output, tuple | list) else ()
    found = [one for one in rest if isinstance(one, Tensor) and one.ndim == 4]
    return found[-1] if found else None  # T5's position bias stands before them


class _Uncopied:
    """Leaves what a capture put into a module out of its copies, pickled or not, until removed.

    It stands in the module alone: hooks that could be copied would cost more at every firing.
    """

    def __init__(self, module: nn.Module, ids: set[int]) -> None:
        self._module = module
        self._ids = ids
        module.__dict__["__reduce_ex__"] = self._reduce

    def _reduce(self, protocol: SupportsIndex) -> Any:
        made = type(self._module).__reduce_ex__(self._module, protocol)
        if isinstance(made, str) or len(made) <= _STATE or not isinstance(made[_STATE], dict):
            return made
        state = {
            name: OrderedDict(one for one in value.items() if one[0] not in self._ids)
            if name.startswith(_HOOKS)
            else value
            for name, value in made[_STATE].items()
            if name != "__reduce_ex__"
        }
        stoppable = getattr(state.get("forward"), "stoppable", None)
        if stoppable is not None:
            stoppable.restore(state)
        return *made[:_STATE], state, *made[_STATE + 1 :]

    def remove(self) -> None:
        """Let the module be copied as it was before."""
        self._module.__dict__.pop("__reduce_ex__", None)


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

        stoppable.stoppable = self  # type: ignore[attr-defined]
        self._stoppable = module.forward = stoppable

    def remove(self) -> None:
        """Give the module its own forward again, if nobody has given it another since."""
        if self._module.__dict__.get("forward") is self._stoppable:
            self.restore(self._module.__dict__)

    def restore(self, state: dict[str, Any]) -> None:
        """Put the forward into a module's attributes that it had before."""
        if self._own:
            state["forward"] = self._before
        else:
            del state["forward"]
