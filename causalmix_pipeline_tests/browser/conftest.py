"""A browser, the UI of a finished project, and pages that must end without an error."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

#: Folder that screenshots are kept in; a folder of the tests' own where it isn't set.
SCREENSHOTS = "CAUSALMIX_SCREENSHOTS"

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the system's Chromium."""
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        pytest.skip("this machine has no Chromium")
    return path


@pytest.fixture
def browser(chromium):
    """Chromium without a window; one a test, since its event loop runs while it's open."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    """Where screenshots are kept."""
    kept = os.environ.get(SCREENSHOTS)
    return Path(kept) if kept else tmp_path_factory.mktemp("screenshots")


@pytest.fixture(scope="session")
def served(chromium, finished_project, tmp_path_factory):
    """A copy of the finished project, its UI and daemon; its pool sensor looks once an hour."""
    from causalmix_pipeline_tests.browser.served import serve

    root = tmp_path_factory.mktemp("served") / "project"
    shutil.copytree(finished_project, root)
    config = root / "causalmix.yaml"
    raw = yaml.safe_load(config.read_text())
    raw["automation"] |= {"sensor_interval_seconds": 3600, "owners": ["data@example.com"]}
    config.write_text(yaml.safe_dump(raw))
    with serve(config, root / "ui.log") as server:
        yield server


@pytest.fixture
def watched(browser, shots) -> Iterator:
    """A page; nothing in it may fail, ask, or call another host."""
    from causalmix_pipeline_tests.browser.served import watched_page

    with watched_page(browser, shots) as page:
        yield page
        assert page.problems == []
