"""Which artifacts of a run are in the store already, without making any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.inputs import Inputs
from flows.settings import RunSettings
from flows.stages import FULL, NO_HEADS
from p2d_core.aer import machine_name
from p2d_core.heads.ranking import rankers
from p2d_core.planning import NEW, REUSED
from p2d_core.store import ArtifactRef, Store
from p2d_core.store.store import readable
from tasks.evaluation import evaluate_model
from tasks.heads import average_heads, rank_heads
from tasks.measurements import measure, measurer_of, n_steps, scorer_step
from tasks.model import calibrate, fine_tune
from tasks.proxy import head_proxy_run, proxy_run
from tasks.samples import assemble, read_source, redraw_target, shards_of, split_target
from tasks.scores import score
from tasks.stage import Runtime, ShardRef, SourceInput
from tasks.subset import draw_subset


@dataclass(frozen=True)
class Artifact:
    """An artifact of a run: the ref is known from its recipe, whether it is made or not."""

    stage: str
    """As the run's ledger calls it."""
    state: str
    """`REUSED`, `NEW`, or "unknown until heads is made" and the like."""
    ref: ArtifactRef | None = None
    """None: what it is made from is not known yet."""

    @property
    def made(self) -> bool:
        return self.state == REUSED

    @property
    def facts(self) -> dict[str, Any] | None:
        """Of its manifest; None before it is made."""
        return dict(self.ref.manifest.facts) if self.made and self.ref is not None else None


@dataclass(frozen=True)
class Found:
    """Every artifact of a run that its report counts."""

    target: Artifact
    corpus: Artifact
    draws: list[Artifact]
    """Further draws of the target."""
    proxies: list[Artifact]
    rankings: list[Artifact]
    """The last one is the head map."""
    head_proxy: Artifact | None
    measurements: list[list[Artifact]]
    """Of each step of the scorer, a shard each; of unknown shards one stands for all."""
    scores: list[Artifact]
    subset: Artifact
    model: Artifact
    subset_random: Artifact | None
    model_random: Artifact | None
    full: Artifact
    """The trained model, or the reference."""
    evaluations: dict[str, list[Artifact]]
    """By arm: on the target, and on the retention samples."""


class Search:
    """Walks the recipes of `flows.stages`, as far as keys are known; reads manifests only."""

    def __init__(self, settings: RunSettings, inputs: Inputs, runtime: Runtime) -> None:
        self.settings, self.inputs, self.runtime = settings, inputs, runtime
        self.store = Store(Path(runtime.store))
        self.stages_there = {ref.stage for ref in self.store.refs()}

    def look(self, stage: str, task: Any, **inputs: Any) -> Artifact:
        """The artifact that a task would make of these inputs, `Artifact` among them."""
        waits = _first_unknown(inputs.values())
        if waits is not None:
            return self.unknown(stage, waits, task.name)
        recipe = task.cache_policy.recipe_of({name: _ref(value) for name, value in inputs.items()})
        folder = self.store.path(recipe.stage, recipe.key)
        ref = ArtifactRef(stage=recipe.stage, key=recipe.key, location=str(folder))
        return Artifact(stage, REUSED if readable(ref) else NEW, ref)

    def unknown(self, stage: str, waits_for: str, kind: str = "") -> Artifact:
        """One whose key is not known; where the store has none of its kind it is new all the same.

        ``waits_for`` is a stage, or the state of an artifact that waits itself.
        """
        if (kind or stage) not in self.stages_there:
            return Artifact(stage, NEW)
        said = waits_for if " " in waits_for else f"unknown until {waits_for} is made"
        return Artifact(stage, said)

    def all(self, given_heads: ArtifactRef | None, shards: Sequence[ShardRef] | None) -> Found:
        """Every artifact of the run.

        Args:
            given_heads: the head map that the user named.
            shards: of the corpus, as they will be; None: those that it has, if it is made.
        """
        inputs = self.inputs
        evaluation, retention = self.read(inputs.evaluation), self.read(inputs.retention)
        target = self._target(evaluation)
        corpus = self._corpus(target, [each for each in (evaluation, retention) if each])
        if shards is None and corpus.made and corpus.ref is not None:
            shards = shards_of(corpus.ref)
        draws, proxies, rankings = self._heads(target, given_heads)
        facts = rankings[-1].facts
        task_heads = None
        if facts is not None:
            task_heads = tuple((layer, head) for layer, head in facts["task_heads"])
        scoring = _Scoring(self, target, corpus, rankings[-1], task_heads, shards)
        scoring.walk()
        chosen = {"scores": scoring.scores[-1], "corpus": corpus}
        subset = self.look("subset", draw_subset, selection=inputs.selection, **chosen)
        model = self._model("model", subset, rankings[-1], task_heads)
        subset_random = model_random = None
        if self.settings.arms.random:
            by_chance = replace(inputs.selection, at_random=True)
            subset_random = self.look("subset_random", draw_subset, selection=by_chance, **chosen)
            model_random = self._model("model_random", subset_random, rankings[-1], task_heads)
        full = self._full(corpus)
        models: dict[str, Artifact | None] = {"base": None, "p2d": model}
        if model_random is not None:
            models["random"] = model_random
        if self.settings.arms.full == "measured":
            models["full"] = full
        if scoring.head_proxy is not None:
            models["proxy"] = scoring.head_proxy
        sets = [each for each in (evaluation or target, retention) if each is not None]
        return Found(
            target=target,
            corpus=corpus,
            draws=draws,
            proxies=proxies,
            rankings=rankings,
            head_proxy=scoring.head_proxy,
            measurements=scoring.measurements,
            scores=scoring.scores,
            subset=subset,
            model=model,
            subset_random=subset_random,
            model_random=model_random,
            full=full,
            evaluations={
                arm: [self._evaluation(arm, of_arm, samples) for samples in sets]
                for arm, of_arm in models.items()
            },
        )

    def read(self, source: SourceInput | None) -> Artifact | None:
        """A source as it is read."""
        return self.look("samples", read_source, source=source) if source else None

    def _target(self, evaluation: Artifact | None) -> Artifact:
        settings = self.settings
        return self.look(
            "samples",
            split_target,
            target=self.read(self.inputs.target),
            evaluation=evaluation,
            n_proxy=settings.proxy.samples,
            n_held_out=settings.proxy.held_out,
            n_evaluation=settings.evaluation.samples,
            seed=settings.seed,
        )

    def _corpus(self, target: Artifact, kept_out: list[Artifact]) -> Artifact:
        return self.look(
            "samples",
            assemble,
            sources=[self.read(each) for each in self.inputs.corpus],
            target=target,
            kept_out=kept_out,
            include_target=self.settings.corpus.include_target,
        )

    def _heads(
        self, target: Artifact, given: ArtifactRef | None
    ) -> tuple[list[Artifact], list[Artifact], list[Artifact]]:
        """Further draws of the target, proxy runs, and rankings, of which the last is the map."""
        if given is not None:
            made_from = [
                Artifact(ref.stage, REUSED, ref) for ref in reversed(self.store.lineage(given))
            ]
            proxies = [each for each in made_from if each.stage == "proxy"]
            return [], proxies, [each for each in made_from if each.stage == "heads"]
        inputs, settings = self.inputs, self.settings
        ranker = rankers.make(inputs.ranker.name, inputs.ranker.options)
        draws = [
            self.look("samples", redraw_target, target=target, draw=draw)
            for draw in range(1, settings.heads.average_over)
        ]
        proxies, rankings = [], []
        ranked = {"base": inputs.base, "ranker": inputs.ranker, "pick": inputs.pick}
        for drawn in [target, *draws]:
            proxy = None
            if ranker.needs_proxy_run:
                training = inputs.proxy_training
                proxy = self.look(
                    "proxy", proxy_run, base=inputs.base, target=drawn, training=training
                )
                proxies.append(proxy)
            rankings.append(self.look("heads", rank_heads, proxy=proxy, target=drawn, **ranked))
        if draws:
            rankings.append(self.look("heads", average_heads, draws=list(rankings), **ranked))
        return draws, proxies, rankings

    def _model(
        self,
        stage: str,
        subset: Artifact,
        heads: Artifact,
        task_heads: tuple[tuple[int, int], ...] | None,
    ) -> Artifact:
        needs_heads = self.inputs.adaptation_needs_heads
        if needs_heads and task_heads is None:
            return self.unknown(stage, "heads", "model")
        return self.look(
            stage,
            fine_tune,
            base=self.inputs.base,
            samples=subset,
            adaptation=self.inputs.adaptation,
            task_heads=task_heads if needs_heads else NO_HEADS,
            training=self.inputs.training,
            heads=heads if needs_heads else None,
            arm=stage,
        )

    def _full(self, corpus: Artifact) -> Artifact:
        """Full fine-tuning as it was run, or the reference that stands for it."""
        inputs, arms, runtime = self.inputs, self.settings.arms, self.runtime
        if arms.full == "measured":
            return self.look(
                "model_full",
                fine_tune,
                base=inputs.base,
                samples=corpus,
                adaptation=FULL,
                task_heads=NO_HEADS,
                training=inputs.full_training,
                heads=None,
                arm="full",
            )
        return self.look(
            "reference",
            calibrate,
            base=inputs.base,
            corpus=corpus,
            training=inputs.full_training,
            steps=arms.calibration_steps,
            machine=f"{machine_name()}, {runtime.device}, {runtime.threads} threads",
        )

    def _evaluation(self, arm: str, model: Artifact | None, samples: Artifact) -> Artifact:
        return self.look(
            "evaluation",
            evaluate_model,
            base=self.inputs.base,
            model=model,
            samples=samples,
            evaluation=self.inputs.evaluating,
            arm=arm,
        )


@dataclass
class _Scoring:
    """Measurements and scores, a step of the scorer after the other."""

    search: Search
    target: Artifact
    corpus: Artifact
    heads: Artifact
    task_heads: tuple[tuple[int, int], ...] | None
    shards: Sequence[ShardRef] | None
    head_proxy: Artifact | None = None
    measurements: list[list[Artifact]] = field(default_factory=list)
    scores: list[Artifact] = field(default_factory=list)

    def walk(self) -> None:
        """Every step."""
        inputs = self.search.inputs
        for step in range(n_steps(inputs.scorer)):
            one = scorer_step(inputs.scorer, step).scorer
            looked_at = {
                "base": inputs.base,
                "scorer": inputs.scorer,
                "step": step,
                "task_heads": self.task_heads if one.needs_heads else NO_HEADS,
                "head_proxy": self._tuned() if one.needs_head_proxy else None,
                "heads": self.heads if one.needs_heads else None,
                "previous": self.scores[-1] if self.scores else None,
            }
            measured_with = looked_at | {
                "measurer": measurer_of(one),
                "target": self.target if one.measures_target else None,
            }
            self.measurements.append(self._measured(measured_with))
            self.scores.append(self._scored(looked_at))

    def _tuned(self) -> Artifact:
        search = self.search
        self.head_proxy = search.look(
            "head_proxy",
            head_proxy_run,
            base=search.inputs.base,
            heads=self.heads,
            target=self.target,
            include_kv=search.settings.heads.include_kv,
            training=search.inputs.head_proxy_training,
        )
        return self.head_proxy

    def _measured(self, measured_with: dict[str, Any]) -> list[Artifact]:
        stage, search = "measurements", self.search
        if self.shards is None:
            return [search.unknown(stage, "samples")]
        if measured_with["task_heads"] is None:
            return [search.unknown(stage, "heads")] * len(self.shards)
        passing: list[str | None] = [None] * len(self.shards)
        if self.scores:
            before = self.scores[-1]
            if before.facts is None:
                waits_for = "scores" if before.state == NEW else before.state
                return [search.unknown(stage, waits_for)] * len(self.shards)
            passing = before.facts["passing"]
        return [
            search.look(stage, measure, shard=shard, passing=passed, **measured_with)
            for shard, passed in zip(self.shards, passing, strict=True)
        ]

    def _scored(self, looked_at: dict[str, Any]) -> Artifact:
        if looked_at["task_heads"] is None:
            return self.search.unknown("scores", "heads")
        return self.search.look(
            "scores",
            score,
            corpus=self.corpus,
            measurements=self.measurements[-1],
            target=self.target,
            **looked_at,
        )


def _first_unknown(values: Iterable[Any]) -> str | None:
    """The state of the first artifact among them whose key is not known."""
    for value in values:
        parts = value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if isinstance(part, Artifact) and part.ref is None:
                return part.state if part.state != NEW else part.stage
    return None


def _ref(value: Any) -> Any:
    """The value with refs in the place of artifacts."""
    if isinstance(value, Artifact):
        return value.ref
    if isinstance(value, list | tuple):
        return type(value)(_ref(part) for part in value)
    return value
