"""Owns bringing rows, tokens and statistics of the library into the form that screens show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actstore.cli import screens
from actstore.cli.output import Output

__all__ = ["stats", "tokens"]


def tokens(
    out: Output, path: Path, find: list[str], *, generated: bool, limit: int, dim: str | None
) -> None:
    """Show labels of rows, or recorded tokens."""
    table = _recorded(path, find) if generated else _rows(path, find, dim)
    shown = table.head(limit) if limit else table
    rows = shown.to_numpy(object).tolist()
    columns = [str(one) for one in table.columns]
    document = {
        "path": path,
        "total": len(table),
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    left = len(table) - len(shown)
    out.result(document, lambda console: screens.tokens_screen(console, columns, rows, left))


def _rows(path: Path, find: list[str], dim: str | None) -> Any:
    import actstore

    with actstore.open_dataset(path, chunks=None) as dataset:
        found = dataset if not find else dataset.actstore.tokens(find, dim=dim)
        table = found.actstore.table(dim=dim)
        if find:  # the place in the whole
            whole = dataset.actstore.table(dim=dim)
            table.index = whole.index[_matching(whole, find)]
        return table.rename_axis(index="row").reset_index()


def _matching(whole: Any, find: list[str]) -> Any:
    texts = [form for one in find for form in (one, f" {one}")]
    return whole["token_text"].isin(texts).to_numpy()


def _recorded(path: Path, find: list[str]) -> Any:
    import pandas as pd

    import actstore

    framework = actstore.InstrumentationFramework
    del framework
    with actstore.open_stream(path) as reader:
        from actstore.stream.summary import summarise_tokens

        table = pd.DataFrame(summarise_tokens(reader))
    return table[_matching(table, find)] if find and len(table) else table


def stats(
    out: Output,
    path: Path,
    variables: list[str] | None,
    *,
    each: bool,
    workers: int,
    max_memory_gb: float,
) -> None:
    """Show statistics of each variable, or of each layer."""
    raise NotImplementedError
