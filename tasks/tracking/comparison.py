"""A comparison in MLflow: a run for each arm, siblings of one group, and one for the verdict."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from p2d_core.comparison.arms import BASE, ArmRun, read
from p2d_core.comparison.picture import PICTURE
from p2d_core.comparison.verdict import (
    ON_FRONT,
    ArmLine,
    answers,
    arm_lines,
    front,
    further_metrics,
)
from p2d_core.store import ArtifactRef
from tasks.report.markdown import LONGEST_NOTE, escaped, table
from tasks.report.page import user
from tasks.tracking import run
from tasks.tracking.views import COMPARED, GROUP, KIND, address

if TYPE_CHECKING:
    from mlflow import MlflowClient


def write(
    client: MlflowClient,
    experiment_id: str,
    comparison: ArtifactRef,
    run_id: str,
    tags: Mapping[str, str],
    folder: Path,
) -> str:
    """The id of the comparison's own run, whose note has the table and the verdict.

    Args:
        run_id: of the P2D run that made or found the comparison.
        folder: for what is copied, empty.
    """
    from mlflow.entities import RunTag

    runs, metric, higher_is_better = read(comparison.path)
    lines = arm_lines(runs, higher_is_better)
    name = str(comparison.manifest.facts["name"])
    common = {
        GROUP: comparison.key[:12],
        "p2d.run_id": run_id,
        "key.comparison": comparison.key,
        "mlflow.source.name": "p2d compare",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": user() or "unknown",
    } | dict(tags)
    for line in lines:
        _write_arm(client, experiment_id, line, runs, f"{line.arm.label}, {name}", common)
    own = client.create_run(
        experiment_id, run_name=f"{name}: comparison", tags=common | {KIND: "comparison"}
    ).info.run_id
    shutil.copyfile(comparison.path / PICTURE, folder / PICTURE)
    shutil.copyfile(comparison.path / "verdict.json", folder / "verdict.json")
    client.log_artifacts(own, str(folder))
    note = as_note(
        runs, lines, metric, higher_is_better, address(experiment_id, COMPARED),
        f"get-artifact?path={PICTURE}&run_uuid={own}",
    )  # fmt: skip
    client.log_batch(own, tags=[RunTag("mlflow.note.content", note[:LONGEST_NOTE])])
    run.end(client, own)
    return str(own)


def as_note(
    runs: Sequence[ArmRun],
    lines: Sequence[ArmLine],
    metric: str,
    higher_is_better: bool,
    charts: str,
    picture: str,
) -> str:
    """The verdict, the chart and the arms, as markdown."""
    better = "higher" if higher_is_better else "lower"
    more = further_metrics(lines, metric)
    columns = ["arm", f">{escaped(metric)} ({better} is better)", ">over random", ">AER"]
    columns += [*(f">{escaped(name)}" for name in more), ""]
    said = [
        f"- {escaped(one.question)} **{escaped(one.words)}**"
        for one in answers(runs, higher_is_better)
    ]
    rows = [
        [
            escaped(line.arm.label),
            str(line.quality or ""),
            f"{line.over_random.mean:+.3f}" if line.over_random else "",
            f"{line.aer:.2f}" if line.aer is not None else "",
            *(f"{line.metrics[name]:.3f}" if name in line.metrics else "" for name in more),
            f"{line.failed} of {line.runs} failed" if line.failed else "",
        ]
        for line in lines
    ]
    return "\n".join(
        [
            f"{len(lines)} arms · [side by side]({charts})",
            "",
            *(said or ["- No two arms answer a question."]),
            f"- {ON_FRONT} **{escaped(front(lines))}**",
            "",
            f"![AER against quality]({picture})",
            *table(columns, rows),
        ]
    )


def _write_arm(
    client: MlflowClient,
    experiment_id: str,
    line: ArmLine,
    runs: Sequence[ArmRun],
    title: str,
    common: Mapping[str, str],
) -> None:
    from mlflow.entities import Metric

    arm, own = line.arm, [one for one in runs if one.arm == line.arm]
    described = {
        KIND: "compared",
        "scorer": arm.scorer,
        "ranker": arm.ranker,
        "adaptation": arm.adaptation,
    }
    described |= {"data": f"{arm.fraction:.1%}"} if arm.scorer != BASE else {}
    errors = [one.error for one in own if one.error]
    described |= {"error": errors[0][:1000]} if errors else {}
    parameters = next((one.parameters for one in own if one.parameters is not None), None)
    numbers = {
        "quality": line.quality.mean if line.quality else None,
        "retention": line.retention.mean if line.retention else None,
        "gain over random data": line.over_random.mean if line.over_random else None,
        "gain over the best arm": line.over_best.mean if line.over_best else None,
        "AER": line.aer,
        "parameters": parameters,
        "runs": line.runs,
        "failed": line.failed,
    }
    numbers |= {f"quality/{name}": value for name, value in line.metrics.items()}
    made = client.create_run(experiment_id, run_name=title, tags=dict(common) | described)
    metrics = run.as_metrics(numbers, {})
    now = metrics[0].timestamp
    metrics += [
        Metric("quality by seed", one.quality, now, one.seed)
        for one in own
        if one.quality is not None
    ]
    client.log_batch(made.info.run_id, metrics=metrics)
    run.end(client, made.info.run_id, "FAILED" if line.failed == line.runs else "FINISHED")
