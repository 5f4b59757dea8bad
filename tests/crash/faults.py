"""The faults of a capture: what fails, and a run that suffers it, in a fork of a child process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import actstore
from actstore import codecs
from actstore.capture import stage
from actstore.errors import CaptureError

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
import refeed
from forks import TIMEOUT, Job, forked, serve, wait_for
from oracle import hooks_of

__all__ = ["INTERVAL", "STEPS"]

STEPS, INTERVAL = 8, 3
Said = Callable[[str], None]


class MineError(Exception):
    """What a user's own code raises."""


def silent(_: str) -> None:
    """Let a run go on."""


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a function, in this process alone."""
    real = getattr(owner, name)
    setattr(owner, name, make(real))
    try:
        yield
    finally:
        setattr(owner, name, real)


def of_log(job: Job, descriptor: int) -> bool:
    return os.readlink(f"/proc/self/fd/{descriptor}") == job["log"]  # noqa: PTH115 - hot


@contextmanager
def failing_call(job: Job) -> Iterator[Said]:
    """Let the log's n-th ``writev`` or ``fdatasync`` fail, once or from then on."""
    count = 0

    def make(real: Any) -> Any:
        def call(descriptor: int, *rest: Any) -> Any:
            nonlocal count
            if not of_log(job, descriptor):
                return real(descriptor, *rest)
            count += 1
            if count - 1 == job["at"] or (count - 1 > job["at"] and job["lasting"]):
                if rest and job["torn"]:  # some of it came
                    data = b"".join(bytes(one) for one in rest[0])
                    os.write(descriptor, data[: len(data) // 2])
                raise OSError(job["errno"], os.strerror(job["errno"]))
            return real(descriptor, *rest)

        return call

    with patched(os, job["call"], make):
        yield silent


@contextmanager
def short_writes(job: Job) -> Iterator[Said]:
    """Let every write take only some of what it is given."""
    rng = random.Random(job["seed"])

    def make(real: Any) -> Any:
        def writev(descriptor: int, buffers: Any) -> int:
            if not of_log(job, descriptor):
                return real(descriptor, buffers)
            data = b"".join(bytes(one) for one in buffers)
            return os.write(descriptor, data[: rng.randint(1, len(data))])

        return writev

    with patched(os, "writev", make):
        yield silent


@contextmanager
def slow_disk(job: Job) -> Iterator[Said]:
    """Let writes and syncs take their time."""

    def make(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            time.sleep(job["seconds"])  # the slow disk itself
            return real(*arguments)

        return call

    with patched(os, "writev", make), patched(os, "fdatasync", make):
        yield silent


@contextmanager
def failing_encoder(job: Job) -> Iterator[Said]:
    """Let the n-th block not be encoded."""
    count = 0
    kind = {"RuntimeError": RuntimeError, "MemoryError": MemoryError, "SystemExit": SystemExit}

    def make(real: Any) -> Any:
        def encode(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == job["at"]:
                raise kind[job["kind"]]("the encoder broke")
            return real(*arguments)

        return encode

    with patched(codecs, "encode", make):
        yield silent


@contextmanager
def limited_files(job: Job) -> Iterator[Said]:
    """Let no file become larger: what a full disk is where there is no small one to mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["bytes"], before[1]))
    try:
        yield silent
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def interfering(job: Job) -> Iterator[Said]:
    """Let something else remove, cut, replace or write the file."""
    log = Path(job["log"])

    def said(line: str) -> None:
        seen.append(line)
        if line != job["line"] or seen.count(line) > 1:
            return
        match job["how"]:
            case "remove":
                log.unlink()
            case "truncate":
                os.truncate(log, int(log.stat().st_size * job["share"]))
            case "replace":
                other = log.with_name("other")
                other.write_bytes(log.read_bytes())
                other.replace(log)
            case "append":
                with log.open("ab") as file:
                    file.write(b"something else")

    seen: list[str] = []
    yield said


@contextmanager
def raising(job: Job) -> Iterator[Said]:
    """Let the user's code raise: in the forward, or between the forwards."""
    kinds = {"MineError": MineError, "KeyboardInterrupt": KeyboardInterrupt, "exit": SystemExit}

    def said(line: str) -> None:
        seen.append(line)
        if len(seen) == job["line"]:
            raise kinds[job["kind"]]

    seen: list[str] = []
    yield said


@contextmanager
def signalled(job: Job) -> Iterator[Said]:
    """Let a signal's handler raise, some time after the capture begins, or its first forward."""
    armed = True

    def handler(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise MineError if job["kind"] == "MineError" else KeyboardInterrupt

    def said(line: str) -> None:
        if line == "forward" and not signal.getitimer(signal.ITIMER_REAL)[0] and armed:
            signal.setitimer(signal.ITIMER_REAL, job["seconds"])

    before = signal.signal(signal.SIGALRM, handler)
    with slow_disk({"seconds": job["disk"]}) if job["disk"] else contextlib.nullcontext():
        try:
            if job["begins"]:
                signal.setitimer(signal.ITIMER_REAL, job["seconds"])
            yield said
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@contextmanager
def threads(job: Job) -> Iterator[Said]:
    """Let other threads raise, and try a forward of their own within one of the main thread's."""
    told: list[BaseException] = []
    before, threading.excepthook = threading.excepthook, lambda args: told.append(args.exc_value)

    def work() -> None:
        if job["kind"] == "forward":
            job["model"].blocks[0](torch.ones(1, 2, refeed.WIDTH))
        raise MineError

    def said(line: str) -> None:
        if line == "block 1":
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    try:
        yield said
    finally:
        threading.excepthook = before
    wanted = CaptureError if job["kind"] == "forward" else MineError
    assert [type(one) for one in told] == [wanted] * STEPS, told


@contextmanager
def forking(job: Job) -> Iterator[Said]:
    """Let the process fork; the child runs the model and leaves by the ``with``."""

    def said(line: str) -> None:
        seen.append(line)
        if len(seen) != job["line"] or os.getpid() != parent:
            return
        child = os.fork()
        if not child:
            with contextlib.suppress(actstore.ActstoreError), torch.no_grad():
                job["model"](torch.tensor([[1, 2, 3]]))
            raise SystemExit
        assert wait_for(child, TIMEOUT / 2), "the forked child hung"

    seen: list[str] = []
    parent = os.getpid()
    try:
        yield said
    finally:
        if os.getpid() != parent:
            os._exit(0)


@contextmanager
def failing_sidecar(job: Job) -> Iterator[Said]:
    """Let the n-th file beside the log not be written."""
    count = 0

    def make(real: Any) -> Any:
        def call(source: Any, target: Any) -> None:
            nonlocal count
            if str(target).endswith(".json"):
                count += 1
                if count == job["at"]:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
            real(source, target)

        return call

    with patched(os, "replace", make):
        yield silent


FAULTS: dict[str, Callable[[Job], Any]] = {
    one.__name__: one
    for one in (
        failing_call,
        short_writes,
        slow_disk,
        failing_encoder,
        limited_files,
        interfering,
        raising,
        signalled,
        threads,
        forking,
        failing_sidecar,
    )
} | {"none": lambda _: contextlib.nullcontext(silent)}


def descriptors() -> set[str]:
    return {
        f"{one.name} {target}"
        for one in Path("/proc/self/fd").iterdir()
        if (target := os.path.realpath(one)) and not target.endswith("/fd")
    }


def suffer(job: Job, heard: list[str]) -> dict[str, Any]:
    """Run a capture with a fault; say how it ended and what it left behind."""
    stage.FLUSH_SECONDS = job.get("flush_seconds", 0.0)
    model = job["model"] = refeed.Model()
    before, running = descriptors(), set(threading.enumerate())
    caught: BaseException | None = None
    try:
        with FAULTS[job["fault"]](job) as fault:

            def said(line: str) -> None:
                heard.append(line)
                fault(line)

            refeed.run(
                Path(job["log"]), STEPS, INTERVAL, model=model, codec=job["codec"], said=said
            )
    except BaseException as error:
        caught = error
    for thread in set(threading.enumerate()) - running:
        if thread.ident is not None:  # else a handler raised as it was being started
            thread.join(5)
    found = {
        "error": type(caught).__name__,
        "text": "\n".join([str(caught), *getattr(caught, "__notes__", [])]),
        "cause": type(caught.__cause__).__name__ if caught else "NoneType",
        "hooks": hooks_of(model),
        "threads": sorted(
            one.name for one in set(threading.enumerate()) - running if one.is_alive()
        ),
        "said": heard,
    }
    del caught
    found["descriptors"] = sorted(descriptors() - before)
    model.said = silent
    refeed.run(Path(job["again"]), 2, model=model)  # it can be captured again
    return found


def answer(job: Job) -> dict[str, Any]:
    """Let a fork suffer; give what it says, or that it hung or died."""

    def work(say: Said) -> None:
        try:
            found = suffer(job, [])
        except BaseException as error:
            found = {"error": "lost", "text": repr(error)}
        say(json.dumps(found))

    ended = forked(work)
    found = json.loads(ended["said"][-1]) if ended["said"] else {"error": "hung or died"}
    return found | {"status": ended["status"]}


if __name__ == "__main__":
    serve(answer)
