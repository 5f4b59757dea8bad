"""Owns what a benchmark says of where it ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

__all__ = ["machine"]

_PACKAGES = ("torch", "numpy", "numcodecs", "zstandard", "zarr", "xarray")


def machine() -> str:
    """Give the processor, the cores, and the versions, in a line."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"{cores} cores of {names[0]}, Python {platform.python_version()}, {versions}"
