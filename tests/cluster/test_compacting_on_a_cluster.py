"""Compaction by the workers of a cluster: the bytes that threads make, whatever dies."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import ml_dtypes
import numpy as np
import pytest
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import actstore
from actstore import errors
from actstore.archive import grid
from actstore.archive.journal import attempts_of
from actstore.cli.app import app
from actstore.compaction import cluster, worker
from actstore.compaction.recipe import OfLogs
from actstore.compaction.worker import Making, WorkerError, stamps_of
from actstore.errors import ArchiveError, ConfigError

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
sys.path.insert(0, str(Path(__file__).parent))
from clusters import cluster_of, kill, kill_one_of_four, processes, small_shards
from logs import LogBuilder, axis, decoder_log, files_of, random_values
from test_ranks import logs_of


@pytest.fixture(autouse=True)
def _small_and_dated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with small_shards():
        yield


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return decoder_log(tmp_path / "run.stream", steps=60, width=96, vocab=160).path


def finite_log(path: Path, *, run: int = 0, rows: int = 300) -> Path:
    """Write a log of finite values, dense and ragged, with a site whose rows are missing once."""
    log = LogBuilder(path, run=f"00000000-0000-4000-8000-{run:012}")
    for block in range(2):
        log.layer(f"h.{block}", "resid", block)
    log.layer("loose", "loose")
    rng = np.random.default_rng(run)
    for number in range(3):
        log.begin(axis(1, rows))
        for block in range(2):
            if (number, block) != (1, 1):
                values = rng.standard_normal((1, rows, 32)).astype(ml_dtypes.bfloat16)
                log.put(f"h.{block}", values)
        log.put("loose", random_values((7, 11 + number), "float16", seed=number))
        log.commit()
    return log.close()


# -- the same bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "precision"),
    [
        ("balanced", None),
        ("fast", {"resid": "bfloat16"}),
        ("dense", "relative=0.01"),
        ("balanced", "nmse=1e-3"),
        ("none", {"*": "mse=1e-4"}),
        ("balanced", "int8"),
    ],
)
def test_several_logs_are_the_archive_that_threads_make(
    client: Client, tmp_path: Path, profile: str, precision: Any
) -> None:
    logs = [finite_log(tmp_path / f"{number}.stream", run=number) for number in range(2)]
    options: dict[str, Any] = {"profile": profile, "precision": precision}
    by_threads = actstore.compact(logs, tmp_path / "a.zarr", **options)
    seen: list[tuple[int, int]] = []
    by_workers = actstore.compact(
        logs, tmp_path / "b.zarr", client=client, progress=lambda *now: seen.append(now), **options
    )
    assert files_of(by_workers.path) == files_of(by_threads.path)
    assert by_workers.shards_verified == by_threads.shards_verified > 8
    assert seen == sorted(seen)
    assert seen[-1] == (by_threads.raw_bytes,) * 2
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"0.stream", "1.stream", "a.zarr", "b.zarr"}


def test_every_site_of_a_decoder_is_the_same(client: Client, log: Path, tmp_path: Path) -> None:
    texts = {number: f"<{number}>" for number in range(100, 110)}
    tokenizer = type("Told", (), {"decode": lambda self, ids: texts[ids[0]]})()  # can't travel
    for name, options in (("a", {}), ("b", {"client": client})):
        actstore.compact(log, tmp_path / f"{name}.zarr", tokenizer=tokenizer, **options)
    assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "b.zarr")
    assert actstore.verify(tmp_path / "b.zarr", against=log).ok


def test_the_logs_of_ranks_are_united_on_the_workers(client: Client, tmp_path: Path) -> None:
    logs = logs_of(tmp_path, (2, 1, 2))
    actstore.compact(logs, tmp_path / "a.zarr")
    actstore.compact(logs, tmp_path / "b.zarr", client=client)
    assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "b.zarr")


def test_a_cluster_writes_into_a_bucket(client: Client, log: Path, tmp_path: Path) -> None:
    actstore.compact(log, tmp_path / "a.zarr")
    (tmp_path / "bucket").mkdir()
    url = (tmp_path / "bucket/b.zarr").as_uri()
    actstore.compact(log, url, client=client)
    assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "bucket/b.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "bucket", "run.stream"]
    held = client.run(lambda: list(worker._SHELF.held))
    planned = [sum(tmp_path in one.parents for one in mine) for mine in held.values()]
    assert max(planned) == 1  # each worker plans the logs once
    far = (tmp_path / "bucket/run.stream").as_uri()
    actstore.upload(log, far)
    with pytest.raises(ConfigError, match="is in a bucket"):
        actstore.compact(far, tmp_path / "c.zarr", client=client)


def test_shuffled_rows_are_not_for_a_cluster(client: Client, log: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave client out"):
        actstore.compact(log, tmp_path / "a.zarr", layout="shuffled", client=client)
    assert [path.name for path in tmp_path.iterdir()] == ["run.stream"]


def test_a_log_named_from_where_only_the_client_is(
    client: Client, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    actstore.compact("run.stream", "a.zarr")
    actstore.compact("run.stream", "b.zarr", client=client, remove_logs=True)
    assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "b.zarr")
    assert not log.exists()


def test_what_is_appended_is_the_same(client: Client, tmp_path: Path) -> None:
    first, later = (finite_log(tmp_path / f"{number}.stream", run=number) for number in range(2))
    for name, options in (("a", {}), ("b", {"client": client})):
        archive = actstore.compact(first, tmp_path / f"{name}.zarr").path
        actstore.append(later, archive, **options)
    assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "b.zarr")


def test_the_command_takes_a_scheduler(workers: LocalCluster, log: Path, tmp_path: Path) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(one) for one in arguments])

    out, address = tmp_path / "b.zarr", workers.scheduler_address
    actstore.compact(log, tmp_path / "a.zarr")
    assert run("compact", log, out, "--scheduler", address).exit_code == 0
    assert files_of(tmp_path / "a.zarr") == files_of(out)
    command = ("stats", out, "--variable", "resid", "--json")
    assert run(*command, "--scheduler", address).stdout == run(*command).stdout
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        refused = run("compact", log, tmp_path / "c.zarr", "--scheduler", "host:0")
    assert refused.exit_code == 3
    assert "no dask scheduler answers at 'host:0'" in refused.stderr


# -- going on -----------------------------------------------------------------------------------


class StoppedError(Exception):
    """What a test ends a compaction with."""


def stopped(log: Path, out: Path, share: float, **options: Any) -> None:
    """Compact, and end it when a share of the bytes is done."""

    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise StoppedError

    with pytest.raises(StoppedError):
        actstore.compact(log, out, progress=progress, **options)


@pytest.mark.parametrize("first", ["threads", "workers"])
def test_a_compaction_that_was_cut_short_goes_on_elsewhere(
    client: Client, log: Path, tmp_path: Path, first: str
) -> None:
    wanted = files_of(actstore.compact(log, tmp_path / "whole.zarr").path)
    out, ways = tmp_path / "out.zarr", [{}, {"client": client}]
    one, other = ways if first == "threads" else ways[::-1]
    stopped(log, out, 0.4, **one)
    assert not attempts_of(tmp_path / ".out.zarr.partial").exists()
    report = actstore.compact(log, out, **other)
    assert 0 < report.shards_resumed < report.shards_verified
    assert files_of(out) == wanted


def test_a_cancelled_compaction_leaves_the_cluster_idle(
    client: Client, log: Path, tmp_path: Path
) -> None:
    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actstore.compact(log, tmp_path / "out.zarr", client=client, progress=progress)
    wanted = {".out.zarr.journal", ".out.zarr.partial", "run.stream"}
    deadline = time.monotonic() + 30
    while any(client.processing().values()) or {one.name for one in tmp_path.iterdir()} != wanted:
        assert time.monotonic() < deadline, "tasks, or what they wrote, are still there"


def test_what_a_lost_client_left_is_removed(client: Client, log: Path, tmp_path: Path) -> None:
    wanted = files_of(actstore.compact(log, tmp_path / "whole.zarr").path)
    stopped(log, tmp_path / "out.zarr", 0.3, client=client)
    left = attempts_of(tmp_path / ".out.zarr.partial") / "run" / "attempt" / "resid"
    left.mkdir(parents=True)
    (left / "0").write_bytes(b"half")
    actstore.compact(log, tmp_path / "out.zarr")
    assert files_of(tmp_path / "out.zarr") == wanted
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


# -- what dies ----------------------------------------------------------------------------------


def test_a_worker_killed_at_any_moment_changes_nothing(tmp_path: Path) -> None:
    assert kill_one_of_four(tmp_path, 2).kills == 2


@pytest.mark.slow
@pytest.mark.crash
def test_a_worker_killed_at_ten_moments_changes_nothing(tmp_path: Path) -> None:
    assert kill_one_of_four(tmp_path, 10, seed=1).kills == 10


def test_without_workers_it_ends_and_the_same_call_goes_on(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    wanted = files_of(actstore.compact(log, tmp_path / "whole.zarr").path)
    out = tmp_path / "out.zarr"
    with (
        cluster_of(2, small=True, restart=False) as dying,
        Client(dying, set_as_default=False) as client,
    ):

        def progress(done: int, total: int) -> None:
            if done >= 0.3 * total:
                for one in processes(client):
                    kill(one)

        with pytest.raises(ArchiveError, match=r"no worker for 1 seconds.*is kept in .*to go on"):
            actstore.compact(log, out, client=client, progress=progress)
    assert not out.exists()
    report = actstore.compact(log, out)
    assert report.shards_resumed > 0
    assert files_of(out) == wanted


def test_a_scheduler_that_is_gone_ends_it(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    with cluster_of(1, small=True) as closing, Client(closing, set_as_default=False) as client:

        def progress(done: int, total: int) -> None:
            closing.close()

        with pytest.raises(ArchiveError, match=r"is kept in \.out\.zarr\.partial"):
            actstore.compact(log, tmp_path / "out.zarr", client=client, progress=progress)
    assert actstore.compact(log, tmp_path / "out.zarr").shards_resumed > 0


# -- what a worker refuses ----------------------------------------------------------------------


@pytest.fixture
def making(log: Path, tmp_path: Path) -> Making:
    recipe = OfLogs((log,))
    folder = tmp_path / "attempts" / "run"
    folder.mkdir(parents=True)
    (folder / "wanted").touch()
    with recipe.made() as (content, jobs):
        return Making(recipe, stamps_of([log]), content.fingerprint(jobs), "none", folder, 1.0)


def asked(client: Client, making: Making) -> Any:
    """Let a worker write the first shard."""
    with making.recipe.made() as (_, jobs):
        file = jobs[0].file
    return client.submit(worker.write, making, [file], pure=False).result()


def changed(making: Making, **other: Any) -> Making:
    return Making(**{name: getattr(making, name) for name in Making.__slots__} | other)


def test_a_worker_writes_into_a_folder_of_the_attempt(client: Client, making: Making) -> None:
    one, other = (asked(client, making) for _ in range(2))
    assert one[0] != other[0]
    assert one[1] == other[1]
    found = [files_of(making.folder / name) for name, _ in (one, other)]
    assert found[0] == found[1]
    assert {name: len(data) for name, data in found[0].items()} == dict(one[1][0].files)


HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda one: one.token.unlink(), "doesn't see the client's folder"),
        (lambda one: one.recipe.paths[0].rename(one.folder / "moved"), "doesn't see the log"),
        (lambda one: os.utime(one.recipe.paths[0], (0, 0)), "the client sees"),
    ],
)
def test_a_worker_that_sees_other_files_says_so(
    client: Client, making: Making, damage: Callable[[Making], None], said: str
) -> None:
    damage(making)
    with pytest.raises(WorkerError, match=f"{HOST} .*{said}.*a file system that all workers"):
        client.submit(worker.write, making, ["resid/c/0/0/0"], pure=False).result()
    assert making.folder.exists() == ("folder" not in said)  # the last one out removes it


def test_a_worker_that_plans_other_shards_says_so(client: Client, making: Making) -> None:
    with pytest.raises(WorkerError, match="plans other shards"):
        asked(client, changed(making, fingerprint="0"))


def test_a_worker_without_room_says_so_and_what_is_finished_stays(
    client: Client, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(log, tmp_path / "out.zarr", 0.3)
    with (
        cluster_of(1, small=True, memory=240_000_000) as tight,
        Client(tight, set_as_default=False) as small,
        pytest.raises(ArchiveError, match=r"host .* its memory limit of 0\.24 GB leaves .* kept"),
    ):
        actstore.compact(log, tmp_path / "out.zarr", client=small)
    assert actstore.compact(log, tmp_path / "out.zarr", client=client).shards_resumed > 0


def test_damage_that_a_worker_finds_is_our_error(client: Client, tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream", steps=60, width=96, vocab=160).path
    with actstore.open_stream(log) as reader:
        place = reader.table.blocks[len(reader.table.blocks) // 2]
    data = bytearray(log.read_bytes())
    data[place.entry.offset + 200] ^= 1
    log.write_bytes(data)
    with pytest.raises(errors.StreamCorruptError) as found:
        actstore.compact(log, tmp_path / "out.zarr", client=client)
    assert found.value.path == str(log)
    assert not (tmp_path / ".out.zarr.partial").exists()


@pytest.mark.parametrize("client", [1, "tcp://127.0.0.1:8786"])
def test_what_is_no_client_is_refused(client: Any, log: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"client must be a dask\.distributed\.Client; got"):
        actstore.compact(log, tmp_path / "a.zarr", client=client)


# -- pure ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), max_size=30))
def test_tasks_are_of_whole_shards_up_to_the_bytes_of_a_full_one(sizes: list[int]) -> None:
    class Shard:
        def __init__(self, count: int) -> None:
            self.shard = self
            self.dtype = np.dtype(np.uint8)
            self.present = np.ones(count, np.bool_)

        def chunk_bytes(self, dtype: np.dtype) -> int:
            return grid.SHARD_BYTES // 20

    jobs: Any = [Shard(count) for count in sizes]
    found: list[Any] = list(cluster.batches(jobs))
    assert [job for batch in found for job in batch] == jobs
    chunks = [[job.present.size for job in batch] for batch in found]
    most = grid.SHARD_BYTES // (grid.SHARD_BYTES // 20)
    assert all(sum(batch) <= most or len(batch) == 1 for batch in chunks)
    assert all(sum(one) + other[0] > most for one, other in pairwise(chunks))


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_travel_with_all_they_say(name: str) -> None:
    kind = getattr(errors, name)
    told = {"path": "a.stream", "offset": 7} if name == "StreamCorruptError" else {}
    error = kind("what was wanted", **told)
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert str(found) == str(error) == "what was wanted"
    assert found.args == error.args
    assert vars(found) == vars(error) == told


def test_a_recipe_and_what_tasks_share_are_small(making: Making) -> None:
    assert len(pickle.dumps(making)) < 2_000
    assert pickle.loads(pickle.dumps(making)) == making
