"""The tables, the chart and the verdict of a comparison."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from p2d_core.comparison import arms, picture
from p2d_core.comparison.arms import ArmRun
from p2d_core.comparison.statistics import plain
from p2d_core.comparison.verdict import ON_FRONT, answers, arm_lines, front
from p2d_core.store import Making
from tasks.stage import Runtime, stage

VERDICT = "verdict.json"


@stage("comparison", version="2")
def compare_arms(
    making: Making,
    runtime: Runtime,
    runs: list[ArmRun],
    metric: str,
    higher_is_better: bool,
    name: str,
) -> None:
    """A row an arm and seed, the value of every evaluation sample, the chart, the verdict."""
    arms.write(runs, metric, higher_is_better, making.folder)
    lines = arm_lines(runs, higher_is_better)
    picture.draw(lines, metric, higher_is_better, making.folder / picture.PICTURE)
    said: list[dict[str, Any]] = [
        asdict(answer) | {"a": answer.a.label, "b": answer.b.label, "words": answer.words}
        for answer in answers(runs, higher_is_better)
    ]
    said.append({"question": ON_FRONT, "words": front(lines)})
    text = json.dumps(plain(said), indent=2, allow_nan=False) + "\n"
    (making.folder / VERDICT).write_text(text, encoding="utf-8")
    making.facts |= {
        "name": name,
        "metric": metric,
        "arms": len(lines),
        "runs": len(runs),
        "failed": sum(run.failed for run in runs),
    }
    making.samples = len(runs)
