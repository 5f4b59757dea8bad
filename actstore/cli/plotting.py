"""Owns ``actstore plot``: which figure, of which rows, into which file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from actstore.cli.common import File, command
from actstore.cli.output import Output
from actstore.errors import ConfigError

__all__ = ["Kind"]

_FORMATS: Final = (".pdf", ".png", ".svg")


class Kind(Enum):
    """What is drawn."""

    NORMS = "norms"
    CHANGE = "change"
    OUTLIERS = "outliers"
    DISTRIBUTIONS = "distributions"
    FEATURE = "feature"
    TRAJECTORY = "trajectory"
    ATTENTION = "attention"
    CORRELATION = "correlation"
    PROGRESSION = "progression"
    RATES = "rates"


@command(
    "plot",
    "actstore plot norms run.stream -o norms.pdf",
    "actstore plot feature run.zarr --feature 7 --layer 3 -o feature.svg",
    "actstore plot rates run.stream -o rates.png",
)
def plot(  # noqa: PLR0913 - options of a command, each by its name
    out: Output,
    kind: Annotated[
        Kind, typer.Argument(metavar="KIND", help=", ".join(one.value for one in Kind) + ".")
    ],
    path: File,
    target: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="A .pdf, .svg or .png.")
    ],
    *,
    variable: Annotated[str | None, typer.Option(metavar="NAME", help="By default resid.")] = None,
    layer: Annotated[int | None, typer.Option(metavar="N", help="A layer, by its block.")] = None,
    feature: Annotated[int | None, typer.Option(metavar="N", help="Of a feature's text.")] = None,
    head: Annotated[int | None, typer.Option(metavar="N", help="A head, of attention.")] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="A:B", help="These rows; else the first sequence.")
    ] = None,
    pass_index: Annotated[
        int | None, typer.Option("--pass", metavar="N", help="The rows of a pass.")
    ] = None,
    item: Annotated[int | None, typer.Option(metavar="N", help="Of a batch item.")] = None,
    sample: Annotated[
        int | None, typer.Option(metavar="N", help="Rows that outliers, … are of.")
    ] = None,
    width: Annotated[
        float | None, typer.Option(metavar="IN", help="Inches: 3.4 is a column, 7 two.")
    ] = None,
) -> None:
    """Draw a figure of a log or an archive, fit for a paper, in seconds."""
    given = {
        "variable": variable,
        "layer": layer,
        "feature": feature,
        "head": head,
        "rows": None if rows is None else _slice(rows),
        "pass_index": pass_index,
        "item": item,
        "sample": sample,
        "width": width,
    }
    if target.suffix.lower() not in _FORMATS:
        msg = f"a figure is written as {', '.join(_FORMATS)}; got {str(target)!r}"
        raise ConfigError(msg)
    _draw(kind, path, {name: one for name, one in given.items() if one is not None}, target)
    document = {"path": path, "kind": kind.value, "figure": target}
    out.result(document, lambda _: f"wrote {target}")


def _draw(kind: Kind, path: Path, given: dict[str, Any], target: Path) -> None:
    import actstore
    from actstore import plots

    figures: dict[Kind, Callable[..., Any]] = {
        Kind.NORMS: plots.norm_map,
        Kind.CHANGE: plots.layer_change,
        Kind.OUTLIERS: plots.outliers,
        Kind.DISTRIBUTIONS: plots.distributions,
        Kind.FEATURE: plots.feature_on_text,
        Kind.TRAJECTORY: plots.trajectory,
        Kind.ATTENTION: plots.attention,
        Kind.CORRELATION: plots.layer_correlation,
        Kind.PROGRESSION: plots.token_progression,
        Kind.RATES: plots.run_rates,
    }
    draw = figures[kind]
    known = inspect.signature(draw).parameters
    odd = [name for name in given if name not in known]
    if odd:
        names = ", ".join(f"--{name.replace('pass_index', 'pass')}" for name in odd)
        msg = f"{kind.value} takes no {names}"
        raise ConfigError(msg)
    if kind is Kind.RATES:
        draw(path, **given).savefig(target)
        return
    if kind is Kind.FEATURE:
        if "feature" not in given:
            msg = "say which feature, with --feature"
            raise ConfigError(msg)
        given.setdefault("variable", "resid")
    with actstore.open_dataset(path, chunks=None) as dataset:
        draw(dataset, **given).savefig(target)


def _slice(text: str) -> slice:
    """Read a slice of rows, such as 100:300 or -50:."""
    parts = text.split(":")
    try:
        if len(parts) == 2:
            first, last = (int(one) if one else None for one in parts)
            return slice(first, last)
    except ValueError:
        pass
    msg = f"--rows takes a slice, such as 100:300 or -50:; got {text!r}"
    raise ConfigError(msg)
