"""The Dockerfile, and what of the project the image is built from."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from tests.docker.compose import DOCKER

ROOT = DOCKER.parent
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")


def taken(path: str) -> bool:
    """Whether .dockerignore lets a file into the build, as far as its rules go here."""
    is_in = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            back = rule.startswith("!")
            pattern = rule.removeprefix("!")
            parts = Path(path).parts if pattern.startswith("**/") else ()
            places = [path, *map(str, Path(path).parents), *parts]
            if any(fnmatch.fnmatch(each, pattern.removeprefix("**/")) for each in places):
                is_in = back
    return is_in
