"""Drives a headless Chromium through its debugging pipe, with nothing but the standard library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

__all__ = ["NAMES", "Chromium", "found"]

NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60.0
_KEYS = {
    "Tab": 9, "Escape": 27, "End": 35, "Home": 36,
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip


def found() -> str | None:
    """Give the browser's program, if there is one."""
    return next((place for name in NAMES if (place := shutil.which(name))), None)


class Chromium:
    """A browser with one page.

    Attributes
    ----------
    errors : list of str
        What the page's console and its exceptions said since it was opened.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._stack = ExitStack()
        self._number = 0
        self._rest = b""
        self._allowed = "file:"

    def __enter__(self) -> Self:
        program = found()
        assert program is not None
        profile = self._stack.enter_context(
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        )
        theirs, self._to = self._pipe()
        self._from, ours = self._pipe()
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *("--no-first-run", "--disable-dev-shm-usage", "--disable-background-networking"),
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        joined = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'  # the pipe's ends are 3 and 4
        self._process = subprocess.Popen(
            ["bash", "-c", joined, "bash", str(theirs), str(ours), program, *options],
            pass_fds=(theirs, ours),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(ours)
        self._session = ""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        session = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._stack.close()

    def open(self, page: Path | str, *, width: int, dark: bool = False, height: int = 900) -> None:
        """Open a file, or an address, in a window of that width."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self.errors.clear()
        address = page if isinstance(page, str) else page.absolute().as_uri()
        self._allowed = address if isinstance(page, str) else "file:"
        self._ask("Page.navigate", url=address)
        end = time.monotonic() + _SECONDS
        while self.run("document.readyState + location.href")[:8] != "complete":
            assert time.monotonic() < end, "the page doesn't load"
        assert unquote(address) == self.run("decodeURIComponent(location.href)")

    def wait(self, code: str) -> Any:
        """Wait until an expression of JavaScript holds, and give it."""
        end = time.monotonic() + _SECONDS
        while not (found := self.run(code)):
            assert time.monotonic() < end, f"never: {code}"
        return found

    def run(self, code: str) -> Any:
        """Evaluate JavaScript, and give what it gives."""
        told = self._ask(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key, and let it go."""
        for kind in ("rawKeyDown", "keyUp"):
            self._ask(
                "Input.dispatchKeyEvent",
                type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key],
                modifiers=8 * shift,
            )  # fmt: skip

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        told = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    # -- the pipe -------------------------------------------------------------------------------

    def _pipe(self) -> tuple[int, int]:
        ends = []
        for end in os.pipe():  # above those that the browser's own ends have
            ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
            os.close(end)
        return ends[0], ends[1]

    def _ask(self, method: str, **given: Any) -> Any:
        self._number += 1
        said = {"id": self._number, "method": method, "params": given}
        if self._session:
            said["sessionId"] = self._session
        data = json.dumps(said).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            self._note(told)

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], _SECONDS)
            assert ready, "the browser doesn't answer"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser is gone"
            self._rest += data
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def _note(self, told: dict[str, Any]) -> None:
        given = told.get("params", {})
        match told.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(given["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.errors.append(str(given["args"]))
            case "Log.entryAdded":
                self.errors.append(given["entry"]["text"])
            case "Network.requestWillBeSent":
                address = given["request"]["url"]
                if not address.startswith(self._allowed):
                    self.errors.append(f"asked for {address}")
