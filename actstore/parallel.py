"""Owns what is said of a model on several processes: where one stands, what it has of a layer.

How it is found out is ``capture.sharding``'s; what is done with it, ``stream.united``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Final, Self

from actstore.errors import ConfigError, FormatError

__all__ = ["AXES", "Parallel", "Shard"]

#: The axes of a mesh, from the outermost.
AXES: Final = ("data", "pipeline", "tensor")
_MOST: Final = 1 << 20  # processes on an axis
_PAIR: Final = 2
_DIMS: Final = 64


@dataclass(frozen=True, slots=True)
class Parallel:
    """Where this process stands among those that run one model.

    Parameters
    ----------
    data, pipeline, tensor : tuple of int
        This process's place on the axis, from 0, and how many there are on it.
    sharded : mapping of str to int or None, optional
        Names of layers, or globs in the way of `fnmatch`, of which each tensor-parallel process
        has a part of the output: the dimension that is divided (``-1`` is the last). None: each
        has the whole. It goes before what is found by itself, and its first match counts.
    run_id : str, optional
        What all processes of the run, and no others, call it by. By default the first process
        that begins a capture draws one, and tells the others through ``torch.distributed``: the
        n-th capture of each is then of one run, so that all have to capture equally often. Give
        one where some capture more, as for a warm-up.
    first_block : int
        Of a pipeline's stage the index that its first block has in the whole model: names and
        blocks count from it.

    Raises
    ------
    ConfigError
        A value is of the wrong kind or out of its range.
    """

    data: tuple[int, int] = (0, 1)
    pipeline: tuple[int, int] = (0, 1)
    tensor: tuple[int, int] = (0, 1)
    sharded: Mapping[str, int | None] = field(default_factory=lambda: MappingProxyType({}))
    run_id: str | None = None
    first_block: int = 0

    def __post_init__(self) -> None:
        for axis in AXES:
            given = getattr(self, axis)
            if not _is_place(given):
                msg = (
                    f"Parallel({axis}=...) wants (place, size) with 0 <= place < size; "
                    f"got {given!r}"
                )
                raise ConfigError(msg)
            object.__setattr__(self, axis, tuple(given))
        if not isinstance(self.sharded, Mapping) or not all(map(_is_rule, self.sharded.items())):
            msg = (
                "Parallel(sharded=...) wants a mapping from names or globs to the dimension that "
                f"is divided, such as {{'*.q_proj': -1}}, or None; got {self.sharded!r}"
            )
            raise ConfigError(msg)
        object.__setattr__(self, "sharded", MappingProxyType(dict(self.sharded)))
        if self.run_id is not None and (not isinstance(self.run_id, str) or not self.run_id):
            msg = f"Parallel(run_id=...) wants a str that is not empty; got {self.run_id!r}"
            raise ConfigError(msg)
        if type(self.first_block) is not int or not 0 <= self.first_block < _MOST:
            msg = f"Parallel(first_block=...) wants an int from 0; got {self.first_block!r}"
            raise ConfigError(msg)

    @property
    def places(self) -> tuple[int, int, int]:
        """The place on each of `AXES`."""
        return self.data[0], self.pipeline[0], self.tensor[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many there are on each of `AXES`."""
        return self.data[1], self.pipeline[1], self.tensor[1]

    def rule(self, name: str) -> tuple[int | None] | None:
        """Give the dimension along which a layer is said to be divided; None: nothing is."""
        if name in self.sharded:
            return (self.sharded[name],)
        return next(
            ((dim,) for glob, dim in self.sharded.items() if fnmatchcase(name, glob)), None
        )

    def header(self) -> dict[str, Any]:
        """Give what the HEADER says."""
        return {"run": self.run_id, **{axis: list(getattr(self, axis)) for axis in AXES}}

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Self | None:
        """Read what a HEADER says; None where it says nothing.

        Raises
        ------
        FormatError
            It says something else.
        """
        said = header.get("parallel")
        if said is None:
            return None
        places = {axis: said.get(axis, [0, 1]) for axis in AXES} if isinstance(said, dict) else {}
        run: Any = said.get("run") if isinstance(said, dict) else 0
        named = run is None or (isinstance(run, str) and run)
        if not places or not all(map(_is_place, places.values())) or not named:
            msg = (
                "the HEADER's parallel needs run, and (place, size) of data, pipeline and tensor; "
                f"found {said!r:.200}"
            )
            raise FormatError(msg)
        data, pipeline, tensor = ((place, size) for place, size in places.values())
        return cls(data, pipeline, tensor, run_id=run)

    def __str__(self) -> str:
        several = [
            f"{axis} {place} of {size}"
            for axis, place, size in zip(AXES, self.places, self.sizes, strict=True)
            if size > 1
        ]
        return ", ".join(several) or "alone"


@dataclass(frozen=True, slots=True)
class Shard:
    """What one process has of a layer's output, of those on the tensor axis.

    Attributes
    ----------
    dim : int
        The dimension that is divided, counted from the last: -1.
    offset, size : int or None
        Where its part begins in the whole, and how long the whole is; None where that differs
        from packet to packet: parts are in the order of their places.
    partial : bool
        It has all of it, but each process one summand.
    """

    dim: int = -1
    offset: int | None = None
    size: int | None = None
    partial: bool = False

    def member(self) -> dict[str, Any]:
        """Give what a LAYER says."""
        if self.partial:
            return {"partial": True}
        return {"dim": self.dim, "offset": self.offset, "size": self.size}

    @classmethod
    def of(cls, said: Any) -> Self:
        """Read what a LAYER says.

        Raises
        ------
        FormatError
            It says something else.
        """
        if isinstance(said, dict):
            dim, offset, size = said.get("dim", -1), said.get("offset"), said.get("size")
            if said.get("partial") is True:
                return cls(partial=True)
            known = all(type(one) is int and 0 <= one < 1 << 58 for one in (offset, size))
            if type(dim) is int and -_DIMS <= dim < 0 and (known or (offset, size) == (None,) * 2):
                return cls(dim, offset, size)
        msg = f"a LAYER's shard needs dim, offset and size, or partial; found {said!r:.200}"
        raise FormatError(msg)


def _is_place(given: Any) -> bool:
    pair = isinstance(given, tuple | list) and len(given) == _PAIR
    if not pair or any(type(one) is not int for one in given):
        return False
    place, size = given
    return bool(0 <= place < size <= _MOST)


def _is_rule(entry: tuple[Any, Any]) -> bool:
    name, dim = entry
    whole = type(dim) is int and -_DIMS <= dim < _DIMS
    return isinstance(name, str) and bool(name) and (dim is None or whole)
