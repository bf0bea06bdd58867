"""A run that reuses everything, against a trivial Prefect flow; and `p2d --help`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure, alternate, figure
from benchmarks.sizes import Size

ROWS = {"target.jsonl": 60, "evaluation.jsonl": 12, "corpus/drills.jsonl": 900}
HELP_SECONDS = 0.6


def measure(size: Size) -> Iterator[Figure]:
    """`reused_vs_trivial_flow` and `help_seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        yield _reused(Path(folder))
    words = [str(Path(sys.executable).with_name("p2d")), "--help"]
    (seconds,) = alternate(lambda: subprocess.run(words, capture_output=True, check=True))
    yield figure(
        "help_seconds",
        "p2d --help, a process of its own",
        f"{HELP_SECONDS} s",
        (seconds, [HELP_SECONDS] * len(seconds)),
        goal=1.0,
    )


def _reused(folder: Path) -> Figure:
    from flows.environment import prepare_environment

    prepare_environment(folder / "artifacts")
    from prefect import flow, task

    from flows.adapt import run_adapt
    from flows.settings import parse_settings
    from p2d_core.synthetic.world import BASE_FOLDER, write_world

    write_world(folder / "whole", seed=3)
    for name, rows in ROWS.items():
        lines = (folder / "whole" / name).read_text().splitlines(keepends=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(lines[:rows]))
    values = {
        "base": str(BASE_FOLDER),
        "target": {"path": "target.jsonl"},
        "corpus": {"sources": [{"path": "corpus/drills.jsonl"}], "include_target": False},
        "evaluation": {"source": {"path": "evaluation.jsonl"}},
        "proxy": {"samples": 20, "held_out": 20, "epochs": 1},
        "heads": {"ranker": "frobenius", "proxy_epochs": 1},
        "training": {"epochs": 1},
        "arms": {"random": False, "full": "calibrated", "calibration_steps": 4},
    }
    settings = parse_settings(values, folder / "run.yaml")

    @task
    def one() -> int:
        return 1

    @flow
    def trivial() -> int:
        return one()

    run_adapt(settings, store=folder / "artifacts")
    summary = run_adapt(settings, store=folder / "artifacts")
    made = [line.name for line in summary.stages if not line.reused]
    if made:
        raise AssertionError(f"the second run was to reuse everything, but made {made}")
    seconds = alternate(lambda: run_adapt(settings, store=folder / "artifacts"), trivial)
    return figure(
        "reused_vs_trivial_flow",
        f"run_adapt, all of {len(summary.stages)} stages reused, MLflow record included",
        "a flow of one task that returns 1",
        (seconds[0], seconds[1]),
        goal=3.0,
        floor=1.0,
        floor_of="a flow run of Prefect's own",
    )
