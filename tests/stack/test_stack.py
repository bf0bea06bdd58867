"""A team's stack on real parts: servers on PostgreSQL behind passwords, workers, schedules.

One story over one stack, in the order of this file.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.deploying import LOST
from p2d_core.store import Store
from tests.stack.servers import Stack

pytestmark = pytest.mark.timeout(900)


def runs_of(stack: Stack, deployment: str, *states: str) -> list[dict[str, Any]]:
    """Flow runs in the given states, the oldest first."""
    with stack.prefect as api:
        wanted = {
            "deployments": {"id": {"any_": [deployment]}},
            "flow_runs": {"state": {"name": {"any_": list(states)}}},
            "sort": "START_TIME_ASC",
        }
        found = api.post("/flow_runs/filter", json=wanted).raise_for_status().json()
    return [run for run in found if run["start_time"]]


def create(stack: Stack, deployment: str, **parameters: Any) -> httpx.Response:
    with stack.prefect as api:
        return api.post(
            f"/deployments/{deployment}/create_flow_run", json={"parameters": parameters}
        )


def parameters_of(stack: Stack, deployment: str) -> dict[str, Any]:
    with stack.prefect as api:
        return dict(api.get(f"/deployments/{deployment}").json()["parameters"])


def sign_of_life(stack: Stack, run: str) -> None:
    """A heartbeat of the run, as Prefect's engine sends it."""
    event = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [{"prefect.resource.id": "prefect.tag.p2d", "prefect.resource.role": "tag"}],
    }
    with stack.prefect as api:
        api.post("/events", json=[event]).raise_for_status()


def ended(stack: Stack, run: str, seconds: float = 300) -> dict[str, Any]:
    """The run when it has come to an end."""

    def state() -> dict[str, Any]:
        with stack.prefect as api:
            return dict(api.get(f"/flow_runs/{run}").json())

    def has_ended() -> bool:
        now = state()["state"]
        is_final = now["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        return is_final and now["name"] != LOST  # it is scheduled again at once

    stack.until(has_ended, f"end of run {run}", seconds)
    return state()


def summaries(store: Path) -> list[dict[str, Any]]:
    """What the runs said of themselves, the oldest first."""
    files = sorted((store / "runs").glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(file.read_text()) for file in files]


def computed(summary: dict[str, Any]) -> list[str]:
    return [line["name"] for line in summary["stages"] if not line["reused"]]


def test_without_the_password_nothing_answers_but_health(stack):
    assert httpx.get(f"{stack.prefect_url}/health").status_code == 200
    assert httpx.get(f"{stack.mlflow_url}/health").status_code == 200
    for auth in (None, ("admin", "wrong")):
        for path in ("/flow_runs/count", "/deployments/filter", "/artifacts/filter"):
            assert httpx.post(stack.prefect_url + path, json={}, auth=auth).status_code == 401
        asked = {"max_results": 1}
        for path in ("/api/2.0/mlflow/experiments/search", "/api/2.0/mlflow/runs/search"):
            assert httpx.post(stack.mlflow_url + path, json=asked, auth=auth).status_code == 401
        kept = stack.mlflow_url + "/api/2.0/mlflow-artifacts/artifacts"
        assert httpx.get(kept, auth=auth).status_code == 401
    auth = ("admin", stack.password)
    asked_well = httpx.post(
        f"{stack.mlflow_url}/api/2.0/mlflow/experiments/search", json={"max_results": 1}, auth=auth
    )
    assert asked_well.status_code == 200


def test_scheduled_runs_complete_and_the_second_reuses_the_head_map(stack, deployed, store):
    nightly = deployed["adapt-nightly"]
    stack.until(lambda: len(runs_of(stack, nightly, "Completed")) >= 2, "two scheduled runs", 400)
    with stack.prefect as api:
        api.post(f"/deployments/{nightly}/pause_deployment").raise_for_status()
        every = api.post(
            "/flow_runs/filter", json={"deployments": {"id": {"any_": [nightly]}}}
        ).json()
        for run in every:
            if run["state"]["type"] in ("SCHEDULED", "PENDING", "RUNNING"):
                ended_state = {"state": {"type": "CANCELLED"}, "force": True}
                if run["state"]["type"] == "SCHEDULED":
                    api.post(f"/flow_runs/{run['id']}/set_state", json=ended_state)
    first, second = runs_of(stack, nightly, "Completed")[:2]
    assert first["auto_scheduled"]
    assert second["auto_scheduled"]
    assert first["name"] == f"my-domain on target, {time.strftime('%Y-%m-%d')}"
    # one at a time over a store
    assert first["end_time"] <= second["start_time"]
    one, two = summaries(store)[:2]
    assert {"proxy", "heads", "subset", "model"} <= set(computed(one))
    assert {"proxy", "heads"} <= set(two["reused"])
    assert computed(two) == []
    assert one["artifacts"]["heads"] == two["artifacts"]["heads"]
    sign_of_life(stack, first["id"])  # a late one; what comes of it is seen at the end


@pytest.mark.slow
def test_a_rerun_with_another_fraction_recomputes_from_the_subset_on(stack, deployed, store):
    rerun = deployed["rerun-from-head-map"]
    key = Path(summaries(store)[0]["artifacts"]["heads"]).name
    before = len(summaries(store))
    made = create(
        stack, rerun, head_map=key[:16], fraction=0.2, **parameters_of(stack, rerun)
    ).raise_for_status()
    done = ended(stack, made.json()["id"])
    assert done["state"]["name"] == "Completed", done["state"]
    (again,) = summaries(store)[before:]
    assert computed(again) == ["subset", "model", "evaluation"]
    assert again["selection"]["selected"] == pytest.approx(
        0.2 * again["selection"]["corpus"], abs=1
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"selection": {"fraction": 7}}, "7 is greater than the maximum of 1"),
        ({"selction": {}}, "selction"),
        ({"precision": "float8"}, "'float8' is not one of"),
        ({"threads": "many"}, "'many' is not of type 'integer'"),
    ],
)
def test_a_bad_parameter_is_refused_when_the_run_is_created(stack, deployed, change, told):
    nightly = deployed["adapt-nightly"]
    settings = parameters_of(stack, nightly)["settings"] | change
    answer = create(stack, nightly, settings=settings)
    assert answer.status_code == 409
    assert told in answer.text


@pytest.mark.slow
def test_a_file_that_is_not_there_fails_the_run_with_the_place_and_the_cure(stack, deployed, store):
    nightly = deployed["adapt-nightly"]
    settings = parameters_of(stack, nightly)["settings"] | {"target": {"path": "nowhere.jsonl"}}
    made = create(stack, nightly, settings=settings).raise_for_status()
    done = ended(stack, made.json()["id"])
    assert done["state"]["name"] == "Failed"
    assert "nowhere.jsonl" in done["state"]["message"]


@pytest.mark.slow
def test_another_worker_finishes_what_a_killed_one_began(stack, deployed, home, store):
    nightly = deployed["adapt-nightly"]
    settings = parameters_of(stack, nightly)["settings"]
    settings |= {"seed": 1, "training": {"epochs": 40, "checkpoint_seconds": 0.2}}
    kept = {ref.key for ref in Store(store).refs()}
    made = create(stack, nightly, settings=settings).raise_for_status().json()["id"]
    checkpoints = store / ".scratch"
    stack.until(
        lambda: any(checkpoints.glob("model-*/checkpoint-*")), "checkpoint of the training", 200
    )
    stack.kill_worker("worker")
    finished = {ref.key for ref in Store(store).refs()} - kept
    stack.start_worker("another", home, store)
    done = ended(stack, made, 400)
    assert done["state"]["name"] == "Completed", done["state"]
    assert done["run_count"] == 2
    last = summaries(store)[-1]
    assert "model" in computed(last)
    assert "proxy" in last["reused"]
    # what the killed one had finished was not made again
    for ref in Store(store).refs():
        if ref.key in finished:
            assert ref.manifest.run_id != last["run_id"]
    model = next(ref for ref in Store(store).refs("model") if ref.manifest.run_id == last["run_id"])
    assert model.manifest.cost["wall_seconds"] > 0


@pytest.mark.slow
def test_only_what_was_killed_runs_again(stack, deployed):
    """Not a run that has ended, though a sign of life came in after its end."""
    with stack.prefect as api:
        runs = api.post("/flow_runs/filter", json={}).raise_for_status().json()
    again = [run["state"]["type"] for run in runs if run["run_count"] > 1]
    assert again == ["COMPLETED"]
    assert not [run for run in runs if run["state"]["name"] in (LOST, "AwaitingRetry")]


@pytest.mark.slow
def test_a_look_at_the_head_map_says_whether_it_holds(stack, deployed):
    refresh = deployed["refresh-head-map"]
    made = create(stack, refresh, **parameters_of(stack, refresh)).raise_for_status().json()["id"]
    done = ended(stack, made)
    assert done["state"]["name"] == "Completed", done["state"]


def test_mlflow_has_every_run_with_its_files_through_the_proxy(stack, deployed, store, monkeypatch):
    for name, value in stack.environment.items():
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, value)
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    client = MlflowClient(tracking_uri=stack.mlflow_url)
    (experiment,) = [e for e in client.search_experiments() if e.name == "p2d"]
    assert experiment.artifact_location.startswith("mlflow-artifacts:")
    runs = client.search_runs([experiment.experiment_id], "tags.`p2d.kind` = 'adaptation'")
    recorded = {run.data.tags["p2d.run_id"] for run in runs}
    assert {summary["run_id"] for summary in summaries(store)} <= recorded
    one = next(run for run in runs if run.data.tags["p2d.run_id"] in recorded)
    names = {file.path for file in client.list_artifacts(one.info.run_id)}
    assert {"heads.png", "summary.json"} <= names
    file = download_artifacts(
        run_id=one.info.run_id, artifact_path="summary.json", tracking_uri=stack.mlflow_url
    )
    assert json.loads(Path(file).read_text())["run_id"] == one.data.tags["p2d.run_id"]
    assert not (store / "mlflow").exists()
