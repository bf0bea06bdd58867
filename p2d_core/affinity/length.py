"""Affinity by length: the longer the response, the higher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample

TOKENS = "n_response_tokens"


@scorers.register("length")
@dataclass(frozen=True)
class Length(Scorer):
    """Tokens of the response, of a conversation those of its earlier answers too.

    Runs no model and knows no target: what a scorer has to beat.

    Source: "Long Is More for Alignment", arXiv 2402.04833.
    """

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    runs_model: ClassVar[bool] = False

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """Nothing."""
        return {}

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """Nothing: the tokens of every sample are counted for all scorers."""
        return {}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """Tokens, the end of sequence included, after truncation to ``format.max_tokens``."""
        for table in only(measured, TOKENS):
            yield pc.cast(table[TOKENS], pa.float64()).combine_chunks()
