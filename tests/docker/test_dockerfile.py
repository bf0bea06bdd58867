"""The Dockerfile: stages, pinned, lean, not root, and what is built from."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.compose import COMPOSE, DOCKER, read_compose, read_env
from tests.docker.env import make_env
from tests.docker.image import DOCKERFILE, ROOT, taken


def stages() -> dict[str, str]:
    """Name of each stage, the last one "final", and its lines joined where they go on."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE))
    parts = re.split(r"(?m)^(?=FROM )", joined)[1:]
    found = {}
    for part in parts:
        name = re.match(r"FROM \S+ AS (\w+)", part)
        found[name[1] if name else "final"] = part
    return found


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
