"""A small adaptation on the demo's world, run for real: all stages, in seconds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.adapt import run_adapt
from flows.settings import RunSettings, parse_settings
from p2d_core.synthetic.world import BASE_FOLDER, write_world
from tasks.summary import Summary

ROWS = {
    "target.jsonl": 60,
    "evaluation.jsonl": 12,
    "corpus/ledgers.jsonl": 300,
    "corpus/drills.jsonl": 900,
}
"""File of the job -> the rows of the world's that it has."""
SETTINGS: dict[str, Any] = {
    "name": "small",
    "base": str(BASE_FOLDER),
    "target": {"path": "target.jsonl"},
    "corpus": {
        "sources": [{"path": "corpus/ledgers.jsonl"}, {"path": "corpus/drills.jsonl"}],
        "include_target": False,
    },
    "evaluation": {"source": {"path": "evaluation.jsonl"}},
    "proxy": {"samples": 20, "held_out": 20, "epochs": 1},
    "heads": {"ranker": "frobenius", "proxy_epochs": 1, "proxy_learning_rate": 3e-4},
    "selection": {"replay": 0.0},
    "training": {"epochs": 1, "learning_rate": 3e-4},
    "arms": {
        "random": False,
        "full": "calibrated",
        "calibration_steps": 4,
        "full_learning_rate": 1e-4,
    },
}


def write_files(folder: Path, rows: Mapping[str, int] = ROWS) -> None:
    """The data; the same bytes every time."""
    write_world(folder / "whole", seed=3)
    for name, n_rows in rows.items():
        lines = (folder / "whole" / name).read_text().splitlines(keepends=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(lines[:n_rows]))


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of settings with some others; a mapping changes only the keys that it has."""
    made = copy.deepcopy(dict(values))
    for key, value in changes.items():
        made[key] = made.get(key, {}) | value if isinstance(value, dict) else value
    return made


class Job:
    """A small adaptation whose files and settings a test can change between runs."""

    def __init__(self, folder: Path, rows: Mapping[str, int] = ROWS, **changes: Any) -> None:
        self.folder = folder
        self.store = folder / "artifacts"
        write_files(folder, rows)
        self.values = changed(SETTINGS, changes)

    def settings(self, **changes: Any) -> RunSettings:
        return parse_settings(changed(self.values, changes), self.folder / "run.yaml")

    def run(self, head_map: str | None = None, **changes: Any) -> Summary:
        return run_adapt(self.settings(**changes), store=self.store, head_map=head_map)


def quick_job(folder: Path) -> Job:
    """As few samples as will do, scored by their words."""
    rows = {
        "target.jsonl": 40, "evaluation.jsonl": 6, "corpus/ledgers.jsonl": 60,
        "corpus/drills.jsonl": 60,
    }  # fmt: skip
    return Job(folder, rows, proxy={"samples": 10, "held_out": 10}, scoring={"scorer": "tfidf"})
