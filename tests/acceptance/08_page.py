"""A page of a run, "Looking at it": odd runs, size, time, and what a real browser makes of it.

    .venv/bin/python tests/acceptance/08_page.py [--examples 1000] [--rows 1000000]

The browser is Debian's ``chromium``; without one its line fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "reporting"))

import numpy as np
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report import run
from runs import compacted, odd_datasets, odd_logs

import actstore
from actstore.packet import Axis

sys.path.insert(0, str(ROOT / "tests" / "archive"))
from logs import LogBuilder

LIMIT = 5_000_000
LAYERS, WIDTH, PASS = 4, 64, 10_000


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def odd_runs(examples: int) -> str:
    """Make the pages of odd logs and of their archives, so many, and of half as many datasets."""
    made = [0, 0, 0.0]

    def note(nbytes: int) -> None:
        made[0] += 1
        made[1] = max(made[1], nbytes)
        assert nbytes < LIMIT

    @_settings(examples // 2)
    @given(odd_datasets())
    def datasets(dataset: xr.Dataset) -> None:
        note(len(actstore.explore(dataset).html.encode()))

    @_settings(examples)
    @given(st.data())
    def files(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            log = data.draw(odd_logs(place))
            for source in (log, compacted(log)):
                note(actstore.report(source, place / "page.html").stat().st_size)

    datasets()
    files()
    assert made[0] >= 2 * examples
    return f"{made[0]} pages without an exception, the largest {made[1] / 1e3:.0f} kB"


def large_log(path: Path, rows: int) -> Path:
    """Write a log of many rows, a pass of 10,000 tokens after the other."""
    log = LogBuilder(path, compression="lz4")
    names = [f"model.layers.{block}" for block in range(LAYERS)]
    for block, name in enumerate(names):
        log.layer(name, "resid", block)
    log.texts({number: f" word{number}" for number in range(500)})
    random = np.random.default_rng(0)
    values = random.normal(size=(1, PASS, WIDTH)).astype(np.float32)
    for _ in range(rows // PASS):
        ids = random.integers(0, 500, (1, PASS))
        places = np.arange(PASS, dtype=np.int64)[np.newaxis]
        log.begin(Axis("token", 1, PASS, ids, places, np.ones((1, PASS), np.bool_), flat=False))
        for name in names:
            log.put(name, values)
        log.commit()
    return log.close()


def large(place: Path, rows: int) -> str:
    """Make the pages of a log and an archive of many rows."""
    log = large_log(place / "large.stream", rows)
    archive = actstore.compact(log, place / "large.zarr").path
    told = []
    for source in (log, archive):
        begun = time.perf_counter()
        page = actstore.report(source, place / "page.html", verify=False)
        took = time.perf_counter() - begun
        begun = time.perf_counter()
        actstore.report(source, place / "page.html")
        whole = time.perf_counter() - begun
        size = page.stat().st_size
        assert took <= 10
        assert size < LIMIT
        told.append(
            f"{source.suffix[1:]} {took:.1f} s (with every checksum {whole:.1f} s), "
            f"{size / 1e6:.2f} MB"
        )
    return f"{rows:,} rows of {LAYERS} layers: {'; '.join(told)}"


def browser() -> str:
    """Run the tests in Chromium: console, slider, strip, keys and contrast, at both widths."""
    import chromium

    assert chromium.found() is not None, "there is no chromium"
    where = str(ROOT / "tests" / "reporting" / "test_in_chromium.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "slow", "-p", "no:cacheprovider", where],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    return f"at 1280 and 400 px, light and dark: {done.stdout.splitlines()[-1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given_ = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return run(
            "A page of a run",
            {
                "odd runs have pages": lambda: odd_runs(given_.examples),
                "a million rows in 10 s, under 5 MB": lambda: large(Path(folder), given_.rows),
                "in a real browser": browser,
            },
        )


if __name__ == "__main__":
    sys.exit(main())
