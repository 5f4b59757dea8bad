"""Captures killed with SIGKILL at any moment, and what must be left of them.

Codecs, granularities, dtypes, budgets, intervals and the moment are drawn at random. What a kill
left is read by actstore and by the independent reader, recovered, then resumed; some captures are
killed again.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import actstore
from actstore.capture import stage
from actstore.config import HookConfig, HookGranularity, InstrumentationConfig
from actstore.errors import FormatError
from actstore.framework import InstrumentationFramework
from actstore.stream.reader import open_stream

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
import independent_reader
import refeed
from forks import Child, Job, forked, serve
from oracle import quiet

__all__ = ["Killed", "kill_and_resume", "quietly"]

STEPS = 12
LINES = STEPS * 6  # what a run says a step: forward, 3 blocks, recording, recorded


def capture(job: Job, *, resume: bool, said: Callable[[str], None] = lambda _: None) -> None:
    """Run the documented re-feeding loop as a job says."""
    torch.set_num_threads(1)
    model = refeed.Model().to(getattr(torch, job["dtype"]))
    model.said = said
    often = stage.FLUSH_SECONDS
    stage.FLUSH_SECONDS = job["flush_seconds"]  # the only way to many commits in a short run
    try:
        config = InstrumentationConfig(
            HookGranularity[job["granularity"]], job["codec"], max_memory_gb=job["budget"]
        )
        framework = InstrumentationFramework(config)
        framework.instrument_model(model, HookConfig(sampling_rate=0.3))
        with framework.capture_activations(
            job["log"],
            track_per_token=True,
            checkpoint_interval_tokens=job["interval"],
            resume_from_checkpoint=resume,
        ) as tracker:
            said("begun")
            ids = torch.tensor([[3, 1, 4] * 2, [1, 5, 9] * 2])
            for one in tracker.tokens:
                ids = torch.cat([ids, torch.full((2, 1), one["token_id"])], dim=-1)
            while len(tracker.tokens) < STEPS:
                said("forward")
                with torch.no_grad():
                    following = int(model(ids)[0, -1].float().argmax())
                said("recording")
                tracker.record_token(following, f"<{following}>")
                said(f"recorded {len(tracker.tokens)}")
                ids = torch.cat([ids, torch.full((2, 1), following)], dim=-1)
    finally:
        stage.FLUSH_SECONDS = often


def answer(job: Job) -> dict[str, Any]:
    """Capture in a fork; kill it a little after it has said so many lines."""
    return forked(
        lambda say: capture(job, resume=job["resume"], said=say), job["line"], job["delay"]
    )


# -- what must hold -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Killed:
    """What came of a capture that was killed.

    ``kills`` are those that struck while it ran, ``packets`` what was read back after them.
    """

    kills: int
    packets: int


@contextmanager
def quietly() -> Iterator[None]:
    """Run captures here as in the child."""
    threads = torch.get_num_threads()
    try:
        with quiet():
            yield
    finally:
        torch.set_num_threads(threads)


def drawn(rng: random.Random) -> Job:
    """Draw how a capture is run, and when it is killed."""
    line = rng.choice((0, *range(LINES)))
    return {
        "codec": rng.choice(("none", "lz4", "zstd")),
        "granularity": rng.choice([one.name for one in HookGranularity]),
        "dtype": rng.choice(("float32", "bfloat16", "float64")),
        "budget": rng.choice((0.00105, 0.0015, 0.02)),
        "interval": rng.choice((None, 1, 3, 5)),
        "flush_seconds": rng.choice((0.0, 0.0, 1.0)),
        "line": line,
        "delay": rng.random() * (0.05 if line == 0 else 0.004),
    }


def contents(log: Path) -> dict[str, Any]:
    """Give all that a run's log says, but for times."""
    with open_stream(log) as reader:
        packets = [
            (one.seq, one.layer, one.pass_index, one.call, one.shape, one.values.tobytes())
            for one in reader.packets()
        ]
        passes = [
            [(axis.token_ids.tolist(), axis.positions.tolist()) for axis in one.axes]
            for one in reader.passes
        ]
        return {
            "packets": packets,
            "tokens": [(one.step, one.token_id, one.token_text) for one in reader.tokens],
            "passes": passes,
            "layers": dict(reader.layers),
            "features": {width: kept.tolist() for width, kept in reader.features.items()},
        }


def promised(job: Job, said: list[str], before: int = 0) -> int:
    """Give how many tokens a checkpoint has said to be saved."""
    counts = [int(one.split()[1]) for one in said if one.startswith("recorded")]
    if job["interval"] is None or not counts:
        return before
    return max(before, counts[-1] // job["interval"] * job["interval"])


def check_read(log: Path, saved: int, wanted: dict[str, Any]) -> int:
    """Read what a kill left; give how many packets that is."""
    try:
        found = contents(log)
    except (FormatError, FileNotFoundError):  # killed before the first commit
        assert saved == 0
        return 0
    for kind in ("packets", "tokens"):
        assert found[kind] == wanted[kind][: len(found[kind])], kind
    assert found["passes"] == wanted["passes"][: len(found["passes"])]
    assert found["layers"].items() <= wanted["layers"].items()
    assert len(found["tokens"]) >= saved
    assert len(found["packets"]) >= sum(one[2] < saved for one in wanted["packets"])
    committed = independent_reader.read(log)["packets"]
    assert [(one["seq"], one["bytes"]) for one in committed] == [
        (one[0], one[-1]) for one in found["packets"]
    ]
    return len(found["packets"])


def check_recovered(log: Path) -> None:
    """Recover what a kill left: a whole log, of the same packets."""
    report = actstore.recover(log)
    assert report.whole
    assert actstore.verify(report.recovered).ok
    assert contents(report.recovered)["packets"] == contents(log)["packets"]


def kill_and_resume(seed: int, folder: Path, child: Child) -> Killed:
    """Kill a capture, perhaps again when it is resumed; say what was read back."""
    rng = random.Random(seed)
    job = drawn(rng) | {"log": str(folder / "whole.stream")}
    capture(job, resume=False)
    wanted = contents(folder / "whole.stream")
    log = folder / "gen.stream"
    saved = kept = kills = 0
    for number in range(rng.choice((1, 1, 2, 3))):
        job |= {"log": str(log), "resume": number > 0}
        if number:
            job |= {name: drawn(rng)[name] for name in ("line", "delay")}
        ended = child.ask(job)
        assert ended["status"] in (0, -signal.SIGKILL), ended
        assert ended["killed"] or ended["status"] == 0, f"it hung: {ended}"
        saved = promised(job, ended["said"], saved)
        found = check_read(log, saved, wanted)
        if ended["status"] == 0:
            break
        kept, kills = kept + found, kills + 1
        if found:
            copy = folder / f"killed-{number}.stream"
            shutil.copy(log, copy)
            check_recovered(copy)
    capture(job, resume=True)
    assert contents(log) == wanted
    with open_stream(log) as reader:
        assert reader.complete
    assert not log.with_name("gen.stream.ckpt.json").exists()
    table = json.loads(log.with_name("gen.stream_tokens.json").read_text())
    assert [one["token_id"] for one in table["tokens"]] == [one[1] for one in wanted["tokens"]]
    return Killed(kills, kept)


if __name__ == "__main__":
    serve(answer)
