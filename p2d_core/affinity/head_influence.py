"""Affinity by how much a sample needs the task heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.attention.silence import silenced
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample

BASE, SILENCED = "base_loss", "silenced_loss"


@scorers.register("head-influence")
@dataclass(frozen=True)
class HeadInfluence(Scorer):
    """What the response's loss rises by when the task heads are silenced in the base.

    Silenced is: their outputs are zero before the output projection. Costs two forward passes a
    sample.

    Source: AttentionInfluence, arXiv 2505.07293, which silences retrieval heads and takes the loss
    of whole texts; here they are the task heads, and the response's loss.
    """

    relative: bool = False
    """The rise over the loss itself, as in the paper."""

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    measured_by: ClassVar[tuple[str, ...]] = ()
    needs_heads: ClassVar[bool] = True

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """``heads`` [n_heads, 2]."""
        assert heads is not None
        return {"heads": torch.tensor(heads.task_heads, dtype=torch.int64)}

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``base_loss`` and ``silenced_loss``: nats a response token, float32."""
        heads = [(int(layer), int(head)) for layer, head in state["heads"]]
        encoded = model.encode(shard)
        base = model.response_losses(encoded)
        # no other thread runs the model in this block: it would run without the heads too
        with model.looking_through(tuned=False), silenced(model.model, model.layers, heads):
            without = model.response_losses(encoded)
        return {BASE: base.numpy(), SILENCED: without.numpy()}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """Nats a response token, or a share of them; above 0 where the heads helped."""
        for table in only(measured, BASE, SILENCED):
            base, without = (np.asarray(table[name], np.float64) for name in (BASE, SILENCED))
            rise = without - base
            yield pa.array(rise / np.maximum(base, 1e-9) if self.relative else rise)
