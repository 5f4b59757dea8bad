"""Owns the commands for what comes from others and goes to them: export, import, share.

Which function of the library makes a file is told by how its name ends, or by a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import actstore
from actstore.cli.common import Dim, Form, Gzip, Memory, Names, command
from actstore.cli.output import Output
from actstore.errors import ConfigError

__all__: list[str] = []

#: How names of one file with a whole archive end.
WHOLE: Final = (".h5", ".hdf5", ".zarr.zip")
#: How names of what holds rows for other tools end; "" is a folder.
ROWS: Final = (".parquet", ".safetensors", "")


@command(
    "export",
    "actstore export run.zarr run.h5",
    "actstore export run.zarr run.zarr.zip",
    "actstore export run.zarr rows.safetensors --layers model.layers.3",
)
def export(  # noqa: PLR0913 - options of a command, each by its name
    out: Output,
    *,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="An archive or a log.")],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            help="All of it: .h5, .zarr.zip. Rows, for other tools: .parquet, .safetensors, or a "
            "folder for SAELens.",
        ),
    ],
    compression: Annotated[
        Gzip | None, typer.Option(metavar="NAME", help="Of an .h5: gzip, zstd, none.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", metavar="NAME", help="Of rows: these; may be given again."),
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option("--format", metavar="NAME", help="parquet, safetensors, saelens."),
    ] = None,
    name: Names = None,
    context_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Rows of a sequence, for SAELens.")
    ] = None,
    dim: Dim = None,
    max_memory_gb: Memory = 1.0,
) -> None:
    """Make one file of an archive or a log, to be read by others."""
    from actstore.cli import screens

    found = _export(
        out,
        source,
        target,
        compression=compression.value if compression else None,
        layers=layers,
        form=form.value if form else None,
        names=name,
        context_size=context_size,
        dim=dim,
        max_memory_gb=max_memory_gb,
    )
    out.result(found, lambda _: screens.exchanged(found))


@command(
    "import",
    "actstore import run.h5 again.zarr",
    "actstore import rows.safetensors rows.stream",
)
def import_(
    out: Output,
    *,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="What export made (.h5, .zarr.zip), or another tool's file or folder.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="An archive, run.zarr, or a log, run.stream.")
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="vllm, saelens, activault, saev, torch, folder; else found by the files.",
        ),
    ] = None,
    name: Names = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Token ids, .npy, of folder and torch.")
    ] = None,
    layer_id: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Of vllm's layers, in order; may be given again."),
    ] = None,
    max_memory_gb: Memory = 1.0,
) -> None:
    """Make an archive or a log of one file, or of what another tool wrote."""
    from actstore.cli import screens

    found = _import(
        out,
        source,
        target,
        kind=kind,
        names=name,
        tokens=tokens,
        layer_ids=layer_id,
        max_memory_gb=max_memory_gb,
    )
    out.result(found, lambda _: screens.exchanged(found))


class Container(Enum):
    """What a shared archive is."""

    ZARR = "zarr"
    ZIP = "zarr.zip"
    H5 = "h5"


@command(
    "share",
    "actstore share run.zarr sent --licence CC-BY-4.0 --drop-text",
    "actstore share run.zarr sent --list",
)
def share(  # noqa: PLR0913 - options of a command, each by its name
    out: Output,
    *,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="An archive or a log.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A folder that is made.")],
    listed: Annotated[
        bool, typer.Option("--list", metavar="", help="Only say what of it would leave.")
    ] = False,
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the data set.")] = None,
    description: Annotated[str, typer.Option(metavar="TEXT", help="For its card.")] = "",
    licence: Annotated[str, typer.Option(metavar="SPDX", help="Such as CC-BY-4.0.")] = "",
    citation: Annotated[str, typer.Option(metavar="TEXT", help="For its card.")] = "",
    url: Annotated[str, typer.Option(metavar="URL", help="For its card.")] = "",
    creator: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="May be given again.")
    ] = None,
    drop_text: Annotated[
        bool, typer.Option("--drop-text", metavar="", help="Without the texts of tokens.")
    ] = False,
    drop_token_ids: Annotated[
        bool, typer.Option("--drop-token-ids", metavar="", help="Without their ids.")
    ] = False,
    hash_text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hash both, by the key in this file.")
    ] = None,
    drop_label: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Without this label; may be given again."),
    ] = None,
    container: Annotated[
        Container, typer.Option(metavar="NAME", help="zarr, zarr.zip or h5.")
    ] = Container.ZARR,
    model_folder: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Hash the model's config and tokenizer.")
    ] = None,
    hash_weights: Annotated[
        bool, typer.Option("--hash-weights", metavar="", help="And its weights.")
    ] = False,
    max_memory_gb: Memory = 1.0,
) -> None:
    """Make a folder to send: the archive, a data card, Croissant metadata and checksums."""
    from actstore.cli import screens

    privacy = actstore.Privacy(
        drop_text=drop_text,
        drop_token_ids=drop_token_ids,
        hash_text=None if hash_text is None else hash_text.read_text().strip(),
        drop_labels=drop_label or (),
    )
    if listed:
        leaving = actstore.what_leaves(source, privacy=privacy)
        out.result(
            {"path": source, "leaving": leaving},
            lambda console: screens.leaving(console, leaving),
        )
        return
    about = actstore.About(
        name or target.name, description, licence, citation, url, tuple(creator or ())
    )
    with out.progress(f"share {target.name}") as progress:
        found = actstore.share(
            source,
            target,
            about=about,
            privacy=privacy,
            container=container.value,
            model_folder=model_folder,
            hash_weights=hash_weights,
            max_memory_gb=max_memory_gb,
            progress=progress,
        )
    out.result(found, lambda console: screens.shared(console, found))


def _export(  # noqa: PLR0913 - options of a command, each by its name
    out: Output,
    source: Path,
    target: Path,
    *,
    compression: str | None,
    layers: Sequence[str] | None,
    form: str | None,
    names: Sequence[str] | None,
    context_size: int | None,
    dim: str | None,
    max_memory_gb: float,
) -> Any:
    """Make a file of an archive or a log; give the report."""
    name = target.name.lower()
    of_rows = {"layers": layers, "format": form, "names": _named(names),
               "context_size": context_size, "dim": dim}  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in of_rows.items() if value}
    if form is None and name.endswith(WHOLE):
        if given:
            msg = (
                f"{target.name} holds all of an archive: {', '.join(given)} are of {_ended(ROWS)}"
            )
            raise ConfigError(msg)
        with out.progress(f"export {target.name}") as progress:
            return actstore.export(
                source,
                target,
                compression=compression,
                max_memory_gb=max_memory_gb,
                progress=progress,
            )
    if form is None and target.suffix.lower() not in ROWS:
        msg = f"{target.name}: wanted a name that ends in {_ended((*WHOLE, *ROWS))}"
        raise ConfigError(msg)
    if compression is not None:
        msg = f"compression is of {_ended(WHOLE[:2])}"
        raise ConfigError(msg)
    return actstore.export_rows(source, target, max_memory_gb=max_memory_gb, **given)


def _import(
    out: Output,
    source: Path,
    target: Path,
    *,
    kind: str | None,
    names: Sequence[str] | None,
    tokens: Path | None,
    layer_ids: Sequence[int] | None,
    max_memory_gb: float,
) -> Any:
    """Make an archive, or a log, of a file; give the report."""
    if kind is None and source.name.lower().endswith(WHOLE):
        with out.progress(f"import {source.name}") as progress:
            return actstore.import_archive(
                source, target, max_memory_gb=max_memory_gb, progress=progress
            )
    given: dict[str, Any] = {"kind": kind, "layers": layer_ids, "names": _named(names)}
    if tokens is not None:
        import numpy as np

        try:
            given["tokens"] = np.load(tokens, allow_pickle=False)
        except ValueError as error:
            msg = f"{tokens} is no array of NumPy: {error}"
            raise ConfigError(msg) from error
    return actstore.import_activations(
        source, target, **{name: value for name, value in given.items() if value is not None}
    )


def _named(given: Sequence[str] | None) -> dict[str, str] | None:
    """Give the names that layers get, of ``LAYER=NAME``."""
    found = {}
    for one in given or ():
        layer, gap, name = one.partition("=")
        if not (layer and gap and name):
            msg = f"--name wants LAYER=NAME; got {one!r}"
            raise ConfigError(msg)
        found[layer] = name
    return found or None


def _ended(names: Sequence[str]) -> str:
    return ", ".join(one or "nothing (a folder)" for one in names)
