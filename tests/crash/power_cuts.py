"""Captures that are recorded, the power cuts of each, and what must hold after every one."""

from __future__ import annotations

import json
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from actstore.capture import stage
from actstore.errors import ActstoreWarning, ConfigError, FormatError, StreamCorruptError
from actstore.stream import writer
from actstore.stream.reader import open_stream

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
import refeed
from disks import Disk, Journal, replayed, writes
from oracle import Oracle, assert_equals, capturing, quiet
from tiny_models import sequential

__all__ = ["CAPTURES", "Cuts", "every_cut", "some_cuts", "some_cuts_within_writes"]

STEPS = 7
BEGINNING = 4096  # a log has fewer bytes until it is durable for the first time


# -- the captures -------------------------------------------------------------------------------


@dataclass
class Recorded:
    """A capture's journal, and what must come of its disks."""

    journal: Journal
    whole: Path  # the log of a run that was not interrupted
    ends: list[tuple[int, int]]  # of its groups: (end, seq that follows)
    ends_before: list[tuple[int, int]] = field(default_factory=list)  # before a resume
    options: dict[str, Any] | None = None  # of resuming; None: it isn't tracked
    interval: int | None = None


def ends_of(log: Path) -> list[tuple[int, int]]:
    with open_stream(log) as reader:
        return [(group.end, group.commit.next_seq) for group in reader.scan.groups]


@contextmanager
def one_core() -> Iterator[None]:
    """Run captures on one core, without the warnings that are meant here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with quiet():
            warnings.filterwarnings("ignore", ".*as a power cut leaves", ActstoreWarning)
            yield
    finally:
        torch.set_num_threads(threads)


def often(patch: pytest.MonkeyPatch) -> None:
    """Let every token close a group: many commits between two syncs."""
    patch.setattr(stage, "FLUSH_SECONDS", 0.0)


def tracked(
    tmp: Path, patch: pytest.MonkeyPatch, *, direct: bool = False, **options: Any
) -> Recorded:
    """Record a whole tracked run, all of whose groups may go past the page cache."""
    folder = tmp / "live"
    folder.mkdir()
    with patch.context() as inner, Journal(folder, inner) as journal:
        often(inner)
        if direct:
            inner.setattr(writer, "DIRECT_BYTES", 1)
        refeed.run(folder / "gen.stream", STEPS, said=journal.said, **options)
    whole = _reference(tmp, **options)
    interval = options.get("interval", 4)
    ends = ends_of(folder / "gen.stream")
    return Recorded(journal, whole, ends, options=options, interval=interval)


def _reference(tmp: Path, **options: Any) -> Path:
    """Run without a power cut, beside plain hooks that say what the packets must be."""
    whole, model = tmp / "whole.stream", refeed.Model()
    with Oracle(model) as oracle:
        refeed.run(whole, STEPS, model=model, **options)
    assert_equals(whole, oracle.fired)
    return whole


class StopError(Exception):
    """Ends a run in the middle."""


def resumed(tmp: Path, patch: pytest.MonkeyPatch, **options: Any) -> Recorded:
    """Record the rest of a run that was stopped within a step, and cut there."""
    folder = tmp / "live"
    folder.mkdir()
    log = folder / "gen.stream"

    def said(line: str) -> None:
        seen.append(line)
        if line == "block 1" and "recorded 3" in seen:
            raise StopError

    seen: list[str] = []
    with patch.context() as inner:
        often(inner)
        with pytest.raises(StopError):
            refeed.run(log, STEPS, said=said, **options)
    before = ends_of(log)
    with patch.context() as inner, Journal(folder, inner) as journal:
        often(inner)
        refeed.run(log, STEPS, said=journal.said, resume=True, **options)
    whole = _reference(tmp, **options)
    interval = options.get("interval", 4)
    return Recorded(journal, whole, ends_of(log), before, options, interval)


def untracked(tmp: Path, patch: pytest.MonkeyPatch, *, sync_bytes: int, codec: str) -> Recorded:
    """Record a capture of many groups and few syncs."""
    folder = tmp / "live"
    folder.mkdir()
    log = folder / "gen.stream"
    model = sequential()
    with patch.context() as inner:
        often(inner)
        inner.setattr(writer, "SYNC_BYTES", sync_bytes)
        with Journal(folder, inner) as journal, Oracle(model) as oracle:
            with capturing(model, log, codec=codec):
                for _ in range(8):
                    model(torch.randn(2, 9, 8))
            journal.said("closed")
    assert_equals(log, oracle.fired)
    return Recorded(journal, log, ends_of(log))


CAPTURES: dict[str, Callable[[Path, pytest.MonkeyPatch], Recorded]] = {
    "tracked": lambda tmp, patch: tracked(tmp, patch, interval=3),
    "tracked-no-checkpoints": lambda tmp, patch: tracked(tmp, patch, interval=None, codec="none"),
    "tracked-direct": lambda tmp, patch: tracked(
        tmp, patch, direct=True, interval=3, codec="none"
    ),
    "resumed": lambda tmp, patch: resumed(tmp, patch, interval=2, codec="zstd"),
    "untracked": lambda tmp, patch: untracked(tmp, patch, sync_bytes=1 << 30, codec="lz4"),
    "untracked-synced": lambda tmp, patch: untracked(tmp, patch, sync_bytes=6_000, codec="none"),
}


# -- what must hold -----------------------------------------------------------------------------


Contents = dict[str, dict[int, Any]]


def contents(log: Path, errors: str = "raise") -> tuple[Contents, bool]:
    """Give all that can be read of a log by what numbers it, and whether it is complete."""
    found: Contents = {"packets": {}, "tokens": {}, "passes": {}}
    with open_stream(log, errors=errors) as reader:
        for one in reader.tokens:
            found["tokens"][one.step] = (one.token_id, one.token_text, one.pass_index)
        try:
            for one in reader.packets():
                values = (one.shape, one.values.dtype.name, one.values.tobytes())
                found["packets"][one.seq] = (one.layer, one.pass_index, one.call, *values)
        except StreamCorruptError:
            assert errors == "raise"
        try:
            for one in reader.passes:
                ids = [(a.token_ids.tolist(), a.positions.tolist()) for a in one.axes]
                found["passes"][one.index] = ids
        except StreamCorruptError:
            assert errors == "raise"
        return found, reader.complete


class Cuts:
    """The power cuts of one recorded capture.

    Attributes
    ----------
    tried, resumes : int
        Disks that lost power, and those of them on which the capture was gone on with.
    cleared : int
        Of those, how many had what is no log where nothing was promised yet, which is refused
        until it is moved away.
    refused : list of str
        Those that could not be gone on with, or ended at another log.
    """

    def __init__(self, recorded: Recorded, folder: Path) -> None:
        self.recorded = recorded
        self.tried = self.resumes = self.cleared = 0
        self.refused: list[str] = []
        self._folder = folder
        self._wanted, complete = contents(recorded.whole)
        assert complete

    def assert_resumed(self) -> None:
        """Fail if any run could not be gone on with."""
        some = "\n".join(self.refused[:8])
        tried = len(self.refused) + self.resumes
        assert not self.refused, (
            f"{len(self.refused)} of {tried} runs are not resumed to the same log:\n{some}"
        )

    def _synced(self, disk: Disk, since: bool) -> int:
        """Give the seq up to which packets were committed and are durable."""
        inode = next(
            (one for name, one in disk.named(len(disk.pending)).items() if name == "gen.stream"),
            None,
        )
        if inode is None:
            return 0
        durable = disk.files[inode].durable
        cuts = [one.offset for one in disk.files[inode].pending if one.kind == "truncate"]
        length = min([len(durable), *cuts])
        ends = self.recorded.ends if since else self.recorded.ends_before
        return max((seq for end, seq in ends if end <= length), default=0)

    def try_one(
        self,
        disk: Disk,
        number: int,
        keep: str,
        seed: int,
        *,
        cut: tuple[int, int] | None = None,
        resume: bool,
    ) -> None:
        """Cut the power at a call; read what is left, and go on with it."""
        where = f"call {number} {keep} {seed} {cut}"
        folder = self._folder / "cut"
        folder.mkdir()
        disk.lose_power(folder, keep, random.Random(f"{number} {keep} {seed}"), cut)
        calls = self.recorded.journal.calls[:number]
        told = [call.name for call in calls if call.kind == "said"]
        begun = not self.recorded.ends_before or any(one.kind == "truncate" for one in calls)
        self._check(folder, self._synced(disk, begun), told, where)
        if resume and self.recorded.options is not None:
            self._resume(folder, where)
        shutil.rmtree(folder)
        self.tried += 1

    def _check(self, folder: Path, synced: int, told: list[str], where: str) -> None:
        log = folder / "gen.stream"
        promised = self._promised(told)
        if not log.exists():
            assert synced == promised == 0, where
            return
        for errors in ("raise", "skip"):
            try:
                found, complete = contents(log, errors)
            except FormatError:
                assert synced == promised == 0, where
                continue
            for kind, mine in found.items():
                theirs = self._wanted[kind]
                assert all(theirs.get(key) == one or one == [] for key, one in mine.items()), where
            missing = [seq for seq in range(synced) if seq not in found["packets"]]
            assert not missing, f"{where}: packets {missing} were durable"
            kept = {key for key, one in self._wanted["packets"].items() if one[1] < promised}
            assert found["packets"].keys() >= kept, where
            assert found["tokens"].keys() >= set(range(promised)), where
            # what was resumed had been closed, too
            if complete and log.read_bytes() != self.recorded.journal.before.get(log.name):
                assert found == self._wanted, where
            if told and told[-1] == "closed":
                assert complete, where
        self._check_sidecars(folder, promised, where)

    def _promised(self, told: list[str]) -> int:
        """Give how many tokens a checkpoint that returned has said to be durable."""
        interval = self.recorded.interval
        counts = [int(line.split()[1]) for line in told if line.startswith("recorded")]
        if interval is None or not counts:
            return 0
        return counts[-1] // interval * interval if counts[-1] >= interval else 0

    def _check_sidecars(self, folder: Path, promised: int, where: str) -> None:
        table, checkpoint = (folder / f"gen.stream{one}" for one in ("_tokens.json", ".ckpt.json"))
        for one in (table, checkpoint):
            if one.exists():
                state = json.loads(one.read_text())
                assert state["total_tokens"] == len(state["tokens"]) >= min(promised, 1), where
        if promised and not checkpoint.exists():
            assert json.loads(table.read_text())["total_tokens"] == STEPS, where

    def _resume(self, folder: Path, where: str) -> None:
        log, options = folder / "gen.stream", self.recorded.options or {}
        try:
            try:
                refeed.run(log, STEPS, resume=True, **options)
            except ConfigError as error:
                # the beginning of a log, of which nothing that makes it one came: none is promised
                if "no .stream log" not in str(error) or log.stat().st_size > BEGINNING:
                    raise
                log.rename(log.with_name("no.stream"))
                self.cleared += 1
                refeed.run(log, STEPS, resume=True, **options)
        except Exception as error:  # counted: how many of how many says more than the first
            self.refused.append(f"{where}: {type(error).__name__}: {error}")
            return
        if contents(log) != (self._wanted, True):
            self.refused.append(f"{where}: gone on with, but not the same in the end")
            return
        self.resumes += 1


# -- the cuts -------------------------------------------------------------------------------------


KEEPS = ("dropped", "kept", "zeros", "torn", "reordered")


def some_cuts(recorded: Recorded, folder: Path) -> Cuts:
    """Cut the power between any two calls, in every way once; go on with every fifth disk."""
    cuts = Cuts(recorded, folder)
    for number, disk in replayed(recorded.journal):
        for keep in KEEPS:
            cuts.try_one(disk, number, keep, 0, resume=number % 5 == KEEPS.index(keep))
    return cuts


def some_cuts_within_writes(recorded: Recorded, folder: Path) -> Cuts:
    """Cut the power within every write, at a random byte; go on with every tenth disk."""
    cuts, rng = Cuts(recorded, folder), random.Random(1)
    for number, disk, length in writes(recorded.journal):
        for keep in ("kept", "torn"):
            cut = (recorded.journal.calls[number].file, rng.randrange(length))
            cuts.try_one(disk, number, keep, 0, cut=cut, resume=rng.random() < 0.1)
    return cuts


def every_cut(recorded: Recorded, folder: Path) -> Cuts:
    """Cut the power between any two calls, in every way, and at many bytes of every write."""
    cuts, rng = Cuts(recorded, folder), random.Random(2)
    for number, disk in replayed(recorded.journal):
        for keep in KEEPS:
            for seed in range(8 if keep in ("torn", "reordered") else 1):
                cuts.try_one(disk, number, keep, seed, resume=True)
    for number, disk, length in writes(recorded.journal):
        file = recorded.journal.calls[number].file
        chosen = {*range(0, min(length, 120), 3), *range(max(length - 60, 0), length, 3)}
        chosen |= {rng.randrange(length) for _ in range(40)}
        for end in sorted(chosen):
            for keep in ("kept", "torn"):
                cuts.try_one(disk, number, keep, end, cut=(file, end), resume=end % 7 == 0)
    return cuts
