"""A tiny real job for `p2d adapt`: all stages, several shards, checkpoints after every step."""

from pathlib import Path
from typing import Any

import yaml

from p2d_core.synthetic.world import BASE_FOLDER, write_world

ROWS = {
    "target.jsonl": 60,
    "evaluation.jsonl": 12,
    "corpus/ledgers.jsonl": 300,
    "corpus/drills.jsonl": 900,
}
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "base": str(BASE_FOLDER),
    "target": {"path": "target.jsonl"},
    "corpus": {
        "sources": [{"path": "corpus/ledgers.jsonl"}, {"path": "corpus/drills.jsonl"}],
        "include_target": False,
    },
    "evaluation": {"source": {"path": "evaluation.jsonl"}},
    "proxy": {"samples": 20, "held_out": 20, "epochs": 2},
    "heads": {"ranker": "frobenius", "proxy_epochs": 2},
    "training": {"epochs": 1, "checkpoint_seconds": 0.0001},
    "arms": {"random": False, "full": "calibrated", "calibration_steps": 4},
    "threads": 1,
}


def write_job(folder: Path) -> Path:
    """Writes data and ``run.yaml``; the same bytes every time."""
    write_world(folder / "whole", seed=3)
    for name, rows in ROWS.items():
        lines = (folder / "whole" / name).read_text().splitlines(keepends=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(lines[:rows]))
    return write_settings(folder, "run.yaml")


def write_settings(folder: Path, name: str, **changes: Any) -> Path:
    """A settings file beside the job's data; a mapping changes only the keys that it has."""
    values = dict(SETTINGS)
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    file = folder / name
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file
