"""Debian's Chromium through Playwright."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.needs import CHROMIUM

NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
"""MLflow opens a chat beside its pages, once for each browser."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def page_at(browser: Browser, address: str, width: int, height: int) -> Iterator[Page]:
    """A new page of that size, in a browser that has never been here before."""
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(60_000)
    context.add_init_script(NO_ASSISTANT)
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()


def pages_printed(page: Page, file: Path) -> int:
    """Prints to a PDF; how many pages it has."""
    page.pdf(path=file, prefer_css_page_size=True)
    return len(re.findall(rb"/Type\s*/Page\b", file.read_bytes()))
