"""Owns what is asked of a dask cluster, whatever it is to do: its client, its workers' memory.

dask.distributed is imported by these functions alone, when a cluster is there or wanted.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any, Final

from actstore.errors import ConfigError

__all__ = ["Memory", "check_client", "default_client", "memory_of"]

#: Of glibc's ``mallopt``, and bytes: what is freed of an arena and kept, and which arrays are
#: taken from there. Ours are of one to a few MiB.
_TRIM_THRESHOLD, _KEPT = -1, 64 << 20
_MMAP_THRESHOLD, _LARGEST = -3, 8 << 20


def check_client(client: Any) -> None:
    """Refuse what is neither None nor a client of a cluster; and one whose calls are coroutines.

    Raises
    ------
    ConfigError
        It is, or distributed isn't installed.
    """
    if client is None:
        return
    try:
        from distributed import Client
    except ImportError as error:
        msg = "client= wants dask.distributed, which isn't installed: actstore[distributed]"
        raise ConfigError(msg) from error
    if not isinstance(client, Client):
        msg = f"client must be a dask.distributed.Client; got {client!r}"
        raise ConfigError(msg)
    if client.asynchronous:
        msg = "client is asynchronous; give one that isn't: Client(address)"
        raise ConfigError(msg)


def default_client() -> Any:
    """Give the client that dask computes by, where that is a cluster's; else None."""
    if "distributed" not in sys.modules:
        return None
    from dask.base import get_scheduler
    from distributed import Client

    found = getattr(get_scheduler(), "__self__", None)  # type: ignore[no-untyped-call]
    return found if isinstance(found, Client) else None


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a worker: its host, its threads, its limit in bytes (0: none), and what is free in it.

    Free is what a process may take over what it had before it did anything of ours, until dask
    lets it begin no more tasks.
    """

    host: str
    threads: int
    limit: int
    free: float


@dataclass(slots=True)
class _Before:
    nbytes: int = 0


_BEFORE: Final = _Before()


def memory_of(worker: Any) -> Memory:
    """Give the memory of the worker that this process is, when it has imported all it needs."""
    _keep_freed_memory()
    _BEFORE.nbytes = _BEFORE.nbytes or worker.monitor.get_process_memory()
    limit = worker.memory_manager.memory_limit or 0
    pause = worker.memory_manager.memory_pause_fraction or 1.0
    free = pause * limit - _BEFORE.nbytes if limit else float("inf")
    return Memory(socket.gethostname(), worker.state.nthreads, limit, free)


def _keep_freed_memory() -> None:
    """Let a worker use freed memory again.

    Dask's nanny tells malloc to give it back at once; every array of a MiB then begins with 256
    page faults, and a compaction took 2.5 times as long.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # only glibc has it
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _KEPT)
