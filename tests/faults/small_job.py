"""A small adaptation on the demo's world, run for real in this process."""

from pathlib import Path
from typing import Any

from flows.adapt import run_adapt
from flows.settings import parse_settings
from p2d_core.synthetic.world import BASE_FOLDER, write_world
from tasks.summary import Summary


class SmallJob:
    """Seconds: few samples, no loss to speak of, no arms beside P2D."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "artifacts"
        write_world(folder / "whole", seed=3)
        for name, rows in {
            "target.jsonl": 40, "evaluation.jsonl": 6, "corpus/ledgers.jsonl": 60,
            "corpus/drills.jsonl": 60,
        }.items():  # fmt: skip
            lines = (folder / "whole" / name).read_text().splitlines(keepends=True)
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("".join(lines[:rows]))
        self.values: dict[str, Any] = {
            "base": str(BASE_FOLDER),
            "target": {"path": "target.jsonl"},
            "corpus": {
                "sources": [{"path": "corpus/ledgers.jsonl"}, {"path": "corpus/drills.jsonl"}],
                "include_target": False,
            },
            "evaluation": {"source": {"path": "evaluation.jsonl"}},
            "proxy": {"samples": 10, "held_out": 10, "epochs": 1},
            "heads": {"ranker": "frobenius", "proxy_epochs": 1},
            "scoring": {"scorer": "tfidf"},
            "training": {"epochs": 1},
            "arms": {"random": False, "full": "calibrated", "calibration_steps": 4},
        }

    def run(self, head_map: str | None = None, **changes: Any) -> Summary:
        values = dict(self.values)
        for key, value in changes.items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
        settings = parse_settings(values, self.folder / "run.yaml")
        return run_adapt(settings, store=self.store, head_map=head_map)
