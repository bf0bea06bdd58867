"""Affinity by instruction-following difficulty: how little the prompt helps the response."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import EncodedSample

WITH, ALONE = "loss_with_prompt", "loss_alone"


@scorers.register("ifd")
@dataclass(frozen=True)
class Ifd(Scorer):
    """The response's loss given its prompt over its loss alone; the higher, the harder to follow.

    Above 1 the prompt misleads, which the paper takes for a broken sample and leaves out: there
    the affinity is 1 minus the ratio, below that of all others. Of a conversation the last answer
    is judged.

    Costs two forward passes a sample, the second of the response alone. It knows no target. The
    base is not first tuned on a part of the corpus, as in the paper.

    Source: arXiv 2308.12032.
    """

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """Nothing."""
        return {}

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``loss_with_prompt`` and ``loss_alone``: nats a response token, float32."""
        encoded = model.encode(shard)
        # the same tokens are judged in both: alone, they follow the beginning of sequence, or the
        # end of another where the tokenizer has no beginning
        start = model.tokenizer.bos_token_id
        start = model.encoder.end_id if start is None else start
        alone = [
            EncodedSample(each.sample_id, [start, *each.input_ids[each.n_prompt :]], 1)
            for each in encoded
        ]
        return {
            WITH: model.response_losses([replace(each, earlier=()) for each in encoded]).numpy(),
            ALONE: model.response_losses(alone).numpy(),
        }

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """In [0, 1]; below 0 where the prompt misleads."""
        for table in only(measured, WITH, ALONE):
            given, alone = (np.asarray(table[name], dtype=np.float64) for name in (WITH, ALONE))
            ratio = given / np.maximum(alone, 1e-9)
            yield pa.array(np.where(ratio <= 1, ratio, 1 - ratio))
