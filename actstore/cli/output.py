"""Owns what a command may say and where: results on stdout, progress and messages on stderr.

How long something takes, and ends early, is told here too. What a result looks like is
``screens``'s.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["DAMAGED", "FAILED", "INTERRUPTED", "Output", "Progress", "again", "plain"]

DAMAGED: Final = 1
FAILED: Final = 3
INTERRUPTED: Final = 130

_AFTER: Final = 1.0  # seconds that are worth no progress
_EVERY: Final = 10.0  # seconds between lines where nothing can be drawn
_WIDE: Final = 1000  # columns where nobody looks: nothing is folded


def plain(value: Any) -> Any:
    """Give a value as JSON has it; NaN and infinities, which it has not, as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: Any = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    else:
        found = value.tolist() if hasattr(value, "tolist") else value  # NumPy's
    if isinstance(found, Mapping):
        return {str(name): plain(one) for name, one in found.items()}
    if isinstance(found, list | tuple | set | frozenset):
        return [plain(one) for one in found]
    if isinstance(found, float):
        return found if math.isfinite(found) else None
    return found if found is None or isinstance(found, str | int | bool) else str(found)


class Output:
    """What one call of a command says.

    Parameters
    ----------
    json : bool
        One JSON document on stdout, and nothing else there.
    quiet : bool
        No progress and no messages; errors are told.
    debug : bool
        With the traceback of an error.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.debug = debug

    def console(self, *, stderr: bool = False) -> Console:
        """Give where something is drawn: as wide as a terminal; in a pipe nothing is folded."""
        from rich.console import Console

        stream = sys.stderr if stderr else sys.stdout
        width = None
        if not stream.isatty() and not os.environ.get("COLUMNS", "").isdecimal():
            width = _WIDE
        return Console(
            stderr=stderr, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False
        )

    def result(self, document: Any, screen: Callable[[Console], RenderableType]) -> None:
        """Say what a command found: as JSON, or as a screen."""
        if self.json:
            # allow_nan is off so that it is JSON for every reader
            text = json.dumps(plain(document), allow_nan=False, ensure_ascii=False, indent=2)
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
            return
        console = self.console()
        drawn = screen(console)
        with console.capture() as captured:
            console.print(drawn)
        for line in captured.get().splitlines():
            sys.stdout.write(line.rstrip() + "\n")
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Say something beside the result."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def error(self, error: BaseException, *, known: bool = True) -> None:
        """Say why a command failed."""
        if self.debug or not known:
            traceback.print_exception(error)
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
            for note in getattr(error, "__notes__", ()):
                print(note, file=sys.stderr, flush=True)
        if self.json:
            document = {"error": str(error), "type": type(error).__name__}
            sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")
            sys.stdout.flush()

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Say warnings as messages."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from actstore.errors import ActstoreWarning

            warnings.simplefilter("always", ActstoreWarning)
            warnings.showwarning = self._warned
            yield

    def _warned(self, message: Warning | str, *_rest: Any, **_more: Any) -> None:
        self.say(f"warning: {message}")

    @contextmanager
    def progress(self, doing: str, unit: str = "bytes") -> Iterator[Progress]:
        """Tell how far something is, with its rate and the time left, if it takes over a second.

        Parameters
        ----------
        doing : str
            What is being done.
        unit : {"bytes", …}
            What is counted.
        """
        progress = Progress(self, doing, unit)
        try:
            yield progress
        finally:
            progress.close()


class Progress:
    """Is called with what is done and what there is; draws on a terminal, else says lines."""

    def __init__(self, output: Output, doing: str, unit: str) -> None:
        self._output = output
        self._doing = doing
        self._unit = unit
        self._began = self._told = time.monotonic()
        self._first: int | None = None
        self._last = 0
        self._drawn: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int, more: str = "") -> None:
        """Take what is done and what there is, in all, and what else is worth telling."""
        now = time.monotonic()
        if self._first is None or done < self._last:  # or the next of two parts begins
            self._first, self._began = done, now if self._first is not None else self._began
        self._last = done  # the first is what an earlier call had finished
        if self._output.quiet or now - self._began < _AFTER:
            return
        said = self._said(done, total, now, more)
        if sys.stderr.isatty():
            self._draw(done, total, said)
        elif now - self._told >= _EVERY:
            self._told = now
            share = f"{done / total:4.0%}  " if total else ""
            self._output.say(f"{self._doing}  {share}{said}")

    def _said(self, done: int, total: int, now: float, more: str) -> str:
        from actstore.cli.drawing import duration, rate

        made, seconds = done - (self._first or 0), max(now - self._began, 1e-9)
        parts = [rate(made / seconds, self._unit), *([more] if more else [])]
        if made and total > done:
            parts.append(f"{duration((total - done) * seconds / made)} left")
        return "  ".join(parts)

    def _draw(self, done: int, total: int, said: str) -> None:
        if self._drawn is None:
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as Bar

            self._drawn = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                TextColumn("{task.fields[said]}", markup=False),
                console=self._output.console(stderr=True),
                transient=True,
            )
            self._task = self._drawn.add_task(self._doing, total=total, said=said)
            self._drawn.start()
        self._drawn.update(self._task, completed=done, total=total, said=said)

    def close(self) -> None:
        """Take what was drawn away."""
        if self._drawn is not None:
            self._drawn.stop()


def again(*more: str) -> str:
    """Give the command line of this call, and more options."""
    given = [one for one in sys.argv[1:] if one not in more]
    return shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "actstore"), *given, *more])
