"""Headless Chromium, driven through the DevTools protocol: opens a page as a reader would, and tells what went wrong in it.

Messages are JSON with a zero byte after each, over two pipes (`--remote-debugging-pipe`: descriptors 3 and 4).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ANSWER_WITHIN_S = 60.0


class Tab:
    """A tab of the browser.

    `complaints` are the console messages, the uncaught exceptions and the browser's own log entries since the page was opened. `requests`
    are the addresses that the page has asked for.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._buffer, self._calls = read, write, b"", 0
        self._session: dict[str, str] = {}
        self._events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, page: Path, *, width: int) -> None:
        """Loads the file `page` in a window `width` pixels wide, and waits until its pictures are loaded too."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._call("Emulation.setScrollbarsHidden", hidden=True)
        self._events = []
        self._call("Page.navigate", url=page.resolve().as_uri())
        while not self._said("Page.loadEventFired"):
            self._events.append(self._receive())

    def run(self, script: str) -> Any:
        """Evaluates a JavaScript expression in the page and returns its value."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Saves a picture of the whole page as PNG, not only of what fits into the window."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    @property
    def complaints(self) -> list[Any]:
        return [params for name in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded") for params in self._said(name)]

    @property
    def requests(self) -> list[str]:
        return [params["request"]["url"] for params in self._said("Network.requestWillBeSent")]

    def _said(self, event: str) -> list[dict[str, Any]]:
        return [message["params"] for message in self._events if message.get("method") == event]

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._calls:
            self._events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], ANSWER_WITHIN_S)[0], f"Chromium said nothing for {ANSWER_WITHIN_S:.0f} s"
            received = os.read(self._read, 1 << 20)
            assert received, "Chromium ended"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def headless_chromium(profile: Path) -> Iterator[Tab]:
    """Runs a browser with an empty profile during the block, and yields its one tab. `profile`: an empty directory for its files."""
    assert CHROMIUM is not None
    to_browser, from_browser = os.pipe(), os.pipe()
    # The sandbox refuses to run as root, as CI does; the pages are our own.
    flags = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    shell = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
    command = ["bash", "-c", shell, "bash", CHROMIUM, *flags, f"--user-data-dir={profile}"]
    with (profile / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, pass_fds=(to_browser[0], from_browser[1]), stdout=log, stderr=log)
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Tab(from_browser[0], to_browser[1])
    finally:
        os.close(to_browser[1])  # It takes the end of its pipe for a wish to quit.
        os.close(from_browser[0])
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
