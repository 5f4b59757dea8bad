"""Owns bringing rows, tokens and statistics of the library into the form that screens show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actstore.cli import screens
from actstore.cli.output import Output
from actstore.errors import ConfigError

__all__ = ["stats", "tokens"]


def tokens(
    out: Output, path: Path, find: list[str], *, generated: bool, limit: int, dim: str | None
) -> None:
    """Show labels of rows, or recorded tokens."""
    prefix, table = ("", _recorded(path, find)) if generated else _rows(path, find, dim)
    shown = table.head(limit) if limit else table
    rows = shown.to_numpy(object).tolist()
    columns = [str(one) for one in table.columns]
    document = {
        "path": path,
        "total": len(table),
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    titles = [one.removeprefix(prefix) for one in columns]
    left = len(table) - len(shown)
    out.result(document, lambda console: screens.tokens_screen(console, titles, rows, left))


def _rows(path: Path, find: list[str], dim: str | None) -> tuple[str, Any]:
    """Give the labels of rows, and what their names begin with where there are two axes."""
    import actstore

    with actstore.open_dataset(path, chunks=None) as dataset:
        table = dataset.actstore.table(dim=dim)
    prefix = str(table.index.name).removesuffix("token")
    if find:
        table = table[_matching(table[f"{prefix}token_text"], find)]
    return prefix, table.rename_axis(index="row").reset_index()


def _matching(texts: Any, find: list[str]) -> Any:
    """Tell which texts are meant, as ``dataset.actstore.tokens`` does."""
    behind = [f" {one}" for one in find if not one[:1].isspace()]
    return texts.isin([*find, *behind]).to_numpy()


def _recorded(path: Path, find: list[str]) -> Any:
    import pandas as pd

    import actstore
    from actstore.stream.summary import summarise_tokens

    with actstore.open_stream(path) as reader:
        table = pd.DataFrame(summarise_tokens(reader))
    return table[_matching(table["token_text"], find)] if find and len(table) else table


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
    import actstore
    from actstore.analysis import statistics

    found = []
    with actstore.open_dataset(path, chunks=None) as dataset:
        names = variables or [
            str(name)
            for name, one in dataset.data_vars.items()
            if one.dtype.kind == "f" and "source_dtype" in one.attrs and _has_rows(one)
        ]
        missing = [name for name in names if name not in dataset.data_vars]
        if missing:
            known = ", ".join(map(repr, dataset.data_vars))
            msg = f"no variable {missing[0]!r}; there are {known}"
            raise ConfigError(msg)
        sizes = [dataset[name].nbytes for name in names]
        with out.progress(f"stats {path.name}") as progress:
            for place, name in enumerate(names):
                progress(sum(sizes[:place]), sum(sizes))
                told = statistics(dataset, name, workers=workers, max_memory_gb=max_memory_gb)
                found += _lines(told, name, each=each)
    out.result(
        {"path": path, "statistics": found},
        lambda console: screens.statistics(console, found, each=each),
    )


def _has_rows(array: Any) -> bool:
    return array.size > 0 and any(str(dim).endswith("token") for dim in array.dims)


def _lines(told: Any, name: str, *, each: bool) -> list[dict[str, Any]]:
    """Put the features of a variable together, or of each of its layers."""
    layers = told.layer.values.tolist() if each and "layer" in told.dims else [None]
    return [{"variable": name, "block": block, **_together(told, name, block)} for block in layers]


def _together(told: Any, name: str, block: int | None) -> dict[str, Any]:
    import numpy as np

    mine = told if block is None else told.sel(layer=block)
    columns = {
        one: np.asarray(mine[f"{name}_{one}"].values, np.float64)
        for one in ("count", "nonfinite", "mean", "rms", "sparsity", "minimum", "maximum")
    }
    many = columns["count"]
    total = float(many.sum())
    share = many / total if total else many

    def mean(values: Any) -> float:
        return float(np.nansum(values * share)) if total else float("nan")

    center, square = mean(columns["mean"]), mean(columns["rms"] ** 2)
    there = many > 0
    return {
        "count": int(total),
        "nonfinite": int(columns["nonfinite"].sum()),
        "mean": center,
        "std": max(square - center**2, 0.0) ** 0.5 if total else float("nan"),
        "rms": square**0.5,
        "minimum": float(columns["minimum"][there].min()) if total else float("nan"),
        "maximum": float(columns["maximum"][there].max()) if total else float("nan"),
        "zeros": mean(columns["sparsity"]),
        "row_norm": float(np.nanmean(mine[f"{name}_norm_mean"].values)),
    }
