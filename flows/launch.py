"""How a flow is started: a server is there, what killed runs left is cleared, the run is noted."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from flows.engine import engine_of
from flows.environment import wait_for_server
from flows.hub import pinned
from flows.killed import clear_killed, end_orphans, noted, untagged
from flows.prefect_progress import told_to_prefect
from flows.services import service_error
from flows.settings import RunSettings, anchored, named_after
from p2d_core.errors import ArtifactError, P2DError
from p2d_core.store import ArtifactRef, Store
from tasks.stage import BaseModel
from tasks.tracking.ahead import ask_ahead

MOST_STARTS = 5
"""Of one run: what kills it every time must not go on for ever."""

T = TypeVar("T")
C = TypeVar("C")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begun(Generic[C]):
    """A run that was noted, with its input checked."""

    settings: RunSettings
    run_id: str
    checked: C
    finished: list[Any]
    """Where the flow leaves what came of it, for the case that Prefect then cannot be told."""


_begun: ContextVar[Begun[Any] | None] = ContextVar("begun", default=None)
"""The run that `started` has begun, so that its flow does not read all data again."""


def started(
    settings: RunSettings, base: BaseModel, checked: C, store: Path, flow: Callable[[], T]
) -> T:
    """Calls a flow whose input was checked, which `run_of` gives it then.

    Raises:
        SettingsError: the engine that the settings name is not there, or their experiment deleted.
        ServiceError: Prefect's server went away before the work was done.
    """
    finished: list[T] = []
    answered = ask_ahead(settings.tracking.uri, settings.tracking.experiment, store)

    def run(run_id: str) -> T:
        answered()
        token = _begun.set(Begun(settings, run_id, checked, finished))
        try:
            return flow()
        finally:
            _begun.reset(token)

    with engine_of(settings, base):
        return launch(store, run, finished)


def launch(store: Path, run: Callable[[str], T], finished: list[T]) -> T:
    """Calls ``run`` with a new run's id, as a run that the next one knows of if it is killed.

    Args:
        run: calls the flow, after its input was checked.
        finished: where the flow leaves what came of it, for the case that Prefect then cannot be
            told.

    Raises:
        ServiceError: Prefect's server went away before the work was done.
    """
    from prefect import tags

    run_id = new_run_id()
    try:
        end_orphans(store)
        wait_for_server()
        clear_killed(store)
        with noted(store, run_id), tags(run_id), _without_heartbeats():
            return run(run_id)
    except Exception as error:
        away = service_error(error)
        if away is None:
            raise
        if not finished:
            raise away from error
        log.warning("the run is done and recorded, but not in Prefect's pages: %s", away)
        return finished[0]


@contextmanager
def run_of(
    settings: RunSettings, store: Path, check: Callable[[RunSettings], tuple[C, BaseModel]]
) -> Iterator[Begun[C]]:
    """Around the work of a flow, which `started` has begun or a worker has started.

    Args:
        check: the input of the run, and its base model; asked where a worker has started it.
    """
    if (begun := _begun.get()) is not None:
        with untagged(begun.run_id):
            yield begun
        return
    settings = pinned(anchored(settings, Path.cwd()))
    checked, base = check(settings)
    ask_ahead(settings.tracking.uri, settings.tracking.experiment, store)()
    with engine_of(settings, base), on_worker(store) as run_id:
        yield Begun(settings, run_id, checked, [])


@contextmanager
def _without_heartbeats() -> Iterator[None]:
    """On a temporary server of our own nobody listens, and each flow run ends a second later.

    Prefect's thread for them looks once a second whether it is to stop, and the run waits for it.
    """
    from prefect.settings import temporary_settings

    if "PREFECT_API_URL" in os.environ:
        yield
    else:
        with temporary_settings({"flows.heartbeat_frequency": None}):
            yield


@contextmanager
def on_worker(store: Path) -> Iterator[str]:
    """Around the work of a flow that a worker has started; gives the run's id.

    Progress is told as Prefect's progress artifacts. A run that was killed is not marked as
    crashed here: its worker's heartbeats say so (`flows.deploying`), and it may be this one again.
    """
    from prefect.runtime import flow_run

    if (flow_run.run_count or 0) > MOST_STARTS:
        raise P2DError(
            f"this run was killed {MOST_STARTS} times and is not started again: see the worker's "
            "log and the machine's memory. A new run goes on from what was finished."
        )
    clear_killed(store)
    run_id = new_run_id()
    with told_to_prefect(), noted(store, run_id):
        yield run_id


def store_folder(given: str | None) -> Path:
    """Where a deployed flow keeps artifacts: as given, else P2D_STORE, else ``artifacts``."""
    return Path(given or os.environ.get("P2D_STORE") or "artifacts").resolve()


def run_name(kind: str = "") -> str:
    """Such as "math on gsm8k, 2026-01-31": what a run of the calling flow is about, and its day."""
    from prefect.runtime import flow_run

    settings = flow_run.parameters["settings"]
    target = settings.target.name or named_after(settings.target.path)
    return f"{settings.name}{kind} on {target}, {time.strftime('%Y-%m-%d')}"


def new_run_id() -> str:
    """When it began, and a few letters more."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def ranked_bases(store: Store) -> set[str]:
    """Hashes of the base models that the store has head maps of."""
    return {base_of(ref) for ref in store.refs("heads")}


def base_of(heads: ArtifactRef) -> str:
    """The hash of the base model that a head map was made for; empty if its manifest is broken."""
    try:
        return str(heads.manifest.inputs["base"]["sha256"])
    except (ArtifactError, KeyError, TypeError):
        return ""
