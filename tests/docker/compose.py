"""Reads docker/compose.yaml as `docker compose` does: merges, and variables from the .env file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE = DOCKER / "compose.yaml"
VARIABLE = re.compile(r"\$\{(\w+)(:?\?[^}]*|:-[^}]*)?\}")


def read_env(file: Path) -> dict[str, str]:
    """Variables of an .env file; a value in single quotes is taken as it stands."""
    lines = file.read_text(encoding="utf-8").splitlines()
    found = dict(line.split("=", 1) for line in lines)
    return {name: value.removeprefix("'").removesuffix("'") for name, value in found.items()}


def variables(file: Path) -> set[str]:
    """Names of all variables that a compose file asks for and has no default of."""
    found = VARIABLE.findall(file.read_text(encoding="utf-8"))
    return {name for name, otherwise in found if not otherwise.startswith(":-")}


def read_compose(file: Path, env: dict[str, str]) -> dict[str, Any]:
    """The services and the rest, with every variable filled in.

    Raises:
        KeyError: a variable is not set, or is empty and must not be.
    """

    def value(found: re.Match[str]) -> str:
        name, otherwise = found.groups()
        if (otherwise or "").startswith(":-"):
            return env.get(name) or otherwise[2:]
        if name not in env or ((otherwise or "").startswith(":?") and not env[name]):
            raise KeyError(name)
        return env[name]

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: filled(each) for key, each in part.items()}
        if isinstance(part, list):
            return [filled(each) for each in part]
        return VARIABLE.sub(value, part) if isinstance(part, str) else part

    return dict(filled(yaml.safe_load(file.read_text(encoding="utf-8"))))
