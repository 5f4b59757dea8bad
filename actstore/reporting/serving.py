"""Owns the served page: who may ask, which addresses there are, and how it is run.

No address holds a file's path: there is the page, and the few questions of ``answers``. Only
this module imports starlette and uvicorn.
"""

from __future__ import annotations

import hmac
import inspect
import json
import os
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import parse_qsl

from actstore.buckets import local
from actstore.dataset import open_dataset
from actstore.errors import ConfigError
from actstore.reporting import data
from actstore.reporting.answers import Answers, RefusedError
from actstore.reporting.page import served_page
from actstore.reporting.values import Limits

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["LOOPBACK", "application", "is_loopback", "serve"]

#: What a browser on this machine may call it, whatever names point here.
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
QUESTIONS: Final = ("sequences", "tokens", "layer", "norms", "feature", "distribution")

_WORKERS: Final = 2  # that read at the same time
_AT_ONCE: Final = 32  # requests that are answered, or wait for it; more are told to come again
_CONNECTIONS: Final = 512  # beyond which uvicorn itself says 503
_PATH: Final = 200  # bytes of a request's path
_QUERY: Final = 1000  # and of its query
_HEAD: Final = 16 << 10  # and of all that comes before a body
_TOKENS: Final = 400
_DIGITS: Final = re.compile(r"-?[0-9]{1,15}", re.ASCII)
_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),  # the token is in the address
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_NOTHING: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


@contextmanager
def application(
    source: str | os.PathLike[str],
    *,
    token: str,
    hosts: Iterable[str] = LOOPBACK,
    sequence: tuple[int, int] | None = None,
    verify: bool = False,
    max_memory_gb: float = 1.0,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Starlette]:
    """Open a log or an archive, and give the ASGI application that serves its page.

    Parameters
    ----------
    source : path
        A log, an archive's folder, ``.zarr.zip`` or ``.h5``.
    token : str
        What every address begins with; whoever has it may read all of the archive.
    hosts : iterable of str, optional
        What the application may be called in a request, without the port; this machine's
        loopback names. Others are refused, so that no page from elsewhere reaches it by a name
        that it made to point here.
    sequence : (int, int), optional
        The pass and the batch item that are shown first; the longest sequence, if not given.
    verify : bool, optional
        Whether every checksum is looked at before.
    max_memory_gb : float, optional
        What the values that are being read may take, in 10^9 bytes.
    tell : function, optional
        Takes, in words, what couldn't be read.

    Yields
    ------
    starlette.applications.Starlette
        It reads only: GET and HEAD.

    Raises
    ------
    MissingFileError, FormatError, StreamCorruptError
        There is nothing, it is neither, or the log is damaged.
    ConfigError
        There is no such sequence, an option is none, or starlette isn't installed.
    """
    _needs("starlette")
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,}", token, re.ASCII):
        msg = "token must be 16 or more letters, digits, - and _: secrets.token_urlsafe(24)"
        raise ConfigError(msg)
    limits = Limits(_TOKENS, sequence, max_memory_gb)
    each = Limits(_TOKENS, sequence, max_memory_gb / _WORKERS)
    with open_dataset(local(source, "serve"), chunks=None) as dataset:
        answers = Answers(dataset, each, tell)
        said = data.of_path(source, answers.outline, check=verify)
        said["notes"].append(
            f"Served, read-only. Values are read when they are asked for, {limits.max_tokens} "
            "tokens at a time."
        )
        yield _application(answers, *served_page(said), token, frozenset(hosts))


def _application(
    answers: Answers, html: str, policy: str, token: str, hosts: frozenset[str]
) -> Starlette:
    import anyio
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.responses import Response
    from starlette.routing import Route

    reading = anyio.Semaphore(_WORKERS)
    body = html.encode("utf-8", "backslashreplace")

    async def page(request: Request) -> Response:
        _asked(request, {})
        headers = {"content-security-policy": f"{policy}; frame-ancestors 'none'"}
        return Response(body, media_type="text/html", headers=headers)

    def question(name: str) -> Route:
        answer = getattr(answers, name)
        wanted = {
            one.name: one.annotation for one in inspect.signature(answer).parameters.values()
        }

        async def endpoint(request: Request) -> Response:
            given = _asked(request, wanted)
            async with reading:
                if await request.is_disconnected():  # it moved on while it waited
                    return Response(status_code=408)
                return _said(await run_in_threadpool(partial(answer, **given)))

        return Route(f"/{{token}}/{name}", endpoint, methods=["GET"])

    async def refused(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)  # noqa: S101 - it is registered for no other
        return _said({"error": str(error), "wanted": error.wanted, "found": error.found},
                     error.status)  # fmt: skip

    async def nowhere(_request: Request, _error: Exception) -> Response:
        wanted = f"the page, or one of {', '.join(QUESTIONS)}"
        return _said({"error": f"there is nothing here; wanted {wanted}", "wanted": wanted}, 404)

    app = Starlette(
        routes=[Route("/{token}/", page, methods=["GET"]), *map(question, QUESTIONS)],
        middleware=[Middleware(_Guard, token=token, hosts=hosts)],
        exception_handlers={RefusedError: refused, 404: nowhere},
    )
    app.router.redirect_slashes = False
    return app


class _Guard:
    """Lets through who has the token and asks for little at a time, and adds the headers."""

    def __init__(self, app: App, token: str, hosts: frozenset[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = hosts
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                more = [*_HEADERS, (b"content-security-policy", _NOTHING.encode())]
                message["headers"] = [
                    *message["headers"],
                    *(one for one in more if one[0] not in known),
                ]
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, sent)
            return
        self._running += 1
        try:
            await self._app(scope, receive, sent)
        finally:
            self._running -= 1

    def _refusal(self, scope: Scope) -> Response | None:
        hosts = [_name_of(one) for name, one in scope["headers"] if name == b"host"]
        here = (scope.get("server") or ("",))[0]  # an address is no name that could be made up
        if len(hosts) != 1 or hosts[0] not in self._hosts | {here} - {""}:
            return _no(403, "this isn't the host that was served; use the address as printed")
        raw = scope.get("raw_path") or scope["path"].encode()
        if len(raw) > _PATH or len(scope["query_string"]) > _QUERY:
            return _no(414, f"wanted a path of {_PATH} bytes and a query of {_QUERY} at most")
        given = raw.removeprefix(b"/").partition(b"/")[0]
        if not hmac.compare_digest(given, self._token) or not raw.startswith(b"/"):
            return _no(403, "the address has no valid token; use it as it was printed")
        if scope["method"] not in {"GET", "HEAD"}:
            return _no(405, "this is read-only: wanted GET or HEAD", allow="GET, HEAD")
        if self._running >= _AT_ONCE:
            return _no(429, f"{_AT_ONCE} requests are being answered; come again in a second",
                       **{"retry-after": "1"})  # fmt: skip
        return None


def _no(status: int, why: str, **headers: str) -> Response:
    return _said({"error": why}, status, headers)


def _said(
    value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    from starlette.responses import Response

    body = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(body, status, headers, media_type="application/json")


def _name_of(host: bytes) -> str:
    """Give what a Host header calls the server, without the port and an address' brackets."""
    found = re.fullmatch(rb"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+))(?::[0-9]{1,5})?", host)
    return "" if found is None else (found[1] or found[2]).decode().lower()


def _asked(request: Request, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read a query: these parameters, each once, numbers in ASCII digits."""
    names = ", ".join(wanted) or "none"
    try:
        query = request.scope["query_string"].decode("ascii")
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query),
                          encoding="utf-8", errors="strict", max_num_fields=16)  # fmt: skip
    except ValueError as error:
        raise RefusedError(f"the parameters {names}", "a query that is none") from error
    given = dict(pairs)
    if len(pairs) != len(given) or set(given) != set(wanted):
        told = ", ".join(name for name, _ in pairs) or "none"
        raise RefusedError(f"the parameters {names}, each once", told)
    found: dict[str, Any] = {}
    for name, kind in wanted.items():
        text = given[name]
        number = str(kind) == "int"
        if number and not _DIGITS.fullmatch(text):
            raise RefusedError(f"{name} as a whole number of 15 digits at most", text)
        found[name] = int(text) if number else text
    return found


# -- running it -----------------------------------------------------------------------------------


def serve(
    source: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    sequence: tuple[int, int] | None = None,
    verify: bool = False,
    max_memory_gb: float = 1.0,
    ready: Callable[[str], None] = print,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve the page of a log or an archive, until the process is interrupted.

    Parameters
    ----------
    source, sequence, verify, max_memory_gb, tell
        As for `application`.
    host : str, optional
        The address to listen at; the default is reached from this machine only.
    port : int, optional
        0: any that is free.
    ready : function, optional
        Takes the page's address, with a new token, when connections are accepted.

    Raises
    ------
    MissingFileError, FormatError, StreamCorruptError, ConfigError
        As for `application`, or it can't be listened there.
    KeyboardInterrupt
        It was ended, also where Ctrl-C is ignored: in what a script starts in the background.
    """
    _needs("starlette")
    _needs("uvicorn")
    import uvicorn

    token = secrets.token_urlsafe(24)
    with (
        application(source, token=token, hosts=_hosts(host), sequence=sequence, verify=verify,
                    max_memory_gb=max_memory_gb, tell=tell) as app,
        _listening(host, port) as listener,
    ):  # fmt: skip
        config = uvicorn.Config(
            app,
            loop="asyncio", http="h11", ws="none", lifespan="off", interface="asgi3",
            log_level="error", access_log=False,  # which would say the token
            server_header=False, proxy_headers=False,
            limit_concurrency=_CONNECTIONS, h11_max_incomplete_event_size=_HEAD,
            timeout_keep_alive=5, timeout_graceful_shutdown=2,
        )  # fmt: skip
        name = socket.gethostname() if _is_any(host) else f"[{host}]" if ":" in host else host
        ready(f"http://{name}:{listener.getsockname()[1]}/{token}/")
        uvicorn.Server(config).run(sockets=[listener])
    raise KeyboardInterrupt


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_CONNECTIONS)
    except (OSError, OverflowError, UnicodeError) as error:
        msg = f"can't listen at {host} port {port}: {error}; give another host or port"
        raise ConfigError(msg) from error
    with listener:
        yield listener


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_any(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return not host


def _hosts(host: str) -> frozenset[str]:
    """Give the names that a server that listens there may be called, besides its addresses."""
    names = {host} if is_loopback(host) else {host, socket.gethostname(), socket.getfqdn()}
    return LOOPBACK | {one.lower() for one in names}


def _needs(module: str) -> None:
    if find_spec(module) is None:
        msg = f"a page is served by {module}, which isn't here: pip install 'actstore[serve]'"
        raise ConfigError(msg)
