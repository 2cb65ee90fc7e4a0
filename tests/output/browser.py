"""A page in a headless Chromium, by the browser's own protocol on two pipes; no package is needed for it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ("--headless", "--disable-gpu", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run")


class Page:
    """One tab.

    Attributes:
        complaints: errors and warnings of the console, the policy's among them, and requests to the network.
    """

    def __init__(self, commands: RawIOBase, answers: BufferedReader) -> None:
        self.complaints: list[str] = []
        self._commands, self._answers = commands, answers
        self._count, self._session = 0, ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, file: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Show a file in a window of this size."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url=file.as_uri())
        loaded = "document.readyState === 'complete' && document.URL.startsWith('file:')"
        while not self.evaluate(loaded):
            pass
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def evaluate(self, code: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        answer = self._call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._count += 1
        message: dict[str, object] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _next(self) -> bytes:
        parts = []
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            parts.append(byte)
        return b"".join(parts)

    def _note(self, event: str, told: dict[str, Any]) -> None:
        is_file = told.get("request", {}).get("url", "file:").startswith(("file:", "about:"))
        if event in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(told))
        elif event == "Network.requestWillBeSent" and not is_file:
            self.complaints.append(told["request"]["url"])


@contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """A browser with a profile of its own; it has ended afterwards."""
    assert CHROMIUM is not None
    (read, commands), (answers, write) = os.pipe(), os.pipe()
    redirected = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", CHROMIUM, *ARGUMENTS]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [*redirected, f"--user-data-dir={profile}"], pass_fds=(read, write), stdout=quiet, stderr=quiet
    )
    os.close(read)
    os.close(write)
    try:
        with os.fdopen(commands, "wb", 0) as to_it, os.fdopen(answers, "rb") as from_it:
            yield Page(to_it, from_it)
    finally:
        process.terminate()
        process.wait(30)
