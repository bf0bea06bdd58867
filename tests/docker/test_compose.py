"""compose.yaml: loopback, no password in a file of git, limits, health, lasting volumes."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml

from tests.docker.compose import COMPOSE, DOCKER
from tests.docker.env import PASSWORDS
from tests.docker.image import DOCKERFILE, ROOT

SERVERS = {"postgres", "prefect", "mlflow"}
STAYING = SERVERS | {"worker"}


def test_the_services_are_these(services):
    assert set(services) == STAYING | {"deploy"}


def test_no_password_stands_in_a_file_of_git(services):
    """Whatever is called a password, key or login is filled in from .env."""
    raw = yaml.safe_load(COMPOSE.read_text())["services"]
    secret = re.compile("PASSWORD|SECRET|AUTH_STRING|CONNECTION_URL")
    found = [
        (service, name, value)
        for service, each in raw.items()
        for name, value in each.get("environment", {}).items()
        if secret.search(name)
    ]
    assert {service for service, _, _ in found} == set(raw)
    for service, name, value in found:
        assert re.search(r"\$\{\w+:\?", value), (service, name)
    for file in DOCKER.rglob("*"):
        if file.is_file() and file.name != ".env":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"(?i)passw(or)?d\w*\s*[=:]\s*['\"]?\w{6,}['\"]?\s*$", text, re.M)


def test_no_password_is_an_argument(services, env):
    """Anybody on the machine can read the arguments of a process."""
    for name, service in services.items():
        words = [*service.get("command", ()), *service.get("healthcheck", {}).get("test", ())]
        assert not any(env[password] in str(word) for password in PASSWORDS for word in words), name


def test_ports_are_open_on_this_machine_only(services):
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert ports == {"prefect": ["127.0.0.1:4200:4200"], "mlflow": ["127.0.0.1:5000:5000"]}
    for service in services.values():
        assert "network_mode" not in service
        assert service["networks"]


def test_the_databases_are_out_of_reach_of_runs(services, project):
    assert project["networks"]["databases"] == {"internal": True}
    assert services["postgres"]["networks"] == ["databases"]
    reach = {name for name, service in services.items() if "databases" in service["networks"]}
    assert reach == SERVERS


def test_every_service_that_stays_has_a_health_check(services):
    for name in STAYING:
        check = services[name]["healthcheck"]
        assert check["test"][0] == "CMD", name
        assert check["retries"] >= 2
        assert {"interval", "timeout", "start_period"} <= set(check)
    assert services["mlflow"]["healthcheck"]["test"][-1] == "http://127.0.0.1:5000/health"
    assert services["prefect"]["healthcheck"]["test"][-1] == "http://127.0.0.1:4200/api/health"
    port = services["worker"]["command"][services["worker"]["command"].index("--health-port") + 1]
    assert services["worker"]["healthcheck"]["test"][-1] == f"http://127.0.0.1:{port}/health"


def test_services_wait_for_what_they_need(services):
    waits = {
        name: {on: how["condition"] for on, how in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    healthy = "service_healthy"
    assert waits == {
        "postgres": {},
        "prefect": {"postgres": healthy},
        "mlflow": {"postgres": healthy},
        "deploy": {"prefect": healthy},
        "worker": {
            "prefect": healthy, "mlflow": healthy, "deploy": "service_completed_successfully",
        },
    }  # fmt: skip


def test_what_ends_is_started_again_and_the_one_shot_is_tried_a_few_times(services):
    assert {services[name]["restart"] for name in STAYING} == {"unless-stopped"}
    assert re.fullmatch(r"on-failure:[1-9]", services["deploy"]["restart"])


def test_every_service_has_limits(services, env):
    for name, service in services.items():
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0, name
        assert re.fullmatch(r"[1-9]\d*[mg]", limits["memory"]), name
        assert limits["pids"] > 0, name
        assert service["logging"]["options"]["max-size"], name
    limits = services["worker"]["deploy"]["resources"]["limits"]
    assert (limits["cpus"], limits["memory"]) == (env["WORKER_CPUS"], env["WORKER_MEMORY"])


def test_no_service_can_become_root(services):
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service
        assert "cap_add" not in service
    assert services["postgres"]["user"] == "postgres"


def test_what_has_to_last_is_on_volumes(services, project):
    mounts = {
        name: [v for v in service.get("volumes", ()) if isinstance(v, str) and v[0] != "."]
        for name, service in services.items()
    }
    assert {name: kept for name, kept in mounts.items() if kept} == {
        "postgres": ["postgres:/var/lib/postgresql/data"],
        "mlflow": ["mlartifacts:/mlartifacts"],
        "worker": ["store:/store"],
    }
    assert set(project["volumes"]) == {"postgres", "mlartifacts", "store"}


def test_runs_cannot_write_to_the_users_data(services, env):
    (data,) = [volume for volume in services["worker"]["volumes"] if isinstance(volume, dict)]
    assert data == {
        "type": "bind", "source": env["P2D_DATA"], "target": "/data", "read_only": True,
        "bind": {"create_host_path": False},
    }  # fmt: skip


def test_the_worker_has_its_places_and_records_at_the_teams_mlflow(services):
    worker = services["worker"]
    assert worker["command"][:2] == ["p2d", "worker"]
    environment = worker["environment"]
    assert (environment["P2D_HOME"], environment["P2D_STORE"]) == ("/data", "/store")
    assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert environment["PREFECT_API_URL"] == "http://prefect:4200/api"


def test_the_folder_of_the_worker_is_not_known_where_it_is_deployed(services):
    """Set there, or in the image, it would be filled into the pull step for every worker."""
    assert "P2D_HOME" not in services["deploy"]["environment"]
    assert "P2D_HOME" not in DOCKERFILE


def test_pool_and_queue_are_those_of_the_deployments(services):
    (step,) = yaml.safe_load((ROOT / "deployment.yaml").read_text())["build"]
    made = step["flows.deploying.prepare"]
    words = services["worker"]["command"]
    assert words[words.index("--pool") + 1] == made["pool"]
    assert words[words.index("--queue") + 1] == made["queue"]
    script = services["deploy"]["command"][-1]
    assert f"work-pool create {made['pool']} --type process" in script
    assert "deploy --all --prefect-file /opt/p2d/deployment.yaml" in script


def test_nothing_phones_home(services):
    for name in STAYING - {"postgres"}:
        environment = services[name]["environment"]
        assert environment["DO_NOT_TRACK"] == "1"
        assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_the_gpu_file_changes_the_worker_and_nothing_else():
    services = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"]
    assert list(services) == ["worker"]
    assert list(services["worker"]) == ["deploy"]


def test_compose_itself_takes_it(env_file):
    docker = shutil.which("docker")
    has_plugin = (
        docker
        and not subprocess.run(
            [docker, "compose", "version"], capture_output=True, check=False
        ).returncode
    )
    if not has_plugin:
        pytest.skip("docker compose is not installed")
    for files in (["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]):
        given = [word for file in files for word in ("--file", str(DOCKER / file))]
        done = subprocess.run(
            [docker, "compose", *given, "--env-file", str(env_file), "config", "--quiet"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
