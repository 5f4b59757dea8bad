"""Owns what `actstore capture` does around the library: signals, progress, and how to go on."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import typer

from actstore import samples
from actstore.cli.output import Output, Progress, again
from actstore.config import HookConfig, HookGranularity, InstrumentationConfig
from actstore.errors import ConfigError, FormatError

_SLICE: Final = re.compile(r"(-?\d+)?:(-?\d+)?(:-?[1-9]\d*)?")

__all__ = ["Wanted", "going_on", "precisions", "run", "texts"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command was given."""

    model: str
    log: Path
    samples: list[samples.Sample]
    granularity: HookGranularity
    layers: list[str] | None
    rows: str | None
    dtype: str
    device: str | None
    compression: str
    max_memory_gb: float | None
    generate: int
    batch_size: int
    max_length: int | None
    checkpoint_tokens: int
    resume: bool
    archive: Path | None
    precision: list[str] | None


def texts(
    text: Any, jsonl: Any, field: str, id_field: str | None, prompts: Sequence[str] | None
) -> list[samples.Sample]:
    """Read the texts, of wherever they were said to be."""
    given = [one for one in (text, jsonl, prompts or None) if one is not None]
    if len(given) != 1:
        msg = "give the texts by one of --text, --jsonl and --prompt"
        raise typer.BadParameter(msg)
    try:
        if text is not None:
            return samples.of_lines(text)
        if jsonl is not None:
            return samples.of_jsonl(jsonl, field, id_field, jsonl.name)
    except UnicodeDecodeError as error:
        msg = f"the texts are no UTF-8: {error}"
        raise FormatError(msg) from error
    return samples.of_lines(prompts or ())


def precisions(given: Sequence[str] | None) -> str | dict[str, str] | None:
    """Give what is kept of floats as `compact` takes it: of all, or by the names of sites."""
    from actstore.archive.precision import Precision

    if not given:
        return None
    found: dict[str, str] = {}
    for one in given:
        try:
            Precision.parse(one)
            name, how = "*", one
        except ConfigError:
            name, _, how = one.partition("=")
            if not how:
                raise
            Precision.parse(how)
        found[name] = how
    whole = found.pop("*", None)  # the first that matches counts
    return found if whole is None else {**found, "*": whole}


@contextmanager
def going_on(how: str) -> Iterator[None]:
    """Let an interrupt say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how) from None


class _Stop:
    """The first Ctrl-C asks for an end after the pass that runs; the next ends at once."""

    def __init__(self, out: Output) -> None:
        self.asked = False
        self._out = out

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self._heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _heard(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if not self._out.quiet:  # what prints may be what was interrupted
            os.write(sys.stderr.fileno(), b"ending after this pass; Ctrl-C again ends at once\n")


def run(out: Output, wanted: Wanted) -> None:
    """Load the model, feed it the texts, capture, and compact if that is wanted."""
    config = InstrumentationConfig(
        wanted.granularity, wanted.compression, 1e-9, wanted.max_memory_gb
    )
    hooks = HookConfig(target_layers=wanted.layers or None, rows=_rows(wanted.rows))
    precision = precisions(wanted.precision)
    if precision is not None and wanted.archive is None:
        msg = "the log keeps everything: --precision is of the archive that --compact makes"
        raise typer.BadParameter(msg)
    if wanted.archive is not None and wanted.archive.exists():
        msg = f"{wanted.archive} exists, and is not overwritten; give another name"
        raise ConfigError(msg)
    fed, summary = _feed(out, wanted, config, hooks)
    report = None
    if wanted.archive is not None:
        report = _compact(out, wanted, fed, precision)
    from actstore.cli import screens

    document = {
        "log": fed.log,
        "samples": fed.samples,
        "skipped": fed.skipped,
        "truncated": fed.truncated,
        "tokens": fed.tokens,
        "generated": fed.generated,
        "summary": dict(summary),
        "archive": report,
    }
    out.result(document, lambda _: screens.captured(fed, summary, report))


def _feed(
    out: Output, wanted: Wanted, config: InstrumentationConfig, hooks: HookConfig
) -> tuple[Any, Mapping[str, Any]]:
    out.say(f"loading {wanted.model}")
    from actstore.capture import feeding
    from actstore.framework import InstrumentationFramework

    how = feeding.How(
        wanted.generate,
        wanted.batch_size,
        wanted.max_length,
        wanted.checkpoint_tokens,
        wanted.resume,
    )
    loaded = feeding.load(
        wanted.model, dtype=wanted.dtype, device=wanted.device, generates=wanted.generate > 0
    )
    framework = InstrumentationFramework(config)
    stop = _Stop(out)
    with out.progress(f"capture {wanted.log.name}", "tokens") as progress:
        told = _told(progress, framework, wanted)
        try:
            with stop.listening():
                fed = feeding.feed(
                    framework, loaded, wanted.samples, wanted.log, how,
                    hooks=hooks, stop=stop, progress=told,
                )  # fmt: skip
        except KeyboardInterrupt:
            msg = f"{wanted.log} is whole as far as it goes; go on with\n  {again('--resume')}"
            raise KeyboardInterrupt(msg) from None
    return fed, framework.summary


def _told(progress: Progress, framework: Any, wanted: Wanted) -> Any:
    """Give what tells how far a capture is: tokens, and GB/s that are written."""
    from actstore.cli.drawing import rate

    began = time.monotonic()

    def tell(fed: Any) -> None:
        done, many = fed.samples + fed.skipped, len(wanted.samples)
        tokens = fed.tokens + fed.generated
        expected = wanted.generate * many
        total = expected if wanted.generate else int(tokens * many / max(done, 1))
        counted = (
            fed.generated + fed.skipped * wanted.generate
            if wanted.generate
            else int(tokens * done / max(fed.samples, 1))
        )
        a_second = framework.captured_bytes / max(time.monotonic() - began, 1e-9)
        progress(counted, max(total, counted), rate(a_second, "bytes"))

    return tell


def _compact(out: Output, wanted: Wanted, fed: Any, precision: Any) -> Any:
    import actstore
    from actstore.capture import feeding

    logs = [fed.log] if wanted.generate or not wanted.resume else feeding.logs_of(wanted.log)
    archive = wanted.archive
    assert archive is not None  # noqa: S101 - the caller asked
    how = f"{fed.log} is whole; actstore compact {' '.join(map(str, logs))} {archive} goes on"
    with going_on(how), out.progress(f"compact {archive.name}") as progress:
        return actstore.compact(
            logs[0] if len(logs) == 1 else logs, archive, precision=precision, progress=progress
        )


def _rows(given: str | None) -> Any:
    if given is None or given in ("last", "generated"):
        return given
    if _SLICE.fullmatch(given) is None:
        msg = f"rows are 'last', 'generated', or a slice such as '-8:'; got {given!r}"
        raise typer.BadParameter(msg, param_hint="--rows")
    return slice(*(int(one) if one else None for one in given.split(":")))
