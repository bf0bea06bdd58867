"""One stack for all tests of this folder, with everything of deployment.yaml deployed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.needs import postgres_programs
from tests.stack.quick import QUICK, write_home
from tests.stack.servers import Stack

DEPLOYMENT = Path(__file__).parents[2] / "deployment.yaml"
SECONDS_TO_LIVE = 45


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """The folder that a worker starts in, with files where deployment.yaml looks for them."""
    folder = tmp_path_factory.mktemp("home")
    write_home(folder)
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def stack(tmp_path_factory) -> Iterator[Stack]:
    programs = postgres_programs()
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.start_postgres(programs)
        stack.start_prefect()
        stack.start_mlflow()
        stack.wait_until_up()
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="session")
def deployed(stack, home, store) -> Iterator[dict[str, str]]:
    """Ids of the deployments of deployment.yaml, sped up; the nightly one every few seconds."""
    plan = yaml.safe_load(DEPLOYMENT.read_text())
    (step,) = plan["build"]
    step["flows.deploying.prepare"]["seconds_to_live"] = SECONDS_TO_LIVE
    for each in plan["deployments"]:
        each["parameters"]["settings"] = each["parameters"]["settings"] | QUICK
        each.pop("schedules", None)
        if each["name"] == "adapt-nightly":
            each["parameters"]["head_map"] = "in-use"
            each["schedules"] = [{"slug": "often", "interval": 5, "active": True}]
    (stack.folder / "deployment.yaml").write_text(yaml.safe_dump(plan))
    stack.prefect_command("work-pool", "create", "p2d", "--type", "process")
    stack.start_worker("worker", home, store)
    stack.prefect_command(
        "deploy", "--all", "--prefect-file", str(stack.folder / "deployment.yaml")
    )
    with stack.prefect as api:
        found = api.post("/deployments/filter", json={}).raise_for_status().json()
        yield {each["name"]: each["id"] for each in found}
