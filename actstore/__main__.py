"""Lets ``python -m actstore`` be the `actstore` command."""

from __future__ import annotations

from actstore.cli import main

if __name__ == "__main__":
    main()
