"""Whom each ranker and scorer chooses where the answer is known; nothing is trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from benchmarks.evidence.studies import Study
from flows.compare import checked_arms, grid_of
from flows.inputs import make_runtime
from flows.launch import launch, ranked_bases
from flows.ledger import Ledger
from flows.report import label_in, labels_of
from flows.scoring import score_corpus
from flows.settings import RunSettings
from flows.stages import Run, choose, find_heads, read_data
from p2d_core.affinity.scoring import SCORES
from p2d_core.comparison.arms import NONE
from p2d_core.store import ArtifactRef, Store
from tasks.heads import head_map_in
from tasks.samples import shards_of

TABLE = "selection.parquet"


@dataclass(frozen=True, slots=True)
class Choice:
    """What one ranker and scorer chose, of one world and seed."""

    world: str
    seed: int
    scorer: str
    ranker: str
    heads: str
    """The task heads, such as ``0.5 2.1``."""
    selected: int
    clean: int
    """Of the selected."""
    wrong: int
    near: int
    other: int
    auc_wrong: float | None
    """How well the order tells clean target samples from wrong ones; 0.5 is chance."""
    auc_near: float | None
    auc_other: float | None
    seconds: float
    """Cold: proxy, ranking, scoring and selection."""

    @property
    def precision(self) -> float:
        return self.clean / self.selected


def run(study: Study, seeds: range, store: Path, kept: Path) -> list[Choice]:
    """Every world and seed; what is done is written after each."""
    found: list[Choice] = []
    for seed in seeds:
        for world, prepare in study.worlds.items():
            settings = prepare(store / "worlds" / world / f"seed-{seed}", seed)
            grid = {**study.compare, "seeds": [seed], "fractions": [settings.selection.fraction]}
            compare = settings.compare.model_validate(grid)
            settings = settings.model_copy(update={"compare": compare})

            def of_seed(run_id: str, settings: RunSettings = settings) -> list[Choice]:
                return list(choices(settings, store, run_id))

            found += [replace(each, world=world) for each in launch(store, of_seed, [])]
            write(found, kept)
    return found


@flow(name="evidence", task_runner=ThreadPoolTaskRunner(max_workers=1), persist_result=False)
def choices(settings: RunSettings, store: Path, run_id: str) -> list[Choice]:
    """Of every arm."""
    return list(_choices(settings, store, run_id))


def _choices(settings: RunSettings, store: Path, run_id: str) -> Iterator[Choice]:
    checked = checked_arms(grid_of(settings), ranked_bases(Store(store)))
    data = labels = None
    for (arm, seed), inputs in checked.items():
        its = grid_of(settings).arms[arm].model_copy(update={"seed": seed})
        run = Run(its, inputs, make_runtime(its, store, run_id), Ledger(run_id))
        if data is None or labels is None:
            data = read_data(run)
            labels = _labels(data.corpus)
        heads = find_heads(run, data.target) if arm.ranker != NONE else None
        scores = score_corpus(run, data, heads, inputs.scorer)
        subset = choose(run, data, scores)
        seconds = sum(line.cold_seconds for line in run.ledger.lines() if line.name != "samples")
        by_label = labels_of(subset)
        auc = _aucs(scores, labels)
        yield Choice(
            world="",
            seed=seed,
            scorer=arm.scorer,
            ranker=arm.ranker,
            heads=" ".join(f"{layer}.{head}" for layer, head in head_map_in(heads).task_heads)
            if heads is not None
            else "",
            selected=int(subset.manifest.facts["rows"]),
            seconds=seconds,
            **{label: by_label.get(label, 0) for label in ("clean", "wrong", "near", "other")},
            **auc,
        )


def _aucs(scores: ArtifactRef, labels: dict[str, str]) -> dict[str, float | None]:
    """Of the order in which samples are taken: gates first, then affinity."""
    from scipy.stats import rankdata
    from sklearn.metrics import roc_auc_score

    table = pq.read_table(scores.path / SCORES, columns=["sample_id", "affinity", "gates_passed"])
    of = np.array([labels[sample_id] for sample_id in table["sample_id"].to_pylist()])
    places = rankdata(table["affinity"].to_numpy())
    order = places + (len(places) + 1) * table["gates_passed"].to_numpy()
    found: dict[str, float | None] = {}
    for label in ("wrong", "near", "other"):
        both = (of == "clean") | (of == label)
        known = len(set(of[both])) == 2
        found[f"auc_{label}"] = (
            float(roc_auc_score(of[both] == "clean", order[both])) if known else None
        )
    return found


def _labels(corpus: ArtifactRef) -> dict[str, str]:
    return {
        row["sample_id"]: str(label_in(row["extra"]))
        for shard in shards_of(corpus)
        for row in pq.read_table(shard.file, columns=["sample_id", "extra"]).to_pylist()
    }


def write(found: list[Choice], folder: Path) -> None:
    """Writes `TABLE`."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([asdict(each) for each in found]), folder / TABLE)


def read(folder: Path) -> list[Choice]:
    """The inverse of `write`."""
    return [Choice(**row) for row in pq.read_table(folder / TABLE).to_pylist()]
