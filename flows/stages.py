"""The stages of the main job, as flows call them: each times itself in the run's ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flows.inputs import Inputs
from flows.ledger import Ledger
from flows.settings import RunSettings
from flows.settings_base import Rate
from p2d_core.adaptation.adaptations import Full
from p2d_core.adaptation.rates import rate_for
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.aer import Reference
from p2d_core.heads.ranking import rankers
from p2d_core.store import ArtifactRef, Store
from p2d_core.store.in_use import InUse, put_in_use
from tasks.elsewhere import machine, workers
from tasks.evaluation import evaluate_model
from tasks.harness import run_harness
from tasks.heads import average_heads, head_map_in, rank_heads
from tasks.model import calibrate, fine_tune, reference_in
from tasks.proxy import proxy_run
from tasks.rate import find_rate
from tasks.room import rows_of
from tasks.samples import (
    assemble,
    read_source,
    redraw_target,
    refuse_too_many_rejected,
    refuse_unforeseen_chats,
    split_target,
)
from tasks.stage import NotMade, Plugin, Runtime, SourceInput
from tasks.subset import draw_subset
from tasks.together import together

NO_HEADS: tuple[tuple[int, int], ...] = ()
FULL = Plugin.of("full", Full())
IN_USE = "in-use"
"""In place of a head map's key: the one that is in use for the base model and target."""


@dataclass(frozen=True)
class Run:
    """What the parts of the flow share."""

    settings: RunSettings
    inputs: Inputs
    runtime: Runtime
    ledger: Ledger


@dataclass(frozen=True)
class Data:
    """Where the samples are."""

    target: ArtifactRef
    corpus: ArtifactRef
    evaluation: ArtifactRef
    retention: ArtifactRef | None
    sources: tuple[ArtifactRef, ...]
    """Each file as it was read."""


def read_data(run: Run) -> Data:
    """Samples: every source into shards; the target into its parts; the corpus."""
    inputs, settings, runtime = run.inputs, run.settings, run.runtime
    sources: list[ArtifactRef] = []

    def read(source: SourceInput) -> ArtifactRef:
        sources.append(read_source(runtime, source))
        return sources[-1]

    with run.ledger.stage("samples") as made:
        target, evaluation = read_target(run, sources)
        retention = read(inputs.retention) if inputs.retention is not None else None
        corpus = assemble(
            runtime,
            sources=[read(each) for each in inputs.corpus],
            target=target,
            kept_out=[ref for ref in (evaluation, retention) if ref is not None],
            include_target=settings.corpus.include_target,
        )
        if not runtime.only_look:
            refuse_too_many_rejected(sources, settings.skip_bad_rows)
            if settings.format.template == "auto" and inputs.base.template == "plain":
                refuse_unforeseen_chats(sources)
        made += [target, corpus]
    return Data(target, corpus, evaluation or target, retention, tuple(sources))


def read_target(run: Run, sources: list[ArtifactRef]) -> tuple[ArtifactRef, ArtifactRef | None]:
    """The target in its parts, and the evaluation samples if they have a source of their own.

    What is read is added to ``sources``.
    """
    inputs, settings, runtime = run.inputs, run.settings, run.runtime
    evaluation = None
    if inputs.evaluation is not None:
        evaluation = read_source(runtime, inputs.evaluation)
        sources.append(evaluation)
    whole = read_source(runtime, inputs.target)
    sources.append(whole)
    target = split_target(
        runtime,
        target=whole,
        n_proxy=settings.proxy.samples,
        n_held_out=settings.proxy.held_out,
        # samples of a source of their own are no part of the target: it stays when they change
        n_evaluation=0 if evaluation is not None else settings.evaluation.samples,
        seed=settings.seed,
    )
    return target, evaluation


def heads_for(run: Run, data: Data, given: ArtifactRef | None) -> ArtifactRef | None:
    """The head map that was given, or else one that is found; None where no heads are needed."""
    if not run.inputs.needs_heads:
        return None
    return reuse_heads(run, given) if given is not None else find_heads(run, data.target)


def reuse_heads(run: Run, heads: ArtifactRef) -> ArtifactRef:
    """A given head map, with what it and its proxy run cost when they were made."""
    store = Store(Path(run.runtime.store))
    for ref in reversed(store.lineage(heads)):
        if ref.stage in ("proxy", "heads"):
            with run.ledger.stage(ref.stage) as found:
                found.append(ref)
        proxy = ref.manifest.inputs.get("proxy") if ref.stage == "heads" else None
        if proxy and not store.path("proxy", proxy).exists():
            run.ledger.gone.append(f"proxy/{proxy[:12]}")
    return heads


def find_heads(run: Run, target: ArtifactRef) -> ArtifactRef:
    """Proxy run, where the ranker wants one, and head ranking; on several draws if asked for."""
    inputs = run.inputs
    targets = draws_of(run, target, run.settings.heads.average_over)
    maps = [rank_on(run, target, inputs.ranker) for target in targets]
    if len(maps) == 1:
        return maps[0]
    with run.ledger.stage("heads") as made:
        heads = average_heads(
            run.runtime, inputs.base, draws=maps, ranker=inputs.ranker, pick=inputs.pick
        )
        made.append(heads)
    return heads


def use_from_now_on(run: Run, heads: ArtifactRef, why: str, refreshes: int = 0) -> None:
    """Runs over this base model and target that ask for the head map in use get this one."""
    in_use = InUse(heads.key, time.strftime("%Y-%m-%d"), why, refreshes)
    put_in_use(Path(run.runtime.store), run.inputs.base.sha256, run.settings.target.name, in_use)


def draws_of(run: Run, target: ArtifactRef, n: int) -> list[ArtifactRef]:
    """The target, and then the same with other proxy sets; ``n`` in all."""
    with run.ledger.stage("samples") as made:
        made += [redraw_target(run.runtime, target=target, draw=draw) for draw in range(1, n)]
    return [target, *made]


def rank_on(run: Run, target: ArtifactRef, ranker: Plugin) -> ArtifactRef:
    """The heads as this target's proxy set has them."""
    inputs = run.inputs
    proxy = None
    if rankers.make(ranker.name, ranker.options).needs_proxy_run:
        with run.ledger.stage("proxy") as made:
            proxy = proxy_run(run.runtime, inputs.base, target, inputs.proxy_training)
            made.append(proxy)
    with run.ledger.stage("heads") as made:
        heads = rank_heads(
            run.runtime, inputs.base, proxy=proxy, target=target, ranker=ranker, pick=inputs.pick
        )
        made.append(heads)
    return heads


def task_heads_of(heads: ArtifactRef | None) -> tuple[tuple[int, int], ...]:
    """The task heads of a head map, none where no head is looked at."""
    return head_map_in(heads).task_heads if heads is not None else NO_HEADS


def choose(run: Run, data: Data, scores: ArtifactRef) -> ArtifactRef:
    """The subset."""
    with run.ledger.stage("subset") as made:
        subset = draw_subset(run.runtime, scores, data.corpus, run.inputs.selection)
        made.append(subset)
    return subset


def with_rate(
    run: Run,
    data: Data,
    heads: ArtifactRef | None,
    adaptation: Plugin,
    training: TrainingSpec,
    asked: Rate,
    n: Callable[[], int],
    stage: str = "rate",
) -> TrainingSpec:
    """A training on ``n`` samples with its own rate, or, if ``asked`` for auto, the best one."""
    if asked != "auto":
        return training
    with run.ledger.stage(stage) as made:
        found = find_rate(
            run.runtime,
            run.inputs.base,
            target=data.target,
            adaptation=adaptation,
            task_heads=task_heads_of(heads),
            training=run.inputs.rate_training,
            heads=heads,
        )
        made.append(found)
    facts = found.manifest.facts
    rate = rate_for(facts["learning_rate"], facts["steps"], training.steps(n()))
    return replace(training, learning_rate=rate)


def train(
    run: Run, data: Data, heads: ArtifactRef | None, subset: ArtifactRef, arm: str = "p2d"
) -> ArtifactRef:
    """Fine-tuning with the chosen adaptation; ``heads`` may be None for one that needs none."""
    inputs, settings = run.inputs, run.settings
    looked_at = heads if inputs.adaptation_needs_heads else None
    asked = settings.training.learning_rate

    def n() -> int:
        return int(subset.manifest.facts["rows"]) + settings.n_proxy_trained_on

    training = with_rate(run, data, looked_at, inputs.adaptation, inputs.training, asked, n)
    with run.ledger.stage("model" if arm == "p2d" else f"model_{arm}") as made:
        model = fine_tune(
            run.runtime,
            inputs.base,
            samples=subset,
            adaptation=inputs.adaptation,
            task_heads=task_heads_of(looked_at),
            training=training,
            heads=looked_at,
            target=data.target if settings.n_proxy_trained_on else None,
            arm=arm,
        )
        made.append(model)
    return model


def other_arms(
    run: Run, data: Data, heads: ArtifactRef | None, scores: ArtifactRef, subset: ArtifactRef
) -> dict[str, ArtifactRef]:
    """What P2D is held against: random data of the same size, and everything."""
    arms = {}
    if run.settings.arms.random:
        by_chance = choose_at_random(run, data, scores, subset)
        arms["random"] = train(run, data, heads, by_chance, "random")
    if run.settings.arms.full == "measured":
        arms["full"] = train_full(run, data)
    return arms


def choose_at_random(run: Run, data: Data, scores: ArtifactRef, chosen: ArtifactRef) -> ArtifactRef:
    """A subset of the same size as the ``chosen`` one, drawn by chance."""
    with run.ledger.stage("subset_random") as made:
        by_chance = replace(run.inputs.selection, at_random=True)
        if not isinstance(chosen, NotMade):
            facts = chosen.manifest.facts
            # quotas may leave places open
            if facts["rows"] < by_chance.budget(sum(facts["corpus_by_source"].values())):
                by_chance = replace(by_chance, rows=facts["rows"])
        subset = draw_subset(run.runtime, scores, data.corpus, by_chance)
        made.append(subset)
    return subset


def train_full(run: Run, data: Data) -> ArtifactRef:
    """Full fine-tuning on the whole corpus."""
    inputs, settings = run.inputs, run.settings
    asked = settings.arms.full_learning_rate

    def n() -> int:
        return rows_of(data.corpus) + settings.n_proxy_trained_on

    training = with_rate(run, data, None, FULL, inputs.full_training, asked, n, "rate_full")
    with run.ledger.stage("model_full") as made:
        full = fine_tune(
            run.runtime,
            inputs.base,
            samples=data.corpus,
            adaptation=FULL,
            task_heads=NO_HEADS,
            training=training,
            heads=None,
            target=data.target if settings.n_proxy_trained_on else None,
            arm="full",
        )
        made.append(full)
    return full


def cost_of_full(run: Run, data: Data, full: ArtifactRef | None) -> Reference:
    """What full fine-tuning on the whole corpus takes: as it was run, or from some steps."""
    if full is not None:
        return Reference("measured", float(full.manifest.cost["wall_seconds"]))
    with run.ledger.stage("reference") as made:
        calibrated = calibrate(
            run.runtime,
            run.inputs.base,
            data.corpus,
            # nothing is learnt, and another rate takes no other time
            training=replace(run.inputs.full_training, learning_rate=0.0),
            steps=run.settings.arms.calibration_steps,
            n_more=run.settings.n_proxy_trained_on,
            machine=_machine(run.runtime),
        )
        made.append(calibrated)
    return reference_in(calibrated)


def _machine(runtime: Runtime) -> str:
    """What decides how long a step takes, in words."""
    lent = workers()
    found = lent.threads if lent is not None else torch.get_num_threads()
    words = [machine(), runtime.device, f"{runtime.threads or found} threads"]
    if runtime.gradient_checkpointing:
        words.append("gradient checkpointing")
    if runtime.micro_batch_tokens is not None:
        words.append(f"{runtime.micro_batch_tokens:,} tokens at once")
    if (processes := together(runtime.parallel)).size > 1:
        words.append(f"{processes.size} processes")
        words += ["fsdp"] if processes.shards_model else []
    return ", ".join(words)


def evaluate(run: Run, data: Data, arm: str, model: ArtifactRef | None) -> dict[str, ArtifactRef]:
    """Quality on the target, and on what the base could do before."""
    measured = {}
    with run.ledger.stage("evaluation") as made:
        for name, samples in (("target", data.evaluation), ("retention", data.retention)):
            if samples is not None:
                measured[name] = evaluate_model(
                    run.runtime,
                    run.inputs.base,
                    model=model,
                    samples=samples,
                    evaluation=run.inputs.evaluating,
                    arm=arm,
                )
        made += measured.values()
    return measured


def benchmark(run: Run, models: Mapping[str, ArtifactRef | None]) -> dict[str, ArtifactRef]:
    """Tasks of lm-eval on the arms that they are asked of, by arm."""
    asked, spec = run.settings.evaluation.harness, run.inputs.harness
    if asked is None or spec is None:
        return {}
    measured = {}
    with run.ledger.stage("harness") as made:
        for arm in (arm for arm in models if arm in asked.arms):
            measured[arm] = run_harness(
                run.runtime,
                run.inputs.base,
                model=models[arm],
                harness=spec,
                batch_size=asked.batch_size,
                arm=arm,
            )
        made += measured.values()
    return measured
