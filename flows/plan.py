"""What a run would take and what it would reuse, found in a minute and without making anything."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

from flows.adapt import given_head_map
from flows.environment import MORE_BOOKS, NEW_BOOKS
from flows.inputs import Inputs, check_inputs, make_runtime
from flows.launch import ranked_bases
from flows.ledger import TERM_OF_STAGE
from flows.planned import keep_plan, plan_key
from flows.preview import Preview, preview
from flows.rehearsal import BYTES_SAVED, Budget, Rehearsal
from flows.reuse import Artifact, Found, Search
from flows.settings import RunSettings
from p2d_core.aer import AER_STAGES, Reference, machine_name, measured
from p2d_core.errors import ArtifactError
from p2d_core.models import DTYPES, parameter_counts
from p2d_core.planning import REUSED, Estimate, Part, state_of, total
from p2d_core.store import ArtifactRef, Store
from p2d_core.store.room import free_bytes
from p2d_core.store.runs import read_summary, run_files
from tasks.heads import head_map_in
from tasks.measurements import scorer_step
from tasks.model import reference_in, samples_in
from tasks.planned import Plan, PlannedAER, PlannedStage
from tasks.room import CHECKPOINTS

READING_SHARE = 0.25
"""Of the time, for reading the corpus."""
RUNS_LOOKED_AT = 5


def run_plan(
    settings: RunSettings, *, store: Path, head_map: str | None = None, seconds: float = 60
) -> Plan:
    """Times a few steps of what is not in the store, and keeps the plan there; nothing else.

    Args:
        head_map: key or folder of a `heads` artifact; skips proxy and ranking.
        seconds: about what it may take, beyond checking the input.

    Raises:
        InputError: as `flows.adapt.run_adapt`.
        ArtifactError: there is no such head map.
    """
    began = time.monotonic()
    inputs = check_inputs(settings, ranked_bases(Store(store)))
    given = given_head_map(Store(store), head_map, inputs, settings.target.name) if head_map is not None else None
    with tempfile.TemporaryDirectory(prefix="p2d-plan-") as folder, measured() as watch:
        planner = _Planner(settings, inputs, store, given, Path(folder), seconds)
        parts = planner.parts()
    plan = planner.plan(parts, watch.cost.peak_memory_bytes, time.monotonic() - began)
    plan.key = plan_key(settings, inputs, given.key if given is not None else None)
    keep_plan(store, plan)
    return plan


class _Planner:
    """Puts the plan of one run together, a stage at a time and in the run's order."""

    def __init__(
        self,
        settings: RunSettings,
        inputs: Inputs,
        store: Path,
        given: ArtifactRef | None,
        folder: Path,
        seconds: float,
    ) -> None:
        self.settings, self.inputs, self.store = settings, inputs, Store(store)
        self.folder = folder
        self.runtime = make_runtime(settings, store, "plan")
        search = Search(settings, inputs, self.runtime)
        self.budget = Budget(seconds)
        self.found = search.all(given, None)
        self._data: Preview | None = None
        self._rehearsal: Rehearsal | None = None
        if not self.found.corpus.made:
            # the shards say what of an earlier corpus is measured already
            self.found = search.all(given, self.data.shards)
        self.full = Estimate()
        """What full fine-tuning on the whole corpus takes."""

    @property
    def data(self) -> Preview:
        """Read when it is first needed."""
        if self._data is None:
            self._data = preview(self.settings, self.inputs, self.budget.seconds * READING_SHARE)
        return self._data

    @property
    def rehearsal(self) -> Rehearsal:
        """Made when something has to be timed."""
        if self._rehearsal is None:
            self._rehearsal = Rehearsal(
                self.settings, self.inputs, self.runtime, self.data, self.folder, self.budget
            )
            ranked = self.found.rankings[-1]
            if ranked.made and ranked.ref is not None:
                self._rehearsal.heads = head_map_in(ranked.ref)
            if self.found.model.made and self.found.model.ref is not None:
                self._rehearsal.kept = self.found.model.ref.path
            if self.found.subset.made and self.found.subset.ref is not None:
                self._rehearsal.chosen = samples_in(self.found.subset.ref)
        return self._rehearsal

    def parts(self) -> list[Part]:
        """Every artifact of the run with what it takes, in order."""
        self.budget.parts = _timings(self.found)
        return [*self._heads(), *self._scoring(), *self._models(), *self._evaluations()]

    def _heads(self) -> list[Part]:
        found = self.found
        samples = [found.target, found.corpus, *found.draws]
        parts = [self._part(each, self._samples) for each in samples]
        parts += [self._part(each, lambda: self.rehearsal.proxy()) for each in found.proxies]
        *before, last = found.rankings
        parts += [self._part(each, lambda: self.rehearsal.ranking()) for each in before]
        averaged = self.settings.heads.average_over > 1
        parts.append(
            self._part(
                last, lambda: self.rehearsal.average() if averaged else self.rehearsal.ranking()
            )
        )
        return parts

    def _part(self, artifact: Artifact, estimate: Callable[[], Estimate]) -> Part:
        """``estimate`` is asked only if the artifact is not there."""
        if artifact.made and artifact.ref is not None:
            cost = artifact.ref.manifest.cost
            return Part(artifact.stage, REUSED, Estimate(float(cost["wall_seconds"])))
        return Part(artifact.stage, artifact.state, estimate())

    def _samples(self) -> Estimate:
        return Estimate(self.data.seconds_to_read / 2)

    def _scoring(self) -> list[Part]:
        found = self.found
        parts: list[Part] = []
        rows = float(self.corpus)
        for step, (shards, scores) in enumerate(zip(found.measurements, found.scores, strict=True)):
            if self._needs_head_proxy(step) and found.head_proxy is not None:
                parts.append(self._part(found.head_proxy, lambda: self.rehearsal.head_proxy()))
            n_new = sum(not each.made for each in shards)
            if n_new:
                measuring = self.rehearsal.measuring(step, rows * n_new / len(shards), n_new)
                of_shard = measuring.times(1 / n_new)
            parts += [self._part(each, lambda: of_shard) for each in shards]
            if (facts := scores.facts) is not None:
                parts.append(self._part(scores, Estimate))
                rows = float(facts["passed"])
            else:
                scoring, passing = self.rehearsal.scoring(step, self.corpus)
                parts.append(Part(scores.stage, scores.state, scoring))
                rows = passing * self.corpus
        return parts

    def _needs_head_proxy(self, step: int) -> bool:
        return bool(scorer_step(self.inputs.scorer, step).scorer.needs_head_proxy)

    def _models(self) -> list[Part]:
        found, settings = self.found, self.settings
        chosen = max(1, round(settings.selection.fraction * self.corpus))
        parts = [
            self._part(
                found.subset,
                lambda: self.rehearsal.selecting(self.inputs.selection, self.corpus),
            ),
            self._part(found.model, lambda: self.rehearsal.training(self.rehearsal.chosen, chosen)),
        ]
        if found.subset_random is not None and found.model_random is not None:
            by_chance = replace(self.inputs.selection, at_random=True)
            parts += [
                self._part(
                    found.subset_random, lambda: self.rehearsal.selecting(by_chance, self.corpus)
                ),
                self._part(
                    found.model_random, lambda: self.rehearsal.training(self.data.drawn, chosen)
                ),
            ]
        return [*parts, self._reference()]

    def _reference(self) -> Part:
        """Full fine-tuning, or what stands for it; says what it takes in ``full``."""
        full = self.found.full
        if self.settings.arms.full == "measured":
            part = self._part(full, lambda: self.rehearsal.full())
            self.full = part.cold
            return part
        if full.made and full.ref is not None:
            reference = reference_in(full.ref)
            self.full = Estimate(reference.seconds, reference.spread_seconds)
            return self._part(full, Estimate)
        spent, self.full = self.rehearsal.calibration()
        return Part(full.stage, full.state, spent)

    def _evaluations(self) -> list[Part]:
        @cache
        def of_set(index: int, adapter: bool) -> Estimate:
            samples = [self.data.evaluation, self.data.retention][index]
            return self.rehearsal.evaluating(samples, adapter=adapter)

        def estimate(arm: str, index: int) -> Estimate:
            load = self.rehearsal.captured_load() if arm == "base" else self.rehearsal.load()
            return load + of_set(index, arm in ("p2d", "random"))

        return [
            self._part(each, partial(estimate, arm, index))
            for arm, on_sets in self.found.evaluations.items()
            for index, each in enumerate(on_sets)
        ]

    @property
    def corpus(self) -> int:
        """Samples."""
        facts = self.found.corpus.facts
        if facts is not None:
            return sum(shard["rows"] for shard in facts["shards"])
        return self.data.corpus

    def plan(self, parts: Sequence[Part], memory_bytes: int, seconds: float) -> Plan:
        """What is kept and shown."""
        stages = [
            _stage(name, [part for part in parts if part.stage == name])
            for name in dict.fromkeys(part.stage for part in parts)
        ]
        starting = self._starting()
        now = total(part.now for part in parts)
        rehearsal = self._rehearsal
        books = MORE_BOOKS if run_files(self.store) else NEW_BOOKS
        return Plan(
            name=self.settings.name,
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine_name(),
            seconds_to_plan=seconds,
            corpus=self.corpus,
            corpus_is_estimated=self._data is not None and self._data.shards is None,
            tokens_in_sample=rehearsal.tokens if rehearsal else 0.0,
            stages=stages,
            seconds=now.seconds + (starting or 0.0),
            spread_seconds=now.spread,
            starting_seconds=starting,
            aer=self._aer(parts),
            memory_bytes=memory_bytes + self._copy_bytes() if rehearsal else 0,
            disk_bytes=books + (self._disk_bytes(rehearsal) if rehearsal else 0),
            free_bytes=free_bytes(self.store.root),
        )

    def _aer(self, parts: Sequence[Part]) -> PlannedAER:
        def spent(seconds_of: Callable[[Part], Estimate]) -> float:
            counted = [part for part in parts if TERM_OF_STAGE.get(part.stage) in AER_STAGES]
            return total(seconds_of(part) for part in counted).seconds

        reference = Reference("planned", self.full.seconds, self.full.spread)
        cold = spent(lambda part: part.cold) / reference.seconds
        return PlannedAER(
            cold=cold,
            this_run=spent(lambda part: part.now) / reference.seconds,
            speedup=1 / cold,
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

    def _copy_bytes(self) -> int:
        """A run has the base beside the model in training; the rehearsal shares one."""
        size = DTYPES[self.settings.precision].itemsize
        return parameter_counts(Path(self.inputs.base.folder)).total * size

    def _disk_bytes(self, rehearsal: Rehearsal) -> int:
        return round(rehearsal.bytes + CHECKPOINTS * BYTES_SAVED * rehearsal.most_trained)


def _stage(name: str, parts: Sequence[Part]) -> PlannedStage:
    cold = total(part.cold for part in parts)
    return PlannedStage(
        name=name,
        state=state_of(part.state for part in parts),
        seconds=total(part.now for part in parts).seconds,
        cold_seconds=cold.seconds,
        spread_seconds=cold.spread,
    )


def _timings(found: Found) -> int:
    """About how many shares of the time will be asked for."""

    def new(artifacts: Iterable[Artifact | None]) -> int:
        return sum(each is not None and not each.made for each in artifacts)

    steps = zip(found.measurements, found.scores, strict=True)
    scoring = sum(any(not each.made for each in of) + (not scores.made) for of, scores in steps)
    tunings = 2 * new([*found.proxies, found.head_proxy])
    models = new([found.model, found.model_random, found.full])
    sets = len(next(iter(found.evaluations.values())))
    evaluations = 2 * sets if new(each for of in found.evaluations.values() for each in of) else 0
    return tunings + new(found.rankings) + scoring + models + evaluations
