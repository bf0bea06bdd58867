"""Stands in for `docker compose` where there is no engine: services as processes of this machine.

Knows what docs/operations.md needs: up, stop, down, exec, run, build. Each service has the command,
environment and health check of compose.yaml; addresses and folders that are those of a container
are replaced by some of this machine. Images, networks, limits and restarts are not stood in for.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.docker.compose import read_compose, read_env
from tests.needs import postgres_programs
from tests.stack.servers import BIN, NOBODY, clean, free_port

ROOT = Path(__file__).parents[2]
ORDER = ["postgres", "prefect", "mlflow", "deploy", "worker"]
ONE_SHOT = {"deploy"}
SECONDS_TO_START = 150.0
AS_NOBODY: dict[str, Any] = {"user": NOBODY, "group": NOBODY} if os.geteuid() == 0 else {}
"""PostgreSQL does not start as root."""
PLACES = {"/store": "store", "/mlartifacts": "mlartifacts"}
"""Where a service has a volume -> folder that stands in for it."""


@dataclass
class Project:
    """A folder with compose.yaml and .env, and beside it what engines keep elsewhere."""

    folder: Path

    @property
    def state(self) -> dict[str, Any]:
        """Ports and folders, made once; and what runs: process ids, environments."""
        file = self.folder / "stand-in.json"
        if not file.exists():
            names = ("postgres", "prefect", "mlflow", "worker")
            # where PostgreSQL's user gets to whatever is above, and a socket's path stays short
            postgres = tempfile.mkdtemp(prefix="p2d-postgres-")
            if AS_NOBODY:
                os.chown(postgres, NOBODY, NOBODY)
            fresh = {"ports": {name: free_port() for name in names}, "postgres": postgres}
            file.write_text(json.dumps(fresh | {"pids": {}, "environments": {}}))
        return dict(json.loads(file.read_text()))

    def keep(self, part: str, service: str, value: Any) -> None:
        state = self.state
        state[part][service] = value
        (self.folder / "stand-in.json").write_text(json.dumps(state))

    @property
    def cluster(self) -> Path:
        return Path(self.state["postgres"]) / "data"

    @property
    def volumes(self) -> Path:
        return self.folder.parent / "volumes"

    def services(self) -> dict[str, dict[str, Any]]:
        env = read_env(self.folder / ".env")
        return dict(read_compose(self.folder / "compose.yaml", env)["services"])

    def here(self, text: str) -> str:
        """What is a container's address or folder becomes one of this machine."""
        ports = self.state["ports"]
        for inside, outside in {
            "@postgres:5432": f"@127.0.0.1:{ports['postgres']}",
            "http://prefect:4200": f"http://127.0.0.1:{ports['prefect']}",
            "http://mlflow:5000": f"http://127.0.0.1:{ports['mlflow']}",
            ":4200": f":{ports['prefect']}",
            ":5000": f":{ports['mlflow']}",
            ":8080": f":{ports['worker']}",
            "0.0.0.0": "127.0.0.1",
            "/opt/p2d/deployment.yaml": str(self.folder.parent / "deployment.yaml"),
            "/opt/p2d": str(ROOT),
            "/docker-entrypoint-initdb.d": str(self.folder / "postgres"),
            "/tmp/prefect": str(self.volumes / "tmp-prefect"),
        }.items():
            text = text.replace(inside, outside)
        whole = {"4200": "prefect", "5000": "mlflow", "8080": "worker", "postgres": ""}
        if whole.get(text):
            return str(ports[whole[text]])
        for inside, outside in PLACES.items():
            if text == inside:
                return str(self.volumes / outside)
        return text

    def command(self, words: list[str]) -> list[str]:
        return [self.here(str(word)) for word in words]

    def environment(self, service: dict[str, Any], name: str) -> dict[str, str]:
        """That of compose.yaml, with the programs that its image would have."""
        state = self.state
        found = {key: self.here(str(value)) for key, value in service["environment"].items()}
        found["PGPORT"] = str(state["ports"]["postgres"])
        path = os.environ["PATH"]
        if name == "postgres":
            path = f"{postgres_programs()}:{path}"
            found["PGHOST"] = state["postgres"]
        elif "PGHOST" in found:
            found["PGHOST"] = "127.0.0.1"
        if "P2D_HOME" in found:
            (data,) = [v["source"] for v in service["volumes"] if isinstance(v, dict)]
            found["P2D_HOME"] = data
        (self.volumes / "home").mkdir(parents=True, exist_ok=True)
        return clean() | found | {"PATH": f"{BIN}:{path}", "HOME": str(self.volumes / "home")}

    def up(self, names: list[str]) -> None:
        services = self.services()
        for name in [n for n in ORDER if not names or n in self.with_dependencies(services, names)]:
            environment = self.environment(services[name], name)
            if self.is_running(name) and self.state["environments"].get(name) == environment:
                continue
            self.stop([name])
            self.keep("environments", name, environment)
            if name in ONE_SHOT:
                command = self.command(services[name]["command"])
                subprocess.run(command, env=environment, cwd=ROOT, check=True)
                continue
            is_new = name == "postgres" and self.make_cluster(environment)
            self.start(name, services[name], environment)
            if is_new:
                for script in sorted((self.folder / "postgres").glob("*.sh")):
                    subprocess.run(["sh", script], env=environment, check=True)

    def with_dependencies(self, services: dict[str, Any], names: list[str]) -> set[str]:
        found = set(names)
        for name in names:
            found |= self.with_dependencies(services, list(services[name].get("depends_on", ())))
        return found

    def make_cluster(self, environment: dict[str, str]) -> bool:
        """As PostgreSQL's image does it: passwords asked for over the network, not on the socket.

        Returns:
            Whether there was none.
        """
        data = self.cluster
        if (data / "PG_VERSION").exists():
            return False
        data.mkdir(parents=True, exist_ok=True)
        password = data.parent / "pw"
        password.write_text(environment["POSTGRES_PASSWORD"])
        if AS_NOBODY:
            for path in (data, password):
                os.chown(path, NOBODY, NOBODY)
        command = [
            postgres_programs() / "initdb", "-D", data, "-U", environment["POSTGRES_USER"],
            "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}", "--no-sync",
            "--encoding=UTF8",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=data, **AS_NOBODY)
        password.unlink()
        return True

    def start(self, name: str, service: dict[str, Any], environment: dict[str, str]) -> None:
        as_user: dict[str, Any] = {}
        if name == "postgres":
            data, state = self.cluster, self.state
            command = [
                str(postgres_programs() / "postgres"), "-D", str(data), "-h", "127.0.0.1",
                "-p", str(state["ports"]["postgres"]), "-k", state["postgres"], "-c", "fsync=off",
            ]  # fmt: skip
            as_user = {"cwd": data, **AS_NOBODY}
        else:
            command = self.command(service["command"])
            for place in PLACES.values():
                (self.volumes / place).mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, **({"cwd": ROOT} | as_user),
            )  # fmt: skip
        self.keep("pids", name, process.pid)
        check = self.command(service["healthcheck"]["test"])
        assert check.pop(0) == "CMD"
        end = time.monotonic() + SECONDS_TO_START
        while subprocess.run(check, env=environment, capture_output=True, check=False).returncode:
            if process.poll() is not None or time.monotonic() > end:
                log_text = (self.folder / f"{name}.log").read_text()[-3000:]
                sys.exit(f"{name} did not become healthy:\n{log_text}")
            time.sleep(0.5)

    def is_running(self, name: str) -> bool:
        pid = self.state["pids"].get(name)
        with_pid = pid is not None and psutil.pid_exists(pid)
        return with_pid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    def stop(self, names: list[str]) -> None:
        """Whoever depends on others first."""
        for name in reversed([n for n in ORDER if not names or n in names]):
            if not self.is_running(name):
                continue
            pid = self.state["pids"][name]
            for sign in (signal.SIGINT, signal.SIGKILL):
                os.killpg(pid, sign)
                end = time.monotonic() + 10
                while self.is_running(name) and time.monotonic() < end:
                    time.sleep(0.1)
                if not self.is_running(name):
                    break

    def down(self, *, volumes: bool) -> None:
        self.stop([])
        if volumes:
            for volume in (self.volumes, self.cluster):
                shutil.rmtree(volume)

    def clear(self) -> None:
        """Ends everything."""
        self.stop([])
        shutil.rmtree(self.state["postgres"])

    def execute(self, name: str, words: list[str]) -> int:
        """Within a running service: it has the environment that the service was started with."""
        if not self.is_running(name):
            sys.exit(f'service "{name}" is not running')
        environment = self.state["environments"][name]
        return subprocess.run(
            self.command(words), env=environment, cwd=ROOT, check=False
        ).returncode

    def run(self, name: str, words: list[str]) -> int:
        """In a container of its own, with the service's environment."""
        for place in PLACES.values():
            (self.volumes / place).mkdir(parents=True, exist_ok=True)
        service = self.services()[name]
        command = self.command(words or service["command"])
        return subprocess.run(
            command, env=self.environment(service, name), cwd=ROOT, check=False
        ).returncode


def main(words: list[str]) -> int:
    """What `docker` answers; the project is the folder that it is called in."""
    assert words.pop(0) == "compose", words
    project = Project(Path.cwd())
    verb = words.pop(0)
    options = [words.pop(0) for word in list(words) if words and words[0].startswith("-")]
    match verb:
        case "build":
            assert set(options) <= {"--pull"}
        case "up":
            assert set(options) == {"--detach", "--wait"}, options
            project.up(words)
        case "stop":
            project.stop(words)
        case "down":
            project.down(volumes=options == ["--volumes"])
        case "exec":
            assert options == ["-T"], options
            return project.execute(words[0], words[1:])
        case "run":
            assert set(options) <= {"--rm", "--no-deps", "-T"}, options
            return project.run(words[0], words[1:])
        case _:
            sys.exit(f"docker compose {verb} is not stood in for")
    return 0


def put_on_path(folder: Path) -> dict[str, str]:
    """A `docker` in this folder that is this file; gives the environment in which it is found."""
    folder.mkdir()
    docker = folder / "docker"
    docker.write_text(
        f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m tests.docker.stand_in "$@"\n'
    )
    docker.chmod(0o755)
    return clean() | {"PATH": f"{folder}:{BIN}:{os.environ['PATH']}"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
