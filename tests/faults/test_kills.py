"""A run that is killed at any instant goes on from there and ends as if nothing had happened.

The kills: in the middle of a write, at a random time, at one of the things that a run does to the
files of its store. The same machine and number of threads: everything that is compared is equal to
the last bit, the adapter's weights included.
"""

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from uuid import UUID

import pytest

from flows.cli.doctor import examine
from flows.killed import killed_runs, orphaned_servers
from p2d_core.adaptation.training import SEAL
from p2d_core.store import Store
from p2d_core.store.manifest import MANIFEST
from tests.demo_run import P2D, command
from tests.faults.job import write_job
from tests.faults.trials import trials
from tests.faults.undisturbed import Undisturbed, contents, files, left_by_runs, names
from tests.faults.warm import Warm

KINDS = {"write": 64, "time": 96, "event": 96}
"""How many of each. In the middle of a write a run is killed by the system, of SIGXFSZ, at a byte;
all others, and those of a run with a server of its own, are SIGKILLs."""
OWN_SERVER = 8


@pytest.mark.parametrize(
    "which", trials([(kind, number) for kind, n in KINDS.items() for number in range(n)], quick=1)
)
def test_a_killed_run_goes_on_and_ends_the_same(
    which: tuple[str, int],
    warm: Warm,
    undisturbed: Undisturbed,
    empty: Path,
    met: Counter[str],
) -> None:
    kind, number = which
    running_before = running_at_prefect()
    kill = {"write": in_a_write, "time": at_a_time, "event": at_an_event}[kind]
    chance = random.Random(f"{kind} {number}")
    while (code := kill(chance, number, warm, undisturbed)) == 0:
        # it was through before it could be killed: that shows nothing, and another is drawn
        shutil.rmtree(empty)
    assert code == (-signal.SIGXFSZ if kind == "write" else -signal.SIGKILL)
    finished, sealed = manifests(empty), newest_checkpoints(empty)
    met[met_in(empty, undisturbed)] += 1

    code, said = warm.run("adapt", "run.yaml")

    assert code == 0, said
    assert contents(empty) == undisturbed.contents
    assert finished.items() <= manifests(empty).items(), "what was finished was made again"
    for stage, checkpoint in sealed.items():
        assert f"training goes on from {checkpoint} of {stage}" in said
    assert files(empty) == undisturbed.files
    assert left_by_runs(empty) == set()
    assert names(warm.temporary) == undisturbed.temporary
    assert running_at_prefect() <= running_before


def in_a_write(chance: random.Random, number: int, warm: Warm, undisturbed: Undisturbed) -> int:
    """Once more bytes are written to a file than a random share of what belongs there."""
    targets: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for ref in Store(undisturbed.store).refs():
        staging = rf"/{ref.stage}/{ref.key}\.staging-\w+"
        size = (ref.path / MANIFEST).stat().st_size
        targets["manifest"].append((rf"^open w {staging}/{MANIFEST}", size))
        for name, entry in ref.manifest.files.items():
            what = "table" if name.endswith(".parquet") else "other"
            targets[what].append((f"^os.mkdir {staging}$", entry["size"]))
    for event in undisturbed.events:
        if re.search(r"^os.mkdir .*/checkpoint-\d+$", event):
            # of its four files the smallest has 1 kB, the largest more than 100
            targets["checkpoint"].append((f"^{re.escape(event)}$", chance.choice([10**3, 10**5])))
    what = ("table", "checkpoint", "manifest", "other")[number % 4]
    armed_by, size = chance.choice(targets[what])
    share = chance.uniform(0.02, 0.98)
    return warm.run("adapt", "run.yaml", armed_by=armed_by, bytes=int(share * size))[0]


def at_a_time(chance: random.Random, number: int, warm: Warm, undisturbed: Undisturbed) -> int:
    """A random share of the seconds that an undisturbed run takes."""
    child = warm.start("adapt", "run.yaml")
    time.sleep(chance.uniform(0, undisturbed.seconds))
    child.kill()
    return child.wait()


def at_an_event(chance: random.Random, number: int, warm: Warm, undisturbed: Undisturbed) -> int:
    """Before a random one of the things that a stage does to files; one stage after the other."""
    of_stage: dict[str, list[int]] = defaultdict(list)
    for place, event in enumerate(undisturbed.events):
        of_stage[stage_of(event.split(" ")[-1])].append(place)
    stage = sorted(of_stage)[number % len(of_stage)]
    place = chance.choice(of_stage[stage])
    return warm.run("adapt", "run.yaml", end_at=place)[0]


def stage_of(path: str) -> str:
    """Which stage a path in the store belongs to, or what else."""
    first, *rest = path.strip("/").split("/")
    named = (rest and first in (".scratch", ".locks")) or (first == "prefect" and len(rest) > 1)
    return rest[-1 if first == "prefect" else 0].split("-")[0] if named else first


def met_in(store: Path, undisturbed: Undisturbed) -> str:
    """The stage that was being made, and whether a file of it was cut short."""
    for staging in store.glob("*/*.staging-*"):
        whole = undisturbed.store / staging.parent.name / staging.name.split(".")[0]
        cut = [
            name
            for name in names(staging)
            if (staging / name).is_file()
            # safetensors writes under another name first
            and not (
                (whole / name).exists()
                and (staging / name).stat().st_size >= (whole / name).stat().st_size
            )
        ]
        scratch = store / ".scratch" / f"{staging.parent.name}-{whole.name}"
        unsealed = [f for f in scratch.glob("checkpoint-*") if not (f / SEAL).exists()]
        in_what = (
            f" (in {Path(cut[0]).suffix[1:] or 'safetensors'})"
            if cut
            else " (in checkpoint)" * bool(unsealed)
        )
        return staging.parent.name + in_what
    return "between stages"


def manifests(store: Path) -> dict[str, bytes]:
    """What is finished: who made it when, and what it cost, stands in there."""
    return {ref.key: (ref.path / MANIFEST).read_bytes() for ref in Store(store).refs()}


def newest_checkpoints(store: Path) -> dict[str, str]:
    """Of each stage that was killed in training, by the name of its scratch folder."""
    found = {}
    for scratch in (store / ".scratch").glob("*-*"):
        stage, _, key = scratch.name.rpartition("-")
        sealed = [f.name for f in scratch.glob("checkpoint-*") if is_sealed(f)]
        if sealed and not (store / stage / key / MANIFEST).exists():
            found[scratch.name] = max(sealed, key=lambda name: int(name.split("-")[1]))
    return found


def is_sealed(checkpoint: Path) -> bool:
    try:
        return "files" in json.loads((checkpoint / SEAL).read_text())
    except (FileNotFoundError, ValueError):
        return False


def running_at_prefect() -> set[UUID]:
    """Flow runs that the tests' server believes to be at work."""
    from prefect import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType

    at_work = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    only = FlowRunFilter(state=FlowRunFilterState(type=at_work))
    with get_client(sync_client=True) as client:
        return {run.id for run in client.read_flow_runs(flow_run_filter=only)}


@pytest.mark.faults
def test_the_kills_met_every_stage_and_all_that_is_written(
    undisturbed: Undisturbed, met: Counter[str]
) -> None:
    if met.total() < sum(KINDS.values()):
        pytest.skip("of some kills alone it shows nothing")
    stages = {place.split(" ")[0] for place in met} - {"between"}
    assert stages == {ref.stage for ref in Store(undisturbed.store).refs()}
    for what in ("parquet", "json", "checkpoint"):
        assert sum(n for place, n in met.items() if f"in {what}" in place) >= 5, what


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["proxy", "head_proxy", "model"])
def test_a_run_killed_after_its_last_step_trains_no_more(
    stage: str, warm: Warm, undisturbed: Undisturbed, empty: Path, met: Counter[str]
) -> None:
    seal = rf"^open w /\.scratch/{stage}-.*/{SEAL}$"
    sealed = [place for place, text in enumerate(undisturbed.events) if re.search(seal, text)]
    assert warm.run("adapt", "run.yaml", end_at=sealed[-1] + 1)[0] == -signal.SIGKILL
    met[met_in(empty, undisturbed)] += 1
    (checkpoint,) = newest_checkpoints(empty).values()
    assert checkpoint == undisturbed.events[sealed[-1]].split("/")[-2]
    code, said = warm.run("adapt", "run.yaml")
    assert code == 0, said
    assert f"training goes on from {checkpoint} of {stage}" in said
    assert contents(empty) == undisturbed.contents
    assert files(empty) == undisturbed.files


@pytest.mark.parametrize("number", trials(range(OWN_SERVER), quick=0))
def test_what_is_left_of_prefect_after_a_kill_is_cleared_by_the_next_run(
    number: int, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """The command as a person starts it, with Prefect's temporary server of its own."""
    store = tmp_path / "artifacts"
    write_job(tmp_path)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    with (tmp_path / "killed.txt").open("w") as said:
        run = subprocess.Popen(
            [str(P2D), "adapt", "run.yaml"], cwd=tmp_path, env=kept, stdout=said, stderr=said
        )
    stages = ("samples", "proxy", "heads", "measurements", "scores", "subset", "model", "runs")
    end = time.monotonic() + 240
    while not (store / stages[number]).exists() and time.monotonic() < end:
        time.sleep(0.01)
    run.kill()
    run.wait()
    (server,) = orphaned_servers(store)
    (killed,) = killed_runs(store)
    (told,) = [finding for finding in examine(store) if finding.what == "killed runs"]
    assert told.found.startswith("1 that Prefect shows as running, 1 of its temporary servers")

    again = command(tmp_path, "adapt", "run.yaml")

    assert again.code == 0, again.errors
    assert "ended Prefect's temporary server that a killed run left" in again.errors
    assert f"run {killed.name} was killed: Prefect shows it as crashed" in again.errors
    assert not server.is_running()
    assert killed_runs(store) == orphaned_servers(store) == []
    with sqlite3.connect(store / "prefect/prefect.db") as database:
        states = database.execute("SELECT state_type FROM flow_run ORDER BY created").fetchall()
        tasks = database.execute("SELECT DISTINCT state_type FROM task_run").fetchall()
    assert states == [("CRASHED",), ("COMPLETED",)]
    assert ("RUNNING",) not in tasks
    assert contents(store) == undisturbed.contents
    assert files(store) == undisturbed.files
    assert left_by_runs(store) == set()


KILLED = """
import sys, time
from pathlib import Path
from flows.killed import noted
with noted(Path(sys.argv[1]), "one"):
    print("noted", flush=True)
    time.sleep(60)
"""


def test_doctor_tells_a_run_at_work_from_one_that_was_killed(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "noted\n"
    assert killed_runs(tmp_path) == []
    run.kill()
    run.wait()
    assert [note.name for note in killed_runs(tmp_path)] == ["one"]
    (told,) = [finding for finding in examine(tmp_path) if finding.what == "killed runs"]
    assert told.found.startswith("1 that Prefect shows as running, 0 of its temporary servers")
    assert told.cure == "The next run over this store puts both right."
