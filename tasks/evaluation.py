"""What the base or an adapted model can do."""

from __future__ import annotations

import json

import pyarrow.parquet as pq

from p2d_core.adaptation.adaptations import adapted
from p2d_core.evaluation import EvaluationSpec
from p2d_core.evaluation.evaluate import evaluate
from p2d_core.models import load_model
from p2d_core.store import ArtifactRef, Making
from tasks.elsewhere import as_it_is
from tasks.progress import progress_of
from tasks.samples import all_samples, target_part
from tasks.stage import BaseModel, Runtime, stage


@stage("evaluation", outside_key=("arm",), sent=as_it_is)
def evaluate_model(
    making: Making,
    runtime: Runtime,
    base: BaseModel,
    model: ArtifactRef | None,
    samples: ArtifactRef,
    evaluation: EvaluationSpec,
    arm: str,
) -> None:
    """Metrics, and a row a sample; ``model`` None is the base itself."""
    captured = base.captured(runtime)
    if model is None:
        loaded = captured.model
    else:
        loaded = adapted(load_model(captured.folder, base.precision, captured.device), model.path)
    is_split = "evaluation" in samples.manifest.facts
    chosen = target_part(samples, "evaluation") if is_split else list(all_samples(samples))
    with progress_of(f"evaluation ({arm})") as progress:
        result = evaluate(
            loaded,
            captured.encoder,
            chosen,
            evaluation,
            device=captured.device,
            tokens_per_batch=runtime.tokens_per_batch,
            progress=progress,
        )
    pq.write_table(result.samples, making.folder / "samples.parquet", compression="zstd")
    text = json.dumps(result.metrics, indent=2) + "\n"
    (making.folder / "metrics.json").write_text(text, encoding="utf-8")
    making.facts |= {"metrics": result.metrics, "samples": len(chosen)}
    making.samples, making.tokens = len(chosen), result.tokens
