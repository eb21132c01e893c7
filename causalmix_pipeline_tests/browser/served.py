"""Servers of a project's UI, and pages that remember what went wrong in them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page

#: Width and height of the window that screenshots are taken of.
WINDOW = {"width": 1440, "height": 900}

#: Calls of names from data would set this.
FLAG = "window.hacked"

#: Errors in the console that are Dagster's own. None is known of 1.13; its warnings of the library
#: that talks to the server aren't errors, and aren't collected.
KNOWN_NOISE: tuple[str, ...] = ()

_QUERY = json.dumps(
    {"query": "{workspaceOrError{... on Workspace{locationEntries{loadStatus}}}}"}
).encode()


@dataclass
class Served:
    """A project and the address of its UI."""

    config: Path
    url: str


@dataclass
class Watched:
    """A page, and what a person would call broken in it."""

    page: Page
    shots: Path
    problems: list[str] = field(default_factory=list)

    def shot(self, name: str) -> None:
        """Keep a picture of the window."""
        self.shots.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.shots / f"{name}.png")

    def is_within_the_window(self) -> bool:
        """Whether nothing makes the page wider than its window."""
        width = self.page.evaluate("document.documentElement.scrollWidth")
        return width <= self.page.evaluate("window.innerWidth")


@contextmanager
def watched_page(browser: Browser, shots: Path, *, dark: bool = False) -> Iterator[Watched]:
    """A page whose errors, dialogs and foreign requests are collected."""
    context = browser.new_context(viewport=WINDOW, color_scheme="dark" if dark else "light")  # pyright: ignore[reportArgumentType]
    context.set_default_timeout(30_000)
    watched = Watched(context.new_page(), shots)
    page, problems = watched.page, watched.problems

    def on_console(message) -> None:
        if message.type == "error" and not any(noise in message.text for noise in KNOWN_NOISE):
            problems.append(f"console: {message.text}")

    def on_dialog(dialog) -> None:
        problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(f"page: {error}"))
    page.on("dialog", on_dialog)
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("http://127.0.0.1", "data:", "blob:", "file:"))
            else problems.append(f"request: {request.url[:200]}")
        ),
    )
    try:
        yield watched
    finally:
        context.close()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(config: Path, log: Path) -> Iterator[Served]:
    """The UI and the daemon as `causalmix ui` starts them, until the block ends."""
    port = free_port()
    code = "from causalmix_pipeline.cli import run; run()"
    command = [sys.executable, "-c", code, "ui", "--config", str(config), "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        open(log, "w") as sink,
        subprocess.Popen(
            command,
            cwd=config.parent,
            env=environment,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        ) as process,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}", process, log)
            yield Served(config, f"http://127.0.0.1:{port}")
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    """Wait until the definitions are loaded."""
    ends = time.monotonic() + seconds
    request = urllib.request.Request(f"{url}/graphql", _QUERY, {"Content-Type": "application/json"})
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < ends, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                found = json.load(answer)["data"]["workspaceOrError"]["locationEntries"]
                if found and all(entry["loadStatus"] == "LOADED" for entry in found):
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.5)
