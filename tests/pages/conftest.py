"""What all tests of this folder need."""

import pytest

from tests.needs import CHROMIUM, do_without


@pytest.fixture(scope="session", autouse=True)
def browser_is_there() -> None:
    if CHROMIUM is None:
        do_without("Chromium", "chromium")
