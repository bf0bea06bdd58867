"""`p2d worker`: a Prefect worker with what P2D's runs need around it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import DEFAULT_STORE, StoreOption
from p2d_core.errors import InputError


def worker(
    pool: Annotated[str, typer.Option(help="Work pool to take runs from.")] = "p2d",
    queue: Annotated[
        str, typer.Option(help="Queue of the pool: runs over this worker's store.")
    ] = "artifacts",
    home: Annotated[
        Path,
        typer.Option(
            envvar="P2D_HOME",
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            show_default="the folder it is started in",
            help="Folder that relative paths in a deployment's settings start from.",
        ),
    ] = Path("."),
    health_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Answer http://127.0.0.1:PORT/health with 200 as long as this worker "
            "asks for runs.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Do the runs that a Prefect server has scheduled, until it is stopped.

    `prefect deploy --all --prefect-file deployment.yaml` schedules them; PREFECT_API_URL (and
    PREFECT_API_AUTH_STRING, where it has a password) says where the server is. Several workers may
    serve one store: a run whose worker is gone is taken up by another.

    Example: [bold]PREFECT_API_URL=http://127.0.0.1:4200/api p2d worker --home data[/bold]
    """
    if not os.environ.get("PREFECT_API_URL"):
        raise InputError(
            "PREFECT_API_URL is not set, so there is no server to take runs from. "
            "`prefect server start` starts one; then set it to http://127.0.0.1:4200/api."
        )
    from flows.deploying import HEARTBEAT_SECONDS
    from flows.environment import prepare_environment

    os.environ["PREFECT_LOGGING_LEVEL"] = os.environ.get("PREFECT_LOGGING_LEVEL", "INFO")
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
    prepare_environment(store)
    os.environ["P2D_STORE"] = str(store.resolve())
    os.environ["P2D_HOME"] = str(home.resolve())
    command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process"]
    command += ["--pool", pool, "--work-queue", queue]
    if health_port is not None:
        os.environ["PREFECT_WORKER_WEBSERVER_HOST"] = "127.0.0.1"
        os.environ["PREFECT_WORKER_WEBSERVER_PORT"] = str(health_port)
        command.append("--with-healthcheck")
    # in place of this process, so that what stops it stops the worker
    os.execv(sys.executable, command)
