"""Which artifacts MLflow's registered models were made from: they stay as long as the version."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from p2d_core.errors import ArtifactError, ServiceError
from p2d_core.store import Store
from p2d_core.store.runs import read_summary, run_files
from tasks.tracking.database import mlflow_uri, shown_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

T = TypeVar("T")
PAGE = 1000
MOST_ASKED = 20
"""Runs that a server is asked for, the newest: one is enough."""
LOGGED = re.compile("models:/(m-[0-9a-f]+)")
"""Source of a version that was registered from a logged model."""
SQLITE = "sqlite:///"
KEY = "key"
"""Tag of a logged model: the key of its `model` artifact; of a version: ``key.<stage>`` too."""
NOTHING_REMOVED = "Which artifacts registered models need is not known, so nothing was removed."


def registered_keys(store: Store, servers: Sequence[str]) -> set[str]:
    """Keys of artifacts that a registered model version names, at the servers and in the store.

    Args:
        servers: MLflow servers beside the store's own database and others that runs were recorded
            in, which are looked at if they are there.

    Raises:
        ServiceError: one of them does not answer or refuses, or runs of this store were recorded
            at a server that is none of them.
    """
    recorded = _recorded_elsewhere(store)
    files = [uri for uri in recorded if uri.startswith(SQLITE) and _file_of(uri).is_file()]
    given = {shown_uri(uri).rstrip("/") for uri in (*servers, *files)}
    # from here a server may have another address than from where the run was
    unasked = [
        uri
        for uri, runs in sorted(recorded.items())
        if uri not in given and not any(_knows_one_of(runs, server) for server in servers)
    ]
    if unasked:
        raise ServiceError(
            f"runs of this store were recorded in MLflow at {', '.join(unasked)}, which this "
            f"command was not told to ask. {NOTHING_REMOVED} Name the server with --mlflow URI or "
            "MLFLOW_TRACKING_URI (several: --mlflow for each), by the address that it has from "
            "here; it is known by these runs."
        )
    own = [mlflow_uri(store.root)] if _database(store).is_file() else []
    return {key for uri in dict.fromkeys([*servers, *files, *own]) for key in _keys_at(uri)}


def _database(store: Store) -> Path:
    return store.root / "mlflow" / "mlflow.db"


def _file_of(uri: str) -> Path:
    return Path(uri.removeprefix(SQLITE))


def _recorded_elsewhere(store: Store) -> dict[str, list[str]]:
    """What summaries of runs name beside the store's own database, each with its runs' ids there.

    A damaged summary names nothing.
    """
    found: dict[str, list[str]] = {}
    own = _database(store)
    for file in run_files(store):
        with suppress(ArtifactError, KeyError, TypeError, AttributeError):
            recorded = read_summary(file)["mlflow"]
            uri = str(recorded["tracking_uri"]).rstrip("/")
            # a store that was moved still has its database, under another path
            is_own = uri.startswith(SQLITE) and (
                not _file_of(uri).is_file() or _file_of(uri).resolve() == own.resolve()
            )
            if not (is_own and own.is_file()):
                found.setdefault(uri, []).append(str(recorded["run_id"]))
    return found


def _knows_one_of(runs: Sequence[str], uri: str) -> bool:
    """Whether an MLflow has one of these runs, so that it is the one where they were recorded."""
    from mlflow.exceptions import MlflowException

    def look(client: MlflowClient) -> bool:
        for run in runs[:MOST_ASKED]:
            try:
                client.get_run(run)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                return True
        return False

    return _asked(uri, look)


def _keys_at(uri: str) -> set[str]:
    return _asked(
        uri,
        lambda client: {key for version in _versions(client) for key in _keys_of(client, version)},
    )


def _asked(uri: str, question: Callable[[MlflowClient], T]) -> T:
    """What an MLflow answers, or why it does not."""
    # who waits for an answer wants to know within a minute that there is none
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("mlflow", "alembic"):
        # what goes wrong is raised, and told once
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        if uri.startswith(SQLITE) and not _file_of(uri).is_file():
            # to ask it would make it
            raise FileNotFoundError("there is no such file")
        return question(MlflowClient(tracking_uri=uri, registry_uri=uri))
    except (MlflowException, SQLAlchemyError, OSError) as error:
        said = str(error).splitlines()[0].rstrip(".")[:300] if str(error) else type(error).__name__
        raise ServiceError(
            f"MLflow at {shown_uri(uri)} does not say which models are registered: "
            f"{shown_uri(said)}. {NOTHING_REMOVED} Try again when it can be reached, with a user "
            "who may read every model."
        ) from error


def _versions(client: MlflowClient) -> Iterator[ModelVersion]:
    token = None
    while True:
        page = client.search_model_versions(max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _keys_of(client: MlflowClient, version: ModelVersion) -> list[str]:
    from mlflow.exceptions import MlflowException

    named = _keys_in(version.tags)
    logged = LOGGED.fullmatch(version.source or "")
    if named or logged is None:
        return named
    # registered by hand, from the page of a run's adapter
    try:
        return _keys_in(client.get_logged_model(logged[1]).tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        # deleted, and the version with it of no use
        return []


def _keys_in(tags: Mapping[str, str]) -> list[str]:
    return [value for name, value in tags.items() if name == KEY or name.startswith(f"{KEY}.")]
