"""What docker/ promises: loopback, no password in a file of git, limits, health, a lean image."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.compose import DOCKER, read_compose, read_env, variables

ROOT = DOCKER.parent
COMPOSE = DOCKER / "compose.yaml"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
SERVERS = {"postgres", "prefect", "mlflow"}
STAYING = SERVERS | {"worker"}
PASSWORDS = {
    "POSTGRES_PASSWORD", "PREFECT_DB_PASSWORD", "MLFLOW_DB_PASSWORD", "PREFECT_PASSWORD",
    "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY",
}  # fmt: skip


def make_env(*words: object) -> subprocess.CompletedProcess[str]:
    # without the site's packages: it has to run before anything is installed
    return subprocess.run(
        [sys.executable, "-I", "-S", DOCKER / "make_env.py", *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def env_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("env")
    (folder / "my data").mkdir()
    done = make_env(folder / "my data", "--file", folder / ".env")
    assert done.returncode == 0, done.stderr
    return folder / ".env"


@pytest.fixture(scope="module")
def env(env_file) -> dict[str, str]:
    return read_env(env_file)


@pytest.fixture(scope="module")
def project(env) -> dict[str, Any]:
    return read_compose(COMPOSE, env)


@pytest.fixture(scope="module")
def services(project) -> dict[str, dict[str, Any]]:
    return project["services"]


# --- the .env file


def test_the_env_script_makes_every_variable_of_compose_and_no_other(env):
    assert set(env) == variables(COMPOSE)


def test_passwords_are_random_and_each_its_own(env, tmp_path):
    make_env(tmp_path, "--file", tmp_path / "other")
    other = read_env(tmp_path / "other")
    drawn = [values[name] for values in (env, other) for name in PASSWORDS]
    assert len(set(drawn)) == 2 * len(PASSWORDS)
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in drawn)


def test_only_its_owner_can_read_it_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        make_env(tmp_path, "--file", tmp_path / ".env")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_one_that_is_there_is_never_overwritten(env_file, tmp_path):
    before = env_file.read_text()
    done = make_env(tmp_path, "--file", env_file)
    assert done.returncode == 1
    assert "is there already" in done.stderr
    assert "docs/operations.md" in done.stderr
    assert env_file.read_text() == before


@pytest.mark.parametrize(("name", "told"), [("missing", "is no folder"), ("it's", "a quote")])
def test_a_data_folder_that_will_not_do_is_refused(tmp_path, name, told):
    (tmp_path / "it's").mkdir()
    done = make_env(tmp_path / name, "--file", tmp_path / ".env")
    assert done.returncode == 1
    assert told in done.stderr
    assert not (tmp_path / ".env").exists()


def test_git_and_the_image_never_take_it():
    ignored = subprocess.run(["git", "check-ignore", "-q", "docker/.env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
    assert not taken("docker/.env")


def test_the_limits_of_the_worker_fit_this_machine(env):
    assert int(env["WORKER_CPUS"]) == os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    assert 0.5 * memory < int(env["WORKER_MEMORY"].removesuffix("m")) < memory


def test_without_it_compose_says_what_to_do():
    with pytest.raises(KeyError):
        read_compose(COMPOSE, {})
    asked = re.findall(r"\$\{\w+([^}]*)\}", COMPOSE.read_text())
    has_default = {":-", ":-stack"}
    told = {":?run docker/make_env.py first", "?run docker/make_env.py first"}
    assert set(asked) == told | has_default


def test_a_token_of_the_hub_and_further_parts_reach_the_worker(env):
    """Downloads lie in the store's volume, or each new container would make them again."""
    plain = read_compose(COMPOSE, env)["services"]["worker"]
    assert (plain["environment"]["HF_TOKEN"], plain["build"]["args"]["EXTRAS"]) == ("", "stack")
    asked = env | {"HF_TOKEN": "secret", "EXTRAS": "stack,eval"}
    worker = read_compose(COMPOSE, asked)["services"]["worker"]
    assert worker["environment"]["HF_TOKEN"] == "secret"
    assert worker["build"]["args"]["EXTRAS"] == "stack,eval"
    assert worker["environment"]["HF_HOME"].startswith(worker["environment"]["P2D_STORE"] + "/.")


# --- compose.yaml


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


# --- Dockerfile


def stages() -> dict[str, str]:
    """Name of each stage, the last one "final", and its lines joined where they go on."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE))
    parts = re.split(r"(?m)^(?=FROM )", joined)[1:]
    found = {}
    for part in parts:
        name = re.match(r"FROM \S+ AS (\w+)", part)
        found[name[1] if name else "final"] = part
    return found


def taken(path: str) -> bool:
    """Whether .dockerignore lets a file into the build, as far as its rules go here."""
    is_in = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            back = rule.startswith("!")
            pattern = rule.removeprefix("!")
            parts = Path(path).parts if pattern.startswith("**/") else ()
            places = [path, *map(str, Path(path).parents), *parts]
            if any(fnmatch.fnmatch(each, pattern.removeprefix("**/")) for each in places):
                is_in = back
    return is_in


def test_hadolint_finds_nothing():
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", DOCKER / "Dockerfile"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_built_in_stages_and_the_last_one_takes_only_what_was_built():
    assert list(stages()) == ["base", "build", "final"]
    copied = re.findall(r"(?m)^(?:COPY|ADD) (.*)$", stages()["final"])
    assert copied == ["--from=build /opt/p2d /opt/p2d"]


def test_no_build_tool_is_in_the_last_stage():
    everything_final = stages()["base"] + stages()["final"]
    assert not re.search(r"apt|gcc|build-essential|pip install|git\b", everything_final)
    assert "pip uninstall --yes setuptools wheel pip" in stages()["final"]
    assert "ensurepip" in stages()["final"]
    assert "--without-pip" in stages()["build"]
    assert "slim" in stages()["base"]


def test_it_does_not_run_as_root_and_cannot_change_its_own_code():
    users = re.findall(r"(?m)^USER (\S+)$", stages()["final"])
    assert users == ["10001:10001"]
    assert stages()["final"].index("COPY") < stages()["final"].index("USER")
    assert "--chown" not in stages()["final"]


def test_everything_is_pinned(services):
    images = {service["image"] for service in services.values()}
    assert images == {"postgres:15.18-bookworm", "p2d:0.1.0"}
    outside = [image for image in re.findall(r"FROM (\S+)", DOCKERFILE) if ":" in image]
    assert outside == ["python:3.11.15-slim-bookworm"]
    for install in re.findall(r"pip --python .venv install ([^&;]*)", stages()["build"]):
        assert "--constraint constraints.txt" in install or "--no-deps --editable ." in install
    version = re.search(r'(?m)^version = "(.*)"', (ROOT / "pyproject.toml").read_text())
    assert version is not None
    assert f"p2d:{version[1]}" in images
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert all(re.match(r"[\w.\-\[\]]+==\S+", line) for line in pins)


def test_cpu_or_cuda_is_an_argument_of_the_build(services, tmp_path):
    for service in services.values():
        if "build" in service:
            torch = {"TORCH": "cuda", "TORCH_INDEX": ""}
            assert service["build"]["args"] == torch | {"EXTRAS": "stack"}
    index = "https://an.index"
    make_env(tmp_path, "--file", tmp_path / ".env", "--torch-index", index)
    asked = read_compose(COMPOSE, read_env(tmp_path / ".env"))["services"]["worker"]["build"][
        "args"
    ]
    assert asked == {"TORCH": "cpu", "TORCH_INDEX": index, "EXTRAS": "stack"}


@pytest.mark.parametrize(
    ("torch", "index", "ends", "installs"),
    [
        ("cuda", "", 0, ["--constraint constraints.txt .[stack]"]),
        (
            "cpu", "https://an.index", 0,
            [
                "--no-deps --index-url https://an.index --constraint constraints.txt torch",
                "--constraint constraints.txt .[stack]",
            ],
        ),
        ("cpu", "", 2, []),
        ("rocm", "", 2, []),
    ],
)  # fmt: skip
def test_what_the_build_installs_for_each(tmp_path, torch, index, ends, installs):
    """The line of the Dockerfile itself, with a pip that says what it was asked for."""
    (line,) = [part for part in stages()["build"].split("\nRUN ") if part.startswith("case")]
    script = line.split("\n")[0]
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@" >> asked\n')
    pip.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-c", script], cwd=tmp_path, check=False, capture_output=True,
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "TORCH": torch, "TORCH_INDEX": index, "EXTRAS": "stack",
        },
    )  # fmt: skip
    assert done.returncode == ends, done.stderr
    asked = tmp_path / "asked"
    lines = asked.read_text().splitlines() if asked.exists() else []
    assert [one.removeprefix("--python .venv install ") for one in lines] == installs


def test_what_is_built_from_is_what_runs():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    inside = {path for path in tracked if taken(path)}
    tops = {path.split("/")[0] for path in inside if "/" in path}
    assert tops == {"docker", "flows", "p2d_core", "tasks"}
    assert {path for path in inside if path.startswith("docker/")} == {
        "docker/basic_auth.ini", "docker/healthy.py", "docker/mlflow_password.py",
    }  # fmt: skip
    assert {path for path in inside if "/" not in path} == {
        "README.md", "constraints.txt", "deployment.yaml", "pyproject.toml",
    }  # fmt: skip
    named = re.findall(r"/opt/p2d/([\w./]+)", COMPOSE.read_text())
    assert set(named) <= inside


def test_the_page_says_that_images_were_not_built_here():
    page = (DOCKER / "README.md").read_text(encoding="utf-8")
    assert "images were not built here" in page
    for name in re.findall(r"(?m)^\| `([\w./]+)`", page):
        volumes = {"postgres", "mlartifacts", "store"}
        assert (DOCKER / name).exists() or name in volumes, name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\(docker/README\.md\):[^.]*\. Its images were\s+not built here", readme)
