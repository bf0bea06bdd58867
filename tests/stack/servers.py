"""A team's servers on this machine: PostgreSQL, Prefect, MLflow with its artifact proxy."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

BIN = Path(sys.executable).parent
NOBODY = 65534
"""PostgreSQL does not start as root; so it is this user's where the tests are root's."""
ACCOUNTS = Path(__file__).parents[2] / "docker/basic_auth.ini"
HEALTHY = {"prefect": "/api/health", "mlflow": "/health"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Stack:
    """Servers over one folder, each behind its own password; `stop` ends all of them."""

    folder: Path
    password: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    cluster: Path | None = None
    """PostgreSQL's folder."""

    @property
    def prefect_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['prefect']}/api"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def prefect(self) -> httpx.Client:
        """Asks Prefect's API, with the password."""
        return httpx.Client(base_url=self.prefect_url, auth=("admin", self.password), timeout=30)

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever talks to the servers: people, workers and their runs."""
        return clean() | {
            "PREFECT_API_URL": self.prefect_url,
            "PREFECT_API_AUTH_STRING": f"admin:{self.password}",
            "PREFECT_HOME": str(self.folder / "home"),
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }

    def start(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=dict(environment), stdout=log, stderr=log, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip

    def start_postgres(self, programs: Path) -> None:
        """A cluster of its own, over TCP with a password, with a database for each server."""
        # not below the tests' folder, which the next start of pytest closes to other users
        self.cluster, port = Path(tempfile.mkdtemp(prefix="p2d-postgres-")), free_port()
        self.ports["postgres"] = port
        data, password = self.cluster / "data", self.cluster / "password"
        data.mkdir()
        password.write_text(self.password)
        as_user: dict[str, int] = {}
        if os.geteuid() == 0:
            as_user = {"user": NOBODY, "group": NOBODY}
            for path in (self.cluster, data, password):
                os.chown(path, NOBODY, NOBODY)
        initdb = [
            programs / "initdb", "-D", data, "-U", "p2d", "--auth=scram-sha-256",
            f"--pwfile={password}", "--no-sync", "--encoding=UTF8",
        ]  # fmt: skip
        subprocess.run(initdb, check=True, capture_output=True, cwd=data, **as_user)
        with (self.folder / "postgres.log").open("ab") as log:
            options = ["-p", str(port), "-h", "127.0.0.1", "-k", data, "-c", "fsync=off"]
            self.processes["postgres"] = subprocess.Popen(
                [programs / "postgres", "-D", data, *options], cwd=data, stdout=log, stderr=log,
                start_new_session=True, **as_user,
            )  # fmt: skip
        environment = clean() | {"PGPASSWORD": self.password}
        for database in ("prefect", "mlflow"):
            command = [
                programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "p2d", database,
            ]  # fmt: skip
            self.until(
                lambda command=command: (
                    subprocess.run(  # type: ignore[misc]
                        command, env=environment, capture_output=True, check=False
                    ).returncode
                    == 0
                ),
                f"database {database}",
                60,
            )

    def database(self, driver: str, name: str) -> str:
        return f"{driver}://p2d:{self.password}@127.0.0.1:{self.ports['postgres']}/{name}"

    def start_prefect(self) -> None:
        self.ports["prefect"] = free_port()
        command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1"]
        environment = clean() | {
            "PREFECT_HOME": str(self.folder / "home"),
            "PREFECT_SERVER_API_AUTH_STRING": f"admin:{self.password}",
            "PREFECT_SERVER_UI_API_URL": self.prefect_url,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database(
                "postgresql+asyncpg", "prefect"
            ),
        }
        self.start("prefect", [*command, "--port", str(self.ports["prefect"])], environment)

    def start_mlflow(self) -> None:
        self.ports["mlflow"] = free_port()
        command = [
            str(BIN / "mlflow"), "server", "--app-name", "basic-auth", "--host", "127.0.0.1",
            "--port", str(self.ports["mlflow"]), "--workers", "1", "--serve-artifacts",
            "--artifacts-destination", str(self.folder / "mlartifacts"),
        ]  # fmt: skip
        environment = clean() | {
            "MLFLOW_BACKEND_STORE_URI": "postgresql:///mlflow",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.ports["postgres"]),
            "PGUSER": "p2d",
            "PGPASSWORD": self.password,
            "MLFLOW_AUTH_CONFIG_PATH": str(ACCOUNTS),
            "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(24),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        self.start("mlflow", command, environment)

    def start_worker(self, name: str, home: Path, store: Path) -> None:
        command = [str(BIN / "p2d"), "worker", "--home", str(home), "--store", str(store)]
        # the worker's own books are in its store
        environment = {k: v for k, v in self.environment.items() if k != "PREFECT_HOME"}
        self.start(name, command, environment)

    def kill_worker(self, name: str) -> None:
        """As when its machine loses power: it and the runs that it started."""
        worker = psutil.Process(self.processes.pop(name).pid)
        for process in [worker, *worker.children(recursive=True)]:
            process.kill()

    def wait_until_up(self) -> None:
        for name, path in HEALTHY.items():
            address = f"http://127.0.0.1:{self.ports[name]}{path}"
            self.until(lambda address=address: answers(address), name, 120)  # type: ignore[misc]

    def prefect_command(self, *words: str) -> str:
        """What a `prefect` command prints; it has to end well."""
        done = subprocess.run(
            [BIN / "prefect", "--no-prompt", *words], env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def until(self, reached: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not reached():
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended:\n{self.said(name)}"
            assert time.monotonic() < end, f"no {what} after {seconds} s:\n" + "\n".join(
                self.said(name) for name in self.processes
            )
            time.sleep(0.3)

    def said(self, name: str) -> str:
        log = (self.folder / f"{name}.log").read_text(errors="replace")
        return f"--- {name}\n{log[-1500:]}"

    def stop(self) -> None:
        """Workers first: one whose server is gone does not end by itself."""
        for process in reversed(self.processes.values()):
            for sign in (signal.SIGINT, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sign)
                    process.wait(10)
                    break
                except ProcessLookupError:
                    break
                except subprocess.TimeoutExpired:
                    continue
        if self.cluster is not None:
            shutil.rmtree(self.cluster)


def clean() -> dict[str, str]:
    """The environment without what a test before this one has set."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "P2D_"))
    }
    return kept | {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
