"""The .env file that docker/make_env.py makes, and compose.yaml filled in from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.docker.compose import COMPOSE, read_compose, read_env
from tests.docker.env import make_env


@pytest.fixture(scope="session")
def env_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("env")
    (folder / "my data").mkdir()
    done = make_env(folder / "my data", "--file", folder / ".env")
    assert done.returncode == 0, done.stderr
    return folder / ".env"


@pytest.fixture(scope="session")
def env(env_file) -> dict[str, str]:
    return read_env(env_file)


@pytest.fixture(scope="session")
def project(env) -> dict[str, Any]:
    return read_compose(COMPOSE, env)


@pytest.fixture(scope="session")
def services(project) -> dict[str, dict[str, Any]]:
    return project["services"]
