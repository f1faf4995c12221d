"""Chromium without a window, driven by its own driver over plain HTTP: the WebDriver protocol needs no library."""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

KEYS = {"ArrowLeft": "\ue012", "ArrowRight": "\ue014", "Home": "\ue011", "End": "\ue010", "PageDown": "\ue00f"}
needed = pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")),
    reason="Debian's packages chromium and chromium-driver are not installed",
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Browser:
    """One session. `with Browser() as browser:`"""

    def __enter__(self) -> "Browser":
        port = free_port()
        self.home = f"http://127.0.0.1:{port}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.driver = subprocess.Popen([shutil.which("chromedriver"), f"--port={port}"], **quiet)
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        options = {"args": ["--headless", "--disable-gpu", "--disable-dev-shm-usage", *sandbox]}
        wish = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options,
                                                 "goog:loggingPrefs": {"browser": "ALL"}}}}  # fmt: skip
        try:
            self.until(lambda: self.ask("GET", "/status")["ready"])
            self.home += "/session/" + self.ask("POST", "/session", wish)["sessionId"]
        except BaseException:
            self.driver.kill()
            raise
        return self

    def __exit__(self, *error) -> None:
        with suppress(OSError):
            self.ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait(10)

    def ask(self, method: str, path: str, body: dict | None = None):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = Request(self.home + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:  # of our own JavaScript, mostly
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def until(self, holds, seconds: float = 30):
        """What holds() returns as soon as it is true."""
        end = time.monotonic() + seconds
        while True:
            with suppress(OSError):
                if found := holds():
                    return found
            assert time.monotonic() < end, "it never came"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def run(self, script: str, *args):
        """The value that a piece of JavaScript returns."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def press(self, *keys: str) -> None:
        """Real key strokes, one after another."""
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def point(self, selector: str, click: bool = False) -> None:
        """Move a real mouse to the middle of the first such element, and click."""
        x, y = self.run(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [Math.round(b.x + b.width / 2), Math.round(b.y + b.height / 2)]", selector
        )  # fmt: skip
        moves = [{"type": "pointerMove", "duration": 0, "x": x, "y": y}]
        moves += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}] * click
        self.ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})

    def complaints(self) -> list[str]:
        """What the browser has logged since it was asked last."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path, width: int = 1000, height: int = 700) -> None:
        self.ask("POST", "/window/rect", {"width": width, "height": height})
        path.write_bytes(base64.b64decode(self.ask("GET", "/screenshot")))
