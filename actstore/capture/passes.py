"""Owns what is a pass: when it opens and closes, and what it was fed.

An entry module's pre-hook takes token ids, positions and mask as the model was given them; its
hook, which is called even if the forward raises, says how it ended.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from actstore.capture.device import late, takes
from actstore.config import Rows
from actstore.errors import ConfigError
from actstore.packet import Axis, PassInfo

__all__ = [
    "UNKNOWN",
    "Entries",
    "RowChoice",
    "cache_of",
    "has_bytes",
    "is_filled",
    "read_axes",
    "read_inputs",
    "read_rows",
]

_IDS: Final = ("input_ids", "tokens", "token_ids", "idx", "input")
_EMBEDS: Final = ("inputs_embeds",)
CACHES: Final = ("past_key_values", "cache", "past_key_value", "past_kv_cache", "state")
#: The position of a row behind a cache that doesn't say how much it holds.
UNKNOWN: Final = -1
#: What the root of an encoder-decoder says of its decoder begins with this.
_OF_DECODER: Final = "decoder_"
#: What it says of both, and is of the decoder.
_OF_CACHE: Final = (*CACHES, "cache_position")
#: Integers that are no token ids.
_NO_IDS: Final = re.compile(r"(mask|position|label|type|index|length)")
#: What arguments mostly are, and is no mapping: to ask of each is slow.
_PLAIN: Final = (Tensor, bool, int, type(None))
_POSITIONS: Final = ("position_ids", "cache_position")
_TOKEN_NDIM: Final = 2
_KEYS_NDIM: Final = 4
_FEW: Final = 16


@dataclass(slots=True, eq=False)
class FedAxis:
    """A token axis as a module was fed it: copies of what it was given, until the axis is wanted.

    Attributes
    ----------
    name, batch, sequence, flat
        As `Axis` has them.
    ids : numpy.ndarray, list or None
        int64 [batch, sequence]; None where none were given.
    mask : numpy.ndarray or None
        bool [batch, sequence]; None where none was given.
    positions : numpy.ndarray, list or None
        int64, as many as the sequence has, or of each row; None where none were given.
    before : int
        Else: how many positions came before the first, or `UNKNOWN`.
    silent : object or None
        The cache that they came into, where it doesn't say how many it holds.
    events : list
        Behind the copies that come from a device: the arrays are good once these have passed.
    """

    name: str
    batch: int
    sequence: int
    ids: NDArray[np.int64] | list[list[int]] | None = None
    positions: NDArray[np.int64] | list[list[int]] | None = None
    mask: NDArray[np.bool_] | None = None
    before: int = 0
    silent: Any = None
    flat: bool = False
    events: list[Any] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Number of rows: batch × sequence."""
        return self.batch * self.sequence

    def axis(self) -> Axis:
        """Give the axis; wait for what comes from a device."""
        for event in self.events:
            event.synchronize()
        shape = (self.batch, self.sequence)
        ids, positions, mask = self.ids, self.positions, self.mask
        if positions is None and self.before == UNKNOWN:
            positions = np.full(shape, UNKNOWN, np.int64)
        elif positions is None:
            positions = np.arange(self.before, self.before + self.sequence)
        positions = np.asarray(positions, np.int64)
        if positions.size != self.rows:
            positions = np.broadcast_to(positions, shape).copy()
        return Axis(
            self.name,
            *shape,
            np.full(shape, -1, np.int64) if ids is None else np.reshape(ids, shape),
            positions.reshape(shape),
            np.ones(shape, np.bool_) if mask is None else mask,
            self.flat,
        )


@dataclass(slots=True, eq=False)
class Fed:
    """What a pass was fed: its `PassInfo`, before it is worked out.

    Attributes
    ----------
    index, annotations, entry, logits_to_keep
        As `PassInfo` has them.
    axes : tuple of FedAxis or Axis
        The token axes so far.
    """

    index: int
    axes: tuple[FedAxis | Axis, ...]
    annotations: Mapping[str, Any]
    entry: str
    logits_to_keep: int

    def info(self) -> PassInfo:
        """Work it out."""
        axes = tuple(one if isinstance(one, Axis) else one.axis() for one in self.axes)
        return PassInfo(
            self.index,
            axes,
            self.annotations,
            entry=self.entry,
            logits_to_keep=self.logits_to_keep,
        )


def read_inputs(
    index: int,
    axis: str,
    arguments: Mapping[str, Any],
    annotations: Mapping[str, Any],
    *,
    deferred: bool = False,
) -> tuple[tuple[FedAxis, ...], int]:
    """Take a pass's token axes from the arguments of its entry module, and its logits to keep.

    Parameters
    ----------
    index : int
        Of the pass.
    axis : str
        The entry module's token axis, as `select.entry_modules` gives it.
    arguments : mapping
        Parameter name -> what it was given.
    annotations : mapping
        Label -> a value for each batch item.
    deferred : bool
        Without token ids or embeddings there is no axis yet: the blocks will say.

    Raises
    ------
    ConfigError
        An annotation has not one value for each batch item.
    """
    axes = read_axes(axis, arguments)
    if not axes and not deferred:
        rows = read_rows(axis or "token", arguments)
        cache = cache_of(arguments)
        if rows is not None and cache is not None:
            _, rows.silent = _cached(cache)
        axes = (rows,) if rows else ()
    if annotations:
        _check_labels(index, axes, arguments, annotations)
    keep = arguments.get("logits_to_keep", arguments.get("num_logits_to_keep", 0))
    return axes, keep if type(keep) is int and keep > 0 else 0


def _check_labels(
    index: int,
    axes: tuple[FedAxis, ...],
    arguments: Mapping[str, Any],
    annotations: Mapping[str, Any],
) -> None:
    source = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
    leading = source.shape[0] if source is not None and source.ndim else 0
    batch = axes[-1].batch if axes else leading
    for label, values in annotations.items():
        if len(values) != batch:
            msg = (
                f"annotate({label}=...) gave {len(values)} values; the next pass (number {index}) "
                f"has {batch} batch items: give one for each"
            )
            raise ConfigError(msg)


def read_axes(name: str, arguments: Mapping[str, Any]) -> tuple[FedAxis, ...]:
    """Give the axes of the token ids or embeddings among the arguments of an entry module.

    Parameters
    ----------
    name : str
        The module's token axis; ``""`` for one that is fed both an encoder's and a decoder's.
    arguments : mapping
        Parameter name -> what it was given.
    """
    if name:
        axis = _fed_axis(name, arguments)
        return (axis,) if axis else ()
    start = len(_OF_DECODER)
    of_decoder = {
        key[start:]: value for key, value in arguments.items() if key.startswith(_OF_DECODER)
    }
    of_decoder |= {key: arguments[key] for key in _OF_CACHE if key in arguments}
    encoder = _fed_axis("encoder_token", arguments, guess=False)
    decoder = _fed_axis("decoder_token", of_decoder, guess=False)
    return tuple(axis for axis in (encoder, decoder) if axis)


def _fed_axis(name: str, arguments: Mapping[str, Any], *, guess: bool = True) -> FedAxis | None:
    """Give the axis of token ids [B, S] or [S], or of embeddings [B, S, d] or [S, d].

    With ``guess``, integers that come first are ids, if they are not named as something else:
    a model of the user's own may call them anything.
    """
    ids = bare = _first(arguments, _IDS)
    few = _few(ids) if ids is not None else None
    if few is None:
        bare = bare if bare is not None and _is_ids(bare) else None  # ids that can't be read
        ids = ids if ids is not None and _is_ids(ids) and has_bytes(ids) else None
    embeds = _first(arguments, _EMBEDS) if ids is None else None
    if ids is None and embeds is None and guess:
        given = {key: one for key, one in arguments.items() if not _NO_IDS.search(key)}
        first = next((one for one in given.values() if isinstance(one, Tensor)), None)
        ids = first if first is not None and _is_ids(first) and has_bytes(first) else None
    source = ids if ids is not None else embeds
    if source is None or (source is embeds and source.ndim < _TOKEN_NDIM):
        source = bare
    if source is None:
        return None
    leading = source.ndim - (source is embeds)
    if leading == _TOKEN_NDIM:
        shape = (source.shape[0], source.shape[1])
    else:
        shape = (source.shape[0], 1) if source is embeds else (1, source.shape[0])
    axis = FedAxis(name, *shape, flat=leading != _TOKEN_NDIM)
    if ids is not None:
        axis.ids = few or _copied(ids, torch.int64, axis.events)
    axis.positions = _positions(arguments, shape, axis.events)
    cache = cache_of(arguments)
    if cache is not None and (axis.positions is None or not hasattr(cache, "get_seq_length")):
        axis.before, axis.silent = _cached(cache)
    if "attention_mask" in arguments:
        axis.mask = _mask(arguments["attention_mask"], shape, axis.events)
    return axis


def has_bytes(tensor: Tensor) -> bool:
    """Whether a tensor is strided and has memory: its elements can be read as they are."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    kind = type(tensor)
    if kind is not Tensor and is_lazy(tensor):
        return False
    odd = kind is not Tensor and kind is not nn.Parameter
    if odd and (is_traceable_wrapper_subclass(tensor) or isinstance(tensor, FakeTensor)):
        return False
    try:
        return tensor.data_ptr() != 0 or not tensor.numel()
    except RuntimeError:  # a subclass without storage
        return False


def _is_ids(value: Tensor) -> bool:
    plain = not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
    return plain and 1 <= value.ndim <= _TOKEN_NDIM


def read_rows(name: str, arguments: Mapping[str, Any]) -> FedAxis | None:
    """Give the axis of the leading dimensions of the first tensor, whose tokens are not known."""
    source = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
    if source is None or source.ndim < _TOKEN_NDIM:
        return None  # no leading dimension but the features'
    flat = source.ndim == _TOKEN_NDIM
    return FedAxis(name, source.shape[0], 1 if flat else source.shape[1], flat=flat)


def _positions(
    arguments: Mapping[str, Any], shape: tuple[int, int], events: list[Any]
) -> NDArray[np.int64] | list[list[int]] | None:
    """Give the positions that were given of the rows: [S] or [B, S]."""
    for name in _POSITIONS:
        given = arguments.get(name)
        if isinstance(given, Tensor) and given.ndim <= _TOKEN_NDIM and has_bytes(given):
            fits = tuple(given.shape[-1:]) == shape[1:]
            if fits and given.numel() in (shape[1], shape[0] * shape[1]):
                return _few(given) or _copied(given, torch.int64, events)
    return None


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Give the cache or the state that a model goes on from; None where there is none."""
    for name in CACHES:
        cache = arguments.get(name)
        if cache is not None:
            return cache
    return None


def is_filled(cache: Any) -> bool:
    """Whether a cache that was fed before still holds something: it may have been reset.

    One that only a device could answer for counts as empty: nobody waits for it.
    """
    length = getattr(cache, "get_seq_length", None)
    try:
        found = length() if callable(length) else 1
    except (ValueError, RuntimeError, NotImplementedError):  # a state-space model's has no length
        return True
    elsewhere = isinstance(found, Tensor) and not found.is_cpu
    return not elsewhere and int(found) > 0


def _cached(cache: Any) -> tuple[int, Any]:
    """Give how many positions a cache or state holds; where it can't say, `UNKNOWN` and it."""
    if isinstance(cache, tuple | list):
        first = cache[0] if cache else None
        keys = first[0] if isinstance(first, tuple | list) and first else None
        if isinstance(keys, Tensor) and keys.ndim == _KEYS_NDIM:
            return int(keys.shape[-2]), None  # the older form: (keys, values) [B, H, S, D]
        return UNKNOWN, cache
    length = getattr(cache, "get_seq_length", None)
    try:
        return (int(length()), None) if callable(length) else (UNKNOWN, cache)
    except (ValueError, RuntimeError, NotImplementedError):  # a state-space model's has none
        return UNKNOWN, cache


def _mask(given: Any, shape: tuple[int, int], events: list[Any]) -> NDArray[np.bool_] | None:
    if isinstance(given, Tensor) and given.ndim == _TOKEN_NDIM and has_bytes(given):
        last = given[:, max(given.shape[1] - shape[1], 0) :]
        if tuple(last.shape) == shape:
            few = _few(last)
            return np.array(few, np.bool_) if few else _copied(last != 0, torch.bool, events)
    return None


def _few(given: Tensor) -> list[list[int]] | None:
    """Give integers [B, S] of one token at a time; None of any others.

    Between two tokens caches are cold: every function that is not called counts.
    """
    try:
        if given.dtype is torch.int64 and type(given) is Tensor and given.ndim == _TOKEN_NDIM:
            return given.tolist() if 0 < given.numel() <= _FEW and given.is_cpu else None
    except RuntimeError:  # of torch.func's, or without strides
        pass
    return None


def _copied(tensor: Tensor, dtype: torch.dtype, events: list[Any]) -> NDArray[Any]:
    """Copy a tensor; from a device later, when the events that are added have passed."""
    if takes(tensor.device):
        values, event = late(tensor, dtype)
        events.append(event)
        return values
    return tensor.detach().to("cpu", dtype, copy=True).contiguous().numpy()


def _first(arguments: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    for name in names:
        value = arguments.get(name)
        if isinstance(value, Tensor):
            return value
    return None


@dataclass(slots=True)
class RowChoice:
    """Which rows of a pass's axes are kept.

    Parameters
    ----------
    rows : {"last", "generated"}, slice or callable
        As `HookConfig` has it.
    """

    rows: Rows
    _prompt: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def choose(self, axis: Axis) -> tuple[Axis, NDArray[np.int64]]:
        """Give an axis of the rows that are kept, and the place of each in the sequence.

        Every item keeps the same number of rows; those that only fill up are marked as padding.

        Returns
        -------
        axis : Axis
            [batch, k].
        places : numpy.ndarray
            int64 [batch, k], ascending in each item.

        Raises
        ------
        ConfigError
            A callable gave something else than bool [batch, sequence].
        """
        wanted = (
            self._wanted(axis) if axis.rows else np.zeros((axis.batch, axis.sequence), np.bool_)
        )
        most = int(wanted.sum(axis=1).max(initial=0))
        places = np.sort(np.argsort(~wanted, axis=1, kind="stable")[:, :most], axis=1)

        def pick(values: NDArray[Any]) -> NDArray[Any]:
            return np.take_along_axis(values, places, axis=1)

        kept = replace(
            axis,
            sequence=most,
            token_ids=pick(axis.token_ids),
            positions=pick(axis.positions),
            mask=pick(axis.mask & wanted),
        )
        return kept, places

    def _wanted(self, axis: Axis) -> NDArray[np.bool_]:
        shape = (axis.batch, axis.sequence)
        wanted = np.zeros(shape, np.bool_)
        if isinstance(self.rows, slice):
            wanted[:, self.rows] = True
        elif self.rows == "last":
            real = np.where(axis.mask.any(axis=1, keepdims=True), axis.mask, True)
            last = axis.sequence - 1 - np.argmax(real[:, ::-1], axis=1)
            wanted[np.arange(axis.batch), last] = True
        elif self.rows == "generated":
            wanted[:, self._prompt_length(axis) :] = True
        elif callable(self.rows):
            given = np.asarray(self.rows(axis))
            if given.shape != shape or given.dtype != np.bool_:
                msg = (
                    f"rows must give bool {shape} for an axis of {axis.batch} × {axis.sequence} "
                    f"rows; got {given.dtype} {given.shape}"
                )
                raise ConfigError(msg)
            wanted = given
        return wanted

    def _prompt_length(self, axis: Axis) -> int:
        """Give how many of the rows that a pass is fed are its prompt.

        None where they follow what is cached; where what the pass before was fed is fed again
        with more behind it, as many as then; else all.
        """
        if axis.rows and axis.positions[:, 0].min() > 0:
            return 0
        prompt = self._prompt.get(axis.name)
        if prompt is not None and np.array_equal(axis.token_ids[:, : prompt.shape[1]], prompt):
            return int(prompt.shape[1])
        self._prompt[axis.name] = axis.token_ids
        return axis.sequence


@dataclass(slots=True)
class Entries:
    """The entry modules of a model, and which of them are being called.

    Parameters
    ----------
    names : mapping of torch.nn.Module to (str, str)
        The entry modules: of each the name, and the token axis of what it is fed.

    Attributes
    ----------
    interrupted : bool
        The call before this one never came to its end.
    """

    names: Mapping[nn.Module, tuple[str, str]]
    interrupted: bool = False
    _stack: list[nn.Module] = field(default_factory=list)
    _outermost: FrameType | None = None
    _raised: BaseException | None = None
    _parameters: dict[nn.Module, tuple[str, ...]] = field(default_factory=dict)

    @property
    def outermost(self) -> nn.Module | None:
        """The entry module whose call is the pass, while it runs."""
        return self._stack[0] if self._stack else None

    @property
    def inside(self) -> bool:
        """Whether an entry module is being called."""
        return bool(self._stack)

    def enter(self, module: nn.Module) -> bool:
        """Note a call; tell whether it is an outermost one."""
        self.interrupted = bool(self._stack) and _has_ended(self._outermost)
        if self.interrupted:  # hooks are not called where an interrupt ends a forward
            self._stack.clear()
        self._stack.append(module)
        if len(self._stack) == 1:
            self._raised = sys.exception()
            self._outermost = sys._getframe(2)  # what calls hooks and forward
        return len(self._stack) == 1

    def leave(self, module: nn.Module) -> bool:
        """Note the end of a call; tell whether it was the outermost one."""
        if module not in self._stack:
            return False
        while self._stack.pop() is not module:
            pass
        if not self._stack:
            self._outermost = None
        return not self._stack

    def forget(self) -> None:
        """Note that the call that was entered won't take place."""
        self._stack.clear()
        self._outermost = None

    def raised(self) -> bool:
        """Whether the forward that is being left raised: its hooks run inside the handler."""
        current = sys.exception()
        return current is not None and current is not self._raised

    def arguments(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Name the arguments of a call by the parameters of the module's forward.

        What is in a dict among them has its own name: a batch may come as one.
        """
        names = self._parameters.get(module)
        if names is None:
            try:
                names = tuple(inspect.signature(module.forward).parameters)
            except ValueError:  # a traced module's says nothing
                names = ()
            self._parameters[module] = names
        given: dict[str, Any] = dict(zip(names, args, strict=False))
        given.update(kwargs)
        for place in range(len(names), len(args)):
            given[f"*{place}"] = args[place]
        whole = given
        for value in given.values():
            if type(value) not in _PLAIN and isinstance(value, Mapping):
                whole = {**{str(key): one for key, one in value.items()}, **whole}
        return whole


def _has_ended(frame: FrameType | None) -> bool:
    """Whether a call came to its end."""
    if frame is not None:
        try:
            frame.clear()
        except RuntimeError:  # it is executing
            return False
    return True
