"""A real S3 server on loopback (moto's, in a process of its own), and a way to it that has faults.

The way counts the requests, and does to them what a rule says: answers 503 or 500 itself, resets
the connection, cuts the body short, lets the answer be lost, waits, is slow, or flips a bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("503", "500", "reset", "short body", "lost answer", "stalled", "slow", "flipped")
_SLOWDOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass(frozen=True)
class Request:
    """A request as it came."""

    method: str
    path: str
    range: str


@dataclass
class Way:
    """A proxy in front of a server: what it saw, and the fault that each request meets."""

    port: int
    behind: int
    seen: list[Request] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)
    rule: Callable[[Request], str | None] = lambda _request: None
    busy: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[Request]]:
        """Give a list of the requests that come meanwhile, filled at the end."""
        before, found = len(self.seen), []
        yield found
        found += self.seen[before:]

    def faulty(self, seed: int, share: float, *kinds: str, most: int = 3) -> None:
        """Let a share of all requests meet a fault, but no object more than ``most`` in a row."""
        rng, lock, row = random.Random(seed), threading.Lock(), Counter[str]()

        def rule(request: Request) -> str | None:
            with lock:
                if rng.random() >= share or row[request.path] >= most:
                    row[request.path] = 0
                    return None
                row[request.path] += 1
                return rng.choice(kinds or FAULTS)

        self.rule = rule

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count a request that is being answered."""
        with self._lock:
            self.busy += 1
        try:
            yield
        finally:
            with self._lock:
                self.busy -= 1

    def clean(self) -> None:
        """Let all requests pass."""
        self.rule = lambda _request: None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    way: Way

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _pass(self) -> None:
        with self.way.working():
            self._do()

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, self.headers.get("Range", ""))
        self.way.seen.append(request)
        fault = self.way.rule(request)
        self.way.met[fault or "none"] += 1
        if fault in ("503", "500"):
            self._answer(int(fault), [], _SLOWDOWN)
            return
        if fault == "reset":
            self._reset()
            return
        if fault == "stalled":
            time.sleep(1.5)  # longer than the client waits
            self._reset()
            return
        if fault == "slow":
            time.sleep(0.05)
        if fault == "flipped" and body and "?" not in self.path:
            body = bytes([body[0] ^ 1]) + body[1:]
        if not self._is_signed(body):  # as S3 does, and moto doesn't
            self._answer(400, [], b"<Error><Code>XAmzContentSHA256Mismatch</Code></Error>")
            return
        there = http.client.HTTPConnection("127.0.0.1", self.way.behind, timeout=60)
        try:
            kept = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in ("connection", "host", "content-length")
            }
            there.request(self.command, self.path, body, {**kept, "Content-Length": len(body)})
            found = there.getresponse()
            data = found.read()
            headers = found.getheaders()
        finally:
            there.close()
        if fault == "lost answer":
            self._reset()
            return
        self._answer(found.status, headers, data, cut=fault == "short body")

    def _is_signed(self, body: bytes) -> bool:
        said = self.headers.get("x-amz-content-sha256", "")
        return len(said) != 64 or hashlib.sha256(body).hexdigest() == said

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        length = next((value for name, value in headers if name.lower() == "content-length"), "")
        size = length if self.command == "HEAD" and length else str(len(data))
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", size)
        self.end_headers()
        if cut:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self._reset()
        elif self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            self.connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass  # noqa: N815 - the base class's


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was reset is none."""


@contextlib.contextmanager
def way_to(port: int) -> Iterator[Way]:
    """Give a proxy in front of a server."""
    handler = type("Handler", (_Handler,), {})
    with _serving(handler) as mine:
        handler.way = way = Way(mine, port)
        yield way


@contextlib.contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """Give the port of a server on loopback."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """Give the port of an S3 server that has a bucket ``bucket``."""
    said = folder / "moto.log"
    with said.open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", "0", "-H", "127.0.0.1"],
            stdout=log,
            stderr=log,
        )
    try:
        port = _port(said, server)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        yield port
    finally:
        server.kill()
        server.wait()


def _port(said: Path, server: subprocess.Popen[bytes]) -> int:
    for _ in range(600):
        found = re.search(rb"Running on http://127.0.0.1:(\d+)", said.read_bytes())
        if found is not None:
            return int(found[1])
        assert server.poll() is None, said.read_text()
        time.sleep(0.1)
    raise AssertionError(said.read_text())


class _Blobs(BaseHTTPRequestHandler):
    """Answers as Azure does who reads blobs: the files of a folder, at ``/me/box/``."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _give(self) -> None:
        file = self.folder / self.path.removeprefix("/me/box/")
        data = file.read_bytes() if file.is_file() else b""
        size, asked = len(data), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.send_response((206 if asked else 200) if file.is_file() else 404)
        if asked:
            data = data[int(asked[1]) : int(asked[2]) + 1]
            end = int(asked[1]) + len(data) - 1
            self.send_header("Content-Range", f"bytes {asked[1]}-{end}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = _give  # noqa: N815 - the base class's


@contextlib.contextmanager
def blobs_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Give the storage options by which ``az://box/`` is a folder."""
    handler = type("Handler", (_Blobs,), {"folder": folder})
    with _serving(handler) as port:
        yield {
            "account_name": "me",
            "endpoint": f"http://127.0.0.1:{port}/me",
            "skip_signature": True,
            "client_options": {"allow_http": True},
        }


def options(endpoint: str) -> dict[str, Any]:
    """Give what a client needs to know, and waits for."""
    return {
        "endpoint": endpoint,
        "access_key_id": "test",
        "secret_access_key": "test",
        "region": "us-east-1",
        "virtual_hosted_style_request": False,
        "client_options": {"allow_http": True, "timeout": "1s"},
        "retry_config": {
            "max_retries": 5,
            "retry_timeout": timedelta(seconds=30),
            "backoff": {
                "init_backoff": timedelta(milliseconds=10),
                "max_backoff": timedelta(milliseconds=100),
                "base": 2,
            },
        },
    }
