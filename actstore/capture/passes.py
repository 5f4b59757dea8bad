"""Owns what is a pass: when it opens and closes, and what it was fed.

An entry module's pre-hook takes token ids, positions and mask as the model was given them; its
hook, which is called even if the forward raises, says how it ended.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actstore.errors import ConfigError
from actstore.packet import Axis, PassInfo

__all__ = ["Entries", "read_inputs"]

_IDS: Final = ("input_ids", "decoder_input_ids", "tokens", "token_ids", "idx")
_EMBEDS: Final = ("inputs_embeds", "decoder_inputs_embeds")
_CACHES: Final = ("past_key_values", "cache", "past_key_value")
_TOKEN_NDIM: Final = 2


def read_inputs(
    index: int, entry: str, arguments: Mapping[str, Any], annotations: Mapping[str, Any]
) -> PassInfo:
    """Take a pass's token axis from the arguments of its entry module.

    Parameters
    ----------
    index : int
        Of the pass.
    entry : str
        The entry module's name.
    arguments : mapping
        Parameter name -> what it was given.
    annotations : mapping
        Label -> a value for each batch item.

    Raises
    ------
    ConfigError
        An annotation has not one value for each batch item.
    """
    axis = _axis(arguments)
    for label, values in annotations.items():
        batch = axis.batch if axis else 0
        if len(values) != batch:
            msg = (
                f"annotate({label}=...) gave {len(values)} values; the next pass (number {index}) "
                f"has {batch} batch items: give one for each"
            )
            raise ConfigError(msg)
    keep = arguments.get("logits_to_keep", arguments.get("num_logits_to_keep", 0))
    return PassInfo(
        index,
        (axis,) if axis else (),
        annotations,
        entry=entry,
        logits_to_keep=keep if type(keep) is int and keep > 0 else 0,
    )


def _axis(arguments: Mapping[str, Any]) -> Axis | None:
    ids = _first(arguments, _IDS)
    source = ids if ids is not None else _first(arguments, _EMBEDS)
    if source is None:
        source = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
        integers = source is not None and not (source.is_floating_point() or source.is_complex())
        if source is not None and integers and source.dtype is not torch.bool:
            ids = source if source.ndim <= _TOKEN_NDIM else None
    if source is None or source.ndim < (1 if ids is not None else _TOKEN_NDIM):
        return None  # no leading dimension but the features'
    flat = source.ndim == 1 or (ids is None and source.ndim == _TOKEN_NDIM)
    if source.ndim == 1:
        batch, sequence = 1, source.shape[0]
    elif flat:
        batch, sequence = source.shape[0], 1
    else:
        batch, sequence = source.shape[0], source.shape[1]
    shape = (batch, sequence)
    fed = np.full(shape, -1, np.int64) if ids is None else _integers(ids).reshape(shape)
    return Axis(
        "token",
        batch,
        sequence,
        fed,
        _positions(arguments, shape),
        _mask(arguments, shape),
        flat,
    )


def _positions(arguments: Mapping[str, Any], shape: tuple[int, int]) -> NDArray[np.int64]:
    """Give each row's position: as given, else the cached length before the forward + index."""
    for name in ("position_ids", "cache_position"):
        given = arguments.get(name)
        if isinstance(given, Tensor) and given.ndim <= _TOKEN_NDIM:
            found = _integers(given)
            if found.shape[-1:] == shape[1:] and found.size in (shape[1], shape[0] * shape[1]):
                return np.broadcast_to(found, shape).copy()
    return np.broadcast_to(_cached_length(arguments) + np.arange(shape[1]), shape).copy()


def _cached_length(arguments: Mapping[str, Any]) -> int:
    cache = next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)
    length = getattr(cache, "get_seq_length", None)
    if callable(length):
        return int(length())
    if isinstance(cache, tuple | list) and cache and isinstance(cache[0], tuple | list):
        return int(cache[0][0].shape[-2])  # the older form: (keys, values) [B, H, S, D] a layer
    return 0


def _mask(arguments: Mapping[str, Any], shape: tuple[int, int]) -> NDArray[np.bool_]:
    given = arguments.get("attention_mask")
    if isinstance(given, Tensor) and given.ndim == _TOKEN_NDIM:
        last = given[:, max(given.shape[1] - shape[1], 0) :]
        if tuple(last.shape) == shape:
            return np.ascontiguousarray((last != 0).cpu().numpy())
    return np.ones(shape, np.bool_)


def _integers(tensor: Tensor) -> NDArray[np.int64]:
    return tensor.detach().to("cpu", torch.int64, copy=True).numpy()


def _first(arguments: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    found = (arguments.get(name) for name in names)
    return next((value for value in found if isinstance(value, Tensor)), None)


@dataclass(slots=True)
class Entries:
    """The entry modules of a model, and which of them are being called.

    Parameters
    ----------
    names : mapping of torch.nn.Module to str
        The entry modules.

    Attributes
    ----------
    interrupted : bool
        The call before this one never came to its end.
    """

    names: Mapping[nn.Module, str]
    interrupted: bool = False
    _stack: list[nn.Module] = field(default_factory=list)
    _outermost: FrameType | None = None
    _raised: BaseException | None = None
    _parameters: dict[nn.Module, tuple[str, ...]] = field(default_factory=dict)

    @property
    def inside(self) -> bool:
        """Whether an entry module is being called."""
        return bool(self._stack)

    def enter(self, module: nn.Module) -> bool:
        """Note a call; tell whether it is an outermost one."""
        caller = sys._getframe(1)
        self.interrupted = bool(self._stack) and not _encloses(self._outermost, caller)
        if self.interrupted:  # hooks are not called where an interrupt ends a forward
            self._stack.clear()
        self._stack.append(module)
        if len(self._stack) == 1:
            self._raised = sys.exception()
            self._outermost = caller.f_back  # what calls hooks and forward
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
        """Name the arguments of a call by the parameters of the module's forward."""
        names = self._parameters.get(module)
        if names is None:
            names = tuple(inspect.signature(module.forward).parameters)
            self._parameters[module] = names
        unnamed = (f"*{place}" for place in range(len(names), len(args)))
        return {**dict(zip((*names, *unnamed), args, strict=False)), **kwargs}


def _encloses(outer: FrameType | None, frame: FrameType | None) -> bool:
    """Whether one frame called, in however many steps, another."""
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is not None
