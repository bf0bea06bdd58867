"""Several runs over one store: each artifact is made once, and nobody waits for the dead."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from p2d_core.store import Store
from tests.demo_run import P2D
from tests.faults.job import write_job, write_settings
from tests.faults.trials import trials
from tests.faults.undisturbed import Undisturbed, contents, files, left_by_runs
from tests.faults.warm import Child, Warm

SECONDS_TO_GO_ON = 5.0
STAGED = re.compile(r"^os.mkdir /([a-z_]+/[0-9a-f]{64})\.staging-\w+$")


def made_by(events: Path) -> list[str]:
    """Artifacts that a run began to make, by ``stage/key``."""
    found = [STAGED.search(event) for event in json.loads(events.read_text())]
    # a folder is looked at more than once: what begins to be made is told apart by its name
    return sorted({match[0]: match[1] for match in found if match}.values())


def watched(warm: Warm, number: int) -> Path:
    return warm.folder / f"events-{number}.json"


def look_on(store: Store, children: list[Child]) -> int:
    """Checks every artifact as soon as it is there, until all runs have ended; how many it saw."""
    seen: set[str] = set()
    while any(child.is_running() for child in children):
        for ref in store.refs():
            if ref.key not in seen:
                assert store.faults(ref) == []
                seen.add(ref.key)
        time.sleep(0.01)
    return len(seen)


@pytest.mark.parametrize(
    ("runs", "overlapping"),
    [
        pytest.param(2, True, marks=pytest.mark.faults),
        pytest.param(2, False, marks=pytest.mark.faults),
        pytest.param(4, False, marks=pytest.mark.faults),
        pytest.param(4, True, marks=pytest.mark.faults),
    ],
)
def test_runs_at_once_make_each_artifact_once(
    runs: int, overlapping: bool, warm: Warm, undisturbed: Undisturbed, empty: Path
) -> None:
    settings = ["run.yaml"] * runs
    if overlapping:
        for number in range(1, runs):
            settings[number] = f"run-{number}.yaml"
            budget = {"fraction": 0.1 - 0.02 * number}
            write_settings(warm.folder, settings[number], selection=budget)
    children = [
        warm.start("adapt", file, events=str(watched(warm, number)))
        for number, file in enumerate(settings)
    ]
    seen = look_on(Store(empty), children)
    for child in children:
        assert child.wait() == 0, child.said
    made = [what for number in range(runs) for what in made_by(watched(warm, number))]
    kept = sorted(f"{ref.stage}/{ref.key}" for ref in Store(empty).refs())
    assert sorted(made) == kept
    assert seen > len(kept) / 2
    assert undisturbed.contents.items() <= contents(empty).items()
    assert left_by_runs(empty) == set()
    if not overlapping:
        assert files(empty) == undisturbed.files
        assert "is being made by another process: waiting" in "".join(c.said for c in children)
    else:
        # subset, model and evaluation of every further budget
        assert len(kept) == len(list(Store(undisturbed.store).refs())) + 3 * (runs - 1)


@pytest.mark.parametrize(
    "stage", trials(["proxy", "measurements", "model", "samples", "scores", "evaluation"], quick=0)
)
def test_when_the_one_that_computes_is_killed_another_goes_on_within_seconds(
    stage: str, warm: Warm, undisturbed: Undisturbed, empty: Path
) -> None:
    # stopped where it makes the stage's first artifact, it holds that lock for as long as we like
    first = warm.start("adapt", "run.yaml", stop_after=rf"^os.mkdir /{stage}/\w+\.staging-")
    until(lambda: first.is_stopped(), 60)
    (key,) = {folder.name.split(".")[0] for folder in empty.glob(f"{stage}/*.staging-*")}
    other = warm.start("adapt", "run.yaml", events=str(watched(warm, 0)))
    until(lambda: f"{stage} {key[:12]} is being made by another process" in other.said, 60)
    (left,) = empty.glob(f"{stage}/{key}.staging-*")
    first.kill()
    killed_at = time.monotonic()
    first.wait()
    until(lambda: not left.exists(), SECONDS_TO_GO_ON)
    until(lambda: store_has_begun(empty, stage, key), SECONDS_TO_GO_ON)
    assert time.monotonic() - killed_at < SECONDS_TO_GO_ON
    assert other.wait() == 0, other.said
    assert f"{stage}/{key}" in made_by(watched(warm, 0))
    assert contents(empty) == undisturbed.contents
    assert files(empty) == undisturbed.files


def store_has_begun(store: Path, stage: str, key: str) -> bool:
    """Another is making it, or has made it."""
    return any(store.glob(f"{stage}/{key}*"))


def until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"did not come true in {seconds} s"
        time.sleep(0.01)


@pytest.mark.faults
@pytest.mark.parametrize("runs", [2, 4])
def test_commands_started_at_once_on_no_store_at_all_share_it(
    runs: int, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """As a person starts them: each with Prefect's temporary server, all over one new database."""
    write_job(tmp_path)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    logs = [tmp_path / f"said-{number}.txt" for number in range(runs)]
    started = []
    for log in logs:
        with log.open("w") as said:
            command = [str(P2D), "adapt", "run.yaml"]
            started.append(
                subprocess.Popen(command, cwd=tmp_path, env=kept, stdout=said, stderr=said)
            )
    for run, log in zip(started, logs, strict=True):
        assert run.wait(600) == 0, log.read_text()
    store = tmp_path / "artifacts"
    assert contents(store) == undisturbed.contents
    assert files(store) == undisturbed.files
    makers = [ref.manifest.run_id for ref in Store(store).refs()]
    assert len(list((store / "runs").glob("*.json"))) == runs
    assert set(makers) <= {file.stem for file in (store / "runs").glob("*.json")}
