"""Runs of faults on the way to a bucket, and of writers that are killed: nothing lost or doubled.

Shared by the tests (a short form) and the acceptance script. ``python tests/buckets/s3_faults.py
100`` does the long one.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
sys.path.insert(0, str(Path(__file__).parents[2]))

import logs
from logs import LogBuilder, axis, decoder_log, random_values
from loopback import Request, Way, options, s3_server, way_to

import actstore
from actstore.archive import grid
from actstore.buckets import remote
from actstore.errors import ArchiveError, BucketError
from actstore.stream import uploading

__all__ = ["count_requests", "fault_runs"]

ROOT = Path(__file__).parents[2]
PASSES = 60
SHARE = 0.2


# -- requests -----------------------------------------------------------------------------------


def count_requests(shards: int = 12) -> str:
    """Count the requests of opening, and of reading a layer of several shards; give what it says.

    The log is a sampled one, whose sites have widths, and so indices, of their own.
    """
    with tempfile.TemporaryDirectory() as name, s3_server(Path(name)) as port:
        folder = Path(name)
        log = _sampled_log(folder / "run.stream", rows=256 * shards)
        with way_to(port) as way:
            said = options(way.endpoint)
            url = "s3://bucket/run.zarr"
            with _small_shards(256 * 64 * 4):
                actstore.compact(log, url, storage_options=said)
            with way.counted() as opening:
                dataset = actstore.open_dataset(url, storage_options=said)
            assert len(dataset.indexes) >= 3, "the indices are the point of it"
            with way.counted() as reading:
                found = dataset.resid.sel(layer=1).values
            found_shards = dataset.resid.encoding["shards"]
            count = -(-dataset.sizes["token"] // found_shards[1])
            with way.counted() as part:
                some = dataset.resid.isel(layer=0, token=[0, 300, 301]).values
            dataset.close()
        with actstore.open_dataset(log) as oracle:
            np.testing.assert_array_equal(found, oracle.resid.sel(layer=1).values)
            np.testing.assert_array_equal(some, oracle.resid.isel(layer=0, token=[0, 300, 301]))
        assert count == shards, f"{count} shards, {shards} wanted"
        assert len(opening) <= 3, f"opening made {len(opening)} requests"
        assert len(reading) <= shards + 3, f"{shards} shards took {len(reading)} requests"
        assert len(part) <= 2 * 2, f"rows of two shards took {len(part)} requests"
    return (
        f"opening an archive of {len(dataset.indexes)} indices: {len(opening)} request(s); a "
        f"layer of {shards} shards: {len(reading)}; three rows of two shards: {len(part)}"
    )


class _small_shards:  # noqa: N801 - a context manager
    """Let shards be so small that a small log has many of them."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def __enter__(self) -> None:
        self._were = grid.CHUNK_BYTES, grid.SHARD_BYTES
        grid.CHUNK_BYTES, grid.SHARD_BYTES = self._nbytes // 4, self._nbytes

    def __exit__(self, *error: object) -> None:
        grid.CHUNK_BYTES, grid.SHARD_BYTES = self._were


def _sampled_log(path: Path, rows: int) -> Path:
    log = LogBuilder(path)
    widths = {"resid": 64, "wide": 8, "wider": 12}
    for width, kept in ((256, 64), (512, 8), (1024, 12)):
        log.features(width, list(range(0, 3 * kept, 3)))
    for block in range(2):
        log.layer(f"h.{block}", "resid", block)
    log.layer("wide", "wide")
    log.layer("wider", "wider")
    for number in range(rows // 64):
        log.begin(axis(1, 64, start=64 * number))
        for place, (name, site, width) in enumerate(
            (
                *(("h.0", "resid", 256), ("h.1", "resid", 256)),
                *(("wide", "wide", 512), ("wider", "wider", 1024)),
            )
        ):
            values = random_values((1, 64, widths[site]), seed=10 * number + place)
            log.put(name, values, width=width)
        log.commit()
    return log.close()


# -- faults -------------------------------------------------------------------------------------


def fault_runs(runs: int, seed: int = 1, told: Callable[[str], None] | None = None) -> str:
    """Compact, read, upload and kill over a faulty way; every row is there, and once.

    Parameters
    ----------
    runs : int
        How many; each is the next of the kinds in `KINDS`.
    seed : int
        Of the faults and the moments of the kills.
    told : callable, optional
        Is given a line after each run.
    """
    met, kinds = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as name, s3_server(Path(name)) as port:
        for number in range(runs):
            kind = KINDS[number % len(KINDS)]
            folder = Path(name, str(number))
            folder.mkdir()
            with way_to(port) as way:
                kind(_Run(folder, way, f"s3://bucket/{seed}-{number}", seed * 1000 + number))
                met += way.met
            kinds[kind.__name__.lstrip("_")] += 1
            if told is not None:
                told(f"{number + 1} of {runs}: {kind.__name__.lstrip('_')}")
    faults = sum(count for name, count in met.items() if name != "none")
    each = ", ".join(f"{count} {name}" for name, count in sorted(met.items()) if name != "none")
    return (
        f"{runs} runs ({', '.join(f'{count} {name}' for name, count in kinds.items())}), "
        f"{met.total()} requests of which {faults} met a fault ({each}): no row lost or doubled"
    )


class _Run:
    """What a run has: a folder, a way to the server, a URL, and numbers of its own."""

    def __init__(self, folder: Path, way: Way, url: str, seed: int) -> None:
        self.folder, self.way, self.url = folder, way, url
        self.said = options(way.endpoint)
        self.rng = random.Random(seed)
        self.seed = seed

    def spoil(self) -> None:
        self.way.faulty(self.seed, SHARE)

    def log(self) -> LogBuilder:
        return decoder_log(self.folder / "run.stream", steps=self.rng.randrange(4, 30))

    def check(self, url: str, log: Path) -> None:
        """Compare an archive in the bucket with the log, and every byte with its checksum."""
        with (
            actstore.open_dataset(url, storage_options=self.said) as found,
            actstore.open_dataset(log) as wanted,
        ):
            same(found, wanted)
        self.way.clean()
        report = actstore.verify(url, storage_options=self.said)
        assert report.ok, report.damage
        names = {one.name for one in remote(url, self.said).bucket.list()}
        assert ".making.json" not in names


def same(found: xr.Dataset, wanted: xr.Dataset) -> None:
    """Compare the values and labels of an archive with those of its log."""
    xr.testing.assert_identical(found.drop_attrs().load(), wanted.drop_attrs().load())


def compacted(run: _Run) -> None:
    """Compact into the bucket and read it again, while requests fail."""
    log = run.log()
    run.spoil()
    actstore.compact(log.path, f"{run.url}.zarr", storage_options=run.said)
    run.check(f"{run.url}.zarr", log.path)
    assert [one.name for one in run.folder.iterdir()] == ["run.stream"], "something was left"


def cut_off(run: _Run) -> None:
    """Compact; from some moment on nothing is answered; the same call goes on, later."""
    log = run.log()
    url, left = f"{run.url}.zarr", moment_of(run, log.path)

    def rule(request: Request) -> str | None:
        nonlocal left
        left -= 1
        return None if left > 0 else run.rng.choice(("503", "500", "reset"))

    run.way.rule = rule
    with contextlib.suppress(BucketError):
        actstore.compact(log.path, url, storage_options=run.said)
    run.way.clean()
    go_on(run, log.path, url)


def killed_compaction(run: _Run) -> None:
    """Kill a compaction at some moment; the same call goes on."""
    log = run.log()
    url, left = f"{run.url}.zarr", moment_of(run, log.path)
    child = _child("compact", str(log.path), url, run.way.endpoint)

    def rule(_request: Request) -> str | None:
        nonlocal left
        left -= 1
        if left > 0:
            return None
        child.send_signal(signal.SIGKILL)  # what it asked for last is done, or isn't
        return run.rng.choice((None, "reset"))

    run.way.rule = rule
    child.communicate()
    _until(lambda: not run.way.busy)
    go_on(run, log.path, url)


def moment_of(run: _Run, log: Path) -> int:
    """Draw one of the requests of a compaction, as often as not one of the last."""
    with run.way.counted() as whole:
        actstore.compact(log, f"{run.url}-whole.zarr", storage_options=run.said)
    return run.rng.randrange(len(whole) - run.rng.choice((4, len(whole))), len(whole)) + 1


def go_on(run: _Run, log: Path, url: str) -> None:
    """Do the same call again: it goes on, or finds a whole archive; nothing else is left."""
    whole = (remote(url, run.said) / "zarr.json").exists()
    run.spoil()
    try:
        actstore.compact(log, url, storage_options=run.said)
    except ArchiveError:
        assert whole, "it doesn't go on"
    else:
        assert not whole, "it was made twice"
    run.check(url, log)
    assert [one.name for one in run.folder.iterdir()] == ["run.stream"], "something was left"


def uploaded(run: _Run) -> None:
    """Upload a log as it grows, while requests fail, and compact it from there."""
    run.spoil()
    url = f"{run.url}.stream"
    log = growing(run.folder / "spool.stream", url, run.said)
    fired = write_passes(log, PASSES)
    log.close()
    assert not log.path.exists(), "the spool stays"
    check_log(url, run.said, fired, complete=True)
    archive = f"{run.url}.zarr"
    actstore.compact(url, archive, storage_options=run.said, spool=run.folder)
    run.way.clean()
    with (
        actstore.open_dataset(url, storage_options=run.said) as wanted,
        actstore.open_dataset(archive, storage_options=run.said) as found,
    ):
        assert found.sizes["token"] == 4 * PASSES
        same(found, wanted)


def killed_writer(run: _Run) -> None:
    """Kill what writes and uploads a log; what is there is whole, and the rest comes later."""
    url, spool = f"{run.url}.stream", run.folder / "spool.stream"
    run.spoil()
    child = _child("write", str(spool), url, run.way.endpoint)
    wanted, promised = run.rng.randrange(PASSES), 0
    assert child.stdout is not None
    for line in child.stdout:
        promised = int(line)
        if promised >= wanted:
            time.sleep(run.rng.random() * 0.01)  # somewhere within the next passes
            child.send_signal(signal.SIGKILL)
            break
    rest, _ = child.communicate()
    promised = max([promised, *map(int, rest.split())])
    run.way.clean()
    _until(lambda: not run.way.busy)
    there = remote(url, run.said)
    if any(one.name.endswith(".segment") for one in there.bucket.list()):
        check_log(url, run.said, None, complete=None)
    run.spoil()
    report = actstore.upload(spool, url, storage_options=run.said, segment_bytes=4096)
    again = actstore.upload(spool, url, storage_options=run.said, segment_bytes=4096)
    assert again.sent == 0, "a segment was sent twice"
    assert again.bytes == report.bytes
    found = check_log(url, run.said, None, complete=report.complete)
    assert found >= promised, f"{found} passes are there, {promised} were promised"
    if report.complete:
        assert found == PASSES


KINDS = (compacted, uploaded, killed_writer, cut_off, killed_compaction, killed_writer)


# -- logs that are uploaded ---------------------------------------------------------------------


def growing(path: Path, url: str, said: dict[str, Any], spool_bytes: int = 1 << 16) -> LogBuilder:
    """Give a log that is uploaded as it is written, in small segments."""
    where = remote(url, said)
    assert where is not None
    writer = partial(
        uploading.UploadedWriter,
        bucket=where.bucket,
        spool_bytes=spool_bytes,
        segment_bytes=4096,
    )
    was, logs.StreamWriter = logs.StreamWriter, writer
    try:
        return LogBuilder(path)
    finally:
        logs.StreamWriter = was


def write_passes(
    log: LogBuilder, passes: int, told: Callable[[int], None] = lambda _number: None
) -> list[Any]:
    """Write passes of four rows, each a group; what they are depends on their number only."""
    for name in ("h.0", "h.1"):
        log.layer(name, "resid", int(name[-1]))
    for number in range(passes):
        log.begin(axis(1, 4, start=4 * number))
        for place, name in enumerate(("h.0", "h.1")):
            log.put(name, values_of(number, place))
        log.commit()
        told(number + 1)
    return log.fired


def values_of(number: int, place: int) -> Any:
    """Give what a layer of a pass is."""
    return random_values((1, 4, 48), "bfloat16", seed=2 * number + place)


def check_log(
    url: str, said: dict[str, Any], fired: list[Any] | None, *, complete: bool | None
) -> int:
    """Read a log in the bucket: its packets are the first that were written, each once."""
    with actstore.open_stream(url, storage_options=said) as reader:
        assert complete is None or reader.complete == complete
        packets = list(reader.packets())
    assert [one.seq for one in packets] == list(range(len(packets)))
    assert len(packets) % 2 == 0, "half of a group is there"
    for one in packets:
        wanted = values_of(one.seq // 2, one.seq % 2)
        assert one.pass_index == one.seq // 2
        assert one.values.tobytes() == wanted.tobytes()
    if fired is not None:
        assert len(packets) == len(fired)
    return len(packets) // 2


def _until(done: Callable[[], bool]) -> None:
    for _ in range(6000):
        if done():
            return
        time.sleep(0.005)
    raise AssertionError("it never ends")


def _child(*given: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def main(given: list[str]) -> None:
    """Do the runs, or be the process that is killed."""
    match given:
        case ["compact", log, url, endpoint]:
            actstore.compact(log, url, storage_options=options(endpoint))
        case ["write", path, url, endpoint]:
            log = growing(Path(path), url, options(endpoint))
            write_passes(log, PASSES, lambda number: print(number, flush=True))
            log.close()
        case _:
            print(count_requests(), flush=True)
            print(fault_runs(int(given[0]) if given else 100, told=partial(print, flush=True)))


if __name__ == "__main__":
    main(sys.argv[1:])
