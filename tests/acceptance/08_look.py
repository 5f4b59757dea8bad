"""Part 8, looking at it: what must hold of figures, the page and its server, and by how much.

    .venv/bin/python tests/acceptance/08_look.py [--examples 1000] [--rows 1000000] [--shots DIR]

Ten minutes on two cores. The browser is Debian's ``chromium``; without one its lines fail.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "reporting"))

import chromium
import httpx
import numpy as np
import psutil
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report import run
from runs import compacted, odd_datasets, odd_logs, run_log
from servers import Server, served
from test_in_chromium import CONTRAST
from test_served_in_chromium import IDLE
from test_serving import TRAVERSALS, WRONG, raw, unleaked

import actstore
from actstore.packet import Axis

sys.path.insert(0, str(ROOT / "tests" / "archive"))
from logs import LogBuilder

LIMIT = 5_000_000
LAYERS, WIDTH, PASS = 4, 64, 10_000
PARALLEL = 200
FIGURE_SECONDS = 2.0


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


def written(place: Path, rows: int) -> tuple[Path, Path]:
    """Give the log and the archive of many rows, made by the first who asks."""
    log, archive = place / "large.stream", place / "large.zarr"
    if not archive.exists():
        actstore.compact(large_log(log, rows), archive)
    return log, archive


def large(place: Path, rows: int) -> str:
    """Make the pages of a log and an archive of many rows."""
    log, archive = written(place, rows)
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


# -- in a real browser ----------------------------------------------------------------------------


def tests(which: str) -> str:
    """Run tests in Chromium, of the report and of the served page, at both widths."""
    assert chromium.found() is not None, "there is no chromium"
    places = [
        str(ROOT / "tests" / "reporting" / name)
        for name in ("test_in_chromium.py", "test_served_in_chromium.py")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "slow", "-p", "no:cacheprovider",
         "-k", which, *places],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout.splitlines()[-1]


def contrast(place: Path, shots: Path | None) -> str:
    """Look at the report and the served page: the least contrast, and what the console says."""
    assert chromium.found() is not None, "there is no chromium"
    log, _ = run_log(place / "looked.stream", width=128, rows=600, layers=5)
    archive = compacted(log)
    page = actstore.report(archive, place / "looked.html")
    worst = []
    with chromium.Chromium() as browser, served(archive) as server:
        for (name, source), width, dark in itertools.product(
            (("report", page), ("served", server.url)), (1280, 400), (False, True)
        ):
            browser.open(source, width=width, dark=dark)
            if name == "served":
                browser.wait(IDLE)
            assert browser.run("document.documentElement.scrollWidth") <= width
            if shots is not None:
                shot = shots / f"{name}-{width}-{'dark' if dark else 'light'}.png"
                browser.screenshot(shot)
            ratio, what, count = browser.run(CONTRAST)
            assert ratio >= 4.5, what
            assert not browser.errors, browser.errors
            worst.append((ratio, count))
    texts = sum(count for _, count in worst)
    return (
        f"report and served page, 1280 and 400 px, light and dark: least contrast "
        f"{min(worst)[0]:.2f} of {texts:,} texts, console empty"
    )


# -- served ---------------------------------------------------------------------------------------


@contextmanager
def watched(server: Server) -> Iterator[list[int]]:
    """Give the server's memory in use, looked at every 10 ms: what it was first, and the most."""
    process = psutil.Process(server.process.pid)
    found = [process.memory_info().rss] * 2
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            found[1] = max(found[1], process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _hostile(server: Server) -> Iterator[tuple[int, str]]:
    """Ask for what isn't there, in every way of the tests; give statuses and texts."""
    for path in TRAVERSALS:
        for line in (f"/{server.token}/{path}", f"/{path}"):
            said = raw(server, f"GET {line} HTTP/1.1\r\nHost: localhost\r\n"
                               "Connection: close\r\n\r\n".encode("latin-1"))  # fmt: skip
            yield int(said.split(b" ")[1]), said.decode("latin-1")
    right = {
        "variable": "resid", "axis": "token", "layer": 0, "layers": 1, "feature": 0,
        "sequence": 0, "first": 0, "count": 5,
    }  # fmt: skip
    asks = {
        "sequences": ("axis", "first", "count"),
        "tokens": ("axis", "sequence", "first", "count"),
        "layer": ("variable", "layer", "sequence", "first", "count"),
        "norms": ("variable", "layer", "layers", "sequence", "first", "count"),
        "feature": ("variable", "layer", "feature", "sequence", "first", "count"),
        "distribution": ("variable",),
    }
    giant = [("count", 10**6), ("first", 10**9), ("layers", 10**6), ("feature", 10**9)]
    numbers = random.Random(0)
    base = server.url.removesuffix(f"{server.token}/")
    with httpx.Client(timeout=60, trust_env=False) as client:

        def get(address: str, method: str = "GET", **headers: str) -> tuple[int, str]:
            answer = client.request(method, address, headers=headers)
            return answer.status_code, answer.text

        for (what, names), (name, value) in itertools.product(asks.items(), [*WRONG, *giant]):
            if name in names and value not in (1, 3, 4, 16, 40):  # which there are
                text = str(value).encode("utf-8", "surrogatepass")
                query = [f"{one}={quote(text if one == name else str(right[one]))}"
                         for one in names]  # fmt: skip
                yield get(f"{server.url}{what}?{'&'.join(query)}")
        for _ in range(300):  # nearly the token
            place = numbers.randrange(len(server.token))
            near = server.token[:place] + "-" + server.token[place + 1 :]
            if near != server.token:
                yield get(f"{base}{near}/")
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
            yield get(server.url, method)
        for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost:99999999"):
            yield get(server.url, host=host)
        for _ in range(500):  # odd bytes
            query = numbers.randbytes(numbers.randrange(1, 300))
            yield get(f"{server.url}{numbers.choice(list(asks))}?{quote(query)}")
        yield get(f"{server.url}tokens?{'a' * 15_000}")


def hostile(place: Path, rows: int) -> str:
    """Serve a million rows to whom means it ill."""
    with served(written(place, rows)[1]) as server, watched(server) as memory:
        statuses: Counter[int] = Counter()
        for status, text in _hostile(server):
            assert 400 <= status < 500, (status, text[:300])
            unleaked(text)
            assert str(place) not in text
            statuses[status] += 1
        code, said = server.end()
        assert code == 130
        assert "Traceback" not in said, said[-2000:]
    told = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
    return (
        f"{statuses.total()} requests: {told}; nothing leaked; memory "
        f"{memory[0] / 1e6:.0f} MB at first, {memory[1] / 1e6:.0f} at most"
    )


def _sequences(server: Server) -> int:
    asked = httpx.get(f"{server.url}sequences?axis=token&first=0&count=1", trust_env=False)
    found: int = asked.json()["of"]
    return found


def parallel(place: Path, rows: int) -> str:
    """Ask for as much as may be asked, 200 times at once, five times over."""
    numbers = random.Random(0)

    def address(number: int) -> str:
        of = {"variable": "resid", "sequence": numbers.randrange(sequences),
              "first": 400 * numbers.randrange(20), "count": 400}  # fmt: skip
        layer = {"layer": numbers.randrange(LAYERS)}
        labels = {name: one for name, one in of.items() if name != "variable"}
        return [
            f"layer?{urlencode(of | layer)}",
            f"norms?{urlencode(of | {'layer': 0, 'layers': LAYERS})}",
            f"feature?{urlencode(of | layer | {'feature': numbers.randrange(WIDTH)})}",
            f"tokens?{urlencode(labels | {'axis': 'token'})}",
            "distribution?variable=resid",
            f"layer?{urlencode(of | layer | {'count': 10**8})}",
        ][number % 6]

    with served(written(place, rows)[1]) as server, watched(server) as memory:
        sequences = _sequences(server)
        statuses: Counter[int] = Counter()

        def ask(path: str) -> tuple[int, str]:
            with httpx.Client(
                base_url=server.url, timeout=120, trust_env=False, verify=False
            ) as client:
                gate.wait()
                answer = client.get(path)
                return answer.status_code, answer.text

        began = time.perf_counter()
        for _ in range(5):
            gate = threading.Barrier(PARALLEL)
            with ThreadPoolExecutor(PARALLEL) as pool:
                for status, text in pool.map(ask, map(address, range(PARALLEL))):
                    statuses[status] += 1
                    unleaked(text)
        took = time.perf_counter() - began
        assert set(statuses) <= {200, 400, 429}, statuses
        assert statuses[200]
        grown = memory[1] - memory[0]
        assert grown < 1e9  # what max_memory_gb says
    told = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
    return (
        f"5 × {PARALLEL} at once in {took:.1f} s: {told}; memory {memory[0] / 1e6:.0f} MB at "
        f"first, {memory[1] / 1e6:.0f} at most"
    )


def lazily(place: Path, rows: int) -> str:
    """Take the time of what a page asks for, one after the other, of sequences not yet read."""
    taken: dict[str, list[float]] = {}
    with (
        served(written(place, rows)[1]) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):

        def ask(what: str, **given_: Any) -> Any:
            began = time.perf_counter()
            answer = client.get(what, params=given_)
            taken.setdefault(what or "page", []).append(time.perf_counter() - began)
            assert answer.status_code == 200, answer.text
            return answer

        ask("")
        sequences = _sequences(server)
        for sequence in range(0, sequences, max(sequences // 10, 1)):
            of = {"sequence": sequence, "first": 5000, "count": 400}
            ask("tokens", axis="token", **of)
            ask("layer", variable="resid", layer=1, **of)
            ask("norms", variable="resid", layer=0, layers=LAYERS, **of)
            ask("feature", variable="resid", layer=2, feature=63, **of)
    told = ", ".join(f"{what} {max(some) * 1e3:.0f}" for what, some in taken.items())
    return f"ms at most, of 10 sequences: {told}"


# -- figures --------------------------------------------------------------------------------------


def figures() -> str:
    """Draw every figure of a log and an archive of a million rows."""
    script = str(ROOT / "tests" / "benchmarks" / "figures.py")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, script],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
    taken = {
        found[1]: max(float(found[2]), float(found[3]))
        for found in re.finditer(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", done.stdout, re.M)
    }
    assert len(taken) >= 13, done.stdout + done.stderr
    slowest = max(taken, key=lambda one: taken[one])
    told = f"{len(taken)} figures, the slowest {slowest} in {taken[slowest]:.2f} s"
    assert taken[slowest] <= FIGURE_SECONDS, told
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shots", type=Path, help="a folder for screenshots")
    parser.add_argument("--only", default="", help="checks whose names have this in them")
    given_ = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checks = {
            "odd runs have pages": lambda: odd_runs(given_.examples),
            "a million rows in 10 s, under 5 MB": lambda: large(place, given_.rows),
            "browser: console and contrast": lambda: contrast(place, given_.shots),
            "browser: the slider and the strip react": lambda: tests(
                "slider or tell or reached or map"
            ),
            "browser: the keyboard reaches everything": lambda: tests("tab_key or tell"),
            "browser: odd and hostile runs": lambda: tests("little or hostile or cant"),
            "serve: hostile requests get 4xx": lambda: hostile(place, given_.rows),
            "serve: 200 at once, bounded memory": lambda: parallel(place, given_.rows),
            "serve: values come when asked for": lambda: lazily(place, given_.rows),
            "figures of a million rows in 2 s": figures,
        }
        chosen = {name: one for name, one in checks.items() if given_.only in name}
        return run("Part 8: looking at it", chosen)


if __name__ == "__main__":
    sys.exit(main())
