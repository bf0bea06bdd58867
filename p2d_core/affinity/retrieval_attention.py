"""Affinity by whether the task heads look where the response's tokens come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import torch
from torch import Tensor

from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.attention.paid import attention_to_copies
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import IGNORED_LABEL

RETRIEVED = "retrieved"


@scorers.register("retrieval-attention")
@dataclass(frozen=True)
class RetrievalAttention(Scorer):
    """Attention of the tuned task heads to where the response's tokens stand already.

    From the place before each response token, the share of attention that goes to the same token
    further up, beyond what goes there when all tokens are looked at alike; mean over response
    tokens and heads. A right answer that is copied from its prompt is looked up; a wrong one stands
    elsewhere, or nowhere. It says nothing of answers that are not copied.

    Costs one forward pass a sample, as deep as the deepest task head.

    Source: ours, after the retrieval heads of arXiv 2404.15574.
    """

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    needs_heads: ClassVar[bool] = True
    needs_head_proxy: ClassVar[bool] = True

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """``heads`` [n_heads, 2]; ``held_out`` [n]: of held-out target samples, with a target."""
        assert heads is not None
        state = {"heads": torch.tensor(heads.task_heads, dtype=torch.int64)}
        if target.held_out:
            state["held_out"] = _retrieved(model, state, target.held_out).double().mean(1)
        return state

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``retrieved``: of each task head, a share of attention beyond chance, in [-1, 1]."""
        found = _retrieved(model, state, shard)
        flat = pa.array(found.contiguous().view(-1).numpy())
        return {RETRIEVED: pa.FixedSizeListArray.from_arrays(flat, found.shape[1])}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """A share of attention beyond chance, in [-1, 1]."""
        for table in only(measured, RETRIEVED):
            yield pa.array(_of(table, state).mean(1).numpy())

    def own_affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Tensor:
        """Of the held-out target samples, which no tuning saw."""
        return state["held_out"]

    def head_parts(self, state: ScorerState, table: pa.Table) -> Tensor:
        """Each head's share of the mean."""
        by_head = _of(table, state)
        return by_head / by_head.shape[1]


def _of(table: pa.Table, state: ScorerState) -> Tensor:
    flat = table[RETRIEVED].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.copy()).double().view(len(table), len(state["heads"]))


def _retrieved(model: CapturedModel, state: ScorerState, samples: Sequence[Sample]) -> Tensor:
    """``[samples, heads]``, float32."""
    heads = [(int(layer), int(head)) for layer, head in state["heads"]]
    encoded = model.encode(samples)
    found = torch.empty(len(encoded), len(heads))

    def of(batch: dict[str, Tensor]) -> Tensor:
        before_learnt = torch.zeros_like(batch["labels"], dtype=torch.bool)
        before_learnt[:, :-1] = batch["labels"][:, 1:] != IGNORED_LABEL
        return attention_to_copies(
            model.model,
            model.layers,
            heads,
            batch["input_ids"],
            batch["attention_mask"],
            before_learnt,
        ).cpu()

    with model.looking_through(tuned=True):
        for positions, part in model.each_batch(encoded, of):
            found[positions] = part
    return found
