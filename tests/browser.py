"""A real Chromium, and pages in it that must not complain, ask other hosts, or shut anybody out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

CHROMIUM: Final = shutil.which("chromium")
# Pictures of pages are kept here, for people to look at.
SCREENSHOTS: Final = Path(__file__).parent.parent / "build" / "screenshots"
PHONE: Final[dict[str, Any]] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
DARK: Final[dict[str, Any]] = {"viewport": {"width": 1366, "height": 900}, "color_scheme": "dark"}
LIGHT: Final[dict[str, Any]] = {"viewport": {"width": 1366, "height": 900}, "color_scheme": "light"}
# Milliseconds: a loaded machine is waited for.
PATIENCE: Final = 60_000

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="not installed: chromium (Debian package chromium)"
)


@dataclass
class Visit:
    """A page of a collector, and what went wrong in it: nothing may."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    # What the browser itself tells of answers that a test is about.
    expected: tuple[str, ...] = ()

    def open(self, path: str) -> Page:
        """Go to a path, and wait until its view is there."""
        self.page.goto(self.url + path)
        expect(self.page.locator("h1").first).to_be_visible()
        return self.page

    def picture(self, name: str) -> None:
        """Keep a picture of the whole page."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def assert_accessible(self) -> None:
        """Whatever axe knows of accessibility is kept to."""
        found = Axe().run(self.page)
        assert not found.violations_count, found.generate_report()


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    assert CHROMIUM is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """A page of its own, without cookies; at the end there must have been nothing to complain of."""
    context = browser.new_context(**(LIGHT | options))
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    visit = Visit(page, url)

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(each in message.text for each in visit.expected):
            visit.problems.append(f"{message.type}: {message.text}")

    def ask(request: Any) -> None:
        if not request.url.startswith((f"{url}/", "data:")):
            visit.problems.append(f"asked another host: {request.url}")

    page.on("console", listen)
    page.on("pageerror", lambda error: visit.problems.append(f"failed: {error}"))
    page.on("request", ask)
    yield visit
    context.close()
    assert not visit.problems, visit.problems
