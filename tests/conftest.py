"""One Prefect server for all tests of a process, in a temporary home; a thread for each core."""

import os
import tempfile
from pathlib import Path

import pytest

from flows.environment import prepare_environment

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
for name in [name for name in os.environ if name.startswith(("PREFECT_", "P2D_", "MLFLOW_"))]:
    del os.environ[name]
_home = tempfile.TemporaryDirectory(prefix="p2d-tests-")
prepare_environment(Path(_home.name))

DEMO = ("test_readme.py", "test_demo.py")
"""They share one run of the demo, and take longest."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker for each file, as its fixtures are shared; the longest work begins first."""
    items.sort(key=lambda item: item.path.name not in DEMO)
    for item in items:
        file = item.path.relative_to(item.config.rootpath)
        group = "demo" if file.name in DEMO else str(file)
        item.add_marker(pytest.mark.xdist_group(group))
