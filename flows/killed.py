"""What a killed run leaves behind at Prefect and in the store, and how the next one clears it."""

from __future__ import annotations

import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from flows.environment import STARTED_BY
from p2d_core.errors import ArtifactError
from p2d_core.store.runs import remove_unfinished

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

log = logging.getLogger(__name__)

SERVER = "prefect.server.api.server:create_app"
SECONDS_TO_END = 5.0


@contextmanager
def noted(store: Path, run_id: str) -> Iterator[None]:
    """Notes that this process is at a run, under a lock that dies with it.

    A run that ends by itself takes its note away; of one that was killed or stopped it stays, and
    `clear_killed` of the next run finds it without its lock.
    """
    note = _notes(store) / run_id
    with _alone(store):
        stream = note.open("w", encoding="utf-8")
        fcntl.flock(stream, fcntl.LOCK_EX)
    with stream:
        try:
            yield
        except Exception:
            note.unlink(missing_ok=True)
            raise
        note.unlink(missing_ok=True)


@contextmanager
def untagged(run_id: str) -> Iterator[None]:
    """Within a flow: its tasks do without the run's tag; `clear_killed` finds the flow run by it.

    Prefect asks its server of every tag whether tasks that have it are limited, and where another
    write to its SQLite is on the way that question fails: two seconds until it is asked again.
    """
    from prefect.context import TagsContext

    with TagsContext(current_tags=TagsContext.get().current_tags - {run_id}):
        yield


def clear_killed(store: Path) -> None:
    """Tells Prefect of every run that was killed, and removes what it had not yet put in place."""
    from prefect import get_client

    with _alone(store):
        notes = killed_runs(store)
        if not notes:
            return
        with get_client(sync_client=True) as client:
            for note in notes:
                run_id = note.name
                _mark_as_crashed(client, run_id)
                remove_unfinished(store, run_id)
                for folder in (store / ".scratch").glob(f"record-{run_id}-*"):
                    shutil.rmtree(folder, ignore_errors=True)
                note.unlink(missing_ok=True)
                log.warning(
                    "run %s was killed: Prefect shows it as crashed, what it finished is reused",
                    run_id,
                )


@contextmanager
def between_runs(store: Path) -> Iterator[None]:
    """While its block runs, no run over this store is in progress, and none starts.

    Raises:
        ArtifactError: one is in progress.
    """
    with _alone(store):
        running = [note for note in _all_notes(store) if note.exists() and not _is_free(note)]
        if running:
            raise ArtifactError(
                f"run {running[0].name} is in progress, and what it needs is not known until it "
                "ends. Nothing was removed: try again after it."
            )
        yield


def killed_runs(store: Path) -> list[Path]:
    """Notes of runs whose process is gone."""
    return [note for note in _all_notes(store) if _is_free(note)]


def end_orphans(store: Path) -> None:
    """Ends Prefect's temporary servers over this store whose run was killed."""
    for server in orphaned_servers(store):
        with suppress(psutil.Error):
            server.terminate()
            try:
                server.wait(SECONDS_TO_END)
            except psutil.TimeoutExpired:
                server.kill()
            log.warning("ended Prefect's temporary server that a killed run left (%d)", server.pid)


def orphaned_servers(store: Path) -> list[psutil.Process]:
    """Prefect's temporary servers over this store that outlived the process that started them."""
    home = str(store.resolve() / "prefect")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if SERVER not in (process.info["cmdline"] or ()):
            continue
        with suppress(psutil.Error):  # gone in the meantime, or another user's
            environment = process.environ()
            starter = environment.get(STARTED_BY)
            of_this_store = environment.get("PREFECT_HOME") == home
            # it is a child of its starter, until that is gone
            if of_this_store and starter is not None and process.ppid() != int(starter):
                found.append(process)
    return found


def _mark_as_crashed(client: SyncPrefectClient, run_id: str) -> None:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
    from prefect.states import Crashed

    crashed = Crashed(message="Its process was killed. The same command goes on from there.")
    of_run = FlowRunFilter(tags=FlowRunFilterTags(all_=[run_id]))
    for flow_run in client.read_flow_runs(flow_run_filter=of_run):
        if flow_run.state is None or not flow_run.state.is_final():
            client.set_flow_run_state(flow_run.id, crashed, force=True)
    for task_run in client.read_task_runs(flow_run_filter=of_run):
        if task_run.state is None or not task_run.state.is_final():
            client.set_task_run_state(task_run.id, crashed, force=True)


def _notes(store: Path, *, make: bool = True) -> Path:
    folder = store / "prefect" / "running"
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _all_notes(store: Path) -> list[Path]:
    return sorted(_notes(store, make=False).glob("[!.]*"))


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    with (_notes(store) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_free(note: Path) -> bool:
    try:
        with note.open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True
