"""Affinity as in Data Whisperer: how well the model answers with a sample as a demonstration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from p2d_core.affinity.in_context import (
    candidate_attention,
    draw_contexts,
    kept_samples,
    samples_kept,
)
from p2d_core.affinity.protocol import ScorerState, Target, scorers
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample

SCORE = "score"


@scorers.register("data-whisperer")
@dataclass(frozen=True)
class DataWhisperer:
    """How likely the answer is in a context, times the attention that a token of the sample gets.

    The attention is that of the answer's tokens in all heads of one layer, over the sample's
    length; averaged over draws.

    Needs a model that can learn in context. Costs ``draws`` whole forward passes of
    ``demonstrations`` + 1 samples each, and as many down to the layer.

    Source: Data Whisperer, arXiv 2505.12212. Differs: queries and other demonstrations are proxy
    samples, one query a context, and not all from the corpus, so that a sample's affinity does not
    depend on the others; the answer is not generated and judged, but has its likelihood taken (the
    geometric mean over its tokens); attention is paid from the answer and not from the question.
    """

    demonstrations: Annotated[int, Field(ge=2)] = 3
    """Samples before the query, the candidate among them; at least 2."""
    draws: Annotated[int, Field(ge=1)] = 2
    """How many queries a candidate is tried with."""
    layer: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Which layer attention is looked at in, as a share of the depth, in (0, 1]."""
    seed: int = 0

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = True
    measured_by: ClassVar[tuple[str, ...]] = ("demonstrations", "draws", "layer", "seed")
    runs_model: ClassVar[bool] = True
    needs_heads: ClassVar[bool] = False
    needs_head_proxy: ClassVar[bool] = False

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """The proxy samples' token ids."""
        return kept_samples(model, target.proxy)

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``score``: likelihood times attention a token, the mean over draws; float64."""
        layer = model.layers[math.ceil(self.layer * len(model.layers)) - 1]
        heads = [(layer.index, head) for head in range(layer.n_query_heads)]
        contexts = draw_contexts(
            model, shard, samples_kept(state), self.demonstrations, self.draws, self.seed
        )
        paid = candidate_attention(model, heads, contexts).double().sum(dim=1)
        lengths = torch.tensor([context.stop - context.start for context in contexts])
        likelihood = (-model.response_losses([each.tokens for each in contexts]).double()).exp()
        of_draws = likelihood * paid / lengths
        return {SCORE: of_draws.view(len(shard), -1).mean(dim=1).numpy()}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """At least 0."""
        for table in measured:
            yield pa.array(np.asarray(table[SCORE], dtype=np.float64))
