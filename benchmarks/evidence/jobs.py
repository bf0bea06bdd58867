"""Whole jobs that give their files and a setting or two, and leave all else as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.evidence.studies import Study
from flows.adapt import run_adapt
from flows.settings import RunSettings
from tasks.summary import Summary

TABLE = "jobs.parquet"


@dataclass(frozen=True, slots=True)
class Job:
    """What one job gave, of one seed."""

    name: str
    seed: int
    quality: float
    retention: float
    selected: int
    clean: int
    """Of the selected."""
    aer: float
    selection_share: float
    """Of the AER: what is not training."""


def run(study: Study, seeds: range, store: Path, kept: Path) -> list[Job]:
    """Every job and seed; what is done is written after each seed."""
    (prepare,) = study.worlds.values()
    found: list[Job] = []
    for seed in seeds:
        settings = prepare(store / "worlds" / "jobs" / f"seed-{seed}", seed)
        for name, changes in study.jobs.items():
            given = {**settings.model_dump(mode="json", exclude_unset=True), **changes}
            done = run_adapt(RunSettings.model_validate(given), store=store)
            found.append(_job(name, seed, done))
        kept.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([asdict(each) for each in found]), kept / TABLE)
    return found


def _job(name: str, seed: int, done: Summary) -> Job:
    aer = done.aer
    return Job(
        name=name,
        seed=seed,
        quality=done.quality.p2d,
        retention=done.quality.retention["p2d"],
        selected=done.selection.selected,
        clean=done.selection.by_label.get("clean", 0),
        aer=aer.cold,
        selection_share=1 - aer.stages["model"] / sum(aer.stages.values()),
    )


def read(folder: Path) -> Iterator[Job]:
    """What `run` wrote."""
    for row in pq.read_table(folder / TABLE).to_pylist():
        yield Job(**row)
