"""One Prefect server for all tests of a process, in a temporary home; a thread for each core."""

import gc
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.environment import prepare_environment
from tasks.tracking import database
from tests.hub import hub  # noqa: F401

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
for name in [name for name in os.environ if name.startswith(("PREFECT_", "P2D_", "MLFLOW_"))]:
    del os.environ[name]
_home = tempfile.TemporaryDirectory(prefix="p2d-tests-")
# nobody looks at the tests' events
os.environ["PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED"] = "false"
os.environ["PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED"] = "false"
prepare_environment(Path(_home.name))

IMPORTED = (
    "duckdb", "matplotlib.figure", "mlflow.store.tracking.sqlalchemy_store", "peft",
    "prefect.server.api.server", "sklearn.feature_extraction.text", "transformers.trainer",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
"""What nearly every run ends up with."""
TOGETHER = {"test_readme.py": "demo", "test_demo.py": "demo", "stack": "stack", "adapt": "adapt"}
"""Files and folders whose tests share a run of the demo, a team's servers, the store of a job."""


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session", autouse=True)
def one_making_of_mlflows_database() -> Iterator[None]:
    """Its fifty migrations run once a process; every further store gets a copy of what they made.

    They are a fifth of what a small run takes.
    """
    make, made = database._make_database, Path(_home.name) / "mlflow.db"

    def make_or_copy(file: Path) -> None:
        if made.exists():
            shutil.copy(made, file)
        else:
            make(file)
            shutil.copy(file, made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_make_database", make_or_copy)
        yield


@pytest.fixture
def command(monkeypatch, capfd) -> Command:
    """Runs a `p2d` command in this process; gives its exit code and what it said."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["p2d", *words])
        try:
            main.run()
            code = 0
        except SystemExit as ending:
            code = int(ending.code or 0)
        said = capfd.readouterr()
        return code, said.out, said.err

    return call


def shared(file: Path) -> str | None:
    """What the tests of a file share with those of others."""
    return TOGETHER.get(file.name, TOGETHER.get(file.parent.name))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest work begins first."""
    items.sort(key=lambda item: shared(item.path) is None)


def pytest_collection_finish() -> None:
    """What every run imports is not looked through for garbage again and again.

    It is millions of objects, and transformers' training loop collects garbage each time it starts,
    which takes longer than the tests' trainings do. Not where a few tests are tried by hand.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """DuckDB takes what is not collected at the end for leaks, and says so."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file to one worker, as its tests share fixtures; files that share more to one, too."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return shared(Path(file)) or file

    return ByFile(config, log)
