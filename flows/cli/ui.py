"""`p2d ui`: the MLflow UI over the store's own runs, on this machine only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import DEFAULT_STORE, StoreOption, existing_store
from p2d_core.errors import InputError, P2DError
from tasks.tracking.database import server_of, shown_uri

HOST = "127.0.0.1"
USUAL_PORT = 5000
SECONDS_TO_START = 90.0
SECONDS_TO_STOP = 10.0


def ui(
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port; without it 5000, or a free one.", show_default=False
        ),
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser.")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Look at runs in MLflow: numbers, curves, pictures, adapters. Ctrl-C stops it.

    Only this machine can reach it.

    Example: [bold]p2d ui --port 5001 --no-open[/bold]
    """
    folder = existing_store(store).root / "mlflow"
    if not (folder / "mlflow.db").is_file():
        server = server_of(None)
        raise InputError(
            f"no run has been recorded in {folder.parent} yet. `p2d demo` records one."
            if server is None
            else f"{folder.parent} has no runs of its own: MLFLOW_TRACKING_URI names "
            f"{shown_uri(server)}. Look there, or unset it before a run."
        )
    if port is not None and not is_free(port):
        raise InputError(f"port {port} is busy. Leave --port out and a free one is taken.")
    chosen = port or (USUAL_PORT if is_free(USUAL_PORT) else any_free_port())
    # both end the block below, so that no child stays behind; a shell's background jobs ignore
    # Ctrl-C unless told otherwise
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.default_int_handler)
    server = start_server(folder, chosen)
    try:
        wait_until_up(server, chosen, folder)
        address = f"http://{HOST}:{chosen}/{_adaptations(chosen)}"
        typer.echo(f"MLflow: {address}   (runs of {folder.parent}; Ctrl-C stops it)")
        if not no_open:
            import webbrowser

            webbrowser.open(address)
        code = server.wait()
        raise P2DError(f"the MLflow server ended by itself with code {code}.{_said(folder)}")
    except KeyboardInterrupt:
        typer.echo("\nstopped")
    finally:
        stop_server(server)


def is_free(port: int) -> bool:
    """Whether a server could listen on that port of the loopback address."""
    import socket

    with socket.socket() as trial:
        # as servers do: a port whose last connections are still closing is free
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError:
            return False
    return True


def any_free_port() -> int:
    """On the loopback address."""
    import socket

    with socket.socket() as trial:
        trial.bind((HOST, 0))
        return int(trial.getsockname()[1])


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """MLflow over the database and the files in a store's folder `mlflow`."""
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    environment = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "ui.log").open("wb") as said:
        # a session of its own: stopping the group reaches the server's children too
        return subprocess.Popen(
            command, stdout=said, stderr=said, env=environment, cwd=folder, start_new_session=True
        )


def _adaptations(port: int) -> str:
    """The page of the experiment that was last recorded in; empty where there is none."""
    import json
    from urllib.request import ProxyHandler, Request, build_opener

    from tasks.tracking.views import TABLE, VIEW, address

    asked = json.dumps({"max_results": 20, "order_by": ["last_update_time DESC"]}).encode()
    request = Request(
        f"http://{HOST}:{port}/api/2.0/mlflow/experiments/search",
        data=asked,
        headers={"Content-Type": "application/json"},
    )
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=10) as answer:
            found = json.load(answer).get("experiments", [])
    except (OSError, ValueError):
        return ""
    ours = [one for one in found if VIEW + TABLE in {tag["key"] for tag in one.get("tags", [])}]
    return address(ours[0]["experiment_id"]) if ours else ""


def wait_until_up(server: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    """Raises P2DError with what the server said if it does not come up."""
    from urllib.error import URLError
    from urllib.request import ProxyHandler, build_opener

    # a proxy that the environment names must not be asked for this machine
    opener = build_opener(ProxyHandler({}))
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with opener.open(f"http://{HOST}:{port}/health", timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise P2DError(f"the MLflow server did not start.{_said(folder)}")


def _said(folder: Path) -> str:
    log = folder / "ui.log"
    try:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    except OSError:
        return ""
    return "\n".join([f" It said, in {log}:", *last])


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """The server and its children."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
        except ProcessLookupError:
            return
        try:
            server.wait(SECONDS_TO_STOP)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue
