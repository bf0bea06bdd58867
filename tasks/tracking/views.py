"""The experiment as MLflow shows it: preset columns and charts, and links to them in its note.

MLflow keeps the views that its button `Views` lists as tags of the experiment. How they are written
is not documented: it was read off the pages of MLflow 3.17, and tests open them in a browser.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

GROUP, KIND = "p2d.group", "p2d.kind"
"""Tags of a run: what it belongs to; adaptation, arm (of one), comparison, or compared (an arm)."""
VIEW = "mlflow.sharedViewState."
TABLE, ARMS, COMPARED, DRIFT = "p2d", "p2d-arms", "p2d-compared", "p2d-drift"
SERIES = "p2d.drift"
"""Tag of a run of head map drift: the base model and target whose head map is looked at."""

COLUMNS = (
    ("attributes.`User`", 60),
    ("tags.`target`", 80),
    ("tags.`base_model`", 90),
    ("tags.`heads`", 112),
    ("tags.`data`", 140),
    ("metrics.`quality before`", 115),
    ("metrics.`quality`", 68),
    ("metrics.`quality gain`", 98),
    ("metrics.`AER`", 60),
    ("metrics.`speedup`", 76),
    ("tags.`AER parts`", 174),
    ("metrics.`parameters`", 95),
    ("tags.`reused`", 92),
)
"""Of the adaptations: column, width in pixels. All fit on a screen of 1,900."""
FIRST_COLUMNS = (("attributes.`Run Name`", 160), ("runDateAndNestInfo", 140))
"""Those that MLflow always shows: name, and when it was created."""
ARM_CHARTS = (
    ("Quality of the arms", "BAR", "quality"),
    ("Quality of the arms", "BAR", "retention"),
    ("Quality of the arms", "BAR", "eval loss"),
    ("Cost of the arms", "BAR", "training seconds"),
    ("Cost of the arms", "BAR", "parameters"),
    ("Cost of the arms", "LINE", "training loss"),
    ("Adaptations", "IMAGE", "aer"),
    ("Adaptations", "BAR", "AER"),
    ("Adaptations", "IMAGE", "heads"),
)
"""Section, kind and metric (or picture)."""
COMPARED_CHARTS = (
    ("Arms of comparisons", "BAR", "quality"),
    ("Arms of comparisons", "BAR", "gain over random data"),
    ("Arms of comparisons", "BAR", "retention"),
    ("Arms of comparisons", "BAR", "AER"),
    ("Arms of comparisons", "SCATTER", "AER"),
    ("Arms of comparisons", "BAR", "parameters"),
)
DRIFT_CHARTS = tuple(
    ("Head map in use against today's draws", "LINE", key)
    for key in (
        "drift/spearman", "drift/floor_spearman", "drift/overlap", "drift/floor_overlap",
        "drift/replaced",
    )
)  # fmt: skip
OTHER_SECTIONS = (
    "aer", "aer_seconds_cold", "aer_seconds_this_run", "eval_loss", "heads",
    "held_out_loss", "learning_rate",
    "loss", "quality", "retention", "samples", "selected_by_label", "selected_by_source",
    "selection", "trainable", "Model metrics", "System metrics",
)  # fmt: skip
"""Sections that MLflow makes of the metrics that no chart above shows: there, but folded."""


def address(experiment_id: str, view: str = TABLE) -> str:
    """Of a preset view, relative to the MLflow server."""
    as_charts = "" if view == TABLE else "&compareRunsMode=CHART"
    return (
        f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={view}{as_charts}"
    )


def run_address(experiment_id: str, run_id: str, page: str = "") -> str:
    """Of a run, or of one of its files, relative to the MLflow server."""
    file = f"/artifacts/{quote(page)}" if page else ""
    return f"#/experiments/{experiment_id}/runs/{run_id}{file}?workflowType=machine_learning"


def version_address(name: str, version: str) -> str:
    """Of a model version, relative to the MLflow server."""
    return f"#/models/{quote(name)}/versions/{version}?workflowType=machine_learning"


def preset(client: MlflowClient, experiment: Experiment) -> None:
    """Sets the views, and the note where there is none; what is as it should be is left alone."""
    tags = experiment.tags
    kept = {key: _without_times(value) for key, value in tags.items() if key.startswith(VIEW)}
    for key, (name, state) in _views().items():
        if kept.get(VIEW + key) != (name, state):
            client.set_experiment_tag(experiment.experiment_id, VIEW + key, _envelope(name, state))
    if "mlflow.note.content" not in tags:
        client.set_experiment_tag(
            experiment.experiment_id, "mlflow.note.content", _note(experiment.experiment_id)
        )


def _note(experiment_id: str) -> str:
    """MLflow shows its first line without a click."""
    links = " · ".join(
        f"[{words}]({address(experiment_id, view)})"
        for words, view in (
            ("Adaptations", TABLE),
            ("Their arms side by side", ARMS),
            ("Comparisons", COMPARED),
            ("Head map drift", DRIFT),
        )
    )
    return (
        f"**P2D** {links}\n\n"
        "AER parts: ░ proxy run, ▒ head ranking, ▓ scoring, │ selection, █ training; "
        "the whole bar is full fine-tuning on the whole corpus, or P2D where that took longer.\n"
    )


def _views() -> dict[str, tuple[str, dict[str, Any]]]:
    columns = [name for name, _ in COLUMNS]
    widths = dict(FIRST_COLUMNS + COLUMNS)
    table = {"selectedColumns": columns, "columnWidths": widths, "columnOrder": list(widths)}
    return {
        TABLE: ("P2D: adaptations", _state("adaptation") | table),
        ARMS: ("P2D: arms of adaptations", _state("arms") | _charts(ARM_CHARTS, OTHER_SECTIONS)),
        COMPARED: (
            "P2D: arms of comparisons",
            _state("compared") | _charts(COMPARED_CHARTS, OTHER_SECTIONS[-2:]),
        ),
        DRIFT: (
            "P2D: head map drift",
            _state("drift") | _charts(DRIFT_CHARTS, ("drift", *OTHER_SECTIONS[-2:])),
        ),
    }


def _state(what: str) -> dict[str, Any]:
    query = {
        "adaptation": f"tags.`{KIND}` = 'adaptation'",
        "arms": "tags.`arm` LIKE '%'",
        "compared": f"tags.`{KIND}` = 'compared'",
        "drift": f"tags.`{SERIES}` LIKE '%'",
    }[what]
    return {
        "searchFilter": query,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "runsHiddenMode": "FIRST_20_RUNS",
    }


def _charts(given: tuple[tuple[str, str, str], ...], folded: tuple[str, ...]) -> dict[str, Any]:
    names = list(dict.fromkeys(section for section, _, _ in given))
    sections = [
        {"uuid": f"p2d-{name}", "name": name, "display": name in names}
        for name in (*names, *folded)
    ]
    charts = []
    for n, (section, kind, key) in enumerate(given):
        chart: dict[str, Any] = {
            "type": kind,
            "uuid": f"p2d-chart-{n}",
            "metricSectionId": f"p2d-{section}",
            "runsCountToCompare": 20,
        }
        if kind == "IMAGE":
            chart |= {"imageKeys": [key], "step": 0, "showRunParams": False}
        elif kind == "SCATTER":
            chart |= {
                "xaxis": {"key": key, "type": "METRIC"},
                "yaxis": {"key": "quality", "type": "METRIC"},
            }
        elif kind == "LINE":
            # as measured, not smoothed
            chart |= {"metricKey": key, "lineSmoothness": 0, "useGlobalLineSmoothing": False}
        else:
            chart |= {"metricKey": key}
        charts.append(chart)
    plain = {"isGenerated": False, "deleted": False}
    return {
        "compareRunSections": [{"isReordered": False} | plain | one for one in sections],
        "compareRunCharts": [plain | one for one in charts],
        "isAccordionReordered": True,
    }


def _envelope(name: str, state: dict[str, Any]) -> str:
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def _without_times(value: str) -> tuple[str, Any] | None:
    try:
        envelope = json.loads(value)
        return envelope["name"], json.loads(envelope["state"])
    except (ValueError, KeyError, TypeError):
        return None
