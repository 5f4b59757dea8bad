"""Owns how work is spread over threads within a budget, and how what it gives is merged.

The graph is dask's: tasks and states can be pickled, so that it runs on a cluster as well. No
values are in it, and of masks only what they are compressed to.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.arguments import check_count, check_memory
from actstore.clusters import Memory, default_client, memory_of
from actstore.errors import ConfigError

__all__ = ["Budget", "Mask", "compute", "later", "reduced"]

_FAN_IN: Final = 4


@dataclass(frozen=True, slots=True)
class Budget:
    """What a computation may take.

    Parameters
    ----------
    workers : int
        Threads; on a dask cluster, its workers have as many as they were started with.
    gigabytes : float
        Memory, in 10^9 bytes, of all threads; on a cluster too, a thread may hold as much as one
        of so many.
    """

    workers: int
    gigabytes: float

    def __post_init__(self) -> None:
        check_count("workers", self.workers)
        check_memory(self.gigabytes)
        if find_spec("dask") is None:
            msg = "statistics are computed by dask, which isn't installed: install actstore[dask]"
            raise ConfigError(msg)

    @property
    def bytes_each(self) -> int:
        """What one worker may hold."""
        return int(self.gigabytes * 1e9) // self.workers


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """Which rows a task looks at, bool [..., rows]: a function made `later` is given the array.

    It travels as few bytes: of 64 MiB of rows that all count, a hundred.
    """

    rows: NDArray[np.bool_]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (zlib.compress(np.packbits(self.rows).tobytes(), 1), self.rows.shape)


def _unpacked(packed: bytes, shape: tuple[int, ...]) -> Mask:
    bits = np.frombuffer(zlib.decompress(packed), np.uint8)
    found = np.unpackbits(bits, count=int(np.prod(shape, dtype=np.int64)))
    return Mask(found.reshape(shape).view(np.bool_))


@dataclass(frozen=True, slots=True)
class _Work:
    function: Callable[..., Any]

    def __call__(self, *given: Any) -> Any:
        return self.function(*(one.rows if isinstance(one, Mask) else one for one in given))


def later(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give what makes a task of each call, instead of calling."""
    from dask.delayed import delayed

    found: Callable[..., Any] = delayed(_Work(function), pure=False)
    return found


def reduced(parts: Iterable[Any], merge: Callable[[list[Any]], Any]) -> Any:
    """Merge the states of tasks in a tree, whose form goes by their number alone."""
    level, merged = list(parts), later(merge)
    while len(level) > 1:
        fans = [level[at : at + _FAN_IN] for at in range(0, len(level), _FAN_IN)]
        level = [merged(fan) if len(fan) > 1 else fan[0] for fan in fans]
    return level[0]


def compute(tasks: Any, budget: Budget) -> Any:
    """Run tasks, by threads, or by whatever scheduler dask is told to use.

    Raises
    ------
    ConfigError
        It is a cluster, and a worker has less memory than its threads may take.
    """
    from dask.base import compute as run

    client = default_client()
    if client is not None:
        _check_memory(client.run(_memory), budget)
    (found,) = run(tasks, num_workers=budget.workers)  # type: ignore[no-untyped-call]
    return found


def _memory(dask_worker: Any) -> Memory:
    """Give the memory of a worker that has imported what reads values."""
    import actstore.dataset  # noqa: F401

    return memory_of(dask_worker)


def _check_memory(workers: dict[str, Memory], budget: Budget) -> None:
    for address, one in workers.items():
        needed = one.threads * budget.bytes_each
        if needed > one.free:
            msg = (
                f"max_memory_gb={budget.gigabytes!r} for {budget.workers} workers lets each "
                f"thread hold {budget.bytes_each / 1e9:.3f} GB; worker {address} on host "
                f"{one.host} has {one.threads} threads, and {max(one.free, 0) / 1e9:.3f} GB free "
                f"of its limit of {one.limit / 1e9:.3f} GB: give less, or start workers with "
                "fewer threads or more memory"
            )
            raise ConfigError(msg)
