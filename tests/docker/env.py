"""The script that makes the .env file, run as a person runs it."""

import subprocess
import sys

from tests.docker.compose import DOCKER

PASSWORDS = {
    "POSTGRES_PASSWORD", "PREFECT_DB_PASSWORD", "MLFLOW_DB_PASSWORD", "PREFECT_PASSWORD",
    "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY",
}  # fmt: skip


def make_env(*words: object) -> subprocess.CompletedProcess[str]:
    # without the site's packages: it has to run before anything is installed
    return subprocess.run(
        [sys.executable, "-I", "-S", DOCKER / "make_env.py", *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
