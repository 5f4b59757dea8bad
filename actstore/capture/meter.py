"""Owns what a capture says of how it went: rates, waits by their cause, what limited it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["Meter"]

_log = logging.getLogger("actstore")
PROGRESS_SECONDS: Final = 5.0
_PEAK_SECONDS: Final = 1.0


class Meter:
    """Count what is written, and how fast.

    Parameters
    ----------
    name : str
        What its lines call the log.
    progress : callable, optional
        Is given a line every five seconds, until it raises: a line is not worth the run.
    clock : callable
        Seconds, monotonic; tests inject their own.

    Attributes
    ----------
    packets, raw_bytes, encoded_bytes : int
        What was written: packets, and their bytes as they were captured and as they were encoded.
    writing_seconds : float
        How long the writer was at work.
    """

    def __init__(
        self,
        name: str,
        progress: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.packets = self.raw_bytes = self.encoded_bytes = 0
        self.writing_seconds = 0.0
        self._name = name
        self._progress = progress
        self._clock = clock
        self._began = self._told = clock()
        self._last: deque[tuple[float, int]] = deque()  # groups of the last second
        self._in_last = 0
        self._peak = 0.0

    @property
    def seconds(self) -> float:
        """How long the run has taken."""
        return self._clock() - self._began

    def written(self, packets: int, raw: int, encoded: int, took: float) -> None:
        """Count a group that was written; say how the run goes, if that is due."""
        now = self._clock()
        self.packets += packets
        self.raw_bytes += raw
        self.encoded_bytes += encoded
        self.writing_seconds += took
        self._last.append((now, raw))
        self._in_last += raw
        while self._last[0][0] < now - _PEAK_SECONDS:
            self._in_last -= self._last.popleft()[1]
        self._peak = max(self._peak, self._in_last / _PEAK_SECONDS)
        if self._progress is not None and now - self._told >= PROGRESS_SECONDS:
            self._told = now
            try:
                self._progress(self._line())
            except Exception as error:  # the user's: such as of a terminal that is gone
                self._progress = None
                _log.warning("%s: no more lines of progress: %r", self._name, error)

    def _line(self) -> str:
        ratio = self.raw_bytes / max(self.encoded_bytes, 1)
        return (
            f"{self._name}: {self.packets:,} packets, {self.raw_bytes / 1e9:.2f} GB, "
            f"{self._in_last / _PEAK_SECONDS / 1e9:.2f} GB/s, {ratio:.2f} times smaller, "
            f"{self.seconds:.0f} s"
        )

    def rates(self, target: float, waited: Mapping[str, float]) -> dict[str, Any]:
        """Say how fast the run was, and what it is held against.

        Parameters
        ----------
        target : float
            GB/s that were wanted.
        waited : mapping of str to float
            Cause -> seconds that the model waited.

        Returns
        -------
        dict
            ``duration_seconds``, ``sustained_gbps``, ``peak_gbps`` (of the best second),
            ``target_throughput_gbps``, ``target_met``, ``limited_by`` (None where it was met;
            the cause of most waits where these are over a tenth of the run; else ``"model"``),
            ``waited_seconds``, ``waited_by_cause``.
        """
        seconds = max(self.seconds, 1e-9)
        sustained = self.raw_bytes / 1e9 / seconds
        worst = max(waited, key=lambda cause: waited[cause])
        limited = worst if waited[worst] > seconds / 10 else "model"
        return {
            "duration_seconds": seconds,
            "sustained_gbps": sustained,
            "peak_gbps": max(self._peak / 1e9, sustained),
            "target_throughput_gbps": target,
            "target_met": sustained >= target,
            "limited_by": None if sustained >= target else limited,
            "waited_seconds": sum(waited.values()),
            "waited_by_cause": dict(waited),
        }
