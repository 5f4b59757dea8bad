"""Owns what a model on several processes says of itself: its mesh, its parts of layers' outputs.

What is recorded of it is ``header.py``'s and the LAYERs'; how logs are put together by it,
``stream.united``'s.
"""

from __future__ import annotations

import itertools
import sys
import uuid
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from actstore.errors import ConfigError
from actstore.parallel import AXES, Parallel, Shard

if TYPE_CHECKING:
    from actstore.capture.session import Instrumented

__all__ = ["Sharding", "local_of", "parallel_of"]

#: What libraries call the dimensions of a mesh (PyTorch, Transformers, torchtitan, Megatron).
_NAMES: Final = {
    **dict.fromkeys(("dp", "data", "fsdp", "dp_shard", "dp_replicate", "replicate"), "data"),
    **dict.fromkeys(("pp", "pipe", "pipeline", "pipeline_parallel"), "pipeline"),
    **dict.fromkeys(("tp", "tensor", "model", "tensor_parallel"), "tensor"),
}
#: Where modules live that do one thing to each number alone.
_ELEMENTWISE: Final = (
    *("torch.nn.modules.activation", "torch.nn.modules.dropout", "transformers.activations"),
)
_NOT_ELEMENTWISE: Final = (
    *("Softmax", "LogSoftmax", "Softmin", "Softmax2d", "GLU", "MultiheadAttention"),
)
_captures = itertools.count()


def local_of(tensor: Tensor) -> Tensor:
    """Give the part of a tensor that this process has, once it is there; any other as it is."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and isinstance(tensor, collectives.AsyncCollectiveTensor):
        tensor = tensor.trigger_wait()  # a stream waits; the host only where it computes
    return tensor


# -- the mesh -----------------------------------------------------------------------------------


def parallel_of(models: Sequence[Instrumented]) -> Parallel | None:
    """Give where this process stands: as the user says, else as the mesh of the weights does.

    Raises
    ------
    ConfigError
        The models of a capture say different things, or the mesh doesn't say what its dimensions
        are for.
    """
    given = {one.name: one.parallel for one in models}
    first = models[0].parallel
    if any(one != first for one in given.values()):
        msg = f"the models of one capture must have the same parallel; got {given!r}"
        raise ConfigError(msg)
    found = first if first is not None else _of_weights(models)
    if found is None or found.sizes == (1, 1, 1):
        return None
    return found if found.run_id is not None else replace(found, run_id=_shared_id())


def _shared_id() -> str | None:
    """Give what the first process that asks draws; None where processes don't know each other.

    It goes through the store of the process group, which nobody has to wait in: that some ranks
    capture and others don't must not stop them. What captures of ranks belong together is told by
    how many each began before.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    key = f"actstore/run/{next(_captures)}"
    told = _get_default_store().compare_set(key, "", uuid.uuid4().hex)
    return told.decode() if isinstance(told, bytes) else str(told)


def _of_weights(models: Sequence[Instrumented]) -> Parallel | None:
    """Read the mesh that weights are distributed over."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None:
        return None
    meshes: dict[str, Any] = {}
    for one in models:
        for parameter in one.model.parameters():
            if isinstance(parameter, distributed.DTensor):
                mesh = _root(parameter.device_mesh)
                meshes[str(mesh)] = mesh
    if not meshes:
        return _of_stage(models)
    largest = max(meshes.values(), key=lambda mesh: int(mesh.size()))
    _check_world(f"the weights are distributed over {largest}", int(largest.size()))
    places = _places(largest, _is_fsdp(one.given for one in models))
    return Parallel(places["data"], places["pipeline"], places["tensor"])


def _of_stage(models: Sequence[Instrumented]) -> Parallel | None:
    """Read which stage of a pipeline Transformers made of the models."""
    stages = [getattr(one.model, "_pp_stage", None) for one in models]
    rank, size = (getattr(stages[0], name, None) for name in ("pp_rank", "pp_size"))
    if not isinstance(rank, int) or not isinstance(size, int):
        return None
    _check_world(f"the model is stage {rank} of a pipeline of {size}", size)
    return Parallel(pipeline=(rank, size))


def _check_world(what: str, size: int) -> None:
    """Refuse a mesh that leaves processes out: what they are for isn't known."""
    world = torch.distributed.get_world_size()
    if size != world:
        msg = (
            f"{what}, {size} of {world} processes, and what the others are for it doesn't say; "
            "tell instrument_model: parallel=actstore.Parallel(data=(place, size), pipeline=..., "
            "tensor=...)"
        )
        raise ConfigError(msg)


def _root(mesh: Any) -> Any:
    """Give the mesh that a mesh was sliced out of."""
    ask = getattr(mesh, "_get_root_mesh", None)
    return ask() if callable(ask) else mesh


def _places(mesh: Any, fsdp: bool) -> dict[str, tuple[int, int]]:
    coordinate, names = mesh.get_coordinate(), mesh.mesh_dim_names
    places = dict.fromkeys(AXES, (0, 1))
    for dim in range(mesh.ndim):
        axis = _axis(mesh, dim, fsdp)
        if axis is None:
            msg = (
                f"what dimension {dim} of the mesh {names or mesh} is for isn't known; wanted a "
                f"name such as {', '.join(map(repr, ('dp', 'pp', 'tp')))}; or tell "
                "instrument_model: parallel=actstore.Parallel(data=(place, size), ...)"
            )
            raise ConfigError(msg)
        place, size = places[axis]
        more = int(mesh.size(dim))
        places[axis] = place * more + int(coordinate[dim]), size * more
    return places


def _axis(mesh: Any, dim: int, fsdp: bool = False) -> str | None:
    """Say what a dimension of a mesh is for; None: it doesn't say."""
    names = mesh.mesh_dim_names
    if names:
        return _NAMES.get(names[dim])
    if int(mesh.size(dim)) == 1:
        return "data"
    return ("data" if fsdp else "tensor") if mesh.ndim == 1 else None


def _is_fsdp(models: Iterable[nn.Module]) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and any(
        isinstance(module, kind) for model in models for module in model.modules()
    )


# -- what is here of a layer --------------------------------------------------------------------


class Sharding:
    """Says which part of a layer's output this process has, when the layer first fires.

    Parameters
    ----------
    parallel : Parallel
        Where this process stands.
    """

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._known: dict[int, tuple[weakref.ref[Tensor], Shard]] = {}

    def shard_of(
        self,
        name: str,
        module: nn.Module | None,
        tap: str,
        whole: Tensor,
        local: Tensor,
        args: Any,
    ) -> Shard | None:
        """Give the part that is here; None where all of it is, or nothing says.

        Parameters
        ----------
        name, module, tap
            The layer.
        whole, local : torch.Tensor
            What fired, as the module gave it and as it is here.
        args : object
            What the module was given.
        """
        distributed = whole is not local and hasattr(whole, "placements")
        if self._parallel.tensor[1] == 1 and not distributed:
            return None
        rule = self._parallel.rule(name)
        if rule is not None:
            found = _by_rule(name, rule[0], local)
        elif distributed:
            found = _by_placements(whole)
        else:
            found = _by_weight(module, tap, local) or self._by_input(module, tap, local, args)
        if found is not None:
            self._known[id(local)] = weakref.ref(local), found
        return found

    def _by_input(
        self, module: nn.Module | None, tap: str, local: Tensor, args: Any
    ) -> Shard | None:
        """Give the part of an activation's output: that of what it was given."""
        source = args[0] if isinstance(args, tuple) and args else None
        kind = type(module)
        if tap != "out" or kind.__module__ not in _ELEMENTWISE:
            return None
        if kind.__name__ in _NOT_ELEMENTWISE or not isinstance(source, Tensor):
            return None
        known = self._known.get(id(source))
        same = known is not None and known[0]() is source and source.shape == local.shape
        return known[1] if known is not None and same else None


def _by_rule(name: str, dim: int | None, local: Tensor) -> Shard | None:
    if dim is None:
        return None
    if not -local.ndim <= dim < local.ndim:
        msg = (
            f"Parallel(sharded=...) says that layer {name!r} is divided along dimension {dim}; "
            f"its output has the shape {tuple(local.shape)}"
        )
        raise ConfigError(msg)
    return Shard(dim if dim < 0 else dim - local.ndim)


def _by_placements(whole: Any) -> Shard | None:
    """Read the placements of a DTensor over the tensor axis."""
    mesh = whole.device_mesh
    for dim, placement in enumerate(whole.placements):
        if _axis(mesh, dim) != "tensor":
            continue
        if placement.is_partial():
            return Shard(partial=True)
        if _is_shard(placement):
            place = placement.dim % whole.ndim - whole.ndim
            if place != -1:  # over tokens: how many differs from pass to pass
                return Shard(place)
            return Shard(-1, _offset(whole, whole.ndim - 1), int(whole.shape[-1]))
    return None


def _by_weight(module: nn.Module | None, tap: str, local: Tensor) -> Shard | None:
    """Read where a linear or embedding with distributed weights has its part of the features.

    Certain only where the width is that of the part here, and not of the whole.
    """
    weight: Any = getattr(module, "weight", None)
    kinds = {"out": (nn.Linear, nn.Embedding), "in": (nn.Linear,)}.get(tap, ())
    if not isinstance(module, kinds) or not hasattr(weight, "placements") or not local.ndim:
        return None
    along = 0 if tap == "out" and isinstance(module, nn.Linear) else 1
    for dim, placement in enumerate(weight.placements):
        if _axis(weight.device_mesh, dim) != "tensor" or not _is_shard(placement):
            continue
        here, size = int(local_of(weight).shape[along]), int(weight.shape[along])
        if placement.dim % weight.ndim == along and local.shape[-1] == here != size:
            return Shard(-1, _offset(weight, along), size)
    return None


def _is_shard(placement: Any) -> bool:
    """Whether a placement divides into one run of indices a process: no strided one."""
    from torch.distributed.tensor import Shard as Placed

    return type(placement) is Placed


def _offset(tensor: Any, dim: int) -> int:
    """Give where the part here begins in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return int(offsets[dim])
