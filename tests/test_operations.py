"""docs/operations.md: its commands run as they stand, and what it promises of them holds.

`docker compose` is stood in for (`tests/docker/stand_in.py`); the servers, databases, backups and
runs are real.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from mlflow import MlflowClient

from p2d_core.store import Store
from tasks.record import record_run
from tasks.tracking.database import mlflow_uri
from tasks.tracking.views import KIND
from tests.docker.compose import read_env
from tests.docker.stand_in import Project, put_on_path
from tests.needs import postgres_programs
from tests.small_store import fill, keep_run, summary
from tests.stack.quick import QUICK, write_home

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"(?ms)^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE))
ASKED_FOR = [
    "Start the stack", "Deploy", "Schedule", "Rotate passwords", "Back up", "Restore", "Upgrade",
    "Clean up", "What to watch",
]  # fmt: skip


def commands(section: str) -> list[str]:
    """The blocks of shell commands of a section."""
    return re.findall(r"(?s)```sh\n(.*?)```", SECTIONS[section])


def shell(block: str, folder: Path, environment: dict[str, str]) -> str:
    """What the commands print; each has to end well."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}\n{done.stdout[-4000:]}"
    return done.stdout


def test_the_page_has_what_a_team_asks_for():
    assert set(ASKED_FOR) <= set(SECTIONS)
    assert "(docs/operations.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_to_watch_is_also_given_as_commands():
    """Those in the table are shortened, and no test runs them."""
    (block,) = commands("What to watch")
    table = re.findall(r"`((?:p2d|prefect) [^`]*)`", SECTIONS["What to watch"].split("```")[0])
    shortened = [words for words in table if "FILE" not in words]
    assert len(shortened) >= 6
    for words in shortened:
        assert f"docker compose exec -T worker {words}\n" in block


# --- without servers


@pytest.fixture
def one_machine(tmp_path) -> Path:
    """A folder with a store that has a recorded run."""
    store = Store(tmp_path / "artifacts")
    refs = fill(store)
    done = summary(refs)
    done.mlflow = record_run(done, {}, store=store.root, refs=refs)
    keep_run(store, done)
    return tmp_path


def facts(store: Path) -> dict[str, Any]:
    """All that a backup has to bring back."""
    client = MlflowClient(tracking_uri=mlflow_uri(store))
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    return {
        "artifacts": sorted(ref.key for ref in Store(store).refs()),
        "runs": {file.name: file.read_bytes() for file in (store / "runs").iterdir()},
        "metrics": {name: run.data.metrics for name, run in runs.items()},
        "tags": {name: run.data.tags for name, run in runs.items()},
        "files": {
            name: sorted(file.path for file in client.list_artifacts(run.info.run_id))
            for name, run in runs.items()
        },
        "models": len(client.search_logged_models(["1"])),
    }


def test_a_store_and_its_mlflow_database_come_back_from_the_backup(one_machine):
    backup, restore = commands("Back up and restore without servers")
    here = put_on_path(one_machine / "bin") | {"HOME": str(one_machine)}
    before = facts(one_machine / "artifacts")
    assert any(before["files"].values())
    assert before["models"] == 1
    shell(backup, one_machine, here)
    assert (one_machine / "backup").stat().st_mode & 0o077 == 0
    shutil.rmtree(one_machine / "artifacts")
    said = shell(restore, one_machine, here)
    assert f"{len(before['artifacts'])} artifacts checked: every file is as it was made" in said
    assert facts(one_machine / "artifacts") == before


def test_a_backup_that_was_damaged_is_noticed_when_it_is_restored(one_machine):
    backup, restore = commands("Back up and restore without servers")
    here = put_on_path(one_machine / "bin") | {"HOME": str(one_machine)}
    shell(backup, one_machine, here)
    shutil.rmtree(one_machine / "artifacts")
    tar = one_machine / "backup/artifacts.tar"
    tar.write_bytes(tar.read_bytes().replace(b"SELECT", b"DELETE").replace(b"LORA", b"ARLO"))
    with pytest.raises(AssertionError, match=r"is not as it was made|other content"):
        shell(restore, one_machine, here)


# --- the stack: one story, in the order of this file


class Team:
    """The stack that the page has started, and what can be asked of it."""

    def __init__(self, folder: Path) -> None:
        self.docker = folder / "docker"
        shutil.copytree(ROOT / "docker", self.docker, ignore=shutil.ignore_patterns(".env"))
        self.data = folder / "data"
        self.data.mkdir()
        write_home(self.data)
        self.environment = put_on_path(folder / "bin")
        self.project = Project(self.docker)
        self.deployment = folder / "deployment.yaml"
        plan = yaml.safe_load((ROOT / "deployment.yaml").read_text())
        for each in plan["deployments"]:
            each["parameters"]["settings"] = each["parameters"]["settings"] | QUICK
        self.deployment.write_text(yaml.safe_dump(plan))

    def shell(self, block: str) -> str:
        return shell(re.sub(r"\bDATA\b", str(self.data), block), self.docker, self.environment)

    def worker(self, words: str) -> str:
        return self.shell(f"docker compose exec -T worker {words}")

    @property
    def env(self) -> dict[str, str]:
        return read_env(self.docker / ".env")

    @property
    def store(self) -> Path:
        return self.project.volumes / "store"

    def url(self, server: str) -> str:
        return f"http://127.0.0.1:{self.project.state['ports'][server]}"

    def prefect(self, path: str, asked: dict[str, Any], password: str | None = None) -> Any:
        auth = ("admin", password or self.env["PREFECT_PASSWORD"])
        return httpx.post(f"{self.url('prefect')}/api{path}", json=asked, auth=auth, timeout=30)

    def mlflow(self, path: str, asked: dict[str, Any], password: str | None = None) -> Any:
        auth = ("admin", password or self.env["MLFLOW_PASSWORD"])
        address = f"{self.url('mlflow')}/api/2.0/mlflow{path}"
        # as a browser asks that shows MLflow's page
        return httpx.post(
            address, json=asked, auth=auth, timeout=30, headers={"Origin": self.url("mlflow")}
        )

    def get(self, path: str) -> Any:
        auth = ("admin", self.env["MLFLOW_PASSWORD"])
        address = f"{self.url('mlflow')}/api/2.0/mlflow{path}"
        return httpx.get(address, auth=auth, timeout=30).raise_for_status().json()

    def asked_for(self) -> list[dict[str, Any]]:
        """Flow runs that somebody asked for; those of a schedule are planned years ahead."""
        every = self.prefect("/flow_runs/filter", {}).raise_for_status().json()
        return [run for run in every if not run["auto_scheduled"]]

    def until_they_completed(self, seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while True:
            states = [run["state"]["type"] for run in self.asked_for()]
            log = (self.docker / "worker.log").read_text()[-3000:]
            assert not {"FAILED", "CRASHED", "CANCELLED"} & set(states), log
            if set(states) == {"COMPLETED"}:
                return
            assert time.monotonic() < end, f"no end of the run: {states}\n{log}"
            time.sleep(1)

    def recorded(self) -> list[dict[str, Any]]:
        """Runs in MLflow, without those of what P2D is held against."""
        asked = {"experiment_ids": ["1"], "max_results": 100}
        runs = self.mlflow("/runs/search", asked).raise_for_status().json().get("runs", [])
        arm = {"key": KIND, "value": "arm"}
        return [run for run in runs if arm not in run["data"]["tags"]]

    def last_summary(self) -> dict[str, Any]:
        files = (self.store / "runs").glob("*.json")
        return json.loads(max(files, key=lambda file: file.stat().st_mtime_ns).read_text())


stack_test = pytest.mark.slow
slow_enough = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Iterator[Team]:
    postgres_programs()
    team = Team(tmp_path_factory.mktemp("team"))
    try:
        for block in commands("Start the stack")[:1]:
            team.shell(block)
        yield team
    finally:
        team.project.clear()


@stack_test
@slow_enough
def test_the_stack_is_up_behind_passwords(team):
    assert httpx.get(f"{team.url('prefect')}/api/health").status_code == 200
    assert httpx.get(f"{team.url('mlflow')}/health").status_code == 200
    assert team.prefect("/deployments/filter", {}, "wrong").status_code == 401
    assert team.mlflow("/experiments/search", {"max_results": 1}, "wrong").status_code == 401
    names = [each["name"] for each in team.prefect("/deployments/filter", {}).json()]
    assert sorted(names) == ["adapt-nightly", "compare", "refresh-head-map", "rerun-from-head-map"]
    (pull,) = team.prefect("/deployments/filter", {}).json()[0]["pull_steps"]
    assert list(pull.values()) == [{"directory": "{{ $P2D_HOME }}"}]
    elsewhere = {"Host": "example.org"}
    answer = httpx.get(team.url("mlflow"), headers=elsewhere, auth=("admin", "x"))
    assert answer.status_code == 403


@stack_test
@slow_enough
def test_neither_server_may_look_into_the_others_database(team):
    """As a user that reaches the server over the network, with its own password."""
    port = str(team.project.state["ports"]["postgres"])
    for user, other in (("prefect", "mlflow"), ("mlflow", "prefect")):
        secret = team.env[f"{user.upper()}_DB_PASSWORD"]
        for database, password, answer in (
            (user, secret, "1"),
            (other, secret, "permission denied"),
            (user, "wrong", "password authentication failed"),
        ):
            done = subprocess.run(
                ["psql", "-h", "127.0.0.1", "-p", port, "-U", user, "-d", database, "-Atc",
                 "SELECT 1"],
                env=team.environment | {"PGPASSWORD": password}, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert answer in done.stdout + done.stderr


@stack_test
@slow_enough
def test_a_schedule_in_the_file_lasts_and_one_of_the_page_does_not(team):
    (deploy, _) = commands("Deploy")
    seen = "prefect deployment schedule ls adapt/adapt-nightly"
    assert "False" in team.worker(seen)
    nightly = next(
        each
        for each in team.prefect("/deployments/filter", {}).json()
        if each["name"] == "adapt-nightly"
    )
    schedule = nightly["schedules"][0]["id"]
    team.worker(f"prefect deployment schedule resume adapt/adapt-nightly {schedule}")
    assert "True" in team.worker(seen)
    team.shell(deploy)
    assert "False" in team.worker(seen)
    plan = yaml.safe_load(team.deployment.read_text())
    for each in plan["deployments"]:
        if each["name"] == "adapt-nightly":
            each["schedules"][0] |= {"active": True, "cron": "0 3 1 1 *"}
    team.deployment.write_text(yaml.safe_dump(plan))
    team.shell(deploy)
    team.shell(deploy)
    said = team.worker(seen)
    assert "0 3 1 1 *" in said
    assert "True" in said


@stack_test
@slow_enough
def test_a_run_of_the_stack_is_recorded_at_its_mlflow_and_leaves_the_data_alone(team):
    before = sorted(str(path) for path in team.data.rglob("*"))
    (block,) = commands("Schedule")
    said = team.shell(block)
    assert "adapt" in said
    team.until_they_completed()
    done = team.last_summary()
    (run,) = team.recorded()
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert tags["p2d.run_id"] == done["run_id"]
    assert run["info"]["artifact_uri"].startswith("mlflow-artifacts:")
    assert any((team.project.volumes / "mlartifacts").rglob("heads.png"))
    assert not (team.store / "mlflow").exists()
    assert sorted(str(path) for path in team.data.rglob("*")) == before


@stack_test
@slow_enough
def test_everything_comes_back_from_the_backup(team):
    search = team.mlflow("/logged-models/search", {"experiment_ids": ["1"]}).raise_for_status()
    (logged,) = search.json()["models"]
    source = f"models:/{logged['info']['model_id']}"
    team.worker(f"python -c \"import mlflow; mlflow.register_model('{source}', 'ledger')\"")
    team.worker("prefect work-queue pause artifacts --pool p2d")

    def facts() -> dict[str, Any]:
        return {
            "artifacts": sorted(ref.key for ref in Store(team.store).refs()),
            "summary": team.last_summary(),
            "flow runs": sorted(run["id"] for run in team.asked_for()),
            "recorded": sorted(run["info"]["run_id"] for run in team.recorded()),
            "version": team.get("/model-versions/get?name=ledger&version=1"),
            "files": sorted(
                str(file.relative_to(team.project.volumes))
                for file in (team.project.volumes / "mlartifacts").rglob("*")
            ),
            "env": team.env,
        }

    before = facts()
    assert before["artifacts"]
    assert before["recorded"]
    (backup,) = commands("Back up")
    team.shell(backup)
    assert (team.docker / "backup/env").stat().st_mode & 0o077 == 0
    (team.docker / ".env").unlink()
    (team.store / "heads" / "later").mkdir()
    (restore,) = commands("Restore")
    said = team.shell(restore)
    assert not (team.store / "heads" / "later").exists()
    assert f"{len(before['artifacts'])} artifacts checked: every file is as it was made" in said
    assert facts() == before
    # paused as it was
    assert "artifacts (**)" in team.worker("prefect work-queue ls --pool p2d")
    team.worker("prefect work-queue resume artifacts --pool p2d")


@stack_test
@slow_enough
def test_after_a_rotation_the_old_passwords_are_refused_and_runs_go_on(team):
    (block,) = commands("Rotate passwords")
    old = team.env
    team.shell(block)
    new = team.env
    assert not {v for k, v in old.items() if "PASSWORD" in k} & set(new.values())
    assert team.prefect("/deployments/filter", {}, old["PREFECT_PASSWORD"]).status_code == 401
    assert team.prefect("/deployments/filter", {}).status_code == 200
    search = ("/experiments/search", {"max_results": 1})
    assert team.mlflow(*search, old["MLFLOW_PASSWORD"]).status_code == 401
    assert team.mlflow(*search).status_code == 200
    port = str(team.project.state["ports"]["postgres"])
    for user, name in (
        ("postgres", "POSTGRES_PASSWORD"), ("prefect", "PREFECT_DB_PASSWORD"),
        ("mlflow", "MLFLOW_DB_PASSWORD"),
    ):  # fmt: skip
        for env, ends in ((old, 2), (new, 0)):
            done = subprocess.run(
                ["psql", "-h", "127.0.0.1", "-p", port, "-U", user, "-d", user, "-Atc", "SELECT 1"],
                env=team.environment | {"PGPASSWORD": env[name]}, capture_output=True, check=False,
            )  # fmt: skip
            assert done.returncode == ends, (user, done.stderr)
    before = len(team.recorded())
    team.worker("prefect deployment run adapt/adapt-nightly")
    team.until_they_completed()
    again = team.last_summary()
    assert [line["name"] for line in again["stages"] if not line["reused"]] == []
    assert len(team.recorded()) == before + 1


@stack_test
@slow_enough
def test_an_upgrade_brings_the_stack_back(team):
    runs = len(team.recorded())
    (block,) = commands("Upgrade")
    said = team.shell(block)
    assert "cannot work" not in said
    assert len(team.recorded()) == runs


@stack_test
@slow_enough
def test_cleaning_up_by_policy_keeps_what_the_registered_model_needs(team):
    policy, mlflows = commands("Clean up")
    before = {ref.key for ref in Store(team.store).refs()}
    team.shell(policy)
    assert {ref.key for ref in Store(team.store).refs()} == before
    model = Path(team.last_summary()["artifacts"]["model"]).name
    said = team.worker("p2d artifacts gc --keep 0")
    kept = {ref.stage for ref in Store(team.store).refs()}
    assert {"model", "subset", "heads", "samples"} <= kept
    assert "evaluation" not in kept, said
    assert (team.store / "model" / model).exists()
    deleted = team.recorded()[0]["info"]["run_id"]
    files = team.project.volumes / "mlartifacts/1" / deleted
    team.mlflow("/runs/delete", {"run_id": deleted}).raise_for_status()
    team.shell(mlflows)
    assert any(files.rglob("*.png"))
    team.shell(mlflows.replace("30d", "0d"))
    assert not any(files.rglob("*.png"))


@stack_test
@slow_enough
def test_what_to_watch_can_be_seen(team):
    (block,) = commands("What to watch")
    said = team.shell(block)
    assert "every file is as it was made" in said
    assert "artifacts" in said
