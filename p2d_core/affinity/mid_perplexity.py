"""Affinity by an ordinary perplexity: neither known already nor out of reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from p2d_core.affinity.loss import BASE_LOSS
from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample


@scorers.register("mid-perplexity")
@dataclass(frozen=True)
class MidPerplexity(Scorer):
    """How near the response's perplexity is to the middle of the corpus' own.

    Costs one forward pass a sample; 8 bytes of memory a sample to compare them.

    Source: arXiv 2309.04564, which keeps the middle of the perplexities of whole texts; here it is
    the response's, given its prompt.
    """

    middle: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Quantile, in [0, 1], of the corpus' perplexities that has the highest affinity."""

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    measured_by: ClassVar[tuple[str, ...]] = ()

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """Nothing."""
        return {}

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``base_loss``: nats a response token, float32; its exponential is the perplexity."""
        return {BASE_LOSS: model.response_losses(model.encode(shard)).numpy()}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """Minus the share of the corpus between a sample and the middle, in [-1, 0]."""
        parts = [_losses(table) for table in only(measured, BASE_LOSS)]
        in_order = np.sort(np.concatenate(parts)) if parts else np.empty(0)
        for table in only(measured, BASE_LOSS):
            losses = _losses(table)
            below = np.searchsorted(in_order, losses, "left")
            not_above = np.searchsorted(in_order, losses, "right")
            # samples that are alike share the place in the middle of them
            quantile = (below + not_above) / (2 * len(in_order))
            yield pa.array(-np.abs(quantile - self.middle))


def _losses(table: pa.Table) -> np.ndarray[Any, Any]:
    return np.asarray(table[BASE_LOSS], dtype=np.float64)
