"""A headless Chromium, driven by the WebDriver protocol of its chromedriver, and a file server."""

import base64
import functools
import http.server
import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil


HAS_CHROMIUM = bool(shutil.which("chromium") and shutil.which("chromedriver"))


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


class Browser:
    """
    Args:
        folder (`Path`): the folder to serve and to open.
        downloads (`Path`): where saved files go.
        size (`tuple[int, int]`): of the window.
    """

    def __init__(self, folder: Path, downloads: Path, size: tuple[int, int] = (1100, 820)):
        handler = functools.partial(_QuietHandler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        output = subprocess.DEVNULL
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=output, stderr=output)
        self.session = f"http://127.0.0.1:{port}"
        self.wait(lambda: self._answers("/status"))
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += [f"--user-data-dir={self.profile.name}", f"--window-size={size[0]},{size[1]}"]
        options: dict[str, Any] = {"binary": shutil.which("chromium"), "args": arguments}
        options["prefs"] = {"download.default_directory": str(downloads)}
        if size[0] < 500:
            options["mobileEmulation"] = {"deviceMetrics": {"width": size[0], "height": size[1], "pixelRatio": 2}}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.session += f"/session/{self._call('POST', '/session', wanted)['sessionId']}"
        self._call("POST", "/url", {"url": f"http://127.0.0.1:{self.server.server_port}/"})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.session + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:1000]) from None

    def _answers(self, path: str) -> bool:
        try:
            return self._call("GET", path) is not None
        except OSError:
            return False

    @staticmethod
    def wait(condition, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.05)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def text(self, name: str) -> str:
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def element(self, name: str) -> str:
        (reference,) = self._call("POST", "/element", {"using": "css selector", "value": f"#{name}"}).values()
        return reference

    def click(self, name: str) -> None:
        self._call("POST", f"/element/{self.element(name)}/click", {})

    def type(self, name: str, keys: str) -> None:
        """Press keys, or, for a file input, choose the file of this path."""
        self._call("POST", f"/element/{self.element(name)}/value", {"text": keys})

    def press(self, *keys: str) -> None:
        """Press keys one after another, and release them in the opposite order."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def memory(self) -> int:
        """The resident bytes of the processes that run pages and workers."""
        children = psutil.Process(self.driver.pid).children(recursive=True)
        return sum(child.memory_info().rss for child in children if "--type=renderer" in child.cmdline())

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.server.shutdown()
            self.profile.cleanup()
