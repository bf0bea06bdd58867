"""Affinity by chance: the baseline that every other scorer has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample


@scorers.register("random")
@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Uniform in [0, 1), from the sample's id and the seed alone. Costs nothing: it runs no model.

    Source: the usual control.
    """

    seed: int = 0

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    measured_by: ClassVar[tuple[str, ...]] = ()
    runs_model: ClassVar[bool] = False

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """Nothing."""
        return {}

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """Nothing."""
        return {}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """In [0, 1)."""
        for table in only(measured, "sample_id"):
            yield pa.array([self._draw(name) for name in table["sample_id"].to_pylist()])

    def _draw(self, sample_id: str) -> float:
        digest = hashlib.sha256(f"{self.seed}:{sample_id}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48
