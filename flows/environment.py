"""Settings of Prefect and of libraries that have to stand before they are imported."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from p2d_core.store.room import check_room, storage_error

LOGGERS = ("p2d_core", "tasks", "flows")
STARTED_BY = "P2D_STARTED_BY"
"""Id of the process that Prefect's temporary server is for; the server inherits it."""
NEW_BOOKS = 12 * 10**6
"""Bytes that Prefect's and MLflow's databases take at first."""
MORE_BOOKS = 2 * 10**6
"""Bytes that a further run adds to them."""


def prepare_environment(store: Path, *, verbose: bool = False) -> None:
    """Puts Prefect's home and results into the store and turns telemetry off.

    What the user has set stays: with PREFECT_API_URL the runs go to that server.

    Raises:
        StorageError: the store cannot be written, or its disk has no room for the books of a run.
    """
    store = store.resolve()
    prefect = store / "prefect"
    new = not any(prefect.glob("*.db"))
    check_room(store, NEW_BOOKS if new else MORE_BOOKS, "the run's books (Prefect, MLflow)")
    try:
        prefect.mkdir(parents=True, exist_ok=True)  # its server cannot make more than one level
        with tempfile.TemporaryFile(dir=prefect) as probe:
            probe.write(b"p2d")
    except OSError as error:
        raise storage_error(error, store, "the store") or error from error
    set_environment(store, verbose=verbose)


def set_environment(store: Path, *, verbose: bool = False) -> None:
    """The variables alone: for what writes no books. What the user has set stays."""
    prefect = store.resolve() / "prefect"
    # Prefect logs every failure with its traceback; what a person has to know stands in the error
    quiet = "CRITICAL"
    defaults = {
        "PREFECT_HOME": prefect,
        "PREFECT_LOCAL_STORAGE_PATH": prefect / "results",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": 120,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_LOGGING_LEVEL": "INFO" if verbose else quiet,
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING" if verbose else quiet,
        "PREFECT_INTERNAL_LOGGING_LEVEL": "ERROR" if verbose else quiet,
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
    if "PREFECT_API_URL" not in os.environ:
        # a server of our own does not come back: not worth minutes of asking it again. Twice was
        # too little: on a busy machine its database is locked for longer than that
        defaults["PREFECT_CLIENT_MAX_RETRIES"] = 4
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

    # two threads now import what parses its own source (pydantic's docstrings); where a collection
    # lets them take turns in that, Python before 3.11.8 ends with a SystemError (gh-106905)
    gc.disable()
    _starting.append(threading.Thread(target=start, name="prefect-server", daemon=True))
    _starting[-1].start()


def wait_for_server() -> None:
    """Until a server that `start_server` has begun to start is there: two would be started else."""
    while _starting:
        _starting.pop().join()
        gc.enable()
