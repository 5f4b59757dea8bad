"""Owns what all commands have in common: how one is registered and ends, options, and choices.

The commands themselves are ``app``'s.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from actstore.cli.output import FAILED, INTERRUPTED, Output
from actstore.errors import ActstoreError, ConfigError

__all__ = [
    "Codec",
    "Dim",
    "Dtype",
    "File",
    "Form",
    "Gzip",
    "Layers",
    "Logs",
    "Memory",
    "Names",
    "Order",
    "Precisions",
    "Profile",
    "Scheduler",
    "Workers",
    "app",
    "cluster",
    "command",
]

_HELP = """Capture, archive, check and look at language-model activations.

A log (run.stream) is what a capture writes and a crash can't take; an archive (run.zarr) is what a
log becomes, for xarray and others. Every command takes --json: one JSON document on stdout, and
progress on stderr.

Exit codes: 0 done; 1 something is damaged or incomplete; 2 wrong usage; 3 an error, as told on
stderr; 130 interrupted, with nothing left half-done.

Completion: actstore --install-completion.
"""

app = typer.Typer(
    name="actstore",
    help=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)

_OPTIONS = {
    "json": Annotated[
        bool, typer.Option("--json", metavar="", help="One JSON document on stdout.")
    ],
    "quiet": Annotated[
        bool, typer.Option("--quiet", "-q", metavar="", help="No progress, no messages.")
    ],
    "debug": Annotated[bool, typer.Option("--debug", metavar="", help="Tracebacks of errors.")],
}


def command(name: str, *examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command: give it the options that all have, and let errors be exit codes."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            out = Output(**{name: given.pop(name) for name in _OPTIONS})
            with out.warnings():
                try:
                    function(out, **given)
                except (typer.Exit, typer.BadParameter, BrokenPipeError):
                    raise
                except KeyboardInterrupt as error:
                    out.say(f"interrupted: {error}" if str(error) else "interrupted")
                    raise typer.Exit(INTERRUPTED) from None
                except Exception as error:  # also what is a fault of ours: 1 means something else
                    out.error(error, known=isinstance(error, ActstoreError | OSError))
                    raise typer.Exit(FAILED) from None

        hints = get_type_hints(function, include_extras=True)
        kept = list(inspect.signature(function).parameters.values())[1:]
        mine = [one.replace(annotation=hints[one.name]) for one in kept]
        common = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for name, kind in _OPTIONS.items()
        ]
        run.__signature__ = inspect.Signature([*mine, *common])  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in [*mine, *common]}
        shown = "\n\n".join(f"    $ {one}" for one in examples)
        app.command(name, epilog=f"Examples:\n\n{shown}")(run)
        return function

    return register


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Give a client of the dask cluster that has this address; None of none."""
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        msg = "--scheduler wants dask.distributed, which isn't installed: actstore[distributed]"
        raise ConfigError(msg) from error
    try:
        client = Client(address)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        msg = f"no dask scheduler answers at {address!r}: {error}"
        raise ConfigError(msg) from error
    with client:
        yield client


class Dtype(Enum):
    """What a model is loaded in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Codec(Enum):
    """A log's codec."""

    LZ4 = "lz4"
    ZSTD = "zstd"
    NONE = "none"


class Profile(Enum):
    """An archive's profile."""

    BALANCED = "balanced"
    FAST = "fast"
    DENSE = "dense"
    NONE = "none"


class Order(Enum):
    """What layers are sorted by."""

    NAME = "name"
    PACKETS = "packets"
    BYTES = "bytes"
    RATIO = "ratio"


class Form(Enum):
    """What other tools read."""

    PARQUET = "parquet"
    SAFETENSORS = "safetensors"
    SAELENS = "saelens"


class Gzip(Enum):
    """What HDF5's chunks are compressed by."""

    GZIP = "gzip"
    ZSTD = "zstd"
    NONE = "none"


File = Annotated[Path, typer.Argument(metavar="PATH", help="A log or an archive.")]
Logs = Annotated[list[Path], typer.Argument(metavar="LOG...", help="Logs, in their order.")]
Layers = Annotated[
    list[str] | None,
    typer.Option("--layers", metavar="GLOB", help="Layers or sites; may be given again."),
]
Memory = Annotated[float, typer.Option(metavar="GB", help="Memory, at most.")]
Workers = Annotated[
    int | None, typer.Option(metavar="N", help="Threads; by default as many as cores.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Of a dask cluster, such as tcp://host:8786."),
]
Dim = Annotated[
    str | None, typer.Option("--dim", metavar="NAME", help="The token axis, where there are two.")
]
Precisions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[SITE=]HOW",
        help="Keep less of floats: nmse=2e-4, relative=0.01, mse=1e-3, int8, bfloat16, float16; "
        "of all, or of a site (resid=nmse=2e-5); may be given again.",
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Option("--name", metavar="LAYER=NAME", help="Call a layer; may be given again."),
]
