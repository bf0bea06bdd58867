"""How far a target's head map has drifted, as one MLflow run that gets a point for every look."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tasks.tracking.views import SERIES

if TYPE_CHECKING:
    from mlflow import MlflowClient


def add_point(
    client: MlflowClient,
    experiment_id: str,
    series: str,
    title: str,
    step: int,
    figures: Mapping[str, float],
    tags: Mapping[str, str],
    note: str,
) -> str:
    """Adds the figures of a look to the run of its series, which the first look makes.

    Returns:
        The run's id.
    """
    from mlflow.entities import Metric, RunTag

    wanted = f"tags.`{SERIES}` = '{series}'"
    found = client.search_runs([experiment_id], wanted, max_results=1)
    if found:
        run_id = str(found[0].info.run_id)
    else:
        run = client.create_run(experiment_id, run_name=title, tags={SERIES: series})
        run_id = str(run.info.run_id)
        client.set_terminated(run_id)
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, now, step) for key, value in figures.items()],
        tags=[RunTag("mlflow.note.content", note), *(RunTag(*one) for one in tags.items())],
    )
    return run_id
