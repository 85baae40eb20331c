"""What the tests of the page share: a real browser, and what one does with the page."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

USUAL = (
    "/usr/bin/chromium",
    "/usr/bin/chromium-browser",
    "/usr/bin/google-chrome",
    "/usr/bin/google-chrome-stable",
    "/snap/bin/chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)


def find_chromium() -> str | None:
    """A Chromium of this machine: $CHROMIUM, the usual places, or Playwright's own."""
    named = os.environ.get("CHROMIUM")
    if named:
        return named if Path(named).exists() else shutil.which(named)
    for path in USUAL:
        if Path(path).exists():
            return path
    own = sorted(
        Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", "~/.cache/ms-playwright"))
        .expanduser()
        .glob("chromium-*/chrome-linux*/chrome")
    )
    return str(own[-1]) if own else None


@dataclass
class Watched:
    """What the browser did besides showing the page."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window; tests are skipped where there is none, unless DML_REQUIRE_BROWSER=1."""
    give_up = pytest.fail if os.environ.get("DML_REQUIRE_BROWSER") == "1" else pytest.skip
    try:
        from playwright import sync_api as playwright
    except ModuleNotFoundError:
        give_up("playwright is not installed")
    path = find_chromium()
    if path is None:
        give_up("no Chromium: install one, or name it in the environment variable CHROMIUM")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield opened
        opened.close()


def labels(page: Any) -> list[str]:
    return page.locator(".card .label").all_inner_texts()


def upload(page: Any, data: bytes, name: str = "mine.jpg") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": data})


def assert_no_sideways_scroll(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
