"""Owns the `actstore` command: its entry. Commands are ``app``'s, what they show ``screens``'s.

The command has no logic of its own: each calls one function of the library. Importing this imports
neither typer nor anything heavy.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """Run the command that the process was started with."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        wanted = " and ".join(missing)
        print(f"the actstore command wants {wanted}: pip install 'actstore[cli]'", file=sys.stderr)
        sys.exit(3)
    from actstore.cli.app import app

    app(prog_name="actstore")
