"""Owns what becomes of a tensor that a module was given or returned: a packet, an alias, nothing.

Which modules are hooked and when a pass runs is ``hooks.py``'s business, the copy ``stage.py``'s.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actstore import dtypes
from actstore.capture.device import Crossings, takes
from actstore.capture.group import ALIAS, Kind
from actstore.capture.passes import Fed, FedAxis, RowChoice, has_bytes
from actstore.capture.stage import Stage
from actstore.packet import Axis, LayerInfo, axis_of_site, is_weights
from actstore.stream.records import Features

__all__ = ["Choice", "LayerState", "Live", "Outputs", "Sampling", "first_tensor", "tensors_of"]

_TIMED = 7
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

    @property
    def plain(self) -> bool:
        """Whether whole tensors are kept as they come."""
        parts = self.sampling is not None or self.rows is not None
        return not (parts or self.all_outputs or self.stop)


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What tensors of one dtype and shape share: one object, whatever layer they are of.

    Attributes
    ----------
    dtype : torch.dtype
        Of their elements.
    shape : torch.Size
        Their shape.
    nbytes : int
        Bytes of one of them.
    """

    dtype: torch.dtype
    shape: torch.Size
    nbytes: int


@dataclass(slots=True, eq=False)
class LayerState:
    """A hooked module's state.

    Attributes
    ----------
    info : LayerInfo
        What it is.
    described : bool
        The log says so.
    fired, kept : int
        Firings that gave a tensor but not by the fast way, and packets in all.
    timed, seconds : int, float
        Of the packets that came by the fast way, those that were timed, and how long they took.
    slow, slow_seconds : int, float
        The packets that came otherwise, and how long all firings took that did.
    form, kind
        Of the plain packet that it gave last; None, 0 before the first.
    """

    info: LayerInfo
    described: bool
    fired: int = 0
    kept: int = 0
    timed: int = 0
    seconds: float = 0.0
    slow: int = 0
    slow_seconds: float = 0.0
    form: Form | None = None
    kind: int = 0


@dataclass(slots=True, eq=False)
class Live:
    """The thread whose pass runs, where whole tensors are kept as they come; else 0."""

    thread: int = 0


#: What tells whether a tensor is as it was when it was staged.
_State = tuple[int | None, Form, int, str]


class Outputs:
    """Make packets of tensors.

    Parameters
    ----------
    stage : Stage
        Where packets go.
    choice : Choice
        What is kept.
    known_widths : set of int
        Widths whose features the log holds already.
    crossings : Crossings
        How packets of devices come to the host.

    Attributes
    ----------
    skipped : collections.Counter
        "layer: why" -> how often an output couldn't be captured.
    inference : bool
        The pass runs under ``inference_mode``: its tensors have no version.
    """

    def __init__(
        self,
        stage: Stage,
        choice: Choice,
        known_widths: set[int] | None = None,
        crossings: Crossings | None = None,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.inference = False
        self._stage = stage
        self._crossings = crossings or Crossings()
        self._choice = choice
        self._sampling = choice.sampling
        self._written_widths = set(known_widths or ())
        self._kept: dict[int, Tensor] = {}
        self._forms: dict[tuple[torch.dtype, torch.Size], Form] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, *_State]] = {}
        self._chosen: dict[str, tuple[Axis, Axis, NDArray[np.int64]]] = {}

    def begin_pass(self) -> None:
        """Forget what the pass before kept."""
        self._seen.clear()
        self._chosen = {}
        self.inference = torch.is_inference_mode_enabled()

    def end_pass(self) -> None:
        """Let go of what the pass gave."""
        self._seen.clear()

    def choose(self, axes: tuple[FedAxis, ...]) -> tuple[FedAxis | Axis, ...]:
        """Give axes of the rows that are kept."""
        rows = self._choice.rows
        if rows is None:
            return axes
        whole = [one.axis() for one in axes]
        self._chosen |= {axis.name: (axis, *rows.choose(axis)) for axis in whole}
        return tuple(self._chosen[axis.name][1] for axis in whole)

    # -- the fast way ---------------------------------------------------------------------------

    def hook(
        self,
        layers: Mapping[nn.Module, LayerState],
        live: Live,
        otherwise: Callable[[nn.Module, Any, Any], None],
    ) -> Callable[..., None]:
        """Give the forward hook of all modules: it keeps a tensor like the one before.

        It runs whenever a module fires, with caches that are full of the model's weights: every
        line costs, and so does every object that isn't that of the module before, too. What is
        anything else goes on to ``otherwise``, before anything is done.

        Parameters
        ----------
        layers : mapping of torch.nn.Module to LayerState
            The layer that a module's output is; of one that isn't there nothing is kept.
        live : Live
            In which thread tensors are kept as they come.
        otherwise : callable
            Takes a module, its arguments and its output.
        """
        seen, put, reference = self._seen, self._stage.put, weakref.ref
        put_from, copier = self._stage.put_from, self._crossings.copier
        identify, in_backward = threading.get_ident, torch._C._current_graph_task_id
        clock, find = time.perf_counter, layers.get

        def fired(module: nn.Module, args: Any, output: Any) -> None:
            layer = find(module)
            if layer is None:  # a copy of a model whose hooks were copied, too
                return None
            form = layer.form
            # one in eight is timed; the first has come otherwise
            began = clock() if layer.kept & _TIMED == 1 else 0.0
            tensor = output[0] if type(output) is tuple and output else output
            try:
                if (
                    form is None
                    or type(tensor) is not Tensor
                    or tensor.shape != form.shape
                    or tensor.dtype is not form.dtype
                    or identify() != live.thread
                    or not ((on_host := tensor.is_cpu) or takes(tensor.device))
                    or not tensor.is_contiguous()
                    or tensor.is_neg()
                    or in_backward() != -1
                ):
                    return otherwise(module, args, output)
                known = seen.get(id(tensor))
                if known is not None and known[0]() is not None:
                    return otherwise(module, args, output)
                version = None if self.inference else tensor._version
                address = tensor.data_ptr()
            except RuntimeError:  # it has none
                return otherwise(module, args, output)
            if on_host:
                seq = put(layer.kind, form.nbytes, address)
            else:
                seq = put_from(layer.kind, form.nbytes, copier(tensor.detach()))
            layer.kept += 1
            # the packet's state, as _state has it, in one tuple with the rest
            seen[id(tensor)] = (reference(tensor), seq, version, form, address, "")
            if began:
                layer.seconds += clock() - began
                layer.timed += 1
            return None

        return fired

    # -- any other ------------------------------------------------------------------------------

    def keep(self, layer: LayerState, tensor: Tensor, fed: Fed) -> None:
        """Stage what is kept of a tensor, in a pass."""
        if self._chosen:
            kept, axis = self._rows_of(layer, tensor.detach(), fed)
        else:
            kept, axis = tensor.detach(), ""
        layer.fired += 1
        if kept is None:
            return
        width = 0
        if self._sampling is not None and kept.ndim:
            width = kept.shape[-1]
            kept = kept.index_select(-1, self._features(width, kept.device))
        staged = takes(kept.device)  # on the device
        if not staged and not kept.is_cpu:
            kept = kept.cpu()
        plain = kept.resolve_conj().resolve_neg().contiguous()
        if not layer.described:
            self._stage.add_layer(layer.info)
            layer.described = True
        state = self._state(tensor, axis)
        kind = Kind(layer.info.id, _CODES[tensor.dtype], tuple(plain.shape), plain.nbytes, width)
        known = self._alias(tensor, state)
        if known is not None:
            self._stage.put_alias(self._stage.kind(kind._replace(nbytes=0, form=ALIAS)), known)
        else:
            number = self._stage.kind(kind)
            if staged:
                seq = self._stage.put_from(number, plain.nbytes, self._crossings.copier(plain))
            else:
                seq = self._stage.put(number, plain.nbytes, plain.data_ptr())
            self._seen[id(tensor)] = (weakref.ref(tensor), seq, *state)
            if self._choice.plain and not tensor.dtype.is_complex:
                layer.form, layer.kind = state[1], number
        layer.kept += 1
        layer.slow += 1

    def can_keep(self, layer: LayerState, tensor: Tensor) -> bool:
        """Whether a tensor is one that can be kept; note it where not."""
        if tensor.dtype in _CODES and has_bytes(tensor):
            return True
        self._skip(layer, _kind(tensor))
        layer.fired += 1
        return False

    def _skip(self, layer: LayerState, why: str) -> None:
        self.skipped[f"{layer.info.name}: {why}"] += 1

    def _rows_of(self, layer: LayerState, tensor: Tensor, fed: Fed) -> tuple[Tensor | None, str]:
        """Take the rows that are kept of a tensor over a token axis, and name the axis.

        None where no row is kept; the whole tensor where it is over no axis, or there is doubt.
        """
        site = layer.info.site
        fits = {
            name: fit
            for name, (axis, _, _) in self._chosen.items()
            if (fit := _fit(axis, tensor.shape, site, fed)) is not None
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

    def _state(self, tensor: Tensor, axis: str) -> _State:
        version = None if tensor.is_inference() or self.inference else tensor._version
        about = (tensor.dtype, tensor.shape)
        form = self._forms.get(about)
        if form is None:
            form = self._forms[about] = Form(*about, tensor.numel() * tensor.itemsize)
        return (version, form, tensor.data_ptr(), axis)

    def _alias(self, tensor: Tensor, state: _State) -> int | None:
        """Give the seq of the packet of this pass that holds this very tensor, unchanged.

        It is known by being the same Python object, never by its address: the allocator uses
        addresses again. The entry of an object that is gone can't match, since its weak
        reference is dead. Assigning ``.data`` changes no version: it shows in the rest.
        """
        known = self._seen.get(id(tensor))
        if known is not None:
            reference, seq, *then = known
            same = reference() is tensor and tuple(then) == state
            if same and (state[0] is not None or self._unchanged(tensor, seq)):
                return seq
        return None

    def _unchanged(self, tensor: Tensor, seq: int) -> bool:
        """Compare a tensor that has no version with its staged copy, byte for byte."""
        elsewhere = takes(tensor.device) or not tensor.is_cpu
        if self._sampling is not None or self._chosen or elsewhere:
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


def _fit(axis: Axis, shape: tuple[int, ...], site: str, fed: Fed) -> int | None:
    """Give how many rows of each item a shape over an axis holds, the last ones."""
    keep = fed.logits_to_keep
    if is_weights(site, len(shape)):
        return None
    if not axis.flat and shape[:2] == (axis.batch, axis.sequence):
        return axis.sequence
    if (axis.flat or axis.sequence > 1) and shape[:1] == (axis.rows,):
        return axis.sequence
    head = site in ("logits", "output") and 0 < keep < axis.sequence
    return keep if head and shape[:2] == (axis.batch, keep) else None


def _kind(tensor: Tensor) -> str:
    """Say what a tensor is that can't be kept."""
    kind = "" if type(tensor) in (Tensor, nn.Parameter) else f" ({type(tensor).__name__})"
    nested = "nested" if tensor.is_nested else f"layout {tensor.layout}"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        nested += " inside of a torch.func transform"
    return f"{tensor.dtype}{kind} in {nested} on {tensor.device.type}"
