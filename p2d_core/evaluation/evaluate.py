"""Metrics on the evaluation samples, and a row a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from p2d_core.evaluation.evidence import Evidence
from p2d_core.evaluation.metric import EvaluationSpec, metrics
from p2d_core.progress import Progress
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import Encoder


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics over all samples, and a row a sample."""

    metrics: dict[str, float]
    samples: pa.Table
    tokens: int


def evaluate(
    model: Any,
    encoder: Encoder,
    samples: Sequence[Sample],
    spec: EvaluationSpec,
    *,
    device: torch.device,
    tokens_per_batch: int = 8192,
    progress: Progress | None = None,
) -> Evaluation:
    """The loss, and what else is asked for; each metric's file says what it is.

    Raises:
        NumericalError: a loss is no number.
        InputError: a metric can say nothing of a sample.
    """
    seen = Evidence(
        model,
        encoder,
        samples,
        spec,
        device=device,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    columns: dict[str, Any] = {"sample_id": [sample.sample_id for sample in samples]}
    found = {}
    for name in spec.measured:
        measured = metrics.get(name)().measure(seen)
        columns |= {name: measured.values, **measured.columns}
        found[name] = measured.value
    return Evaluation(found, pa.table(columns), sum(len(sample) for sample in seen.encoded))


def check_sample(sample: Sample, spec: EvaluationSpec) -> None:
    """Raises InputError where a metric could say nothing of the sample, or there is none such."""
    for name in spec.measured:
        metrics.get(name)().check(sample, spec)
