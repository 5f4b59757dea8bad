"""Owns activations that are in memory: TransformerLens' and nnsight's caches, and any mapping.

Both are known by what they can do, and neither package is imported: ``ActivationCache`` by its
``cache_dict`` (TransformerLens 3.9.0 and 4.3.0, ``transformer_lens/ActivationCache.py``);
``CacheView`` by its module (nnsight 0.8.1, ``nnsight/intervention/cache.py``: ``keys()``, and
``cache[path]`` with ``output``, ``input`` and ``len()``, the visits).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.bridges.foreign import Array, Firing, Foreign, ForeignPass, wanted_tokens
from actstore.bridges.named import Labels, passes_of
from actstore.bridges.tensors import as_array, first_tensor, memory_of
from actstore.errors import ConfigError, FormatError

__all__ = ["Told", "recognised"]

_ROOT: Final = "model"
_CALL: Final = "\0"  # between a module's path and the call, from the second on


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What a caller says of the rows: see `actstore.save_cache`."""

    tokens: Any
    mask: Any
    annotations: Mapping[str, Sequence[Any]]


def recognised(cache: Any) -> tuple[str, Callable[[Any, Told], Foreign]]:
    """Give the kind of a cache, and what reads it.

    Raises
    ------
    ConfigError
        It is none.
    """
    if isinstance(getattr(cache, "cache_dict", None), Mapping):
        return "transformer_lens", _transformer_lens
    if type(cache).__module__.partition(".")[0] == "nnsight" and hasattr(cache, "keys"):
        return "nnsight", _nnsight
    if isinstance(cache, Mapping):
        return "mapping", _mapping
    msg = (
        "save_cache takes TransformerLens' ActivationCache, nnsight's tracer.cache(), or a "
        f"mapping from layers to arrays; got {type(cache).__name__}"
    )
    raise ConfigError(msg)


def _transformer_lens(cache: Any, told: Told) -> Foreign:
    layout = "TransformerLens 4.3.0, ActivationCache"
    return Foreign(layout, (), _passes([dict(cache.cache_dict)], told))


def _mapping(cache: Mapping[str, Any], told: Told) -> Foreign:
    return Foreign("names to arrays", (), _passes([dict(cache)], told))


def _nnsight(cache: Any, told: Told) -> Foreign:
    """Read a cache whose visits are passes: each module's k-th visit is in the k-th.

    There are as many passes as most modules have visits. A module that has more, by a factor, is
    called so often in each; of which pass the visits of others are can't be told, so that they
    come last, in a pass without rows (the generator and its streamer, an expert).
    """
    visits = {str(path): _visits(cache[path]) for path in cache.keys()}  # noqa: SIM118 - no mapping
    counts = Counter(map(len, visits.values()))
    count = max(counts, key=lambda one: (counts[one], one), default=0)
    passes: list[dict[str, Any]] = [{} for _ in range(count)]
    others: dict[str, Any] = {}
    for path, values in visits.items():
        name = path.removeprefix(_ROOT).removeprefix(".") if _is_root(path) else path
        calls, odd = divmod(len(values), count)
        for number, (output, given) in enumerate(values):
            here = others if odd else passes[number // calls]
            call = number if odd else number % calls
            for key, value in ((name, output), (f"{name}@in", given)):
                if value is not None:
                    here[f"{key}{_CALL}{call}" if call else key] = value
    return Foreign("nnsight 0.8.1, tracer.cache()", (), _passes(passes, told, others))


def _is_root(path: str) -> bool:
    return path == _ROOT or path.startswith(f"{_ROOT}.")


def _visits(entry: Any) -> list[tuple[Any, Any]]:
    """Give the first tensors that a module returned and was given, visit by visit."""
    output, given = getattr(entry, "output", None), getattr(entry, "input", None)
    try:
        count = len(entry)
    except TypeError:
        count = 1
    if count == 1:
        output, given = [output], [given]
    several = [
        list(one) if isinstance(one, list) and len(one) == count else [None] * count
        for one in (output, given)
    ]
    return [(first_tensor(one), first_tensor(two)) for one, two in zip(*several, strict=True)]


def _passes(
    passes: Sequence[Mapping[str, Any]], told: Told, others: Mapping[str, Any] | None = None
) -> Iterator[ForeignPass]:
    """Yield one pass for each mapping, and one without rows for the others."""
    named = [_arrays(one) for one in passes]
    labels = _labels(named, told)
    start = 0
    for (arrays, memory), mine in zip(named, labels, strict=True):
        try:
            found_passes = passes_of(arrays, mine, "tokens", start=start, cut=False, memory=memory)
            for found in found_passes:
                start += 0 if found.axis is None else found.axis.sequence
                _check_annotations(found)
                firings = (_called(one) for one in found.firings)
                yield ForeignPass(found.axis, firings, found.annotations)
        except FormatError as error:  # what is in memory is the caller's
            raise ConfigError(str(error)) from None
    if others:
        arrays, _ = _arrays(others)
        yield ForeignPass(None, (_called(Firing(name, one[...])) for name, one in arrays.items()))


def _arrays(values: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Give the first tensor of each layer, and what is equal for those of the same memory."""
    arrays: dict[str, Array] = {}
    memory: dict[str, Any] = {}
    for name, value in values.items():
        found = first_tensor(value)
        if found is None and value is not None and not isinstance(value, dict | list | tuple):
            found = value
        if found is not None:
            arrays[str(name)] = as_array(found, f"layer {name!r:.80}")
            memory[str(name)] = memory_of(found)
    return arrays, memory


def _called(firing: Firing) -> Firing:
    """Give a packet its call, which stands behind its name so far."""
    layer, _, call = firing.layer.partition(_CALL)
    return replace(firing, layer=layer, call=int(call or 0))


def _labels(named: Sequence[tuple[dict[str, Array], Any]], told: Told) -> list[Labels]:
    """Divide the ids among the passes."""
    count = len(named)
    ids: list[NDArray[np.int64] | None]
    if isinstance(told.tokens, list | tuple) and len(told.tokens) == count > 1:
        ids = [wanted_tokens(one) for one in told.tokens]
    else:
        whole = wanted_tokens(told.tokens)
        ids = [whole] if count == 1 else _divided(whole, named)
    given = told.mask.detach().cpu() if hasattr(told.mask, "detach") else told.mask
    mask = None if given is None else np.asarray(given) != 0
    if mask is not None and (count > 1 or ids[0] is None or mask.shape != ids[0].shape):
        msg = "mask goes with tokens of its shape, of one pass"
        raise ConfigError(msg)
    return [Labels(one, mask, None, told.annotations) for one in ids]


def _divided(
    whole: NDArray[np.int64] | None, named: Sequence[tuple[dict[str, Array], Any]]
) -> list[NDArray[np.int64] | None]:
    """Cut the ids of all passes where each pass's sequence ends."""
    if whole is None:
        return [None] * len(named)
    lengths = []
    for arrays, _ in named:
        first = next(passes_of(arrays, Labels(), "tokens", cut=False), None)
        lengths.append(0 if first is None or first.axis is None else first.axis.sequence)
    if whole.shape[-1] not in (sum(lengths), sum(lengths) + 1):  # the last one made was not fed
        msg = f"the passes have {lengths} tokens; tokens has {whole.shape[-1]}"
        raise ConfigError(msg)
    ends = np.cumsum(lengths).tolist()
    return [whole[..., end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _check_annotations(found: ForeignPass) -> None:
    batch = 0 if found.axis is None else found.axis.batch
    for label, values in found.annotations.items():
        if isinstance(values, str) or len(values) != batch:
            msg = f"annotation {label!r} needs a value for each of {batch} batch items"
            raise ConfigError(msg)
