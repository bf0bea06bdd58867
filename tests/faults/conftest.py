"""Counts, for each family (a file of this folder), how many faults were tried and how many held.

`make test` runs the quick selection; `make faults` runs all of it and writes `results.json`.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.job import write_job
from tests.faults.undisturbed import Undisturbed, run_undisturbed
from tests.faults.warm import Warm

RESULTS = Path(__file__).parent / "results.json"
_met: Counter[str] = Counter()
_counts: dict[str, dict[str, int]] = defaultdict(lambda: {"tried": 0, "held": 0})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = Path(report.nodeid.split("::")[0])
    if path.parent.name != "faults" or report.skipped:
        return
    if report.when == "call" or report.failed:
        family = _counts[path.stem.removeprefix("test_")]
        family["tried"] += 1
        family["held"] += report.passed


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _counts or config.option.markexpr:
        return
    terminalreporter.section("faults")
    if _met:
        places = ", ".join(f"{place} {n}" for place, n in sorted(_met.items()))
        terminalreporter.line(f"where the kills met the runs: {places}")
    for family in sorted(_counts):
        counts = _counts[family]
        terminalreporter.line(f"{family:<20} {counts['held']:>6,} of {counts['tried']:>6,} held")
    if config.option.keyword or any("::" in word for word in config.args):
        return  # some trials are not the family's figures
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    merged = dict(sorted((known | dict(_counts)).items()))
    RESULTS.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Runs `p2d adapt run.yaml` of a tiny job without start-up; all share the tests' server."""
    from prefect import get_client

    folder = tmp_path_factory.mktemp("warm")
    write_job(folder)
    with get_client(sync_client=True) as client:
        client.api_healthcheck()
        url = str(client.api_url)
    warm = Warm(folder, folder / "artifacts", url)
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def undisturbed(warm: Warm) -> Undisturbed:
    """What the job comes to when nothing happens to it; a copy of its store is kept."""
    return run_undisturbed(warm)


@pytest.fixture
def met() -> Counter[str]:
    """Where kills met runs, by stage; said at the end."""
    return _met


@pytest.fixture
def empty(warm: Warm) -> Path:
    """The warm process's store, with nothing in it."""
    shutil.rmtree(warm.store, ignore_errors=True)
    return warm.store
