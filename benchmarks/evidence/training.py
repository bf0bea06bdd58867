"""What training on each choice gives: `p2d compare` on a world of its own for every seed."""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence.studies import Study, trained_as
from flows.compare import run_compare
from p2d_core.comparison import arms
from p2d_core.comparison.arms import ArmRun


def run(study: Study, seeds: range, store: Path, kept: Path) -> list[ArmRun]:
    """Every seed; the table of all that are done is written after each."""
    (prepare,) = study.worlds.values()
    found: list[ArmRun] = []
    for seed in seeds:
        settings = trained_as(study, prepare(store / "worlds" / "trained" / f"seed-{seed}", seed))
        compare = settings.compare.model_validate({**study.compare, "seeds": [seed]})
        done = run_compare(settings.model_copy(update={"compare": compare}), store=store)
        runs, metric, higher_is_better = arms.read(done.path)
        found += runs
        kept.mkdir(parents=True, exist_ok=True)
        arms.write(found, metric, higher_is_better, kept)
    return found
