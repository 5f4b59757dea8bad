"""Owns a short benchmark of the machine that it runs on: a log, its archive, and reading both.

Measures what users do, by the public functions, on values like activations. Comparisons with other
tools and with floors are scripts of the repository (``tests/benchmarks/``).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from actstore.compaction import compact
from actstore.config import HookConfig, HookGranularity, InstrumentationConfig
from actstore.dataset import open_dataset
from actstore.errors import ConfigError
from actstore.framework import InstrumentationFramework
from actstore.verification import verify

__all__ = ["Measured", "measure"]

_LAYERS: Final = 8
_WIDTH: Final = 1024
_TOKENS: Final = 512  # of a pass: a packet has 1 MiB
_DRAWN: Final = 3  # passes of different values
_ROWS: Final = 1000


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured: GB are 10^9 bytes of bfloat16 values.

    Attributes
    ----------
    raw_bytes : int
        Of the values.
    capture_gbps, compact_gbps, verify_gbps, read_gbps : float
        From opening the log until all is on the disk; until the archive is; of the archive's
        checksums; a layer of it, from opening it.
    rows_seconds : float
        To read 1,000 random rows of a layer, from opening the archive.
    log_ratio, archive_ratio : float
        Raw bytes over stored bytes.
    seconds : float
        All of it.
    """

    raw_bytes: int
    capture_gbps: float
    compact_gbps: float
    verify_gbps: float
    read_gbps: float
    rows_seconds: float
    log_ratio: float
    archive_ratio: float
    seconds: float


def measure(
    megabytes: int = 256,
    folder: Path | None = None,
    *,
    compression: str = "zstd",
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Measured:
    """Capture a module that computes nothing, compact the log, and read the archive.

    Parameters
    ----------
    megabytes : int
        10^6 bytes of values, about.
    folder : Path, optional
        Where files are made, and removed; the system's folder for temporary files by default.
    compression : {"zstd", "lz4", "none"}
        The log's codec.
    progress : callable
        Given the steps that are done and those that there are, and what is next.

    Returns
    -------
    Measured
        The figures.

    Raises
    ------
    ConfigError
        There are no megabytes, or torch is missing.
    """
    if megabytes < 1:
        msg = f"megabytes must be positive; got {megabytes!r}"
        raise ConfigError(msg)
    if find_spec("torch") is None:
        msg = "what captures is measured, which wants torch: pip install 'actstore[torch]'"
        raise ConfigError(msg)
    from actstore.capture.replay import Replay

    model = Replay(_LAYERS, _TOKENS, _WIDTH, _DRAWN)
    passes = max(_ROWS // _TOKENS + 1, round(megabytes * 1e6 / (_LAYERS * _TOKENS * _WIDTH * 2)))
    chosen = np.sort(np.random.default_rng(0).choice(passes * _TOKENS, _ROWS, replace=False))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder, prefix="actstore-bench-") as name:
        log, archive = Path(name) / "bench.stream", Path(name) / "bench.zarr"
        progress(0, 4, "capture")
        _capture(model, 1, Path(name) / "warm.stream", compression)
        captured = _seconds(lambda: _capture(model, passes, log, compression))
        progress(1, 4, "compact")
        report = compact(log, archive)
        progress(2, 4, "verify")
        verified = _seconds(lambda: verify(archive))
        progress(3, 4, "read")
        read = _seconds(lambda: _read(archive, slice(None)))
        rows = _seconds(lambda: _read(archive, chosen))
        progress(4, 4, "done")
        raw, held = report.raw_bytes, log.stat().st_size
    return Measured(
        raw_bytes=raw,
        capture_gbps=raw / captured / 1e9,
        compact_gbps=raw / report.seconds / 1e9,
        verify_gbps=raw / verified / 1e9,
        read_gbps=raw / _LAYERS / read / 1e9,
        rows_seconds=rows,
        log_ratio=raw / held,
        archive_ratio=report.ratio,
        seconds=time.perf_counter() - began,
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _capture(model: Any, passes: int, log: Path, compression: str) -> None:
    config = InstrumentationConfig(HookGranularity.FULL_TENSOR, compression, 1e-9)
    framework = InstrumentationFramework(config)
    framework.instrument_model(model, HookConfig(target_layers=["layers.*"]))
    with framework.capture_activations(log):
        for _ in range(passes):
            model(model.input_ids)


def _read(archive: Path, rows: Any) -> None:
    with open_dataset(archive, chunks=None) as dataset:
        _ = dataset.actstore.layer("layers.0")[rows].values
