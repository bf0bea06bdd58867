"""Arms side by side: rankers x scorers x adaptations x shares x seeds over one base and corpus."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from flows.engine import all_at_once
from flows.hub import pinned
from flows.inputs import Inputs, check_inputs, make_runtime, scores_by_heads, takes_depth
from flows.launch import ranked_bases, run_name, run_of, started, store_folder
from flows.ledger import Ledger
from flows.report import labels_of
from flows.scoring import score_corpus
from flows.settings import RunSettings
from flows.settings_compare import Choice
from flows.stages import (
    Data,
    Run,
    choose,
    cost_of_full,
    evaluate,
    find_heads,
    read_data,
    train,
    train_full,
)
from p2d_core.adaptation.adaptations import adaptations
from p2d_core.comparison.arms import BASE, EVERYTHING, NONE, Arm, ArmRun, Plugins
from p2d_core.errors import InputError, P2DError
from p2d_core.evaluation import metrics
from p2d_core.store import ArtifactRef, Store
from p2d_core.store.manifest import MANIFEST
from tasks.comparison import compare_arms
from tasks.progress import progress_of
from tasks.record import record_comparison
from tasks.stage import BaseModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """What is to be run: each arm once, with its settings but for the seed."""

    arms: dict[Arm, RunSettings]
    seeds: tuple[int, ...]


def run_compare(settings: RunSettings, *, store: Path) -> ArtifactRef:
    """Checks all input of all arms, then runs the flow.

    Raises:
        InputError: before anything was started; names the arm.
    """
    settings = pinned(settings)
    checked = checked_arms(grid_of(settings), ranked_bases(Store(store)))

    def run() -> ArtifactRef:
        return compare(settings, store=str(store.resolve()))

    return started(settings, next(iter(checked.values())).base, checked, store, run)


def grid_of(settings: RunSettings) -> Grid:
    """Every combination that differs in something that is looked at.

    Raises:
        InputError: a ranker, scorer or adaptation is not known, or one of its options.
    """
    grid, arms = settings.compare, {}
    scoring, heads, training = settings.scoring, settings.heads, settings.training
    for scorer, ranker, adaptation, fraction in product(
        _as_in_the_run(grid.scorers, scoring.scorer, scoring.options),
        _as_in_the_run(grid.rankers, heads.ranker, heads.options),
        _as_in_the_run(grid.adaptations, training.adaptation, training.options),
        grid.fractions or (settings.selection.fraction,),
    ):
        by_heads = scores_by_heads(scorer.name, scorer.options)
        looks = by_heads or _adapts_heads(adaptation)
        its = _settings_of(settings, scorer, ranker, adaptation, fraction)
        plugins = Plugins(
            scorer.name,
            ranker.name if looks else NONE,
            adaptation.name,
            by_heads,
            its.heads.fraction if looks else None,
        )
        named = (scorer.shown, ranker.shown if looks else NONE, adaptation.shown)
        arm = Arm(*named, fraction, plugins)
        arms.setdefault(arm, its)
    return Grid(arms, tuple(dict.fromkeys(grid.seeds)))


def checked_arms(grid: Grid, ranked: set[str]) -> dict[tuple[Arm, int], Inputs]:
    """The inputs of every arm and seed; the data are read once a seed."""
    checked: dict[tuple[Arm, int], Inputs] = {}
    for arm, seed in product(grid.arms, grid.seeds):
        settings = grid.arms[arm].model_copy(update={"seed": seed})
        like = next((inputs for (_, other), inputs in checked.items() if other == seed), None)
        try:
            checked[arm, seed] = check_inputs(settings, ranked, like)
        except InputError as error:
            raise type(error)(f"arm {arm.label}: {error}") from error
    return checked


def compare_name() -> str:
    """What a run of the flow is called."""
    return run_name(" compared")


@flow(
    name="compare",
    flow_run_name=compare_name,
    task_runner=ThreadPoolTaskRunner(max_workers=2),
    persist_result=False,
)
def compare(settings: RunSettings, store: str | None = None) -> ArtifactRef:
    """Runs every arm of settings.compare over one base and corpus, and says which is better.

    Args:
        settings: The run; its section compare names the arms. Relative paths are taken from the
            worker's folder (P2D_HOME).
        store: Folder of the artifacts on the worker. P2D_STORE, or artifacts, if empty.
    """
    folder = store_folder(store)

    def check(given: RunSettings) -> tuple[dict[tuple[Arm, int], Inputs], BaseModel]:
        checked = checked_arms(grid_of(given), ranked_bases(Store(folder)))
        return checked, next(iter(checked.values())).base

    with run_of(settings, folder, check) as begun:
        done = run_arms(begun.settings, begun.run_id, begun.checked, folder)
        begun.finished.append(done)
        return done


def run_arms(
    settings: RunSettings, run_id: str, inputs: dict[tuple[Arm, int], Inputs], store: Path
) -> ArtifactRef:
    """Every arm, within a flow; one that fails is shown as failed and takes no other with it."""
    grid = grid_of(settings)
    first = next(iter(grid.arms))
    of_seed = [Seed(settings, seed, inputs[first, seed], store, run_id) for seed in grid.seeds]
    # what every arm of a seed is held against, and then the arms: these are told its price
    references = [work for seed in of_seed for work in seed.references()]
    arms = [
        (arm, seed.seed, partial(seed.arm, arm, its, inputs[arm, seed.seed]))
        for seed in of_seed
        for arm, its in grid.arms.items()
    ]
    runs: list[ArmRun] = []
    with progress_of("arms") as progress:
        for works in (references, arms):
            for run in all_at_once([partial(attempt, *work) for work in works]):
                runs.append(run)
                progress(len(runs), len(references) + len(arms))
    # a seed after the other, whichever was done first
    runs.sort(key=lambda run: grid.seeds.index(run.seed))
    metric = settings.evaluation.metric
    done = compare_arms(
        make_runtime(settings, store, run_id),
        runs=runs,
        metric=metric,
        higher_is_better=metrics.get(metric).higher_is_better,
        name=settings.name,
    )
    # one that was found again is as new as this run to `p2d artifacts gc`
    (done.path / MANIFEST).touch()
    record_comparison(done, run_id, settings.tracking.model_dump(mode="json"), store)
    return done


def attempt(arm: Arm, seed: int, work: Callable[[], ArmRun]) -> ArmRun:
    """One arm as a Prefect task; its failure is a row like any other."""

    @task(name="arm", task_run_name=f"{arm.label}, seed {seed}", cache_policy=NO_CACHE)
    def run_arm() -> dict[str, Any]:
        found.append(work())
        return {"arm": arm.label, "seed": seed}

    found: list[ArmRun] = []
    try:
        run_arm()
    except P2DError as error:
        log.warning("arm %s, seed %d failed: %s", arm.label, seed, error)
        return ArmRun(arm, seed, error=str(error))
    except Exception as error:
        log.warning("arm %s, seed %d failed", arm.label, seed, exc_info=True)
        return ArmRun(arm, seed, error=f"{type(error).__name__}: {error}")
    return found[0]


class Seed:
    """What the arms of one seed share: the data, the base's quality, the price of everything."""

    def __init__(
        self, settings: RunSettings, seed: int, inputs: Inputs, store: Path, run_id: str
    ) -> None:
        self.settings = settings.model_copy(update={"seed": seed})
        self.seed, self.store, self.run_id = seed, store, run_id
        self.shared = self._run(self.settings, inputs)
        self.full: ArtifactRef | None = None
        self._data: Data | None = None
        self._reading = threading.Lock()

    def _run(self, settings: RunSettings, inputs: Inputs) -> Run:
        runtime = make_runtime(settings, self.store, self.run_id)
        return Run(settings, inputs, runtime, Ledger(self.run_id))

    @property
    def data(self) -> Data:
        with self._reading:
            if self._data is None:
                self._data = read_data(self.shared)
            return self._data

    def references(self) -> list[tuple[Arm, int, Callable[[], ArmRun]]]:
        """What its arms are held against."""
        works = [(Arm(BASE, NONE, NONE, 0.0), self.seed, self.base)]
        if self.settings.compare.everything:
            works.append((Arm(EVERYTHING, NONE, "full", 1.0), self.seed, self.everything))
        return works

    def base(self) -> ArmRun:
        """The base model as it is."""
        return self._measured(self.shared, Arm(BASE, NONE, NONE, 0.0), None)

    def everything(self) -> ArmRun:
        """Full fine-tuning on the whole corpus."""
        run = self.shared
        self.full = train_full(run, self.data)
        done = self._measured(run, Arm(EVERYTHING, NONE, "full", 1.0), self.full)
        seconds = float(self.full.manifest.cost["wall_seconds"])
        searched = run.ledger.last("rate_full")
        artifacts = {"rate": searched.key} if searched is not None else {}
        return replace(
            done,
            aer=1.0,
            seconds={"model": seconds},
            full_seconds=seconds,
            artifacts=artifacts | {**done.artifacts},
        )

    def arm(self, arm: Arm, settings: RunSettings, inputs: Inputs) -> ArmRun:
        """Heads where they are looked at, scores, subset, training, evaluation."""
        run = self._run(settings.model_copy(update={"seed": self.seed}), inputs)
        data = self.data
        heads = find_heads(run, data.target) if arm.ranker != NONE else None
        scores = score_corpus(run, data, heads, inputs.scorer)
        subset = choose(run, data, scores)
        model = train(run, data, heads, subset)
        reference = cost_of_full(run, data, self.full)
        cold, _ = run.ledger.aer(reference)
        done = self._measured(run, arm, model)
        refs = {"scores": scores, "subset": subset}
        # found again by the next comparison, so kept for it: all that a run of the arm asks for
        for stage in ("heads", "head_proxy", "rate", "reference"):
            if (ref := run.ledger.last(stage)) is not None:
                refs[stage] = ref
        return replace(
            done,
            selected=int(subset.manifest.facts["rows"]),
            labels=labels_of(subset),
            aer=cold.ratio,
            seconds=dict(cold.stages),
            full_seconds=reference.seconds,
            artifacts={name: ref.key for name, ref in refs.items()} | {**done.artifacts},
        )

    def _measured(self, run: Run, arm: Arm, model: ArtifactRef | None) -> ArmRun:
        measured = evaluate(run, self.data, arm.label, model)
        metric = self.settings.evaluation.metric
        facts = {on: ref.manifest.facts["metrics"] for on, ref in measured.items()}
        table = pq.read_table(
            measured["target"].path / "samples.parquet", columns=["sample_id", *facts["target"]]
        )
        ids = table["sample_id"].to_pylist()
        values = {
            name: dict(zip(ids, map(float, table[name].to_pylist()), strict=True))
            for name in facts["target"]
        }
        cost = model.manifest.cost if model is not None else {}
        refs = {f"evaluation_{on}": ref for on, ref in measured.items()}
        refs |= {"model": model} if model is not None else {}
        return ArmRun(
            arm,
            self.seed,
            quality=float(facts["target"][metric]),
            retention=float(facts["retention"][metric]) if "retention" in facts else None,
            metrics=dict(facts["target"]),
            values=values.pop(metric),
            also=values,
            parameters=model.manifest.facts["trainable"] if model is not None else None,
            peak_memory_bytes=int(cost["peak_memory_bytes"]) if cost else None,
            artifacts={name: ref.key for name, ref in refs.items()},
        )


def _as_in_the_run(
    choices: Sequence[Choice], name: str, options: dict[str, Any]
) -> Iterator[Choice]:
    """What the run itself would take has its options, unless it was given others."""
    for each in choices:
        given = each.name != name or "options" in each.model_fields_set
        yield each if given else each.model_copy(update={"options": options})


def _adapts_heads(adaptation: Choice) -> bool:
    return bool(adaptations.make(adaptation.name, adaptation.options).needs_heads)


def _settings_of(
    settings: RunSettings, scorer: Choice, ranker: Choice, adaptation: Choice, fraction: float
) -> RunSettings:
    is_full = adaptation.name == "full"
    rate = settings.arms.full_learning_rate if is_full else settings.training.learning_rate
    share = {"fraction": ranker.fraction} if ranker.fraction is not None else {}
    depth = settings.scoring.depth if takes_depth(scorer.name) else "heads"
    changes: Sequence[tuple[str, dict[str, Any]]] = (
        ("heads", {"ranker": ranker.name, "options": ranker.options, **share}),
        ("scoring", {"scorer": scorer.name, "options": scorer.options, "depth": depth}),
        (
            "training",
            {
                "adaptation": adaptation.name,
                "options": adaptation.options,
                "learning_rate": adaptation.learning_rate or rate,
            },
        ),
        ("selection", {"fraction": fraction}),
    )
    for section, change in changes:
        part = getattr(settings, section).model_copy(update=change)
        settings = settings.model_copy(update={section: part})
    return settings
