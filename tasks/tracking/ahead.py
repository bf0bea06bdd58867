"""Before a run: will the MLflow server that is named take its record?"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from p2d_core.errors import SettingsError
from tasks.tracking.database import address_of, quiet, shown_uri

log = logging.getLogger(__name__)
SQLITE = "sqlite:///"
UNKNOWN = "of an unknown kind"
SECONDS = 10.0
"""That a server has to answer; it is asked while other things start."""


def ask_ahead(uri: str | None, experiment: str, store: Path) -> Callable[[], None]:
    """Asks for the experiment where the run will be recorded, a server beside what else starts.

    A run can do without a server until its end, and its record can be made up for: one that does
    not answer is warned of. A deleted experiment takes no record, whenever it comes, nor does an
    address of a kind that MLflow does not know.

    Returns:
        waits for the answer; raises SettingsError where there can be no record.
    """
    server = address_of(store, uri)
    found: list[str | Exception | None] = []
    asking = threading.Thread(target=lambda: found.append(_stage(server, experiment)), daemon=True)
    if server.startswith(SQLITE):
        found.append(_stage_in(Path(server.removeprefix(SQLITE)), experiment))
    else:
        asking.start()

    def wait() -> None:
        if not found:
            asking.join(SECONDS)
        said = found[0] if found else TimeoutError(f"no answer within {SECONDS:.0f} s")
        if said == UNKNOWN:
            raise SettingsError(
                f"tracking.uri (or MLFLOW_TRACKING_URI) is {shown_uri(server)!r}, of a kind that "
                "MLflow does not know. It takes http(s)://..., sqlite:///... and other databases."
            )
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


def _stage_in(database: Path, experiment: str) -> str | None:
    """As `_stage`; without MLflow, which takes seconds to import and would make a missing file."""
    asked = "SELECT lifecycle_stage FROM experiments WHERE name = ?"
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as there:
            found = there.execute(asked, (experiment,)).fetchone()
    except sqlite3.Error:
        return None  # a new one, or what the record at the end will say
    return str(found[0]) if found else None


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
        return UNKNOWN if "unsupported URI" in str(error) else error
    return there.lifecycle_stage if there is not None else None
