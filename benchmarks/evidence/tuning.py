"""What training gives, one thing changed at a time: what moves, on which samples, how long.

Every variant trains on the subset that the study's run chooses, or on what it says. Its learning
rate is the one of its rates, or of all from 1e-3 up or down in halves of a power of ten, that is
best on a validation split, which is drawn like the evaluation samples; only with that one the
evaluation samples are seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner
from safetensors.torch import load_file
from torch.nn.functional import normalize

from benchmarks.evidence.draws import DRAWS, Passed
from benchmarks.evidence.studies import Study, trained_as
from benchmarks.evidence.variants import BY_CHANCE, EVERYTHING, PROXY, SUBSET, Variant
from flows.inputs import check_inputs, make_runtime
from flows.launch import launch
from flows.ledger import Ledger
from flows.scoring import score_corpus, tune_heads
from flows.settings import RunSettings
from flows.settings_base import Rate
from flows.stages import (
    Data,
    Run,
    choose,
    choose_at_random,
    cost_of_full,
    evaluate,
    find_heads,
    read_data,
    train,
)
from p2d_core.adaptation.rates import best_rate
from p2d_core.affinity.head_activation import OUTPUTS
from p2d_core.affinity.measuring import MEASURED
from p2d_core.affinity.scoring import SCORES, STATE
from p2d_core.selection.subset import SUBSET as SUBSET_FILE
from p2d_core.store import ArtifactRef
from p2d_core.synthetic.world import write_world
from tasks.samples import shards_of

TABLE = "tuning.parquet"
RANKED = ("proxy", "heads", "rate")
SELECTED = (*RANKED, "head_proxy", "measurements", "scores", "subset")
SELECTING = {EVERYTHING: (), BY_CHANCE: RANKED, PROXY: RANKED}
"""Stages whose seconds count as choosing, by what is trained on."""
VALIDATION_WORLDS = 10_000
"""Added to a seed: the worlds that validation samples are of."""


@dataclass(frozen=True, slots=True)
class Trained:
    """One variant with the rate that won, of one seed."""

    variant: str
    seed: int
    quality: float
    retention: float
    validation: float
    learning_rate: float
    parameters: int
    selection_seconds: float
    """Cold: proxy, ranking, scoring, selection; 0 of training on everything."""
    training_seconds: float
    search_seconds: float
    """Training with the other rates, and evaluating all of them."""
    full_seconds: float
    """Training all parameters on everything once."""

    @property
    def aer(self) -> float:
        """Without the search."""
        return (self.selection_seconds + self.training_seconds) / self.full_seconds


@dataclass
class World:
    """What the variants of a seed share."""

    settings: RunSettings
    store: Path
    run_id: str
    folder: Path
    """Where samples that are drawn here are written."""
    runs: dict[str, tuple[Run, Data, ArtifactRef]] = field(default_factory=dict)
    """What to train on, by name."""

    def run_of(self, changes: Mapping[str, Mapping[str, Any]], **more: Any) -> Run:
        """The world's run with some settings changed."""
        values = self.settings.model_dump(mode="json")
        for section, change in changes.items():
            values[section] = values[section] | dict(change)
        its = RunSettings.model_validate(values | more)
        runtime = make_runtime(its, self.store, self.run_id)
        return Run(its, check_inputs(its, set()), runtime, Ledger(self.run_id))


def run(study: Study, seeds: range, store: Path, kept: Path) -> list[Trained]:
    """Every seed; what is done is written after each."""
    (prepare,) = study.worlds.values()
    found: list[Trained] = []
    for seed in seeds:
        folder = store / "worlds" / "tuning" / f"seed-{seed}"
        settings = trained_as(study, prepare(folder, seed))
        validation = write_world(folder / "validation", seed + VALIDATION_WORLDS).evaluation

        def of_seed(
            run_id: str,
            settings: RunSettings = settings,
            folder: Path = folder,
            validation: Path = validation,
        ) -> list[Trained]:
            world = World(settings, store, run_id, folder)
            return variants(study, world, validation)

        found += launch(store, of_seed, [])
        write(found, kept)
    return found


@flow(name="evidence", task_runner=ThreadPoolTaskRunner(max_workers=1), persist_result=False)
def variants(study: Study, world: World, validation: Path) -> list[Trained]:
    """Of every variant of the study."""
    shared = world.run_of({})
    data = read_data(shared)
    heads = find_heads(shared, data.target)
    scores = score_corpus(shared, data, heads, shared.inputs.scorer)
    subset = choose(shared, data, scores)
    world.runs[SUBSET] = (shared, data, subset)
    world.runs[EVERYTHING] = (shared, data, data.corpus)
    world.runs[BY_CHANCE] = (shared, data, choose_at_random(shared, data, scores, subset))
    world.runs[PROXY] = (shared, data, data.target)
    evaluation = {"source": {"path": str(validation)}, "retention": None}
    watched = read_data(world.run_of({"evaluation": evaluation}))
    found = [one_variant(each, world, data, watched) for each in study.variants]
    full = [each.training_seconds for each in found if each.variant == EVERYTHING]
    seconds = full[0] if full else cost_of_full(shared, data, None).seconds
    return [replace(each, full_seconds=seconds) for each in found]


def one_variant(variant: Variant, world: World, data: Data, watched: Data) -> Trained:
    """Trained with every rate, and what the best of them on the validation split gives."""
    subset = samples_of(variant, world)
    tried: dict[Rate, tuple[float, ArtifactRef, Run]] = {}
    spent = 0.0

    def loss_at(rate: Rate) -> float:
        nonlocal spent
        changed = dict(variant.changes)
        changed["training"] = {**changed.get("training", {}), "learning_rate": rate}
        run = world.run_of(changed)
        heads = find_heads(run, data.target) if run.inputs.adaptation_needs_heads else None
        if variant.data == PROXY:
            model = tune_heads(run, data, find_heads(run, data.target))
        else:
            model = train(run, data, heads, subset)
        validation = evaluate(run, watched, variant.name, model)["target"]
        spent += _seconds(model) + _seconds(validation)
        tried[rate] = (_quality(validation, run), model, run)
        return -tried[rate][0]

    for rate in variant.rates:
        loss_at(rate)
    if not variant.rates:
        best_rate(loss_at)
    quality, model, run = max(tried.values(), key=lambda each: each[0])
    measured = evaluate(run, data, variant.name, model)
    return Trained(
        variant=variant.name,
        seed=world.settings.seed,
        quality=_quality(measured["target"], run),
        retention=_quality(measured["retention"], run),
        validation=quality,
        learning_rate=float(model.manifest.settings["training"]["learning_rate"]),
        parameters=int(model.manifest.facts.get("trainable", 0)),
        selection_seconds=_selecting(world, run, SELECTING.get(variant.data, SELECTED)),
        training_seconds=_seconds(model),
        search_seconds=spent - _seconds(model) if len(tried) > 1 else 0.0,
        full_seconds=0.0,
    )


def _selecting(world: World, run: Run, stages: Sequence[str]) -> float:
    """What choosing the data took, a head map of the variant's own, and its learning rate."""
    chosen = {
        ref.key: _seconds(ref)
        for ledger in (world.runs[SUBSET][0].ledger, run.ledger)
        for entry in ledger.entries
        if entry.stage in stages
        for ref in entry.refs
    }
    return sum(chosen.values())


def samples_of(variant: Variant, world: World) -> ArtifactRef:
    """What the variant trains on: of the world's subset, everything, or drawn for it."""
    name = f"{variant.data} {dict(variant.selection)}" if variant.selection else variant.data
    if name not in world.runs:
        run, data, _ = world.runs[SUBSET]
        if variant.data in DRAWS:
            corpus = {"sources": [{"path": str(_drawn(variant.data, world))}]}
            every = {"fraction": 1.0, "replay": 0.0}
            by_chance = {"scorer": "random"}
            run = world.run_of({"corpus": corpus, "scoring": by_chance, "selection": every})
            data = read_data(run)
            scores = score_corpus(run, data, None, run.inputs.scorer)
        else:
            last = run.ledger.last("scores")
            assert last is not None
            scores, run = last, world.run_of({"selection": variant.selection})
        world.runs[name] = (run, data, choose(run, data, scores))
    return world.runs[name][2]


def _drawn(name: str, world: World) -> Path:
    """The world's subset with what was chosen by affinity drawn anew; replay stays."""
    run, data, subset = world.runs[SUBSET]
    rows = pq.read_table(subset.path / SUBSET_FILE).to_pylist()
    replayed = [row["sample_id"] for row in rows if row["chosen_by"] == "replay"]
    ids, passed = _passed(run)
    rng = np.random.default_rng(world.settings.seed)
    drawn = DRAWS[name](passed, len(rows) - len(replayed), rng)
    wanted = {*replayed, *(ids[row] for row in drawn)}
    file = world.folder / "drawn" / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        for shard in shards_of(data.corpus):
            for row in pq.read_table(shard.file, columns=["sample_id", "prompt", "response"]
                                     ).to_pylist():  # fmt: skip
                if row.pop("sample_id") in wanted:
                    stream.write(json.dumps(row) + "\n")
    return file


def _passed(run: Run) -> tuple[list[str], Passed]:
    """Ids of the samples that passed every gate, and what a draw may look at."""
    of = {name: [e.refs for e in run.ledger.entries if e.stage == name]
          for name in ("measurements", "scores")}  # fmt: skip
    (first,), (last,) = of["scores"][0], of["scores"][-1]
    state = load_file(first.path / STATE)
    scores = pq.read_table(last.path / SCORES).to_pylist()
    most = max(row["gates_passed"] for row in scores)
    affinity = {r["sample_id"]: r["affinity"] for r in scores if r["gates_passed"] == most}
    ids: list[str] = []
    vectors: list[torch.Tensor] = []
    for ref in of["measurements"][0]:
        table = pq.read_table(ref.path / MEASURED, columns=["sample_id", OUTPUTS])
        for row in table.to_pylist():
            if row["sample_id"] in affinity:
                ids.append(row["sample_id"])
                vectors.append(torch.tensor(row[OUTPUTS], dtype=torch.float64))
    outputs = torch.stack(vectors).view(len(ids), *state["mean"].shape)
    white = ((outputs - state["mean"]).transpose(0, 1) @ state["matrix"]).transpose(0, 1)
    return ids, Passed(
        np.array([affinity[each] for each in ids]), normalize(white.flatten(1), dim=1).numpy()
    )


def _seconds(ref: ArtifactRef) -> float:
    return float(ref.manifest.cost["wall_seconds"])


def _quality(measured: ArtifactRef, run: Run) -> float:
    return float(measured.manifest.facts["metrics"][run.settings.evaluation.metric])


def write(found: list[Trained], folder: Path) -> None:
    """Writes `TABLE`."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([asdict(each) for each in found]), folder / TABLE)


def read(folder: Path) -> Iterator[Trained]:
    """The inverse of `write`."""
    for row in pq.read_table(folder / TABLE).to_pylist():
        yield Trained(**row)
