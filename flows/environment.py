"""Settings of Prefect and of libraries that have to stand before they are imported."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

LOGGERS = ("p2d_core", "tasks")
STARTED_BY = "P2D_STARTED_BY"
"""Id of the process that Prefect's temporary server is for; the server inherits it."""


def prepare_environment(store: Path, *, verbose: bool = False) -> None:
    """Puts Prefect's home and results into the store and turns telemetry off.

    What the user has set stays: with PREFECT_API_URL the runs go to that server.
    """
    prefect = store.resolve() / "prefect"
    prefect.mkdir(parents=True, exist_ok=True)  # its server cannot make more than one level
    defaults = {
        "PREFECT_HOME": prefect,
        "PREFECT_LOCAL_STORAGE_PATH": prefect / "results",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": 120,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_LOGGING_LEVEL": "INFO" if verbose else "ERROR",
        "PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(LOGGERS),
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        # torch's threads spin while they wait, and beside another busy process wait for it too:
        # a step of a small model then takes many times as long as with threads that sleep
        "OMP_WAIT_POLICY": "PASSIVE",
        "DO_NOT_TRACK": 1,
        "HF_HUB_DISABLE_TELEMETRY": 1,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    os.environ[STARTED_BY] = str(os.getpid())
    if verbose:
        for logger in LOGGERS:
            # Prefect gives them its handlers, not its level
            logging.getLogger(logger).setLevel(logging.INFO)


_starting: list[threading.Thread] = []


def start_server() -> None:
    """Lets Prefect's temporary server start while this process still imports what it needs.

    Only for commands whose input cannot be wrong: others start nothing before they have checked.
    """

    def start() -> None:
        from prefect import get_client

        # a failure shows when the flow asks for the server itself
        with suppress(Exception), get_client(sync_client=True) as client:
            client.api_healthcheck()

    _starting.append(threading.Thread(target=start, name="prefect-server", daemon=True))
    _starting[-1].start()


def wait_for_server() -> None:
    """Until a server that `start_server` has begun to start is there: two would be started else."""
    while _starting:
        _starting.pop().join()
