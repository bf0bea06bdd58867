"""One Prefect server for all tests of a process, in a temporary home; a thread for each core."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from flows.environment import prepare_environment

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
for name in [name for name in os.environ if name.startswith(("PREFECT_", "P2D_", "MLFLOW_"))]:
    del os.environ[name]
_home = tempfile.TemporaryDirectory(prefix="p2d-tests-")
prepare_environment(Path(_home.name))

DEMO = ("test_readme.py", "test_demo.py")
"""They share one run of the demo, and take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest work begins first."""
    items.sort(key=lambda item: item.path.name not in DEMO)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker for each file, as its fixtures are shared, and one for all files of the demo."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "demo" if Path(file).name in DEMO else file

    return ByFile(config, log)
