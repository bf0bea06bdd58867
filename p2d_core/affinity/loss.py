"""Affinity by how well the base knows a response already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample

BASE_LOSS = "base_loss"


@scorers.register("loss")
@dataclass(frozen=True)
class Loss(Scorer):
    """The response's loss under the base: a baseline that knows no target.

    Costs one forward pass a sample.

    Source: the perplexity baselines of arXiv 2309.04564.
    """

    prefer: Literal["low", "high"] = "low"
    """Which losses have a high affinity."""

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    measured_by: ClassVar[tuple[str, ...]] = ()

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """Nothing."""
        return {}

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``base_loss``: nats a response token, float32."""
        return {BASE_LOSS: model.response_losses(model.encode(shard)).numpy()}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """Nats a response token; minus these where low is preferred."""
        sign = -1 if self.prefer == "low" else 1
        for table in only(measured, BASE_LOSS):
            yield pa.array(sign * np.asarray(table[BASE_LOSS], dtype=np.float64))
