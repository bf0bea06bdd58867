"""Tasks of lm-eval on the base or an adapted model."""

from __future__ import annotations

import json
from pathlib import Path

from p2d_core.adaptation.adaptations import adapted
from p2d_core.evaluation.harness import HarnessSpec, run_tasks
from p2d_core.models import load_model, load_tokenizer
from p2d_core.store import ArtifactRef, Making
from tasks.progress import progress_of
from tasks.stage import BaseModel, Runtime, stage

RESULTS = "results.json"


@stage("harness", outside_key=("arm", "batch_size"))
def run_harness(
    making: Making,
    runtime: Runtime,
    base: BaseModel,
    model: ArtifactRef | None,
    harness: HarnessSpec,
    batch_size: int,
    arm: str,
) -> None:
    """A row a task, metric and filter, with its standard error; ``model`` None is the base itself.

    The separator and the limit of tokens are not used: a task brings its own text, and is asked as
    by lm-eval's own command, so that figures can be compared with published ones.
    """
    captured = base.captured(runtime)
    if model is None:
        loaded = captured.model
    else:
        loaded = adapted(load_model(captured.folder, base.precision, captured.device), model.path)
    with progress_of(f"harness ({arm})") as progress:
        rows = run_tasks(
            loaded,
            load_tokenizer(Path(base.folder)),
            harness,
            batch_size=batch_size,
            progress=progress,
        )
    text = json.dumps(rows, indent=2) + "\n"
    (making.folder / RESULTS).write_text(text, encoding="utf-8")
    making.facts |= {"results": rows, "lm_eval": harness.version}
    making.samples = sum(row["samples"] for row in rows)
