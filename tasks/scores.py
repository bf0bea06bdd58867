"""From the measurements of all shards to affinities."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from p2d_core.affinity.head_activation import HeadActivation
from p2d_core.affinity.measuring import MEASURED, MeasuredCorpus
from p2d_core.affinity.scoring import SCORES, STATE, score_corpus
from p2d_core.store import ArtifactRef, Making
from tasks.measurements import head_map_of, model_for, scorer_step, target_of
from tasks.progress import progress_of
from tasks.room import of_scores
from tasks.samples import shards_of
from tasks.stage import BaseModel, Plugin, Runtime, stage


@stage("scores", outside_key=("heads",), room=of_scores)
def score(
    making: Making,
    runtime: Runtime,
    base: BaseModel,
    scorer: Plugin,
    step: int,
    corpus: ArtifactRef,
    measurements: list[ArtifactRef],
    target: ArtifactRef,
    task_heads: tuple[tuple[int, int], ...],
    head_proxy: ArtifactRef | None,
    heads: ArtifactRef | None,
    previous: ArtifactRef | None,
) -> None:
    """Affinities of one step, merged with those of the steps before."""
    one = scorer_step(scorer, step)
    model = model_for(base, runtime, head_proxy)
    known = target_of(target)
    state = one.scorer.prepare(model, head_map_of(heads), known)
    measured = MeasuredCorpus(
        [
            (Path(shard.file), measurement.path / MEASURED)
            for shard, measurement in zip(shards_of(corpus), measurements, strict=True)
        ]
    )
    with progress_of("scores (shards)") as progress:
        outcome = score_corpus(
            one,
            state,
            measured,
            making.folder / SCORES,
            previous=previous.path / SCORES if previous is not None else None,
            progress=progress,
        )
    if outcome.state:
        tensors = {name: tensor.contiguous() for name, tensor in outcome.state.items()}
        save_file(tensors, making.folder / STATE)
    gates = dict(previous.manifest.facts["gates"]) if previous is not None else {}
    if outcome.gate is not None:
        gates[one.name] = {
            "threshold": outcome.gate.threshold,
            "passed": outcome.passed,
            "tried": outcome.tried,
        }
    kept = previous.manifest.facts.get("head_score_kept") if previous is not None else None
    head_map = head_map_of(heads)
    if head_map is not None and isinstance(one.scorer, HeadActivation):
        kept = one.scorer.score_kept(head_map)
    making.facts |= {
        "head_score_kept": kept,
        "rows": outcome.rows,
        "passed": outcome.passed,
        "gates": gates,
        "passing": outcome.passing_by_shard,
        "proxy_lengths": [sample.n_learnt for sample in model.encode(known.proxy)],
    }
    making.samples = outcome.rows
