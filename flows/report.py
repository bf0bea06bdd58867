"""Puts a run's summary together from its artifacts."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flows.hub import base_name, hub_names
from flows.ledger import Ledger
from flows.settings import EvaluationSettings, RunSettings
from p2d_core.aer import Reference
from p2d_core.evaluation import metrics
from p2d_core.evaluation.metric import ALWAYS
from p2d_core.samples.rejected import REJECTED
from p2d_core.selection.subset import SUBSET
from p2d_core.store import ArtifactRef
from tasks.heads import PICTURE
from tasks.summary import (
    AERSummary,
    AgreementSummary,
    HarnessLine,
    HeadsSummary,
    ProxyRunSummary,
    QualitySummary,
    RejectedSummary,
    SelectionSummary,
    Summary,
    TrainableSummary,
)


def make_summary(
    settings: RunSettings,
    ledger: Ledger,
    reference: Reference,
    sources: Sequence[ArtifactRef],
    corpus: ArtifactRef,
    heads: ArtifactRef | None,
    subset: ArtifactRef,
    models: Mapping[str, ArtifactRef | None],
    evaluations: Mapping[str, Mapping[str, ArtifactRef]],
    benchmarks: Mapping[str, ArtifactRef],
) -> Summary:
    """Reads manifests and small files only."""
    model = models["p2d"]
    assert model is not None
    lines = ledger.lines()
    cold, now = ledger.aer(reference)
    facts = model.manifest.facts
    kept = {f"model_{arm}": models[arm] for arm in ("random", "full") if models.get(arm)}
    last = {entry.stage: entry.refs[-1] for entry in ledger.entries if entry.refs}
    for by_arm in ("evaluation", "harness"):
        last.pop(by_arm, None)
    named = last | {"subset": subset, "model": model} | kept
    if heads is not None:
        named["heads"] = heads
    for arm, measured in evaluations.items():
        named |= {f"evaluation_{arm}_{on}": ref for on, ref in measured.items()}
    named |= {f"harness_{arm}": ref for arm, ref in benchmarks.items()}
    return Summary(
        run_id=ledger.run_id,
        name=settings.name,
        base=base_name(settings.base),
        hub=hub_names(settings),
        target=settings.target.name,
        heads=_heads(heads, last.get("proxy")) if heads is not None else None,
        selection=_selection(settings, corpus, last["scores"], subset),
        rejected=_rejected(sources),
        trainable=TrainableSummary(
            adaptation=facts["adaptation"],
            parameters=facts["trainable"],
            share_of_model=facts["share_of_model"],
            share_of_attention=facts["share_of_attention"],
            proxy_samples=facts["proxy_samples"],
            learning_rate=facts["learning_rate"],
            **_search(last["rate"]) if settings.training.learning_rate == "auto" else {},
        ),
        quality=_quality(settings.evaluation, evaluations),
        harness=_harness(benchmarks),
        aer=AERSummary(
            cold=cold.ratio,
            this_run=now.ratio,
            speedup=cold.speedup,
            reference=reference.kind,
            full_seconds=reference.seconds,
            full_spread_seconds=reference.spread_seconds,
            stages=dict(cold.stages),
            stages_this_run=dict(now.stages),
            machines=ledger.machines(),
            gone=ledger.gone,
        ),
        stages=lines,
        reused=[line.name for line in lines if line.reused],
        artifacts={name: os.path.relpath(ref.location) for name, ref in named.items()},
    )


def rerun_command(store: Path, run_id: str, head_map: ArtifactRef | None) -> str:
    """Runs it again with the settings that it kept.

    From the folder that it was started in if the store is below that, else from anywhere.
    """
    here = os.path.relpath(store)
    if here.startswith(".."):
        here = str(store.resolve())
    words = ["p2d", "adapt", f"{here}/runs/{run_id}.yaml"]
    words += ["--store", here] if here != "artifacts" else []
    words += ["--head-map", head_map.key] if head_map is not None else []
    return shlex.join(words)


def _search(rate: ArtifactRef) -> dict[str, Any]:
    facts = rate.manifest.facts
    return {"rate_found": facts["learning_rate"], "rates_tried": dict(facts["tried"])}


def _heads(heads: ArtifactRef, proxy: ArtifactRef | None) -> HeadsSummary:
    facts = heads.manifest.facts
    return HeadsSummary(
        total=facts["total"],
        selected=len(facts["task_heads"]),
        ids=[(layer, head) for layer, head in facts["task_heads"]],
        ranker=facts["ranker"],
        picture=os.path.relpath(heads.path / PICTURE),
        agreement=_agreement(facts.get("agreement")),
        proxy_run=_proxy_run(proxy) if proxy is not None else None,
    )


def _proxy_run(proxy: ArtifactRef) -> ProxyRunSummary:
    facts = proxy.manifest.facts
    return ProxyRunSummary(
        learning_rate=proxy.manifest.settings["training"]["learning_rate"],
        steps=facts["steps"],
        held_out_before=facts["held_out_loss_before"],
        held_out_after=facts["held_out_loss_after"],
    )


def _agreement(found: dict[str, Any] | None) -> AgreementSummary | None:
    if found is None:
        return None
    (top,) = found["top"]
    return AgreementSummary(
        draws=found["draws"],
        spearman=found["spearman"],
        spearman_by_luck=found["spearman_by_luck"],
        jaccard=top["jaccard"],
        jaccard_by_chance=top["by_chance"],
    )


def _rejected(sources: Sequence[ArtifactRef]) -> list[RejectedSummary]:
    """Of each source that had some; one file may be read for two purposes."""
    found = {}
    for source in sources:
        facts = source.manifest.facts
        if facts.get("rejected"):
            file = os.path.relpath(source.path / REJECTED)
            found[source.key] = RejectedSummary(
                source=facts["source"], rows=facts["rejected"], file=file
            )
    return list(found.values())


def _selection(
    settings: RunSettings, corpus: ArtifactRef, scores: ArtifactRef, subset: ArtifactRef
) -> SelectionSummary:
    facts, pool = subset.manifest.facts, corpus.manifest.facts
    notes = list(facts["notes"])
    head_score_kept = scores.manifest.facts["head_score_kept"]
    if settings.scoring.depth != "heads":
        notes.append(
            f"scoring.depth {settings.scoring.depth}: the task heads looked at have "
            f"{head_score_kept:.0%} of all task heads' score"
        )
    if pool["duplicates"] or pool["excluded"]:
        notes.append(
            f"the corpus leaves out {pool['duplicates']} duplicates and {pool['excluded']} samples "
            "of the proxy, held-out or evaluation set"
        )
    return SelectionSummary(
        scorer=settings.scoring.scorer,
        corpus=sum(facts["corpus_by_source"].values()),
        selected=facts["rows"],
        replayed=facts["replayed"],
        by_source=facts["by_source"],
        corpus_by_source=facts["corpus_by_source"],
        by_label=labels_of(subset),
        cut_off=facts["cut_off"],
        notes=notes,
        head_score_kept=head_score_kept,
    )


def labels_of(subset: ArtifactRef) -> dict[str, int]:
    """Chosen samples by label, the most common first; empty where the samples carry none."""
    labels: Counter[str] = Counter()
    for extra in pq.read_table(subset.path / SUBSET, columns=["extra"])["extra"].to_pylist():
        if (label := label_in(extra)) is not None:
            labels[label] += 1
    return dict(labels.most_common())


def _harness(benchmarks: Mapping[str, ArtifactRef]) -> list[HarnessLine]:
    lines: dict[tuple[str, str], HarnessLine] = {}
    for arm, ref in benchmarks.items():
        for row in ref.manifest.facts["results"]:
            new = HarnessLine.model_validate(row | {"value": {}, "stderr": {}})
            line = lines.setdefault((row["task"], row["metric"]), new)
            line.value[arm], line.stderr[arm] = row["value"], row["stderr"]
    return list(lines.values())


def label_in(extra: str) -> str | None:
    """What a sample is labelled as, by the JSON of the columns that no stage reads."""
    label = json.loads(extra).get("label")
    return label if isinstance(label, str) else None


def _quality(
    evaluation: EvaluationSettings, evaluations: Mapping[str, Mapping[str, ArtifactRef]]
) -> QualitySummary:
    metric = evaluation.metric

    def measured(arm: str, on: str = "target") -> dict[str, float]:
        return dict(evaluations[arm][on].manifest.facts["metrics"])

    by_arm = {arm: measured(arm)[metric] for arm in evaluations}
    # the loss is always measured, and stands beside the others where it was asked for
    unasked = {metric} if ALWAYS in evaluation.also else {metric, ALWAYS}
    also = [name for name in measured("base") if name not in unasked]
    return QualitySummary(
        metric=metric,
        higher_is_better=metrics.get(metric).higher_is_better,
        base=by_arm["base"],
        p2d=by_arm["p2d"],
        full=by_arm.get("full"),
        random=by_arm.get("random"),
        proxy=by_arm.get("proxy"),
        retention={
            arm: measured(arm, "retention")[metric]
            for arm, sets in evaluations.items()
            if "retention" in sets
        },
        losses={arm: measured(arm)[ALWAYS] for arm in evaluations},
        also={name: {arm: measured(arm)[name] for arm in evaluations} for name in also},
        samples=evaluations["base"]["target"].manifest.facts["samples"],
    )
