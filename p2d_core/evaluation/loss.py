"""The loss: mean over samples of their response tokens' mean cross-entropy, in nats."""

from __future__ import annotations

from typing import ClassVar

from p2d_core.evaluation.evidence import Evidence
from p2d_core.evaluation.metric import EvaluationSpec, Measured, metrics
from p2d_core.samples.schema import Sample


@metrics.register("loss")
class Loss:
    """Every sample counts the same, however long its response."""

    version: ClassVar[str] = "1"
    higher_is_better: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    counts_tokens: ClassVar[bool] = True

    def check(self, sample: Sample, spec: EvaluationSpec) -> None:
        """Any sample will do."""

    def measure(self, seen: Evidence) -> Measured:
        """In nats a token."""
        return Measured(float(seen.losses.mean()), seen.losses.tolist())
