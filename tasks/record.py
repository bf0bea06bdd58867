"""Records a run: its report as an HTML file, its page in MLflow, the adapter as a model version."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from prefect import task
from prefect.cache_policies import NO_CACHE

from p2d_core.errors import ServiceError, TransientError
from p2d_core.store import ArtifactRef
from p2d_core.store.room import storage_error
from p2d_core.store.runs import keep_file, keep_summary
from tasks.report.html import as_html
from tasks.report.markdown import as_note
from tasks.report.page import Page, gather
from tasks.report.prefect import tell_prefect
from tasks.stage import is_transient
from tasks.summary import Summary
from tasks.tracking import comparison, drift, registry, run, views
from tasks.tracking.database import (
    address_of,
    lock_of,
    prepare_tracking,
    quiet,
    server_of,
    shown_uri,
)
from tasks.tracking.registry import Gate

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

log = logging.getLogger(__name__)

REPORT, SETTINGS = "report.html", "settings.yaml"
AGAIN = "the same command records it without computing anything again"
NEXT_LOOK = "the next look, which draws new proxy sets, is recorded"


@task(name="record", retries=2, retry_condition_fn=is_transient, cache_policy=NO_CACHE)
def record(summary: Summary, settings: Mapping[str, Any], store: str) -> Summary:
    """Records the run in MLflow and writes ``runs/<run_id>.json``; every run is, reused or not."""
    tracking, registered = settings["tracking"], settings.get("registry", {})
    public = {**settings, "tracking": {**tracking, "uri": shown_uri(tracking["uri"] or "") or None}}
    gate = Gate(registered["name"], registered["margin"]) if registered.get("enabled") else None
    try:
        summary.mlflow = record_run(
            summary,
            public,
            store=Path(store),
            experiment=tracking["experiment"],
            uri=tracking["uri"],
            tags=tracking["tags"],
            gate=gate,
        )
    finally:
        keep_summary(Path(store), summary.run_id, summary.to_json())
    return summary


def record_run(
    summary: Summary,
    settings: Mapping[str, Any],
    *,
    store: Path,
    refs: Mapping[str, ArtifactRef] | None = None,
    experiment: str = "p2d",
    uri: str | None = None,
    tags: Mapping[str, str] | None = None,
    gate: Gate | None = None,
) -> dict[str, str]:
    """Writes the report and one MLflow run for each arm; only small files are copied.

    The report lies in the store whether or not MLflow takes the rest; ``summary`` gets its path and
    the model version.

    Args:
        settings: as plain values; nested keys become ``heads.ranker`` and the like.
        refs: artifacts by the name that the run gives them (``model``, ``model_random``); those of
            ``summary.artifacts`` if empty.
        uri: MLflow server; that of the environment (MLFLOW_TRACKING_URI) if empty, else SQLite and
            a folder in the store.
        tags: further tags.
        gate: when the adapter may become champion; nothing is registered if empty.

    Returns:
        ``tracking_uri``, ``experiment`` and ``run_id``.

    Raises:
        TransientError: the disk or the database did not take it this time.
        ServiceError: MLflow cannot be reached or refuses.
    """
    store = store.resolve()
    refs = refs if refs is not None else _refs_of(summary)
    report = store / "reports" / f"{summary.run_id}.html"
    with _told(store, uri, AGAIN), _scratch(store, summary.run_id) as folder:
        page = gather(summary, refs, folder)
        kept = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
        (folder / SETTINGS).write_text(kept, encoding="utf-8")
        keep_file(store / "runs" / f"{summary.run_id}.yaml", kept)
        summary.report = os.path.relpath(report)
        keep_file(report, as_html(page))
        with _mlflow(store, experiment, uri) as (client, where, recorded):
            run_id = run.start(client, where.experiment_id, page, settings, refs, tags or {})
            try:
                summary.mlflow = recorded | {"run_id": run_id}
                links = _write(client, where, run_id, page, refs, gate, folder, store)
                run.write_arms(client, where.experiment_id, page, refs, tags or {})
                run.end(client, run_id)
            except BaseException:
                summary.mlflow = {}
                run.end(client, run_id, "FAILED")
                raise
        keep_file(report, as_html(page))
        tell_prefect(page, links)
    return summary.mlflow


@task(name="record", retries=2, retry_condition_fn=is_transient, cache_policy=NO_CACHE)
def record_comparison(
    made: ArtifactRef, run_id: str, tracking: Mapping[str, Any], store: str
) -> dict[str, str]:
    """Records the arms of a comparison in MLflow, and its verdict.

    Raises:
        TransientError, ServiceError: as for `record_run`.
    """
    root = Path(store).resolve()
    uri = tracking["uri"]
    with (
        _told(root, uri, AGAIN),
        _scratch(root, run_id) as folder,
        _mlflow(root, tracking["experiment"], uri) as (client, where, recorded),
    ):
        own = comparison.write(client, where.experiment_id, made, run_id, tracking["tags"], folder)
        return recorded | {"run_id": own}


@task(name="record", retries=2, retry_condition_fn=is_transient, cache_policy=NO_CACHE)
def record_drift(
    series: str,
    target: str,
    step: int,
    figures: Mapping[str, float],
    note: str,
    tags: Mapping[str, str],
    tracking: Mapping[str, Any],
    store: str,
) -> str:
    """Adds a look at a head map to MLflow's run of that map's drift.

    Raises:
        TransientError, ServiceError: as for `record_run`.
    """
    root = Path(store).resolve()
    uri = tracking["uri"]
    with (
        _told(root, uri, NEXT_LOOK),
        _mlflow(root, tracking["experiment"], uri) as (client, where, _),
    ):
        title = f"head map drift: {target}"
        every = {**tracking["tags"], **tags}
        return drift.add_point(
            client, where.experiment_id, series, title, step, figures, every, note
        )


@contextmanager
def _mlflow(
    store: Path, name: str, uri: str | None
) -> Iterator[tuple[MlflowClient, Experiment, dict[str, str]]]:
    """A client, the experiment, and how the two are called in a summary."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    is_local = server_of(uri) is None
    if is_local:
        prepare_tracking(store)
    from mlflow import MlflowClient

    with quiet():
        address = address_of(store, uri)
        client = MlflowClient(tracking_uri=address)
        location = store / "mlflow" / "artifacts" if is_local else None
        called = {"tracking_uri": shown_uri(address), "experiment": name}
        yield client, _experiment(client, name, location), called


def _write(
    client: MlflowClient,
    experiment: Experiment,
    run_id: str,
    page: Page,
    refs: Mapping[str, ArtifactRef],
    gate: Gate | None,
    folder: Path,
    store: Path,
) -> list[tuple[str, str]]:
    """What of a run follows its numbers: the adapter, its version, the files, the note.

    Returns:
        (words, address) of the pages about it, relative to the MLflow server.
    """
    from mlflow.entities import RunTag

    summary = page.summary
    if "model" in refs and (refs["model"].path / "adapter").is_dir():
        # a version is judged by the champion that there is, and there is one of each adapter
        with lock_of(store, "registry"):
            summary.registered = _log_adapter(client, experiment, run_id, page, refs, gate)
    (folder / "summary.json").write_text(summary.to_json(), encoding="utf-8")
    (folder / REPORT).write_text(as_html(page), encoding="utf-8")
    client.log_artifacts(run_id, str(folder))
    _log_images(client, run_id, folder)
    links = [
        ("Whole report", views.run_address(experiment.experiment_id, run_id, REPORT)),
        ("Arms side by side", views.address(experiment.experiment_id, views.ARMS)),
    ]
    if (done := summary.registered) is not None:
        links.append(("Model version", views.version_address(done.name, done.version)))
    picture = f"get-artifact?path={{name}}.png&run_uuid={run_id}"
    note = RunTag("mlflow.note.content", as_note(page, links, picture))
    named = {"model_version": f"{done.name} {done.version}"} if done is not None else {}
    client.log_batch(run_id, tags=[note, *(RunTag(*one) for one in named.items())])
    return [("This run in MLflow", views.run_address(experiment.experiment_id, run_id)), *links]


def _log_images(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Pictures that the experiment's charts show beside each other."""
    from PIL import Image

    for name in ("aer", "heads"):
        if (folder / f"{name}.png").is_file():
            with Image.open(folder / f"{name}.png") as image:
                client.log_image(run_id, image.convert("RGB"), key=name, step=0)


def _log_adapter(
    client: MlflowClient,
    experiment: Experiment,
    run_id: str,
    page: Page,
    refs: Mapping[str, ArtifactRef],
    gate: Gate | None,
) -> Any:
    """The folder as it is: safetensors and JSON, without the base model and without pickle.

    An adapter that is a model version already is not copied again.
    """
    from mlflow.entities import LoggedModelOutput

    model = refs["model"]
    known = None
    if gate is not None:
        gate = replace(gate, name=gate.name or registry.model_name(page.summary.name))
        known = registry.find_version(client, gate.name, model.key)
    model_id = known.tags.get(registry.MODEL_ID) if known is not None else None
    if model_id is None:
        logged = client.create_logged_model(
            experiment.experiment_id,
            name=f"adapter-{model.key[:12]}",
            source_run_id=run_id,
            tags={"base_model": page.summary.base, "key": model.key},
            params={"trainable": str(page.summary.trainable.parameters)},
            model_type="peft-adapter",
        )
        model_id = logged.model_id
        client.log_model_artifacts(model_id, str(model.path / "adapter"))
        client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run_id, models=[LoggedModelOutput(model_id, step=0)])
    if gate is None:
        return None
    return registry.register(client, page, refs, gate, run_id, model_id, known)


def _experiment(client: MlflowClient, name: str, location: Path | None) -> Experiment:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        place = location.as_uri() if location else None
        try:
            # without it the UI opens with its pages for chats and agents
            tags = {"mlflow.experimentKind": "custom_model_development"}
            client.create_experiment(name, artifact_location=place, tags=tags)
        except MlflowException:
            # another run may have made it in the meantime
            if client.get_experiment_by_name(name) is None:
                raise
        found = client.get_experiment_by_name(name)
    views.preset(client, found)
    return found


@contextmanager
def _told(store: Path, uri: str | None, then: str) -> Iterator[None]:
    """What of the errors of MLflow and of the disk a person should see.

    Args:
        then: what may be done when MLflow can be reached again.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        address = address_of(store, uri)
        of_disk = isinstance(error, OSError) and not isinstance(error, RequestException)
        if of_disk and (full := storage_error(error, store, "the run's record")) is not None:
            raise full from error
        # MLflow hides a locked database behind an exception of its own. An IntegrityError is two
        # runs that write the same row, such as the champion's, at once: the second look finds it
        causes = (error, error.__cause__, error.__context__)
        passing = OSError | OperationalError | IntegrityError
        may_pass = any(isinstance(each, passing) for each in causes)
        said = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise (TransientError if may_pass else ServiceError)(
            f"the run is done and its artifacts are kept, but MLflow at {shown_uri(address)} did "
            f"not take its record: {shown_uri(said)}. When it can be reached and written "
            f"(tracking.uri), {then}."
        ) from error


@contextmanager
def _scratch(store: Path, run_id: str) -> Iterator[Path]:
    """A folder in the store, where the next run finds it when this one is killed.

    So is, meanwhile, what MLflow puts aside for itself in the folder for temporary files.
    """
    scratch = store / ".scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    folder, aside = (tempfile.mkdtemp(prefix=f"record-{run_id}-", dir=scratch) for _ in range(2))
    tempfile.tempdir = aside
    try:
        yield Path(folder)
    finally:
        tempfile.tempdir = None  # the usual one again
        for each in (folder, aside):
            shutil.rmtree(each, ignore_errors=True)


def _refs_of(summary: Summary) -> dict[str, ArtifactRef]:
    refs = {}
    for name, folder in summary.artifacts.items():
        path = Path(folder).resolve()
        refs[name] = ArtifactRef(stage=path.parent.name, key=path.name, location=str(path))
    return refs
