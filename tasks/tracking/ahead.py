"""Before a run: will the MLflow server that is named take its record?"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from p2d_core.errors import SettingsError
from tasks.tracking.database import quiet, server_of, shown_uri

log = logging.getLogger(__name__)
SECONDS = 10.0
"""That a server has to answer; it is asked while other things start."""


def ask_ahead(uri: str | None, experiment: str) -> Callable[[], None]:
    """Asks the server for the experiment, beside what else starts; the store's own is not asked.

    A run can do without a server until its end, and its record can be made up for: one that does
    not answer is warned of. A deleted experiment takes no record, whenever it comes.

    Returns:
        waits for the answer; raises SettingsError where the experiment is deleted.
    """
    server = server_of(uri)
    if server is None or _is_new_file(server):
        return lambda: None
    found: list[str | Exception | None] = []
    asking = threading.Thread(target=lambda: found.append(_stage(server, experiment)), daemon=True)
    asking.start()

    def wait() -> None:
        asking.join(SECONDS)
        said = found[0] if found else TimeoutError(f"no answer within {SECONDS:.0f} s")
        if said == "deleted":
            raise SettingsError(
                f"the MLflow experiment {experiment!r} at {shown_uri(server)} is deleted: it would "
                "take no record of the run. Restore it (mlflow experiments restore), or name "
                "another one as tracking.experiment."
            )
        if isinstance(said, Exception):
            words = shown_uri(str(said).splitlines()[0] if str(said) else type(said).__name__)
            log.warning(
                "MLflow at %s cannot be asked now (%s). The run goes on; if its record is not "
                "taken at the end, the same command records it later. Or stop it and correct "
                "tracking.uri.",
                shown_uri(server),
                words,
            )

    return wait


def _is_new_file(server: str) -> bool:
    """SQLite would make it, empty, to be asked."""
    file = server.removeprefix("sqlite:///")
    return file != server and not Path(file).exists()


def _stage(server: str, experiment: str) -> str | Exception | None:
    """The experiment's life cycle stage, None if there is none yet, or why that is not known."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        if server.startswith("http"):
            import requests

            # MLflow itself tries for minutes
            requests.get(f"{server.rstrip('/')}/health", timeout=SECONDS)
        from mlflow import MlflowClient

        with quiet():
            there = MlflowClient(tracking_uri=server).get_experiment_by_name(experiment)
    except Exception as error:  # what it is, the record at the end will say
        return error
    return there.lifecycle_stage if there is not None else None
