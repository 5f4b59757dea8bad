"""Owns one capture from beginning to end, in whatever way the ``with`` ends.

The log is claimed; hooks, stage, pipeline and tracker are put together, and taken apart again.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import nn

from actstore import codecs
from actstore.buckets import RemotePath
from actstore.capture import place
from actstore.capture.device import Crossings, pinned
from actstore.capture.header import check_same_run, describe
from actstore.capture.hooks import Hooks
from actstore.capture.memory import Memory
from actstore.capture.meter import Meter
from actstore.capture.outputs import Choice, Sampling
from actstore.capture.passes import Entries, RowChoice
from actstore.capture.pipeline import Pipeline
from actstore.capture.select import (
    Stack,
    Target,
    entry_modules,
    find_stacks,
    fused_experts,
    select,
)
from actstore.capture.sharding import Sharding, parallel_of
from actstore.capture.stage import Stage
from actstore.capture.tokens import Checkpoints, _TokenBoundaryTracker
from actstore.config import HookConfig, HookGranularity, InstrumentationConfig
from actstore.errors import ActstoreWarning, BucketError, CaptureError, ConfigError
from actstore.packet import TokenRecord
from actstore.parallel import Parallel
from actstore.stream import resume
from actstore.stream.reader import open_stream
from actstore.stream.sidecars import (
    Checkpoint,
    resume_count,
    tokens_name,
)
from actstore.stream.uploading import UploadedWriter
from actstore.stream.writer import CommitPoint, StreamWriter

__all__ = ["Capture", "Instrumented", "Options", "Upload"]

_log = logging.getLogger("actstore")
_NAMED: Final = 8
_MUCH: Final = 1.0  # seconds of waiting that are worth a warning
_captured: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_captured_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Instrumented:
    """A model that a framework was given.

    Attributes
    ----------
    model : torch.nn.Module
        The model.
    hooks : HookConfig
        What to hook.
    tokenizer : object or None
        With ``decode([id])``.
    name : str
        What its layers are called by where a capture has several models.
    given : torch.nn.Module
        The model, or the wrapper that holds it.
    parallel : Parallel or None
        Where this process stands among those that run the model, as far as the user says.
    """

    model: nn.Module
    hooks: HookConfig
    tokenizer: Any
    name: str
    given: nn.Module
    parallel: Parallel | None = None

    @property
    def compiled(self) -> bool:
        """Whether any part of it was compiled."""
        return any(
            hasattr(module, "_orig_mod")
            or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
            for module in self.given.modules()
        )


@dataclass(frozen=True, slots=True)
class Options:
    """What ``capture_activations`` was given.

    Raises
    ------
    ConfigError
        A value is of the wrong kind, or checkpoints are asked for without tracking.
    """

    track_per_token: bool = False
    checkpoint_interval_tokens: int | None = None
    checkpoint_path: str | os.PathLike[str] | None = None
    resume_from_checkpoint: bool = False

    def __post_init__(self) -> None:
        interval = self.checkpoint_interval_tokens
        if interval is not None and (
            isinstance(interval, bool) or not isinstance(interval, int) or interval <= 0
        ):
            msg = f"checkpoint_interval_tokens must be a positive int or None; got {interval!r}"
            raise ConfigError(msg)
        given = {
            "checkpoint_interval_tokens": interval is not None,
            "checkpoint_path": self.checkpoint_path is not None,
            "resume_from_checkpoint": self.resume_from_checkpoint,
        }
        named = [name for name, is_given in given.items() if is_given]
        if named and not self.track_per_token:
            msg = f"{' and '.join(named)} can only be used with track_per_token=True; add it"
            raise ConfigError(msg)
        if not isinstance(self.checkpoint_path, str | os.PathLike | None):
            msg = f"checkpoint_path must be a str, a path or None; got {self.checkpoint_path!r}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Upload:
    """Where a log goes while it is written.

    Attributes
    ----------
    where : RemotePath
        The log in the bucket.
    spool_bytes : int
        What of it may wait here.
    """

    where: RemotePath
    spool_bytes: int


class Capture:
    """A capture of one or more models into one log: a context manager.

    Parameters
    ----------
    models : sequence of Instrumented
        What to capture.
    config : InstrumentationConfig
        How.
    path : Path
        The log.
    options : Options
        Tracking, checkpoints and resume.
    memory : Memory, optional
        What captures before this one have used.
    progress : callable, optional
        Is given a line every five seconds, by the writer's thread.
    warns : bool
        Warn at the end of what was not captured.
    upload : Upload, optional
        The bucket that the log goes to while it is written; ``path`` is then its spool.

    Attributes
    ----------
    hooks : Hooks
        The hooks, while the context is open.
    summary : mapping
        What the run did, when it has ended.
    """

    hooks: Hooks

    def __init__(
        self,
        models: Sequence[Instrumented],
        config: InstrumentationConfig,
        path: Path,
        options: Options,
        *,
        memory: Memory | None = None,
        progress: Callable[[str], None] | None = None,
        warns: bool = True,
        upload: Upload | None = None,
    ) -> None:
        self._upload = upload
        self._memory = memory
        self._progress = progress
        self._warns = warns
        self.summary: Mapping[str, Any] = {}
        self._models = models
        self._config = config
        self._path = path.absolute()  # also if the working directory changes until the end
        self._called = str(upload.where if upload else self._path)
        self._options = options
        self._tracker: _TokenBoundaryTracker | None = None
        self._left = False

    # -- entering -------------------------------------------------------------------------------

    def __enter__(self) -> _TokenBoundaryTracker | None:
        granularity = self._config.granularity
        _check_alike(self._models)
        targets = _targets(self._models, granularity)
        parallel = parallel_of(self._models)
        header = describe(self._models, self._config, self._options.track_per_token, parallel)
        with ExitStack() as stack, place.telling(self._path):
            _claim_models(self._models, stack)
            # compiled code calls no hooks, or those that there were when it was compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            place.check_path(self._path)
            checkpoint_path = place.checkpoint_path(self._options.checkpoint_path, self._path)
            if not self._options.resume_from_checkpoint:
                place.move_aside(self._path, checkpoint_path)
            self._writer = stack.enter_context(self._opened())
            run = self._begin(header, checkpoint_path)
            self._crossings = Crossings()
            in_turn = _on_cores(self._models)
            if self._memory is not None and not in_turn:
                self._memory.use(pinned)
            self._stage = Stage(
                self._config.budget,
                run.point,
                memory=self._memory,
                into=self._called,
                in_turn=in_turn,
            )
            self._pipeline = Pipeline(
                self._stage,
                self._writer,
                codecs.NAMES[self._config.compression_algorithm],
                Meter(self._called, self._progress),
            )
            first = self._models[0]
            sampled = granularity is HookGranularity.SAMPLED_SLICES
            self.hooks = Hooks(
                self._stage,
                targets,
                Entries(_entries(self._models)),
                _stacks(self._models),
                next_pass=run.point.next_pass,
                known=run.layers,
                choice=Choice(
                    Sampling(first.hooks.sampling_rate, first.hooks.sampling_seed)
                    if sampled
                    else None,
                    RowChoice(first.hooks.rows) if first.hooks.rows is not None else None,
                    first.hooks.outputs == "all",
                    first.hooks.stop_after_last_layer,
                ),
                known_widths=run.widths,
                crossings=self._crossings,
                tokenizer=first.tokenizer,
                sharding=Sharding(parallel or Parallel()),
                flush_at_pass_end=not self._options.track_per_token,
            )
            self._track(run)
            # each is taken apart also if a signal's handler raises while it is put together
            stack.push(self.hooks)
            self.hooks.__enter__()
            stack.callback(self._pipeline.stop)
            self._pipeline.start()
            atexit.register(self._at_exit)
            stack.callback(atexit.unregister, self._at_exit)
            self._open = stack.pop_all()
        return self._tracker

    def _opened(self) -> StreamWriter:
        if self._upload is None:
            return StreamWriter(self._path)
        return UploadedWriter(
            self._path, self._upload.where.bucket, spool_bytes=self._upload.spool_bytes
        )

    def _begin(self, header: dict[str, Any], checkpoint_path: Path) -> _Run:
        """Start the log, or resume it."""
        options = self._options
        found = None
        if options.resume_from_checkpoint:
            if checkpoint_path.exists():
                found = Checkpoint.read(checkpoint_path)
            if self._path.stat().st_size and place.has_begun(self._path):
                return self._resume(header, found, checkpoint_path)
        tokens = found.tokens if found else ()
        if found:
            warnings.warn(
                f"{checkpoint_path} has {len(tokens)} tokens, but there is no log at "
                f"{self._path}: their activations are lost; a new log begins after them",
                ActstoreWarning,
                stacklevel=6,
            )
        self._writer.start({"run_id": uuid.uuid4().hex, "created": _now(), **header})
        point = CommitPoint(next_step=len(tokens))
        lost = tuple(replace(token, pass_index=-1) for token in tokens)
        checkpoints = Checkpoints(
            checkpoint_path,
            options.checkpoint_interval_tokens,
            found.start_time if found else time.time(),
            found.resume_count + 1 if found else 0,
        )
        return _Run(point, {}, set(), lost, checkpoints, rewrite=True)

    def _resume(
        self, header: dict[str, Any], found: Checkpoint | None, checkpoint_path: Path
    ) -> _Run:
        where = resume.resume_point(self._path)
        with open_stream(self._path) as before:
            check_same_run(before.header, header, self._path)
        if where.loses:
            place.keep_cut(self._path, where)
        self._writer.resume(where.sync, where.commits, where.offset)
        with open_stream(self._path) as reader:
            layers, widths, tokens = dict(reader.layers), set(reader.features), reader.tokens
        if found and len(found.tokens) > len(tokens):
            warnings.warn(
                f"{checkpoint_path} has {len(found.tokens)} tokens, {self._path} {len(tokens)}: "
                "the log is what counts; the run goes on after its last token",
                ActstoreWarning,
                stacklevel=7,
            )
        checkpoints = Checkpoints(
            checkpoint_path,
            self._options.checkpoint_interval_tokens,
            found.start_time if found else (tokens[0].time if tokens else time.time()),
            1 + max(resume_count(self._path), found.resume_count if found else 0),
        )
        return _Run(where.point, layers, widths, tokens, checkpoints, rewrite=False)

    def _track(self, run: _Run) -> None:
        if not self._options.track_per_token:
            return
        if run.rewrite:  # tokens of a lost log: kept in the new one, that it alone is enough
            for record in run.tokens:
                self._stage.add_token(record)
        self._tracker = _TokenBoundaryTracker(
            self._stage.add_token,
            lambda: self.hooks.last_pass,
            self._stage.flush,
            run.checkpoints,
            run.tokens,
        )

    @property
    def written_bytes(self) -> int:
        """Bytes of values that were written so far, as they were captured."""
        return self._pipeline.meter.raw_bytes

    # -- leaving --------------------------------------------------------------------------------

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._left:
            return
        self._left = True
        if self.hooks.forked:  # the log is the parent's; what this process has of it is let go
            with self._open:
                self.hooks.__exit__(kind, error, traceback)
            return
        with self._open:
            try:
                self.hooks.__exit__(kind, error, traceback)
            finally:
                self._stage.close()
                self._pipeline.join()
            if self._stage.failure is None:
                self._finish(kind)
        failure = self._stage.failure
        if failure is not None:
            self._surface(failure, error)
        if self._tracker is not None and failure is None:
            self._save(self._tracker, error)
        if error is None and self._warns:
            self._warn()

    def _at_exit(self) -> None:
        """Leave a ``with`` that the interpreter's exit finds open, while it still can be left."""
        leaving = SystemExit("the interpreter exits")
        self.__exit__(SystemExit, leaving, None)
        for note in getattr(leaving, "__notes__", ()):
            _log.error("%s", note)

    def _finish(self, kind: type[BaseException] | None) -> None:
        self.summary = self._summarise(kind)
        try:
            self._writer.finish(self.summary)
        except (OSError, BucketError) as error:
            self._stage.fail(error)
        _log.info("captured %s: %s", self._called, self.summary)

    def _summarise(self, kind: type[BaseException] | None) -> dict[str, Any]:
        stage, hooks, meter = self._stage, self.hooks, self._pipeline.meter
        waited = {
            "budget": stage.waited_seconds,
            "encoding": stage.encoding_seconds,
            "disk": stage.syncing_seconds,
            "device": self._crossings.waited_seconds,
        }
        if isinstance(self._writer, UploadedWriter):  # while it waits, the budget fills up
            waited["bucket"] = min(self._writer.waited_seconds, waited["budget"])
            waited["budget"] -= waited["bucket"]
        skipped = dict(hooks.skipped)
        return {
            "packets": hooks.packets,
            "packets_expected": hooks.packets + sum(skipped.values()),
            "packets_written": meter.packets,
            "passes": hooks.last_pass + 1 - hooks.first_pass,
            "tokens": len(self._tracker.tokens) if self._tracker else 0,
            "raw_bytes": meter.raw_bytes,
            "encoded_bytes": meter.encoded_bytes,
            **meter.rates(self._config.target_throughput_gbps, waited),
            "writing_seconds": meter.writing_seconds,
            "waits": stage.waits,
            "share_in_hooks": min(hooks.seconds / max(meter.seconds, 1e-9), 1.0),
            "staging_high_water_bytes": stage.high_water,
            "ignored_recomputed": hooks.recomputed,
            "skipped": skipped,
            "never_fired": hooks.never_fired(),
            "fused_experts": [name for one in self._models for name in fused_experts(one.model)],
            "ended_by": kind.__name__ if kind else None,
        }

    def _save(self, tracker: _TokenBoundaryTracker, error: BaseException | None) -> None:
        """Write the files beside the log; their failure doesn't hide the error that ends it."""
        try:
            name = tokens_name(self._path)
            tracker.save(name)
            far = self._upload
            tracker.close(clean=error is None or far is not None)  # there, nothing is resumed
            if far is not None:
                far.where.beside("_tokens.json").put(name.read_bytes())
                name.unlink()
        except (CaptureError, BucketError) as fault:
            if error is None:
                raise
            error.add_note(str(fault))

    def _surface(self, failure: BaseException, error: BaseException | None) -> None:
        told = self._stage.told()
        if error is None:
            raise told from failure
        if not isinstance(error, CaptureError):
            error.add_note(str(told))

    def _warn(self) -> None:
        summary, told = self.summary, []
        if len(summary["never_fired"]) == len(self.hooks.names):
            if not self.hooks.first_pass:  # a resumed run may have been at its end
                told.append("no layer fired: the log is empty; call the model inside the with")
        elif summary["never_fired"]:
            told.append(f"these layers never fired: {_some(summary['never_fired'])}")
            told += self._idle(set(summary["never_fired"]))
        compiled = [one.name for one in self._models if one.compiled]
        if compiled:
            told.append(
                f"{_some(compiled)} is compiled: what was captured ran uncompiled, since compiled "
                "code calls no hooks; its last bits may differ from those of compiled code"
            )
        if summary["skipped"]:
            told.append(f"these outputs can't be kept: {_some(list(summary['skipped']))}")
        if self.hooks.unused_labels:
            told.append(
                f"no pass followed that takes the labels {_some(self.hooks.unused_labels)}; call "
                "annotate before the model"
            )
        if self.hooks.without_text:
            token_id, error = next(iter(self.hooks.without_text.items()))
            told.append(
                f"the tokenizer gave no text of {len(self.hooks.without_text)} ids that were fed, "
                f"such as {token_id}: {error!r}; their rows have none"
            )
        waited = summary["waited_seconds"] >= _MUCH
        if waited and summary["limited_by"] not in (None, "model"):
            told.append(
                f"{summary['sustained_gbps']:.3f} GB/s were reached, "
                f"{summary['target_throughput_gbps']} wanted; the model waited "
                f"{summary['waited_seconds']:.2f} s, for {summary['limited_by']} most"
            )
        for text in told:
            warnings.warn(f"capture into {self._called}: {text}", ActstoreWarning, stacklevel=5)

    def _idle(self, never_fired: set[str]) -> list[str]:
        """Say of which of several models nothing fired: they may be those of before."""
        if len(self._models) == 1:
            return []
        granularity = self._config.granularity
        return [
            f"no layer of {one.name!r}, a {type(one.model).__name__}, fired: it was instrumented "
            "before and still exists; let go of it (del), or take a new InstrumentationFramework, "
            "for layers to have their names without those of models"
            for one in self._models
            if never_fired.issuperset(
                _joined(one.name, each.name) for each in _targets([one], granularity)
            )
        ]


@dataclass(frozen=True, slots=True)
class _Run:
    """What a capture begins with: nothing, or what a resumed log holds."""

    point: CommitPoint
    layers: Mapping[str, Any]
    widths: set[int]
    tokens: tuple[TokenRecord, ...]
    checkpoints: Checkpoints
    rewrite: bool


def _claim_models(models: Sequence[Instrumented], stack: ExitStack) -> None:
    """Refuse models that are being captured, and mark the others until the stack is unwound."""
    modules = {module for one in models for module in one.model.modules()}
    with _captured_lock:
        taken = [type(module).__name__ for module in modules if module in _captured]
        if taken:
            msg = (
                f"a capture of this model is already running (of {taken[0]} and {len(taken) - 1} "
                "other modules); end it before the next begins"
            )
            raise CaptureError(msg)
        _captured.update(modules)

    def release() -> None:
        with _captured_lock:
            _captured.difference_update(modules)

    stack.callback(release)


def _check_alike(models: Sequence[Instrumented]) -> None:
    """Refuse models of one capture whose hooks keep different things."""
    for field in ("sampling_rate", "sampling_seed", "outputs", "rows", "stop_after_last_layer"):
        given = {one.name: getattr(one.hooks, field) for one in models}
        first = next(iter(given.values()))
        if any(one != first for one in given.values()):
            msg = (
                f"the models of one capture must have the same HookConfig.{field}; got {given!r}: "
                "give them the same, or capture them one after the other"
            )
            raise ConfigError(msg)


def _targets(models: Sequence[Instrumented], granularity: HookGranularity) -> list[Target]:
    several = len(models) > 1
    targets = []
    for one in models:
        for target in select(one.model, granularity, one.hooks):
            target = _counted(target, one)
            name, site = target.name, target.site
            if several:
                name, site = _joined(one.name, name), f"{one.name}.{site}"
            targets.append(replace(target, name=name, site=site))
    return targets


def _counted(target: Target, one: Instrumented) -> Target:
    """Give a block's module of a pipeline's stage the name that it has in the whole model."""
    first = one.parallel.first_block if one.parallel is not None else 0
    if not first or target.block < 0:
        return target
    stacks = find_stacks(one.model)
    stem = f"{stacks[0].path}." if stacks[0].path else ""
    before = f"{stem}{target.block}"
    if len(stacks) > 1 or not target.name.startswith(before):
        msg = (
            f"Parallel(first_block={first}) counts the blocks of one list of a stage; "
            f"{type(one.model).__name__} has {len(stacks)}, and {target.name!r} in them: give its "
            "blocks the names that they have in the whole model"
        )
        raise ConfigError(msg)
    block = target.block + first
    return replace(target, name=f"{stem}{block}{target.name[len(before) :]}", block=block)


def _on_cores(models: Sequence[Instrumented]) -> bool:
    """Whether models run on the cores that encoding needs, too."""
    parameters = (parameter for one in models for parameter in one.model.parameters())
    return all(parameter.device.type == "cpu" for parameter in parameters)


def _entries(models: Sequence[Instrumented]) -> dict[nn.Module, tuple[str, str]]:
    several = len(models) > 1
    return {
        module: (_joined(one.name, name) if several else name, axis)
        for one in models
        for module, (name, axis) in entry_modules(one.model).items()
    }


def _joined(model: str, name: str) -> str:
    """Give a layer's name among several models; that of the model itself is the model's."""
    return f"{model}{name}" if name[:1] in ("", "@", "#") else f"{model}.{name}"


def _stacks(models: Sequence[Instrumented]) -> list[Stack]:
    return [stack for one in models for stack in find_stacks(one.model)]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_NAMED]))
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
