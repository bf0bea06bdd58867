"""What a run would take and what it would reuse, found in a minute and without making anything."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

from flows.adapt import given_head_map
from flows.environment import MORE_BOOKS, NEW_BOOKS
from flows.harness_timing import harness_estimate
from flows.hub import pinned
from flows.inputs import Inputs, check_inputs, make_runtime
from flows.launch import ranked_bases
from flows.ledger import TERM_OF_STAGE
from flows.looking import look_up, uses_head_proxy
from flows.planned import keep_plan, plan_key
from flows.preview import Preview, preview
from flows.rehearsal import Rehearsal
from flows.rehearsed_corpus import CorpusRehearsal
from flows.scoring import share_to_try, trains_as_searched
from flows.settings import RunSettings
from flows.stages import FULL, NO_HEADS
from flows.timing import Budget
from p2d_core.adaptation.adaptations import Heads
from p2d_core.aer import AER, AER_STAGES, Cost, Reference, machine_name, measured
from p2d_core.affinity.scoring import SCORES
from p2d_core.errors import ArtifactError
from p2d_core.heads.ranking import rankers
from p2d_core.models import DTYPES, parameter_counts
from p2d_core.planning import REUSED, Estimate, Part, by_stage, total
from p2d_core.store import ArtifactRef, Store
from p2d_core.store.room import free_bytes
from p2d_core.store.runs import read_summary, run_files
from tasks.heads import head_map_in
from tasks.measurements import n_steps, scorer_step
from tasks.model import reference_in, samples_in
from tasks.planned import Plan, PlannedAER, PlannedStage
from tasks.room import CHECKPOINTS, COPIES, of_attention, of_model
from tasks.samples import shards_of
from tasks.stage import NotMade, Plugin

READING_SHARE = 0.25
"""Of the time, for reading the corpus."""
RUNS_LOOKED_AT = 5
"""For what starting and looking up take."""

RATES = 4
"""Learning rates that are tried, about."""

Call = tuple[str, Callable[[], Estimate]]
"""A stage as the run calls it, and what is asked for if it has to be made."""


def run_plan(
    settings: RunSettings, *, store: Path, head_map: str | None = None, seconds: float = 60
) -> Plan:
    """Times a few steps of what is not in the store, and keeps the plan there; nothing else.

    Args:
        head_map: as of `flows.adapt.run_adapt`.
        seconds: about what it may take. Checking the input and loading the model count, but cannot
            be cut short; what is left for timing is at least a moment a stage.

    Raises:
        InputError: as `run_adapt`.
        ArtifactError: there is no such head map.
    """
    began, budget = time.monotonic(), Budget(seconds)
    settings = pinned(settings)
    inputs = check_inputs(settings, ranked_bases(Store(store)))
    given = given_head_map(Store(store), head_map, inputs, settings.target.name)
    with tempfile.TemporaryDirectory(prefix="p2d-plan-") as folder, measured() as watch:
        planner = _Planner(settings, inputs, given, store, Path(folder), budget)
        parts = planner.parts()
    plan = planner.plan(parts, watch.cost)
    plan.seconds_to_plan = time.monotonic() - began
    plan.key = plan_key(settings, inputs, given.key if given is not None else None)
    keep_plan(store, plan)
    return plan


class _Planner:
    """Puts the plan of one run together, a call of a stage at a time and in the run's order."""

    def __init__(
        self,
        settings: RunSettings,
        inputs: Inputs,
        given: ArtifactRef | None,
        store: Path,
        folder: Path,
        budget: Budget,
    ) -> None:
        self.settings, self.inputs, self.given = settings, inputs, given
        self.store, self.folder, self.budget = Store(store), folder, budget
        self.runtime = make_runtime(settings, store, "plan")
        self.full = Estimate()
        """What full fine-tuning on the whole corpus takes."""
        self._data: Preview | None = None
        self._rehearsal: CorpusRehearsal | None = None
        self.found = look_up(settings, inputs, store, given)
        if self.found.made("samples", 0) is None and not self.data.corpus_is_estimated:
            self.found = look_up(settings, inputs, store, given, self.data.shards)

    @property
    def data(self) -> Preview:
        """Read when it is first needed."""
        if self._data is None:
            self._data = preview(self.settings, self.inputs, self.budget.seconds * READING_SHARE)
        return self._data

    @property
    def corpus(self) -> int:
        """Samples."""
        made = self.found.made("samples", 0)
        if made is None:
            return self.data.corpus
        return sum(shard["rows"] for shard in made.manifest.facts["shards"])

    @property
    def by_heads(self) -> Plugin:
        """What head_proxy is tuned by."""
        return Plugin.of("heads", Heads(self.settings.heads.slices))

    @property
    def found_for_head_proxy(self) -> bool:
        """The rate that training asks for is the one that head_proxy asks for."""
        asks = self.settings.heads.proxy_learning_rate == "auto" and uses_head_proxy(self.inputs)
        return asks and self.inputs.adaptation == self.by_heads

    @property
    def on_corpus(self) -> CorpusRehearsal:
        """Made when something has to be timed."""
        if self._rehearsal is None:
            tried = Rehearsal(self.inputs, self.runtime, self.data, self.folder, self.budget)
            if (heads := self.found.made("heads")) is not None:
                tried.heads = head_map_in(heads)
            if (model := self.found.made("model")) is not None:
                tried.kept = model.path
            on_corpus = CorpusRehearsal(tried, self.data, self.folder)
            if (subset := self.found.made("subset")) is not None:
                on_corpus.chosen = samples_in(subset)
            corpus, scores = self.found.made("samples", 0), self.found.made("scores")
            if corpus is not None and scores is not None:
                shards = [Path(shard.file) for shard in shards_of(corpus)]
                on_corpus.scored = scores.path / SCORES, shards
            self._rehearsal = on_corpus
        return self._rehearsal

    @property
    def rehearsal(self) -> Rehearsal:
        """Of what is done to the model."""
        return self.on_corpus.rehearsal

    def parts(self) -> list[Part]:
        """Every call of the run, with what it takes."""
        calls = [
            *self._heads(),
            *self._scoring(),
            *self._models(),
            *self._evaluations(),
            *self._harness(),
        ]
        places = [[name for name, _ in calls[:i]].count(name) for i, (name, _) in enumerate(calls)]
        looked = [self.found.of(name, n) for (name, _), n in zip(calls, places, strict=True)]
        states = [self.found.state(call[0], refs) for call, refs in zip(calls, looked, strict=True)]
        self.budget.calls = sum(state != REUSED for state in states)
        parts = []
        for (name, estimate), refs, state in zip(calls, looked, states, strict=True):
            made = [ref for ref in refs if not isinstance(ref, NotMade)]
            cold = Estimate(sum(float(ref.manifest.cost["wall_seconds"]) for ref in made))
            now = Estimate()
            if state != REUSED:
                self.budget.begin()
                now = estimate().times(1 - len(made) / max(1, len(refs)))
            parts.append(Part(name, state, now, cold + now))
        return parts

    def _heads(self) -> Iterator[Call]:
        yield "samples", lambda: Estimate(self.data.seconds_to_read / 2)
        if not self.inputs.needs_heads:
            return
        if self.given is not None:
            for stage in ("proxy", "heads"):
                yield from [(stage, Estimate)] * len(self.found.calls.get(stage, []))
            return
        draws = self.settings.heads.average_over
        if draws > 1:
            yield "samples", Estimate
        for _ in range(draws):
            if rankers.make(self.inputs.ranker.name, self.inputs.ranker.options).needs_proxy_run:
                yield "proxy", lambda: self.rehearsal.proxy()
            yield "heads", lambda: self.rehearsal.ranking()
        if draws > 1:
            yield "heads", lambda: self.rehearsal.picture()

    def _scoring(self) -> Iterator[Call]:
        tuned = False
        for step in range(n_steps(self.inputs.scorer)):
            if not tuned and scorer_step(self.inputs.scorer, step).scorer.needs_head_proxy:
                if searches := self.settings.heads.proxy_learning_rate == "auto":
                    yield "rate", partial(self._searching, self.by_heads)
                is_made = searches and trains_as_searched(self.inputs)
                yield "head_proxy", Estimate if is_made else self._tuning
                tuned = True
            yield "measurements", partial(self._measuring, step)
            yield "scores", partial(self._scored, step)

    def _tuning(self) -> Estimate:
        return self.rehearsal.tuning(self.by_heads, self.inputs.head_proxy_training)

    def _searching(self, adaptation: Plugin) -> Estimate:
        """The search for a learning rate."""
        return self.rehearsal.tuning(adaptation, self.inputs.rate_training).times(RATES)

    def _measuring(self, step: int) -> Estimate:
        if step == 0:
            return self.on_corpus.measuring(step, self.corpus)
        passed, share = self._passed(step - 1), 1.0
        if step == 1 or self.found.made("scores", step - 1) is None:
            first = round(self._passed(0))
            share = share_to_try(self.settings, self.inputs, first, self.corpus)
        return self.on_corpus.measuring(step, passed * share)

    def _passed(self, step: int) -> float:
        """Samples that passed the gates up to a step: of its scores, or of the share tried here."""
        if (scores := self.found.made("scores", step)) is not None:
            return float(scores.manifest.facts["passed"])
        return self.corpus * self.on_corpus.passing.get(step, 1.0)

    def _scored(self, step: int) -> Estimate:
        return self.on_corpus.scoring(step, self.corpus)

    def _models(self) -> Iterator[Call]:
        selection = self.inputs.selection
        more = self.settings.n_proxy_trained_on
        chosen = max(1, round(selection.fraction * self.corpus)) + more

        def train() -> Estimate:
            return self.rehearsal.training(self.on_corpus.chosen or self.data.drawn, chosen)

        def train_full() -> Estimate:
            self.full = self.rehearsal.full(self.corpus + more)
            return self.full

        def calibrate() -> Estimate:
            steps = self.settings.arms.calibration_steps
            spent, self.full = self.rehearsal.calibration(steps, self.corpus + more)
            return spent

        yield "subset", lambda: self.on_corpus.selecting(selection, self.corpus)
        if self.settings.training.learning_rate == "auto" and not self.found_for_head_proxy:
            yield "rate", partial(self._searching, self.inputs.adaptation)
        yield "model", train
        if self.settings.arms.random:
            by_chance = replace(selection, at_random=True)
            yield "subset_random", lambda: self.on_corpus.selecting(by_chance, self.corpus)
            yield "model_random", lambda: self.rehearsal.training(self.data.drawn, chosen)
        if self.settings.arms.full == "measured":
            if self.settings.arms.full_learning_rate == "auto":
                yield "rate_full", partial(self._searching, FULL)
            yield "model_full", train_full
        else:
            yield "reference", calibrate
        if (full := self.found.made("model_full")) is not None:
            self.full = Estimate(float(full.manifest.cost["wall_seconds"]))
        if (calibrated := self.found.made("reference")) is not None:
            reference = reference_in(calibrated)
            self.full = Estimate(reference.seconds, reference.spread_seconds)

    @property
    def arms(self) -> list[str]:
        """What is evaluated."""
        arms, shown = ["base", "p2d"], self.settings.arms
        arms += ["random"] * shown.random + ["full"] * (shown.full == "measured")
        return arms + ["proxy"] * uses_head_proxy(self.inputs)

    def _evaluations(self) -> Iterator[Call]:

        @cache
        def on_samples(adapter: bool) -> Estimate:
            sets = [self.data.evaluation, *([self.data.retention] if self.data.retention else [])]
            return total(self.rehearsal.evaluating(each, adapter=adapter) for each in sets)

        def estimate(arm: str) -> Estimate:
            if arm == "base":
                loads = self.rehearsal.base.captured_load()
            else:
                loads = self.rehearsal.base.load().times(1 + bool(self.data.retention))
            return loads + on_samples(arm in ("p2d", "random"))

        for arm in self.arms:
            yield "evaluation", partial(estimate, arm)

    def _harness(self) -> Iterator[Call]:
        asked, spec = self.settings.evaluation.harness, self.inputs.harness
        if asked is None or spec is None:
            return
        arms = [arm for arm in self.arms if arm in asked.arms]

        @cache
        def on_tasks(adapter: bool) -> Estimate:
            return harness_estimate(self.rehearsal, spec, asked.batch_size, adapter=adapter)

        def estimate() -> Estimate:
            base = self.rehearsal.base
            return total(
                (base.captured_load() if arm == "base" else base.load())
                + on_tasks(arm in ("p2d", "random"))
                for arm in arms
            )

        if arms:
            yield "harness", estimate

    def plan(self, parts: list[Part], cost: Cost) -> Plan:
        """What is kept and shown."""
        stages = by_stage(parts)
        starting = self._starting()
        now = total(part.now for part in parts)
        tried = self._rehearsal
        return Plan(
            name=self.settings.name,
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine_name(),
            corpus=self.corpus,
            corpus_is_estimated=self._data is not None and self._data.corpus_is_estimated,
            tokens_in_sample=tried.base.tokens if tried else 0.0,
            stages=[
                PlannedStage(
                    name=stage.stage,
                    state=stage.state,
                    seconds=stage.now.seconds,
                    cold_seconds=stage.cold.seconds,
                    spread_seconds=stage.now.spread,
                )
                for stage in stages
            ],
            seconds=now.seconds + (starting or 0.0),
            spread_seconds=now.spread,
            starting_seconds=starting,
            aer=self._aer(parts),
            # a run has the base beside the model in training; the rehearsal had one of them
            memory_bytes=cost.peak_memory_bytes + self._base_bytes() if tried else 0,
            disk_bytes=self._disk_bytes(parts),
            free_bytes=free_bytes(self.store.root),
        )

    def _aer(self, parts: list[Part]) -> PlannedAER:
        cold, now = dict.fromkeys(AER_STAGES, 0.0), dict.fromkeys(AER_STAGES, 0.0)
        for part in parts:
            if (term := TERM_OF_STAGE.get(part.stage)) is not None:
                cold[term] += part.cold.seconds
                now[term] += part.now.seconds
        reference = Reference("planned", self.full.seconds, self.full.spread)
        return PlannedAER(
            cold=AER(cold, reference).ratio,
            this_run=AER(now, reference).ratio,
            speedup=AER(cold, reference).speedup,
            full_seconds=reference.seconds,
            full_spread_seconds=reference.spread_seconds,
        )

    def _starting(self) -> float | None:
        """Seconds beside those of the stages, in the newest runs."""
        seconds = []
        for file in run_files(self.store)[:RUNS_LOOKED_AT]:
            try:
                done = read_summary(file)
                stages = sum(float(line["seconds"]) for line in done["stages"])
                seconds.append(max(0.0, float(done["seconds"]) - stages))
            except (ArtifactError, KeyError, TypeError, ValueError, json.JSONDecodeError):
                continue
        return statistics.median(seconds) if seconds else None

    def _base_bytes(self) -> int:
        size = DTYPES[self.settings.precision].itemsize
        return parameter_counts(Path(self.inputs.base.folder)).total * size

    def _disk_bytes(self, parts: list[Part]) -> int:
        """Books, samples and scores as they were tried, and trainings, long ones with checkpoints.

        Checkpoints count as if all of them lay there at once: it is an upper end.
        """
        base, heads = self.inputs.base, NO_HEADS
        if self._rehearsal is not None:
            heads = tuple(self.rehearsal.head_map.task_heads)
        adapted = of_model(base, self.inputs.adaptation, heads)
        room = {
            "proxy": of_attention(base),
            "rate": adapted,
            "rate_full": of_model(base, FULL, NO_HEADS),
            "head_proxy": of_model(base, self.by_heads, heads),
            "model": adapted,
            "model_random": adapted,
            "model_full": of_model(base, FULL, NO_HEADS),
        }
        needed = float(MORE_BOOKS if run_files(self.store) else NEW_BOOKS)
        needed += self._rehearsal.bytes if self._rehearsal else 0
        for part in parts:
            if part.state != REUSED:
                short = part.now.seconds < self.runtime.checkpoint_seconds
                needed += room.get(part.stage, 0) / (1 + CHECKPOINTS * COPIES if short else 1)
        return round(needed)
