"""Capturing, compacting and reading do without what only Linux has; tried on Linux, without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

CODE = """
import ctypes, errno, fcntl, mmap, os, sys
from pathlib import Path

import dask.array, numpy as np, torch, xarray, zarr

for name in (
    "O_DIRECT", "copy_file_range", "eventfd", "fdatasync", "memfd_create", "pipe2",
    "posix_fadvise", "posix_fallocate", "sched_getaffinity",
):
    delattr(os, name)
for name in [one for one in dir(mmap) if one.startswith("MADV_")]:
    delattr(mmap, name)


class Libc(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("fallocate", "fallocate64", "mallopt", "renameat2"):
            raise AttributeError(name)
        return super().__getattr__(name)


ctypes.CDLL = Libc
fcntl.F_FULLFSYNC, control, flushed = 51, fcntl.fcntl, []


def with_full_fsync(descriptor, command, *argument):
    if command != fcntl.F_FULLFSYNC:
        return control(descriptor, command, *argument)
    flushed.append(descriptor)
    if len(flushed) % 2:
        raise OSError(errno.ENOTSUP, "not of this file system")
    return os.fsync(descriptor)


fcntl.fcntl = with_full_fsync

import actstore

folder = Path(sys.argv[1])
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(3)))
framework = actstore.InstrumentationFramework(
    actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR, "none")
)
framework.instrument_model(model)
logs = [folder / "a.stream", folder / "b.stream"]
rows = torch.randn(2, 2048, 256)  # 8 MiB of a log: more than is written at once
for log in logs:
    with torch.no_grad(), framework.capture_activations(str(log)):
        wanted = model(rows).reshape(-1, 256).numpy()
archive = folder / "run.zarr"
actstore.compact(logs[0], archive)
actstore.append(logs[1], archive)
for path in (logs[1], archive):
    with actstore.open_dataset(path) as dataset:
        np.testing.assert_array_equal(dataset["2"].values[-len(wanted) :], wanted)
assert actstore.verify(archive).ok
assert len(flushed) > 2
assert sorted(one.name for one in folder.iterdir()) == ["a.stream", "b.stream", "run.zarr"]
"""


def test_a_run_without_what_only_linux_has(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
