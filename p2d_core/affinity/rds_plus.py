"""Affinity by the nearest target sample among last hidden states, the targets taking turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel, ParameterCounts
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import needed_mask

HIDDEN = "hidden"


@scorers.register("rds-plus")
@dataclass(frozen=True)
class RdsPlus(Scorer):
    """Cosine between position-weighted means of last hidden states; targets choose in turn.

    A token weighs as much as its place in the sample, counted from 1, so that those that have seen
    more count more. Every proxy sample has the corpus in the order of its own likings; the turns
    go round, and what was taken already is passed over.

    Costs one forward pass a sample, without the LM head; 4 bytes of memory for each pair of a
    corpus and a proxy sample to take turns.

    Source: RDS+, arXiv 2503.01807. Inside a round its targets go by their number, ours by how
    similar what they take is.
    """

    choose: Literal["turns", "mean"] = "turns"
    """turns: what some proxy sample likes early; mean: what all of them like on average."""

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    measured_by: ClassVar[tuple[str, ...]] = ()

    def bytes_a_sample(self, counts: ParameterCounts, heads: HeadMap | None) -> int:
        """A vector."""
        return 4 * counts.width

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """``proxy`` [n_proxy, hidden], with a target."""
        return {"proxy": _pooled(model, target.proxy)} if target.proxy else {}

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``hidden``: float32 list of the model's width, of length 1."""
        pooled = _pooled(model, shard)
        flat = pa.array(pooled.reshape(-1).numpy())
        return {HIDDEN: pa.FixedSizeListArray.from_arrays(flat, pooled.shape[1])}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """turns: minus the round in which it is taken, plus less than 1 for its similarity."""
        if self.choose == "mean":
            for table in only(measured, HIDDEN):
                yield pa.array(self.similarities(state, table).mean(dim=1).numpy())
            return
        parts = [
            self.similarities(state, table).float().numpy() for table in only(measured, HIDDEN)
        ]
        places = _turns(np.concatenate(parts)) if parts else np.empty(0)
        start = 0
        for part in parts:
            likeness = (1 + part.max(axis=1).astype(np.float64).clip(-1, 1)) / 2
            yield pa.array(likeness * (1 - 1e-6) - places[start : start + len(part)])
            start += len(part)

    def similarities(self, state: ScorerState, table: pa.Table) -> Tensor:
        """Cosine to each proxy sample, ``[n, n_proxy]``."""
        flat = table[HIDDEN].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        vectors = torch.tensor(np.asarray(flat, np.float64)).view(len(table), -1)
        return vectors @ state["proxy"].double().T


def _turns(similarities: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The round, from 0, in which each sample is taken; ``[samples, targets]`` to ``[samples]``.

    It is the sample's best place in any target's order; samples that are alike share the better.
    """
    places = np.full(len(similarities), len(similarities), dtype=np.int64)
    for column in similarities.T:
        rising = np.sort(column)
        better = len(rising) - np.searchsorted(rising, column, "right")
        np.minimum(places, better, out=places)
    return places


def _pooled(model: CapturedModel, samples: Sequence[Sample]) -> Tensor:
    """Unit vectors ``[n, hidden]``, float32, on the CPU."""

    def of(batch: dict[str, Tensor]) -> Tensor:
        rows = {name: tensor.to(model.device) for name, tensor in batch.items()}
        backbone = getattr(model.model, "base_model", model.model)
        with torch.inference_mode():
            states = backbone(
                input_ids=rows["input_ids"],
                attention_mask=needed_mask(rows["attention_mask"]),
                use_cache=False,
            ).last_hidden_state
            weights = (rows["attention_mask"].cumsum(1) * rows["attention_mask"]).float()
            weights = weights / weights.sum(1, keepdim=True)
            pooled = torch.bmm(weights[:, None, :], states.float())[:, 0]
            return normalize(pooled, dim=1)

    pooled: Tensor | None = None
    for positions, part in model.each_batch(model.encode(samples), of):
        if pooled is None:
            pooled = torch.empty(len(samples), part.shape[1], device=part.device)
        pooled[positions] = part
    assert pooled is not None
    return pooled.cpu().clone()
