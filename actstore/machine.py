"""Owns what this process may use of its machine: cores and memory, within its container's limits.

What each part takes of that is its own business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

__all__ = ["cores", "memory"]

_ROOT: Final = Path("/")
_QUOTA: Final = 2  # words: microseconds of all cores, of so many that pass


def cores(root: Path = _ROOT) -> int:
    """Give how many cores this process may use: by its affinity, and its groups' ``cpu.max``.

    Parameters
    ----------
    root : Path
        Where the file systems ``proc`` and ``sys`` are mounted.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    found = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        words = _text(group / "cpu.max").split() or [
            _text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(words) == _QUOTA and all(word.isdigit() for word in words):  # else "max", or -1
            quota, period = map(int, words)
            found = min(found, max(-(-quota // max(period, 1)), 1))
    return found


def memory(root: Path = _ROOT) -> int:
    """Give how many bytes of memory this process may use: the host's, or its groups' limit.

    Parameters
    ----------
    root : Path
        Where the file systems ``proc`` and ``sys`` are mounted.
    """
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for group in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _text(group / name).strip()
            if limit.isdigit():  # else "max"
                found = min(found, int(limit))
    return found


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups that this process is in, of either version.

    In a container the path is often the host's, which isn't there: what is mounted is the group.
    """
    mounted = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", controller) and controller not in controllers.split(","):
            continue
        top = mounted / controller if controllers else mounted
        inside = PurePosixPath(path.lstrip("/"))
        yield from (top / one for one in (inside, *inside.parents))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # there is no such limit
        return ""
