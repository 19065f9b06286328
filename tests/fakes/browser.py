"""A headless Chromium, driven as a person drives one, through chromedriver and the W3C's WebDriver protocol: JSON over HTTP.

Debian's packages chromium and chromium-driver have both programs; CHROMIUM and CHROMEDRIVER name others.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
IS_THERE = bool(CHROMIUM and DRIVER)
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Up": "\ue013", "Tab": "\ue004", "Shift": "\ue008", "End": "\ue010"}
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Element:
    """A thing on the page."""

    def __init__(self, browser: "Browser", number: str):
        self._browser, self._path = browser, f"/element/{number}"
        self.number = number

    def click(self) -> None:
        self._browser.call("POST", f"{self._path}/click", {})

    def type(self, text: str) -> None:
        self._browser.call("POST", f"{self._path}/value", {"text": text})

    @property
    def text(self) -> str:
        return self._browser.call("GET", f"{self._path}/text")

    @property
    def is_shown(self) -> bool:
        return self._browser.call("GET", f"{self._path}/displayed")

    def property(self, name: str):
        return self._browser.call("GET", f"{self._path}/property/{name}")


class Browser:
    """A context. width, height: of the window in CSS pixels; dark: what the system prefers; touch: a phone. folder: for its profile."""

    def __init__(self, folder: Path, width: int = 1100, height: int = 800, dark: bool = False, touch: bool = False):
        options = [
            *("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-background-networking"),
            *(f"window-size={width},{height}", f"user-data-dir={folder / 'profile'}", "disable-component-update", "hide-scrollbars"),
            *(["force-dark-mode", "blink-settings=preferredColorScheme=0"] if dark else []),
        ]
        phone = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2, "touch": touch, "mobile": touch}}
        chrome = {
            "binary": CHROMIUM,
            "args": [f"--{each}" for each in options],
            "prefs": {"download.default_directory": str(folder)},
            **({"mobileEmulation": phone} if touch or width < 500 else {}),
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        assert DRIVER
        self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._driver.stdout
        line = next(line for line in self._driver.stdout if "started successfully on port" in line)
        self._root = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}/session"
        self._path = ""
        try:
            self._path = "/" + self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._path:
            with contextlib.suppress(OSError, AssertionError):
                self.call("DELETE", "")
        self._driver.terminate()
        self._driver.wait(10)

    def call(self, method: str, path: str, values: dict | None = None):
        """Ask the driver; the value of its answer."""
        body = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(self._root + self._path + path, body, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            value = json.load(error)["value"]
            raise AssertionError(f"{value['error']}: {value['message'][:500]}") from None

    def open(self, address: str) -> None:
        self.call("POST", "/url", {"url": address})

    def reload(self) -> None:
        self.call("POST", "/refresh", {})

    def all(self, selector: str) -> list[Element]:
        """What a CSS selector finds."""
        found = self.call("POST", "/elements", {"using": "css selector", "value": selector})
        return [Element(self, each[_ELEMENT]) for each in found]

    def one(self, selector: str, text: str = "", seconds: float = 15) -> Element:
        """The last that a selector finds, of this text if one is given; it is waited for."""

        def found():
            return next((each for each in reversed(self.all(selector)) if each.is_shown and (not text or each.text == text)), None)

        return self.wait(found, f"{selector} {text}", seconds)

    def wait(self, what, name: str = "", seconds: float = 15):
        """What `what` gives, once it is something."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(AssertionError):  # an element that was replaced meanwhile
                if found := what():
                    return found
            assert time.monotonic() < end, f"waited for {name}: {self.run('return document.body.innerText')}\n{self.logged()}"
            time.sleep(0.03)

    def run(self, script: str, *arguments):
        """What a script in the page returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys: str) -> None:
        """Keys one after another, wherever the focus is."""
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def picture(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))
        return path

    def logged(self) -> list[str]:
        """What the console was told since the last time: errors, warnings, reports of the policy."""
        return [f"{each['level']}: {each['message']}" for each in self.call("POST", "/se/log", {"type": "browser"})]
