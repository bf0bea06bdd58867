"""From heads to scores: every step of a scorer, on all of the corpus or as much as is enough."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from prefect import unmapped

from flows.engine import on_all_workers
from flows.inputs import Inputs
from flows.settings import RunSettings
from flows.stages import Data, Run, task_heads_of, with_rate
from p2d_core.adaptation.adaptations import Heads
from p2d_core.affinity import TakesOver
from p2d_core.affinity.tried import first_share, next_share
from p2d_core.store import ArtifactRef
from tasks.measurements import (
    Passing,
    check_room_for,
    known_of,
    measure,
    measure_together,
    measurer_of,
    n_steps,
    scorer_step,
    with_known,
)
from tasks.progress import progress_of
from tasks.proxy import head_proxy_run
from tasks.samples import shards_of
from tasks.scores import score
from tasks.stage import NotMade, Plugin, Runtime
from tasks.together import spread_out


def score_corpus(run: Run, data: Data, heads: ArtifactRef | None, scorer: Plugin) -> ArtifactRef:
    """Measurements of every shard, then scores, for each step of the scorer.

    ``heads`` may be None for a scorer that looks at none. Gates after the first are tried on a
    share of what passed it, and on a larger one where too few of the share passed.
    """
    scoring = Scoring(run, data, heads, scorer)
    first = scores = scoring.step(0, None, 1.0)
    if n_steps(scorer) == 1:
        return scores
    share = 1.0
    if not isinstance(first, NotMade):
        facts = first.manifest.facts
        share = share_to_try(run.settings, run.inputs, facts["passed"], facts["rows"])
    while True:
        scores = first
        for step in range(1, n_steps(scorer)):
            scores = scoring.step(step, scores, share if step == 1 else 1.0)
        if share == 1 or isinstance(scores, NotMade):
            return scores
        facts = scores.manifest.facts
        if facts["passed"] >= (wanted := run.inputs.selection.wanted(facts["rows"])):
            return scores
        share = next_share(share, facts["passed"], wanted)


@dataclass
class Scoring:
    """The steps of a scorer on one corpus, and what is measured so far."""

    run: Run
    data: Data
    heads: ArtifactRef | None
    scorer: Plugin
    _measured: dict[int, list[ArtifactRef]] = field(default_factory=dict)
    """By step, for each shard."""

    @cached_property
    def tuned(self) -> ArtifactRef:
        """The task heads tuned on the proxy set, for the steps that look through them."""
        return tune_heads(self.run, self.data, self.heads)

    def step(self, step: int, before: ArtifactRef | None, share: float) -> ArtifactRef:
        """Scores of one step: of a share of what passed those ``before``."""
        run, data = self.run, self.data
        one = scorer_step(self.scorer, step).scorer
        heads = self.heads if one.needs_heads else None
        looked_at = {
            "base": run.inputs.base,
            "scorer": self.scorer,
            "step": step,
            "task_heads": task_heads_of(heads),
            "head_proxy": self.tuned if one.needs_head_proxy else None,
            "heads": heads,
            "previous": before,
        }
        measured_with = looked_at | {
            "measurer": measurer_of(one),
            "target": data.target if one.measures_target else None,
        }
        shards = shards_of(data.corpus)
        passing = passing_in(before, share) or [None] * len(shards)
        nothing: list[ArtifactRef | None] = [None] * len(shards)
        known = self._measured.get(step) or nothing
        taken_over = self._measured[step - 1] if step and isinstance(one, TakesOver) else nothing
        each = [
            {"shard": shard, "passing": passes, "before": taken, "known": there}
            for shard, passes, taken, there in zip(shards, passing, taken_over, known, strict=True)
        ]
        with run.ledger.stage("measurements") as made:
            measured = measure_corpus(run.runtime, each, measured_with, one.runs_model)
            made += [ref for each in measured for ref in with_known(run.runtime, each)]
        self._measured[step] = measured
        with run.ledger.stage("scores") as made:
            scores = score(
                run.runtime,
                corpus=data.corpus,
                measurements=measured,
                target=data.target,
                **looked_at,
            )
            made.append(scores)
        return scores


def passing_in(scores: ArtifactRef | None, share: float) -> list[Passing | None]:
    """Of each shard what passed all gates of these scores, a share of it; empty without scores."""
    if scores is None:
        return []
    return [Passing(sha, share) for sha in scores.manifest.facts["passing"]]


def share_to_try(settings: RunSettings, inputs: Inputs, passed: int, n_corpus: int) -> float:
    """Of what ``passed`` the first gate, the share that the gates after it are tried on first."""
    gates = [scorer_step(inputs.scorer, step).gate for step in range(1, n_steps(inputs.scorer))]
    enough, spec = settings.scoring.enough, inputs.selection
    if None in gates or enough is None or spec.quotas or spec.where:
        return 1.0
    expected = math.prod(1 - gate for gate in gates if gate is not None)
    return first_share(passed, enough * spec.wanted(n_corpus), expected)


def measure_corpus(
    runtime: Runtime, each: list[dict[str, Any]], measured_with: dict[str, Any], runs_model: bool
) -> list[ArtifactRef]:
    """Every shard's measurements, in order: a task each where the model runs, else one for all.

    ``each`` are the inputs of `measure` that are a shard's own.
    """
    if runtime.only_look:
        return [measure(runtime, **of_shard, **measured_with) for of_shard in each]
    check_room_for(runtime, [(one["shard"], one["passing"]) for one in each], measured_with)
    each = [one | {"known": one["known"] or known_of(runtime, one, measured_with)} for one in each]
    if not runs_model:
        return measure_together(runtime, each, measured_with)
    rounds = spread_out("measurements", {"runtime": runtime, **measured_with}, each)
    made: dict[int, ArtifactRef] = {}
    with progress_of("measurements (shards)") as progress, on_all_workers(measure) as each_of:
        for places in filter(None, rounds):
            futures = each_of(
                runtime=unmapped(runtime),
                **{name: [each[place][name] for place in places] for name in each[0]},
                **{name: unmapped(value) for name, value in measured_with.items()},
            )
            for place, future in zip(places, futures, strict=True):
                made[place] = future.result()
                progress(len(made), len(each))
    return [made[place] for place in range(len(each))]


def tune_heads(run: Run, data: Data, heads: ArtifactRef | None) -> ArtifactRef:
    """The task heads alone, tuned on the proxy set."""
    assert heads is not None
    settings, inputs = run.settings.heads, run.inputs
    by_heads = Plugin.of("heads", Heads(settings.slices))
    asked, n = settings.proxy_learning_rate, run.settings.proxy.samples
    training = with_rate(run, data, heads, by_heads, inputs.head_proxy_training, asked, lambda: n)
    has_made_it = asked == "auto" and trains_as_searched(inputs)
    searched = run.ledger.last("rate") if has_made_it else None
    with run.ledger.stage("head_proxy") as made:
        head_proxy = head_proxy_run(
            run.runtime,
            inputs.base,
            heads=heads,
            target=data.target,
            slices=settings.slices,
            training=training,
            searched=searched,
        )
        made.append(head_proxy)
    return head_proxy


def trains_as_searched(inputs: Inputs) -> bool:
    """Whether head_proxy is tuned as each rate was tried, so that the search has made it."""
    rate = inputs.rate_training.learning_rate
    return replace(inputs.head_proxy_training, learning_rate=rate) == inputs.rate_training
