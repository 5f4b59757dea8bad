"""Owns what becomes of a tensor that a module was given or returned: a packet, an alias, nothing.

Which modules are hooked and when a pass runs is ``hooks.py``'s business, the copy ``stage.py``'s.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

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

#: Of eight passes those are timed: of the first most come the slow way, as does what follows a
#: prompt.
_TIMED, _OF = (0, 2), 8
#: A tensor of fewer bytes may be held for a while after its module gave it; so is what it is a
#: view of.
_SMALL = 32 << 10
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
    form : Form or None
        Of the plain tensor that it gave last; None before the first.
    kind, alias : int
        The numbers of the kinds of its packets like the last, of those that have values and of
        aliases; -1 where there was none yet.
    fired : int
        Firings that gave a tensor but not by the fast way: the first of every form.
    """

    info: LayerInfo
    described: bool
    form: Form | None = None
    kind: int = -1
    alias: int = -1
    fired: int = 0


#: What tells whether a tensor is as it was when it was staged: version, form, address, rows' axis.
_State = tuple[int | None, Form, int, str]


@dataclass(slots=True, eq=False)
class Live:
    """What the fast way knows of the pass that runs.

    Attributes
    ----------
    thread : int
        In which it runs, where whole tensors are kept as they come; else 0.
    inference : bool
        It runs under ``inference_mode``: its tensors have no version.
    timed : bool
        What is kept by the fast way is timed.
    firings, seconds : int, float
        How much that was in all passes, and how long it took.
    held : int
        A tensor of fewer bytes is held until the next is staged; 0 where the pass might never
        end, or a graph hang on it.
    tensor : torch.Tensor or None
        The one that is held.
    seq, state
        Its packet's, and what it was like.
    """

    thread: int = 0
    inference: bool = False
    timed: bool = False
    firings: int = 0
    seconds: float = 0.0
    held: int = 0
    tensor: Tensor | None = None
    seq: int = -1
    state: _State | None = None


def _references() -> int:
    """Give how many references there are to a tensor that nobody has but `Live` and who asks."""
    live = Live(tensor=torch.empty(0))
    last = live.tensor
    return sys.getrefcount(last)


_ALONE: Final = _references()


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
    live : Live
        What the fast way knows of the pass that runs.
    slow : int
        How many packets came otherwise.
    """

    def __init__(
        self,
        stage: Stage,
        choice: Choice,
        known_widths: set[int] | None = None,
        crossings: Crossings | None = None,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.live = Live()
        self.slow = 0
        self._passes = 0
        self._stage = stage
        self._crossings = crossings or Crossings()
        self._choice = choice
        self._sampling = choice.sampling
        self._written_widths = set(known_widths or ())
        self._kept: dict[int, Tensor] = {}
        self._forms: dict[tuple[torch.dtype, torch.Size], Form] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, _State | None]] = {}
        self._chosen: dict[str, tuple[Axis, Axis, NDArray[np.int64]]] = {}

    def begin_pass(self, *, ends: bool) -> None:
        """Forget what the pass before kept; ``ends`` says that this one's end will be told."""
        live = self.live
        live.inference = torch.is_inference_mode_enabled()
        live.timed = self._passes % _OF in _TIMED
        live.held = _SMALL if ends and not torch.is_grad_enabled() else 0
        live.tensor = None
        self._passes += 1
        self._seen.clear()
        self._chosen = {}

    def end_pass(self) -> None:
        """Let go of what the pass gave."""
        self.live.thread, self.live.tensor = 0, None
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
        otherwise: Callable[[nn.Module, Any, Any], None],
    ) -> Callable[..., None]:
        """Give the forward hook of all modules: it keeps a tensor like the one before.

        It runs whenever a module fires, with caches that are full of the model's weights: every
        line costs, and so does every object that isn't that of the module before, too. What is
        anything else goes on to ``otherwise``, before anything is done.

        A small tensor is held until the next one comes, if no graph hangs on it. Only if somebody
        else still has it then is it remembered, by a weak reference, for the rest of the pass:
        what is gone can't be returned again, most are gone, and to remember one costs more than
        to copy it.

        Parameters
        ----------
        layers : mapping of torch.nn.Module to LayerState
            The layer that a module's output is; of one that isn't there nothing is kept.
        otherwise : callable
            Takes a module, its arguments and its output.
        """
        live, seen, put, again = self.live, self._seen, self._stage.put, self._put_again
        put_from, copier = self._stage.put_from, self._crossings.copier
        identify, in_backward = threading.get_ident, torch._C._current_graph_task_id
        clock, find, reference = time.perf_counter, layers.get, weakref.ref
        references = sys.getrefcount

        def fired(module: nn.Module, args: Any, output: Any) -> None:
            layer = find(module)
            if layer is None:  # a copy of a model whose hooks were copied, too
                return None
            form = layer.form
            began = clock() if live.timed else 0.0
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
                version = None if live.inference else tensor._version
                address = tensor.data_ptr()
            except RuntimeError:  # it has none
                return otherwise(module, args, output)
            last, state = live.tensor, (version, form, address, "")
            known = tensor is last or id(tensor) in seen
            if not known or not again(layer, tensor, state):
                if on_host:
                    seq = put(layer.kind, form.nbytes, address)
                else:
                    seq = put_from(layer.kind, form.nbytes, copier(tensor.detach()))
                if last is not None and references(last) > _ALONE:
                    seen[id(last)] = (reference(last), live.seq, live.state)
                if form.nbytes < live.held:
                    live.tensor, live.seq, live.state = tensor, seq, state
                else:
                    live.tensor = None
                    seen[id(tensor)] = (reference(tensor), seq, state)
            if began:
                live.seconds += clock() - began
                live.firings += 1
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
        if not kept.is_cpu and not takes(kept.device):
            kept = kept.cpu()
        plain = kept.resolve_conj().resolve_neg().contiguous()
        if not layer.described:
            self._stage.add_layer(layer.info)
            layer.described = True
        state = self._state(tensor, axis)
        kind = Kind(layer.info.id, _CODES[tensor.dtype], tuple(plain.shape), plain.nbytes, width)
        number = self._stage.kind(kind)
        if number != layer.kind:
            layer.kind, layer.alias = number, -1
        if not self._put_again(layer, tensor, state):
            seq = self._put(number, plain)
            if tensor is self.live.tensor:
                self.live.tensor = None
            self._seen[id(tensor)] = (weakref.ref(tensor), seq, state)
        like = self._choice.plain and not tensor.dtype.is_complex
        layer.form = state[1] if like else None
        self.slow += 1

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
        try:
            version = None if self.live.inference else tensor._version
        except RuntimeError:  # of one that was made under inference_mode
            version = None
        about = (tensor.dtype, tensor.shape)
        form = self._forms.get(about)
        if form is None:
            form = self._forms[about] = Form(*about, tensor.numel() * tensor.itemsize)
        return (version, form, tensor.data_ptr(), axis)

    def _put(self, kind: int, plain: Tensor) -> int:
        if takes(plain.device):  # staged on the device
            return self._stage.put_from(kind, plain.nbytes, self._crossings.copier(plain))
        return self._stage.put(kind, plain.nbytes, plain.data_ptr())

    def _put_again(self, layer: LayerState, tensor: Tensor, state: _State) -> bool:
        """Stage an alias, if a packet of this pass holds this very tensor, unchanged.

        It is known by being the same Python object, never by its address: the allocator uses
        addresses again. The entry of an object that is gone can't match, since its weak
        reference is dead. Assigning ``.data`` changes no version: it shows in the rest.
        """
        live = self.live
        if tensor is live.tensor:
            seq, then = live.seq, live.state
        else:
            known = self._seen.get(id(tensor))
            if known is None or known[0]() is not tensor:
                return False
            _, seq, then = known
        if then != state or (state[0] is None and not self._unchanged(tensor, seq)):
            return False
        if layer.alias < 0:
            kind = self._stage.kinds[layer.kind]
            layer.alias = self._stage.kind(kind._replace(nbytes=0, form=ALIAS))
        self._stage.put_alias(layer.alias, seq)
        return True

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
