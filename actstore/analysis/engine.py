"""Owns how work is spread over threads within a budget, and how what it gives is merged.

The graph is dask's: tasks and states can be pickled, so that it runs on a cluster as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

from actstore.errors import ConfigError

__all__ = ["Budget", "compute", "later", "reduced"]

_FAN_IN: Final = 4


@dataclass(frozen=True, slots=True)
class Budget:
    """What a computation may take.

    Parameters
    ----------
    workers : int
        Threads; on a dask cluster, the workers decide.
    gigabytes : float
        Memory, in 10^9 bytes.
    """

    workers: int
    gigabytes: float

    def __post_init__(self) -> None:
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            msg = f"workers must be a positive int; got {self.workers!r}"
            raise ConfigError(msg)
        given = self.gigabytes
        if isinstance(given, bool) or not isinstance(given, int | float) or not given > 0:
            msg = f"max_memory_gb must be a positive number of GB, such as 1.0; got {given!r}"
            raise ConfigError(msg)
        if find_spec("dask") is None:
            msg = "statistics are computed by dask, which isn't installed: install actstore[dask]"
            raise ConfigError(msg)

    @property
    def bytes_each(self) -> int:
        """What one worker may hold."""
        return int(self.gigabytes * 1e9) // self.workers


def later(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give what makes a task of each call, instead of calling."""
    from dask.delayed import delayed

    found: Callable[..., Any] = delayed(function, pure=False)
    return found


def reduced(parts: Iterable[Any], merge: Callable[[list[Any]], Any]) -> Any:
    """Merge the states of tasks in a tree, whose form goes by their number alone."""
    level, merged = list(parts), later(merge)
    while len(level) > 1:
        fans = [level[at : at + _FAN_IN] for at in range(0, len(level), _FAN_IN)]
        level = [merged(fan) if len(fan) > 1 else fan[0] for fan in fans]
    return level[0]


def compute(tasks: Any, budget: Budget) -> Any:
    """Run tasks, by threads, or by whatever scheduler dask is told to use."""
    from dask.base import compute as run

    (found,) = run(tasks, num_workers=budget.workers)  # type: ignore[no-untyped-call]
    return found
