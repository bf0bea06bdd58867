"""The demo's world and settings with which a run over it takes seconds."""

from __future__ import annotations

from pathlib import Path

from p2d_core.synthetic.world import BASE_FOLDER
from tests.job import write_files

ROWS = {
    "target.jsonl": 240, "evaluation.jsonl": 12, "corpus/ledgers.jsonl": 200,
    "corpus/drills.jsonl": 300,
}  # fmt: skip
QUICK = {
    "proxy": {"samples": 30, "held_out": 20, "epochs": 1},
    "heads": {"ranker": "frobenius", "proxy_epochs": 1},
    "training": {"epochs": 1, "checkpoint_seconds": 0.5},
    "arms": {"random": False, "calibration_steps": 4},
    "threads": 1,
}


def write_home(folder: Path) -> None:
    """Files where deployment.yaml looks for them."""
    write_files(folder, ROWS)
    (folder / "base").symlink_to(BASE_FOLDER)
