"""Where runs are recorded: a server, or the store's own MLflow database."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
SERVER = "MLFLOW_TRACKING_URI"
"""In the environment: the server, if the settings name none."""


def server_of(given: str | None) -> str | None:
    """The MLflow server that the settings or the environment name; None: the store's own."""
    return given or os.environ.get(SERVER) or None


def address_of(store: Path, given: str | None) -> str:
    """Where a run is recorded."""
    return server_of(given) or mlflow_uri(store)


def mlflow_uri(store: Path) -> str:
    """Where runs are recorded when no server is named."""
    return f"sqlite:///{store.resolve() / 'mlflow' / 'mlflow.db'}"


def shown_uri(uri: str) -> str:
    """A server's address without the name and password that may stand in it."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)


def prepare_tracking(store: Path) -> None:
    """Makes the store's MLflow database if it has none; seconds the first time.

    Its some fifty migrations run on a file of their own that then takes its place: quicker without
    a sync after each, and a kill leaves no half-made database behind.
    """
    folder = store.resolve() / "mlflow"
    database = folder / "mlflow.db"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_of(store, "mlflow"):
        # whoever drew these up held the lock, and was killed
        for file in folder.glob(".mlflow-*"):
            file.unlink()
        if not database.exists():
            _make_database(database)


@contextmanager
def lock_of(store: Path, name: str) -> Iterator[None]:
    """One process at a time, of those that work in this store."""
    locks = store.resolve() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_database(database: Path) -> None:
    folder = database.parent
    draft = folder / f".mlflow-{uuid.uuid4().hex[:8]}.db"
    log.info("making %s: once for this store", database)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # importing it sets its loggers up, so they are quieted after that
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    with quiet():

        def without_sync(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA synchronous = OFF")

        event.listen(Engine, "connect", without_sync)
        try:
            made = SqlAlchemyStore(f"sqlite:///{draft}", str(folder / "artifacts"))
            made.engine.dispose()
            with draft.open("rb") as stream:
                os.fsync(stream.fileno())
            draft.rename(database)
        finally:
            event.remove(Engine, "connect", without_sync)
            for file in folder.glob(f"{draft.name}*"):
                file.unlink(missing_ok=True)


@contextmanager
def quiet() -> Iterator[None]:
    """MLflow's own log is silent in its block."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        # what goes wrong is raised, and told once
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
