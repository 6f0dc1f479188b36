"""Drives a headless Chromium through the DevTools protocol over a pipe: nothing to install but Chromium itself."""

from __future__ import annotations

import base64
import itertools
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --mute-audio --remote-debugging-pipe"
)
TIMEOUT = 20.0


def find() -> str | None:
    """Chromium's command, if it is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Chromium:
    """A running browser. Commands go to its file descriptor 3, replies come from 4, each ended by a zero byte."""

    def __init__(self, command: str, profile: Path) -> None:
        read_commands, self._out = os.pipe()
        self._in, write_replies = os.pipe()
        # The shell puts the two pipes where Chromium expects them, whatever numbers they have here.
        flags = [*FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        script = f'exec "$@" 3<&{read_commands} 4>&{write_replies}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", command, *flags],
            pass_fds=(read_commands, write_replies),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_replies)
        self._numbers = itertools.count(1)
        self._replies: dict[int, queue.Queue[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with os.fdopen(self._in, "rb") as stream:
            buffer = b""
            while data := os.read(stream.fileno(), 1 << 16):
                *messages, buffer = (buffer + data).split(b"\0")
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._replies[message["id"]].put(message)
                    else:
                        self.events.append(message)

    def send(self, method: str, session: str | None = None, **params: Any) -> Any:
        """One command and its result."""
        number = next(self._numbers)
        self._replies[number] = queue.Queue()
        message = {"id": number, "method": method, "params": params}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        reply = self._replies[number].get(timeout=TIMEOUT)
        del self._replies[number]
        assert "error" not in reply, f"{method}: {reply['error']}"
        return reply["result"]

    def open(self, url: str) -> Page:
        """A new tab."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        page.go(url)
        return page

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait(TIMEOUT)
        os.close(self._out)
        self._reader.join(TIMEOUT)


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        """A command to this tab."""
        return self._browser.send(method, self._session, **params)

    def go(self, url: str) -> None:
        """Loads an address and waits until the page's script has run."""
        self.send("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def reload(self) -> None:
        """Loads the page again."""
        self.run("window.isOld = true")
        self.send("Page.reload")
        self.wait("!window.isOld && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, f"{script}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = TIMEOUT) -> None:
        """Waits until a JavaScript expression is true; errors while a page is being replaced count as false."""
        end = time.monotonic() + seconds
        while True:
            try:
                if self.run(f"Boolean({condition})"):
                    return
            except AssertionError:
                pass
            assert time.monotonic() < end, f"waited in vain for: {condition}"
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        """The visible text of the last element that fits."""
        return str(self.run(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1).innerText"))

    def click(self, selector: str) -> None:
        """A real click in the middle of the last element that fits, which must be on top there."""
        found = self.run(
            f"(() => {{ const e = [...document.querySelectorAll({json.dumps(selector)})].at(-1);"
            " e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect();"
            " const [x, y] = [r.x + r.width / 2, r.y + r.height / 2];"
            " return {x, y, onTop: e.contains(document.elementFromPoint(x, y))}; })()"
        )
        assert found["onTop"], f"{selector} is covered or hidden"
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=found["x"], y=found["y"], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Text where the focus is."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, code: int, **more: Any) -> None:
        """A key with its (old) key code."""
        text = {"Enter": "\r", " ": " "}.get(key)
        params = {"key": key, "code": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {}), **more}
        self.send("Input.dispatchKeyEvent", type="keyDown", **params)
        self.send("Input.dispatchKeyEvent", type="keyUp", **params)

    def look(self, *, width: int = 1000, height: int = 760, dark: bool = False, mobile: bool = False) -> None:
        """Sets the size of the window and the colour scheme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Writes what is seen as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def faults(self) -> list[str]:
        """Exceptions and errors of the page so far: scripts, the content security policy, requests."""
        mine = [e for e in self._browser.events if e.get("sessionId") == self._session]
        thrown = [json.dumps(e["params"]) for e in mine if e["method"] == "Runtime.exceptionThrown"]
        entries = [e["params"]["entry"] for e in mine if e["method"] == "Log.entryAdded"]
        return thrown + [e["text"] for e in entries if e["level"] == "error"]

    def requested(self) -> list[str]:
        """Every address that the page has asked for."""
        mine = [e for e in self._browser.events if e.get("sessionId") == self._session]
        return [e["params"]["request"]["url"] for e in mine if e["method"] == "Network.requestWillBeSent"]
