"""Records a run in MLflow: one MLflow run each, numbers, pictures, and the adapter as a model."""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import math
import os
import re
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from p2d_core.errors import ServiceError, TransientError
from p2d_core.store import ArtifactRef
from p2d_core.store.runs import keep_summary
from tasks.pictures import draw_pictures
from tasks.stage import is_transient
from tasks.summary import ARMS, Summary

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)
T = TypeVar("T")

LONGEST_PARAM = 6000
CURVE_POINTS = 1000


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
    locks = store.resolve() / ".locks"
    for needed in (folder, locks):
        needed.mkdir(parents=True, exist_ok=True)
    with (locks / "mlflow").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # whoever drew these up held the lock, and was killed
        for file in folder.glob(".mlflow-*"):
            file.unlink()
        if not database.exists():
            _make_database(database)


def _make_database(database: Path) -> None:
    folder = database.parent
    draft = folder / f".mlflow-{uuid.uuid4().hex[:8]}.db"
    log.info("making %s: once for this store", database)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # importing it sets its loggers up, so they are quieted after that
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    with _quiet():

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


def record_run(
    summary: Summary,
    settings: Mapping[str, Any],
    *,
    store: Path,
    refs: Mapping[str, ArtifactRef] | None = None,
    experiment: str = "p2d",
    uri: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Writes one MLflow run; what lies in the store stays there, only small files are copied.

    Args:
        settings: as plain values; nested keys become ``heads.ranker`` and the like.
        refs: artifacts by the name that the run gives them (``model``, ``model_random``); those of
            ``summary.artifacts`` if empty.
        uri: MLflow server; if empty the one of MLFLOW_TRACKING_URI, and without it SQLite and a
            folder in the store.
        tags: further tags.

    Returns:
        ``tracking_uri``, ``experiment`` and ``run_id``.

    Raises:
        TransientError: the disk or the database did not take it this time.
        ServiceError: MLflow cannot be reached or refuses.
    """
    refs = refs if refs is not None else _refs_of(summary)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    local = not uri
    uri = uri or mlflow_uri(store)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    with _quiet():
        try:
            if local:
                prepare_tracking(store)
            client = MlflowClient(tracking_uri=uri)
            location = store.resolve() / "mlflow" / "artifacts" if local else None
            experiment_id = _experiment(client, experiment, location)
            scratch = store.resolve() / ".scratch"
            run_id = _write(
                client, experiment_id, summary, settings, refs, dict(tags or {}), scratch
            )
        except (MlflowException, SQLAlchemyError, OSError) as error:
            # MLflow hides a locked database behind an exception of its own
            causes = (error, error.__cause__, error.__context__)
            may_pass = any(isinstance(each, OSError | OperationalError) for each in causes)
            said = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise (TransientError if may_pass else ServiceError)(
                "the run is done and its artifacts are kept, but MLflow at "
                f"{shown_uri(uri)} did not take its record: {shown_uri(said)}. When it can "
                "be reached and written (tracking.uri), the same command records it without "
                "computing anything again."
            ) from error
    return {"tracking_uri": shown_uri(uri), "experiment": experiment, "run_id": run_id}


@task(name="record", retries=2, retry_condition_fn=is_transient, cache_policy=NO_CACHE)
def record(summary: Summary, settings: Mapping[str, Any], store: str) -> Summary:
    """Records the run in MLflow and writes ``runs/<run_id>.json``; every run is, reused or not."""
    tracking = settings["tracking"]
    public = {**tracking, "uri": shown_uri(tracking["uri"] or "")}
    try:
        summary.mlflow = record_run(
            summary,
            {**settings, "tracking": public},
            store=Path(store),
            experiment=tracking["experiment"],
            uri=tracking["uri"],
            tags=tracking["tags"],
        )
    finally:
        keep_summary(Path(store), summary.run_id, summary.to_json())
    return summary


def _write(
    client: MlflowClient,
    experiment_id: str,
    summary: Summary,
    settings: Mapping[str, Any],
    refs: Mapping[str, ArtifactRef],
    tags: dict[str, str],
    scratch: Path,
) -> str:
    from mlflow.entities import Param, RunTag

    title = f"{summary.name} {summary.run_id}"
    run = client.create_run(experiment_id, run_name=title, tags=_tags(summary, refs) | tags)
    run_id = run.info.run_id
    try:
        params = [Param(key, value) for key, value in flat(settings).items()]
        for batch in _batches(params, 100):
            client.log_batch(run_id, params=batch)
        curves = {name: curve for name, ref in refs.items() if (curve := _loss_curve(ref))}
        for batch in _batches(_metrics(summary, curves), 1000):
            client.log_batch(run_id, metrics=batch)
        # in the store, where the next run finds it when this one is killed
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"record-{summary.run_id}-", dir=scratch) as folder:
            draw_pictures(Path(folder), summary, refs, curves)
            (Path(folder) / "summary.json").write_text(summary.to_json(), encoding="utf-8")
            client.log_artifacts(run_id, folder)
        if "model" in refs and (refs["model"].path / "adapter").is_dir():
            _log_adapter(client, experiment_id, run_id, summary, refs["model"])
        note = RunTag("mlflow.note.content", as_markdown(summary))
        client.log_batch(run_id, tags=[note])
        client.set_terminated(run_id, "FINISHED")
    except BaseException:
        with suppress(Exception):
            client.set_terminated(run_id, "FAILED")
        raise
    return str(run_id)


def _experiment(client: MlflowClient, name: str, location: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        place = location.as_uri() if location else None
        try:
            # without it the UI opens with its pages for chats and agents
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=place, tags=tags))
        except MlflowException:
            # another run made it in the meantime
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _tags(summary: Summary, refs: Mapping[str, ArtifactRef]) -> dict[str, str]:
    tags = {
        "p2d.run_id": summary.run_id,
        "base_model": summary.base,
        "target": summary.target,
        "ranker": summary.heads.ranker,
        "scorer": summary.selection.scorer,
        "mlflow.source.name": "p2d",
        "mlflow.source.type": "LOCAL",
    }
    with suppress(OSError, KeyError):
        tags["mlflow.user"] = getpass.getuser()
    commit = _git("rev-parse", "HEAD")
    if commit:
        changes = _git("status", "--porcelain", "--untracked-files=no")
        tags["git_commit"] = tags["mlflow.source.git.commit"] = commit
        tags["git_changes"] = "yes" if changes else "no"
    return tags | {f"key.{name}": ref.key for name, ref in refs.items()}


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of dotted keys; what is empty is left out."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
            found |= flat({str(i): part for i, part in enumerate(value)}, f"{prefix}{key}.")
        elif value is not None and value != "" and value != []:
            found[f"{prefix}{key}"] = str(value)[:LONGEST_PARAM]
    return found


def _metrics(summary: Summary, curves: Mapping[str, list[dict[str, float]]]) -> list[Metric]:
    from mlflow.entities import Metric

    quality, aer, selection = summary.quality, summary.aer, summary.selection
    numbers: dict[str, float | None] = {f"quality/{arm}": getattr(quality, arm) for arm in ARMS}
    numbers |= {f"retention/{arm}": value for arm, value in quality.retention.items()}
    numbers |= {f"eval_loss/{arm}": value for arm, value in quality.losses.items()}
    numbers |= {
        "aer/cold": aer.cold,
        "aer/this_run": aer.this_run,
        "aer/speedup": aer.speedup,
        "aer/full_seconds": aer.full_seconds,
        "aer/full_spread_seconds": aer.full_spread_seconds,
        "trainable/parameters": summary.trainable.parameters,
        "trainable/share_of_model": summary.trainable.share_of_model,
        "trainable/share_of_attention": summary.trainable.share_of_attention,
        "heads/selected": summary.heads.selected,
        "heads/total": summary.heads.total,
        "selection/selected": selection.selected,
        "selection/corpus": selection.corpus,
        "selection/cut_off": selection.cut_off,
        "samples/rejected": sum(one.rows for one in summary.rejected),
        "seconds": summary.seconds,
    }
    numbers |= {f"aer_seconds_cold/{term}": s for term, s in aer.stages.items()}
    numbers |= {f"aer_seconds_this_run/{term}": s for term, s in aer.stages_this_run.items()}
    for what, counts in (("source", selection.by_source), ("label", selection.by_label)):
        numbers |= {f"selected_by_{what}/{_safe(name)}": n for name, n in counts.items()}
    now = int(time.time() * 1000)
    metrics = [
        Metric(key, float(value), now, 0)
        for key, value in numbers.items()
        if value is not None and math.isfinite(value)
    ]
    for name, curve in curves.items():
        every = -(-len(curve) // CURVE_POINTS)
        for point in curve[::every]:
            for key in ("loss", "learning_rate", "eval_loss"):
                value = point.get(key)
                if value is not None and math.isfinite(value):
                    metrics.append(Metric(f"{key}/{name}", value, now, int(point["step"])))
    return metrics


def _safe(name: str) -> str:
    """As MLflow wants a part of a metric's name."""
    return "".join(c if c.isalnum() or c in "_-. " else "_" for c in name)[:200] or "_"


def _loss_curve(ref: ArtifactRef) -> list[dict[str, float]]:
    try:
        curve = json.loads((ref.path / "loss.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return [point for point in curve if "step" in point]


def _log_adapter(
    client: MlflowClient, experiment_id: str, run_id: str, summary: Summary, model: ArtifactRef
) -> None:
    """The folder as it is: safetensors and JSON, without the base model and without pickle."""
    from mlflow.entities import LoggedModelOutput

    logged = client.create_logged_model(
        experiment_id,
        name=f"adapter-{model.key[:12]}",
        source_run_id=run_id,
        tags={"base_model": summary.base, "key": model.key},
        params={"trainable": str(summary.trainable.parameters)},
        model_type="peft-adapter",
    )
    client.log_model_artifacts(logged.model_id, str(model.path / "adapter"))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, models=[LoggedModelOutput(logged.model_id, step=0)])


def as_markdown(summary: Summary) -> str:
    """The run on one page, for MLflow's description of it."""
    quality, aer, selection = summary.quality, summary.aer, summary.selection
    better = "higher" if quality.higher_is_better else "lower"
    arms = [
        f"| {arm} | {value:.4f} | {quality.retention.get(arm, math.nan):.4f} |".replace("nan", "")
        for arm in ARMS
        if (value := getattr(quality, arm)) is not None
    ]
    sources = [
        f"| {name} | {n:,} | {selection.corpus_by_source.get(name, 0):,} |"
        for name, n in selection.by_source.items()
    ]
    terms = [
        f"| {term} | {seconds:.1f} | {aer.stages_this_run.get(term, 0.0):.1f} |"
        for term, seconds in aer.stages.items()
    ]
    lines = [
        f"**{summary.name}**: {summary.base} adapted to {summary.target}, "
        f"{summary.heads.selected} of {summary.heads.total} heads, "
        f"{selection.selected:,} of {selection.corpus:,} samples"
        f"{selection.boundary_text}.",
        "",
        f"| arm | {quality.metric} ({better} is better) | retention |",
        "|---|---|---|",
        *arms,
        "",
        f"**AER** {aer.cold:.3f} cold ({aer.speedup:.1f}x), {aer.this_run:.3f} this run; "
        f"full fine-tuning {aer.full_seconds:.1f} s ({aer.reference}).",
        "",
        "| seconds | cold | this run |",
        "|---|---|---|",
        *terms,
        "",
        "| source | chosen | in the corpus |",
        "|---|---|---|",
        *sources,
    ]
    if summary.rejected:
        lines.append("")
        lines += [f"- {one.rows:,} rows of {one.source} left out" for one in summary.rejected]
    if selection.notes:
        lines += ["", *(f"- {note}" for note in selection.notes)]
    return "\n".join(lines) + "\n"


def _refs_of(summary: Summary) -> dict[str, ArtifactRef]:
    refs = {}
    for name, folder in summary.artifacts.items():
        path = Path(folder).resolve()
        refs[name] = ArtifactRef(stage=path.parent.name, key=path.name, location=str(path))
    return refs


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


@contextmanager
def _quiet() -> Iterator[None]:
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
