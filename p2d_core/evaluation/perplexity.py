"""Perplexity: e to the mean cross-entropy of all response tokens."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from p2d_core.errors import NumericalError
from p2d_core.evaluation.evidence import Evidence
from p2d_core.evaluation.metric import EvaluationSpec, Measured, metrics
from p2d_core.samples.schema import Sample


@metrics.register("perplexity")
class Perplexity:
    """Every token counts the same, the end of sequence included: long responses weigh more.

    So it is not e to the metric `loss`, in which every sample counts the same. A sample's own value
    is the perplexity of its response; the metric is not the mean of those.
    """

    version: ClassVar[str] = "1"
    higher_is_better: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    counts_tokens: ClassVar[bool] = True

    def check(self, sample: Sample, spec: EvaluationSpec) -> None:
        """Any sample will do."""

    def measure(self, seen: Evidence) -> Measured:
        """At least 1.

        Raises:
            NumericalError: e to a loss is more than a number can say.
        """
        tokens = torch.tensor([each.n_learnt for each in seen.encoded], dtype=torch.float64)
        mean = float((seen.losses * tokens).sum() / tokens.sum())
        return Measured(_exp(mean), [_exp(loss) for loss in seen.losses.tolist()])


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        raise NumericalError(
            f"a mean loss of {loss:.4g} nats a token has no perplexity that a number can say. Look "
            "at the weights of the model, or lower the learning rate if it was tuned."
        ) from None
