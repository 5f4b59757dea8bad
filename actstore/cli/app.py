"""Owns the commands: what each takes, which function of the library it calls, how it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from actstore.cli import exchange, plotting, serving
from actstore.cli.common import (
    Codec,
    Dim,
    Dtype,
    File,
    Layers,
    Logs,
    Memory,
    Order,
    Precisions,
    Profile,
    Scheduler,
    Workers,
    app,
    cluster,
    command,
)
from actstore.cli.output import DAMAGED, Output
from actstore.config import HookGranularity

__all__ = ["app"]

#: As ``--help`` lists them.
_ORDER: Final = (
    *("capture", "info", "ls", "tokens", "stats", "plot", "verify", "recover"),
    *("compact", "append", "export", "import", "share", "report", "serve", "bench"),
)

# -- capture --------------------------------------------------------------------------------------


@command(
    "capture",
    "actstore capture examples/tiny-llama run.stream --prompt 'A set of'",
    "actstore capture examples/tiny-llama gen.stream --prompt Sets --generate 8",
)
def capture(  # noqa: PLR0913 - options of a command, each by its name
    out: Output,
    *,
    model: Annotated[str, typer.Argument(help="A folder, or a name on the Hugging Face hub.")],
    log: Annotated[Path, typer.Argument(metavar="OUT", help="The log, such as run.stream.")],
    text: Annotated[
        typer.FileText | None,
        typer.Option(metavar="FILE", help="A file with a text a line; - is stdin."),
    ] = None,
    jsonl: Annotated[
        typer.FileText | None,
        typer.Option(metavar="FILE", help="A file with a JSON object a line; or -."),
    ] = None,
    field: Annotated[str, typer.Option(metavar="NAME", help="The objects' text.")] = "text",
    id_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Their id; else the line's number.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A text itself; may be given again.")
    ] = None,
    generate: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens to generate after each text.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Texts a pass, if none generates.")
    ] = 1,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of a text, at most; else as the model."),
    ] = None,
    granularity: Annotated[
        HookGranularity,
        typer.Option(
            metavar="KIND",
            help="full_tensor: all modules; sampled_slices: some features of them; "
            "attention_only, mlp_only: one module a block.",
        ),
    ] = HookGranularity.FULL_TENSOR,
    layers: Layers = None,
    rows: Annotated[
        str | None,
        typer.Option(metavar="ROWS", help="last, generated, or a slice such as -8: (else all)."),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(metavar="NAME", help="bfloat16, float16, float32.")
    ] = Dtype.AUTO,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, …; a GPU if there is one.")
    ] = None,
    compression: Annotated[
        Codec, typer.Option(metavar="NAME", help="The log's: lz4, zstd, none.")
    ] = Codec.ZSTD,
    max_memory_gb: Annotated[
        float | None, typer.Option(metavar="GB", help="Memory; a quarter of what there is.")
    ] = None,
    checkpoint_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens between checkpoints.")
    ] = 64,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Go on with what an earlier capture left.")
    ] = False,
    archive: Annotated[
        Path | None, typer.Option("--compact", metavar="OUT", help="Make an archive of it, too.")
    ] = None,
    precision: Precisions = None,
) -> None:
    """Run a model over texts, and capture what its modules return.

    Each row is labelled with the id of its text, sample_id. Ctrl-C ends after the pass that runs;
    the log is whole then, and --resume goes on. A log that is there is moved aside.
    """
    from actstore.cli import capturing

    wanted = capturing.Wanted(
        model, log, capturing.texts(text, jsonl, field, id_field, prompt),
        granularity, layers, rows, dtype.value, device, compression.value, max_memory_gb,
        generate, batch_size, max_length, checkpoint_tokens, resume, archive, precision,
    )  # fmt: skip
    capturing.run(out, wanted)


# -- looking --------------------------------------------------------------------------------------


@command("info", "actstore info run.stream", "actstore info run.stream --json")
def info(out: Output, path: File) -> None:
    """Say what a log or an archive is: model, run, rows, bytes, errors, provenance."""
    from actstore.cli import screens
    from actstore.overview import Overview

    found = Overview.of(path)
    document = {
        **{name: getattr(found, name) for name in found.__slots__ if name != "per_layer"},
        "ratio": found.ratio,
        "layers": len(found.per_layer),
    }
    out.result(document, lambda _: screens.overview_screen(found))


@command(
    "ls", "actstore ls run.stream", "actstore ls run.stream --layers '*.mlp' --all --sort bytes"
)
def ls(
    out: Output,
    path: File,
    layers: Layers = None,
    every: Annotated[
        bool, typer.Option("--all", metavar="", help="Each layer, not each site.")
    ] = False,
    sort: Annotated[
        Order | None,
        typer.Option(metavar="BY", help="name, packets, bytes, ratio; else as captured."),
    ] = None,
) -> None:
    """List layers: a line for each site, {0..31} being the index of its block."""
    from actstore.cli import screens
    from actstore.overview import Overview, layer_lines, site_lines

    order = sort.value if sort else None
    found = layer_lines(Overview.of(path).per_layer, layers or (), order)
    shown = found if every else site_lines(found, order)
    out.result({"path": path, "layers": [_line(one) for one in shown]},
               lambda console: screens.layers_screen(console, shown, sites=not every))  # fmt: skip


def _line(one: Any) -> dict[str, Any]:
    from actstore.cli.output import plain

    return {**plain(one), "ratio": one.ratio}


@command(
    "tokens",
    "actstore tokens run.stream --limit 5",
    "actstore tokens gen.stream --generated",
    "actstore tokens run.stream --find elements",
)
def tokens(
    out: Output,
    path: File,
    find: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Rows of this token, or of it behind a space."),
    ] = None,
    generated: Annotated[
        bool, typer.Option("--generated", metavar="", help="Recorded tokens, not rows.")
    ] = False,
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="Lines at most; 0 is all.")] = 40,
    dim: Dim = None,
) -> None:
    """Show the labels of the rows: token, pass, position, step, and annotations."""
    from actstore.cli import looking

    looking.tokens(out, path, find or [], generated=generated, limit=limit, dim=dim)


@command("stats", "actstore stats run.zarr", "actstore stats run.zarr --variable resid --each")
def stats(
    out: Output,
    path: File,
    variable: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="May be given again.")
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", metavar="", help="Each layer, not each variable.")
    ] = False,
    workers: Annotated[int, typer.Option(metavar="N", help="Threads.")] = 2,
    max_memory_gb: Memory = 1.0,
    scheduler: Scheduler = None,
) -> None:
    """Read all values once: mean, spread, extremes, zeros, and what is not finite."""
    from actstore.cli import looking

    with cluster(scheduler):  # which dask computes by from here on
        looking.stats(out, path, variable, each=each, workers=workers, max_memory_gb=max_memory_gb)


@command("verify", "actstore verify run.stream", "actstore verify run.zarr --against run.stream")
def verify(
    out: Output,
    path: File,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="LOG", help="Compare an archive with its logs, in their order."),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", metavar="", help="Decode a log's blocks, too.")
    ] = False,
) -> None:
    """Check every checksum. Exit code 1: damaged, or a log that was not closed."""
    import actstore
    from actstore.cli import screens

    with out.progress(f"verify {path.name}") as progress:
        found = actstore.verify(path, decode=decode, against=against or None, progress=progress)
    out.result(
        {"ok": found.ok, **_line_of(found)}, lambda console: screens.verified(console, found)
    )
    if not (found.ok and found.complete):
        raise typer.Exit(DAMAGED)


def _line_of(found: Any) -> dict[str, Any]:
    from actstore.cli.output import plain

    said: dict[str, Any] = plain(found)
    return said


# -- making ---------------------------------------------------------------------------------------


@command("recover", "actstore recover run.stream", "actstore recover run.stream whole.stream")
def recover(
    out: Output,
    path: Annotated[Path, typer.Argument(metavar="LOG", help="A torn or damaged log.")],
    target: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="By default run.recovered.stream.")
    ] = None,
) -> None:
    """Make a whole log of what is intact in a damaged one. Exit code 1: something is lost."""
    import actstore
    from actstore.cli import screens

    with out.progress(f"recover {path.name}") as progress:
        found = actstore.recover(path, target, progress=progress)
    out.result({"whole": found.whole, **_line_of(found)}, lambda _: screens.recovered(found))
    if not found.whole:
        raise typer.Exit(DAMAGED)


@command(
    "compact",
    "actstore compact run.stream run.zarr",
    "actstore compact run.stream small.zarr --precision nmse=2e-4",
    "actstore compact run.stream rows.zarr --layout shuffled --seed 1",
)
def compact(  # noqa: PLR0913 - options of a command, each by its name
    out: Output,
    logs: Logs,
    *,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The archive: run.zarr.")],
    profile: Annotated[
        Profile,
        typer.Option(metavar="NAME", help="balanced, fast, dense or none; all are lossless."),
    ] = Profile.BALANCED,
    precision: Precisions = None,
    layout: Annotated[
        str, typer.Option(metavar="NAME", help="Of the rows: captured, or shuffled for training.")
    ] = "captured",
    seed: Annotated[int, typer.Option(metavar="N", help="By which rows are shuffled.")] = 0,
    workers: Workers = None,
    max_memory_gb: Memory = 1.0,
    scheduler: Scheduler = None,
    remove_logs: Annotated[
        bool,
        typer.Option(
            "--remove-logs", metavar="", help="Remove them when it is verified and durable."
        ),
    ] = False,
    ranks: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="Of a run on several processes: all (none may be missing), common (passes that "
            "all have) or given (of the logs that there are).",
        ),
    ] = "all",
) -> None:
    """Make an archive of logs; interrupted, the same command goes on where it was."""
    import actstore
    from actstore.cli import capturing, screens

    with (
        cluster(scheduler) as client,
        capturing.going_on(f"{target} is not there yet; the same command goes on"),
        out.progress(f"compact {target.name}") as progress,
    ):
        found = actstore.compact(
            logs[0] if len(logs) == 1 else logs,
            target,
            profile=profile.value,
            precision=capturing.precisions(precision),
            layout=layout,
            seed=seed,
            workers=workers,
            max_memory_gb=max_memory_gb,
            client=client,
            remove_logs=remove_logs,
            progress=progress,
            ranks=ranks,
        )
    out.result({**_line_of(found), "ratio": found.ratio}, lambda _: screens.compacted(found))


@command("append", "actstore append later.stream run.zarr")
def append(
    out: Output,
    logs: Logs,
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="It has their rows, too.")],
    workers: Workers = None,
    max_memory_gb: Memory = 1.0,
    scheduler: Scheduler = None,
) -> None:
    """Bring later logs of the same model into an archive."""
    import actstore
    from actstore.cli import capturing, screens

    with (
        cluster(scheduler) as client,
        capturing.going_on(f"{archive} is as it was; the same command goes on"),
        out.progress(f"append to {archive.name}") as progress,
    ):
        found = actstore.append(
            logs,
            archive,
            workers=workers,
            max_memory_gb=max_memory_gb,
            client=client,
            progress=progress,
        )
    out.result({**_line_of(found), "ratio": found.ratio}, lambda _: screens.compacted(found))


@command("bench", "actstore bench --megabytes 64")
def bench(
    out: Output,
    megabytes: Annotated[int, typer.Option(metavar="MB", min=1, help="Of values.")] = 256,
    folder: Annotated[
        Path | None, typer.Option(metavar="PATH", help="On the disk that is meant.")
    ] = None,
    compression: Annotated[
        Codec, typer.Option(metavar="NAME", help="The log's: lz4, zstd, none.")
    ] = Codec.ZSTD,
) -> None:
    """Measure this machine: capture, compact, verify and read values like activations."""
    from actstore.bench import measure
    from actstore.cli import screens

    with out.progress("bench", "steps") as progress:
        found = measure(megabytes, folder, compression=compression.value, progress=progress)
    out.result(found, lambda console: screens.measured(console, found))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Say the version.")
    ] = False,
) -> None:
    if version:
        import actstore

        sys.stdout.write(f"actstore {actstore.__version__}\n")
        raise typer.Exit


assert exchange and plotting and serving  # noqa: S101, PT018 - their commands are registered
app.registered_commands.sort(key=lambda one: _ORDER.index(str(one.name)))
