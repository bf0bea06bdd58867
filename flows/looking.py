"""Which artifacts of a run are in the store already, without making any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flows.inputs import Inputs, make_runtime
from flows.ledger import Ledger
from flows.scoring import score_corpus
from flows.settings import RunSettings
from flows.stages import (
    Run,
    benchmark,
    choose,
    choose_at_random,
    cost_of_full,
    evaluate,
    heads_for,
    read_data,
    train,
    train_full,
)
from p2d_core.planning import NEW, PARTLY, REUSED
from p2d_core.store import ArtifactRef, Store
from tasks.measurements import n_steps, scorer_step
from tasks.stage import NotMade, NotMadeError, ShardRef


class Found:
    """By stage, what each of its calls would find or make, in the order of the run."""

    def __init__(self, ledger: Ledger, waits_for: str, store: Store) -> None:
        self.calls: dict[str, list[list[ArtifactRef]]] = {}
        for entry in ledger.entries:
            if entry.refs:
                self.calls.setdefault(entry.stage, []).append(entry.refs)
        self.waits_for = waits_for
        """The first stage without which later keys are not known; empty if all are."""
        self.kinds = {ref.stage for ref in store.refs()}

    def of(self, stage: str, call: int = 0) -> list[ArtifactRef]:
        """The artifacts of a call; empty where it is not known which they are."""
        calls = self.calls.get(stage, [])
        return calls[call] if call < len(calls) else []

    def made(self, stage: str, call: int = -1) -> ArtifactRef | None:
        """The last artifact of a call, if it is there."""
        calls = self.calls.get(stage, [])
        ref = calls[call][-1] if -len(calls) <= call < len(calls) else None
        return None if isinstance(ref, NotMade) else ref

    def state(self, stage: str, refs: list[ArtifactRef]) -> str:
        """Of a call: `REUSED`, `NEW`, `PARTLY`, or "unknown until heads is made" and the like.

        What the store has none of is new, whatever its key.
        """
        missing = [ref for ref in refs if isinstance(ref, NotMade)]
        if refs and not missing:
            return REUSED
        if refs and all(ref.key for ref in missing):
            return NEW if len(missing) == len(refs) else PARTLY
        kind = next((k for k in ("model", "rate") if stage.startswith(k)), None)
        kind = kind or stage.removesuffix("_random")
        waits_for = missing[0].waits_for if missing else self.waits_for
        return f"unknown until {waits_for} is made" if kind in self.kinds else NEW


class _Foreseen(NotMade):
    """A corpus that is not made, but of which it is known how it will be cut."""

    shards: list[dict[str, Any]]

    @property
    def path(self) -> Path:
        """No file is opened."""
        return Path()

    @property
    def manifest(self) -> Any:
        """What `tasks.samples.shards_of` reads."""
        return SimpleNamespace(facts={"shards": self.shards})


def look_up(
    settings: RunSettings,
    inputs: Inputs,
    store: Path,
    given: ArtifactRef | None,
    shards: Sequence[ShardRef] | None = None,
) -> Found:
    """Goes through `flows.adapt.adapt_to`, as far as keys are known; reads manifests only.

    Args:
        given: the head map that the user named.
        shards: of the corpus if it is not made; what of an earlier one is measured already.
    """
    runtime = replace(make_runtime(settings, store, "plan"), only_look=True)
    run = Run(settings, inputs, runtime, Ledger("plan"))
    waits_for: list[str] = []

    def attempt(stage: str, call: Callable[[], ArtifactRef]) -> ArtifactRef:
        try:
            return call()
        except NotMadeError as missing:
            waits_for.append(missing.stage)
            return NotMade(stage=stage, waits_for=missing.stage)

    data = read_data(run)
    if shards is not None and isinstance(data.corpus, NotMade) and data.corpus.key:
        cut = [{"file": "", "sha": shard.sha} for shard in shards]
        corpus = _Foreseen(stage=data.corpus.stage, key=data.corpus.key, shards=cut)
        data = replace(data, corpus=corpus)
    heads = heads_for(run, data, given)
    scores = attempt("scores", lambda: score_corpus(run, data, heads, inputs.scorer))
    subset = choose(run, data, scores)
    models: dict[str, ArtifactRef | None] = {"base": None}
    models["p2d"] = attempt("model", lambda: train(run, data, heads, subset))
    if settings.arms.random:
        by_chance = choose_at_random(run, data, scores, subset)
        models["random"] = attempt("model", lambda: train(run, data, heads, by_chance, "random"))
    full = None
    if settings.arms.full == "measured":
        models["full"] = full = attempt("model", lambda: train_full(run, data))
    if uses_head_proxy(inputs):
        tuned = run.ledger.last("head_proxy")
        models["proxy"] = tuned or NotMade(stage="head_proxy", waits_for=waits_for[0])
    for arm, model in models.items():
        evaluate(run, data, arm, model)
    benchmark(run, models)
    with suppress(NotMadeError):  # it is looked up all the same
        cost_of_full(run, data, full)
    return Found(run.ledger, waits_for[0] if waits_for else "", Store(store))


def uses_head_proxy(inputs: Inputs) -> bool:
    """Whether a step of the scorer looks through tuned heads."""
    steps = range(n_steps(inputs.scorer))
    return any(scorer_step(inputs.scorer, step).scorer.needs_head_proxy for step in steps)
