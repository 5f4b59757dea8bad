"""Owns ``actstore serve``: where it listens, what it says, and when a browser is opened."""

from __future__ import annotations

from typing import Annotated

import typer

from actstore.cli.common import File, Memory, command
from actstore.cli.output import Output

__all__ = ["serve"]


@command("serve", "actstore serve run.zarr", "actstore serve run.zarr --port 8765 --open")
def serve(
    out: Output,
    *,
    path: File,
    host: Annotated[
        str, typer.Option(metavar="ADDR", help="Where it listens: 127.0.0.1 is this machine only.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0 is any that is free.")
    ] = 0,
    browser: Annotated[
        bool, typer.Option("--open", metavar="", help="Open the page in a browser.")
    ] = False,
    sequence: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="PASS ITEM", help="Shown first; else the longest sequence."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Look at every checksum before.")
    ] = False,
    max_memory_gb: Memory = 1.0,
) -> None:
    """Serve the page of a run of any size: what it shows is read when it is asked for.

    Any sequence, site, layer and feature; read-only, and nothing but this file. The address that
    is printed holds a new token: whoever has it may read all of it. Ctrl-C ends it.
    """
    from actstore.cli import screens
    from actstore.reporting import serving

    def ready(address: str) -> None:
        if not serving.is_loopback(host):
            out.say(f"warning: others in the network reach {host}, over HTTP that they can read "
                    "along; on 127.0.0.1, ssh -L brings the page elsewhere")  # fmt: skip
        out.result({"path": path, "url": address}, lambda _: screens.served(path, address))
        if browser:
            import webbrowser

            webbrowser.open(address)

    serving.serve(
        path, host=host, port=port, sequence=sequence, verify=verify,
        max_memory_gb=max_memory_gb, ready=ready, tell=out.say,
    )  # fmt: skip
