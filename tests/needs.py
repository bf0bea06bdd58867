"""Programs beside Python that tests need: where one is missing they are skipped, but fail in CI."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
IN_CI = "CI" in os.environ


def do_without(program: str, package: str) -> NoReturn:
    """Ends the test: a skip on somebody's machine, a failure in CI, which has to install it."""
    words = f"{program} is not installed: apt-get install {package}"
    if IN_CI:
        pytest.fail(words, pytrace=False)
    pytest.skip(words)


def postgres_programs() -> Path:
    """Folder of initdb and its like; ends the test where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        do_without("PostgreSQL's server", "postgresql")
    return found[-1].parent if found else Path(str(on_path)).parent
