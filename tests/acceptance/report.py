"""Prints a line for each thing that must hold: PASS or FAIL, and the measured figure."""

from __future__ import annotations

import traceback
from collections.abc import Callable

__all__ = ["run"]


def run(title: str, checks: dict[str, Callable[[], str]]) -> int:
    """Run the checks, print a line for each, and give the exit status: 0 if all hold.

    A check returns its figure, and raises where what it checks doesn't hold.
    """
    print(title)
    failed = 0
    for name, check in checks.items():
        try:
            word, figure = "PASS", check()
        except Exception as error:  # the next checks run all the same, and the script fails
            word, figure = "FAIL", f"{type(error).__name__}: {error}"
            failed += 1
            traceback.print_exc()
        print(f"{word}  {name}: {figure}", flush=True)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return int(failed > 0)
