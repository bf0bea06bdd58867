"""Affinity by attention in context: how much target queries look at a sample as a demonstration."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from p2d_core.affinity.protocol import ScorerState, Target, scorers
from p2d_core.attention.capture import attention_paid
from p2d_core.errors import SettingsError
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import EncodedSample, each_batch

NOTHING, DEMONSTRATION, QUERY_RESPONSE = -1, 1, -2


@scorers.register("icl-attention")
@dataclass(frozen=True)
class IclAttention:
    """The attention that the task heads pay to a sample from the answers of target queries.

    The candidate stands among demonstrations of the proxy set before a proxy query; its affinity
    is the attention paid to a token of it, over that paid to a token of the other demonstrations,
    averaged over task heads and draws. Fellow demonstrations, query and the candidate's place are
    drawn from the sample's id alone.

    Needs a model that can learn in context: small ones cannot, and for them this says nothing.
    Costs ``draws`` forward passes of ``demonstrations`` + 1 samples each, as deep as the deepest
    task head.

    Source: P2D (arXiv 2605.21558), after Data Whisperer (arXiv 2505.12212); one candidate a
    sequence, so that a measurement does not depend on its neighbours, is ours.
    """

    demonstrations: Annotated[int, Field(ge=2)] = 3
    """Samples before the query, the candidate among them; at least 2."""
    draws: Annotated[int, Field(ge=1)] = 2
    """How many queries a candidate is tried with."""
    seed: int = 0

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = True
    measured_by: ClassVar[tuple[str, ...]] = ("demonstrations", "draws", "seed")
    runs_model: ClassVar[bool] = True
    needs_heads: ClassVar[bool] = True
    needs_head_proxy: ClassVar[bool] = False

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """The task heads and the proxy samples' token ids, end to end with their lengths."""
        assert heads is not None
        encoded = model.encode(target.proxy)
        return {
            "heads": torch.tensor(heads.task_heads, dtype=torch.int64),
            "ids": torch.tensor([i for sample in encoded for i in sample.input_ids]),
            "lengths": torch.tensor([len(sample.input_ids) for sample in encoded]),
            "prompts": torch.tensor([sample.n_prompt for sample in encoded]),
        }

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``attention``: share of attention a token, candidate over fellows, by task head."""
        heads = [(int(layer), int(head)) for layer, head in state["heads"]]
        proxies = _proxies(state)
        sequences: list[_Sequence] = []
        for sample in model.encode(shard):
            sequences += [self._sequence(sample, proxies, draw) for draw in range(self.draws)]
        _check_positions(model, max(len(sequence.segments) for sequence in sequences))
        paid = torch.empty(len(sequences), len(heads))

        def of(positions: list[int]) -> Tensor:
            ids, mask, rows, segments = _collate([sequences[i] for i in positions], model.pad_id)
            shares = attention_paid(
                model.model,
                model.layers,
                heads,
                ids.to(model.device),
                mask.to(model.device),
                rows.to(model.device),
                segments.to(model.device),
                2,
            ).cpu()
            sizes = torch.stack([(segments == part).sum(dim=1) for part in (0, 1)], dim=1)
            a_token = shares / sizes[:, None, :].clamp(min=1)
            return a_token[..., 0] / a_token[..., 1].clamp(min=1e-9)

        tokens = [sequence.tokens for sequence in sequences]
        for positions, part in each_batch(tokens, model.budget, of):
            paid[positions] = part
        mean = paid.view(len(shard), self.draws, len(heads)).mean(dim=1).contiguous()
        flat = pa.array(mean.reshape(-1).numpy())
        return {"attention": pa.FixedSizeListArray.from_arrays(flat, len(heads))}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """Mean over task heads; 1 is what another target sample gets in the same place."""
        for table in measured:
            flat = table["attention"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            yield pa.array(np.asarray(flat, np.float64).reshape(len(table), -1).mean(axis=1))

    def _sequence(self, candidate: EncodedSample, proxies: list[_Proxy], draw: int) -> _Sequence:
        text = f"{self.seed}:{draw}:{candidate.sample_id}"
        rng = random.Random(hashlib.sha256(text.encode()).digest())
        fellows = rng.sample(range(len(proxies)), min(self.demonstrations, len(proxies)))
        query = proxies[fellows.pop()]
        order = [(proxies[i].ids, DEMONSTRATION) for i in fellows]
        order.insert(rng.randrange(len(order) + 1), (candidate.input_ids, 0))
        ids = [i for part, _ in order for i in part]
        segments = [mark for part, mark in order for _ in part]
        ids += query.ids
        segments += [NOTHING] * query.n_prompt
        segments += [QUERY_RESPONSE] * (len(query.ids) - query.n_prompt)
        return _Sequence(EncodedSample(candidate.sample_id, ids, 1), segments)


@dataclass(frozen=True)
class _Proxy:
    ids: list[int]
    n_prompt: int


@dataclass(frozen=True)
class _Sequence:
    tokens: EncodedSample
    segments: list[int]


def _check_positions(model: CapturedModel, longest: int) -> None:
    """Beyond its positions a model fails, or looks at what it has never seen."""
    most = getattr(model.model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise SettingsError(
            f"icl-attention puts {longest} tokens side by side, the model's positions reach "
            f"{most}. Lower format.max_tokens, or `demonstrations` in scoring.options."
        )


def _proxies(state: ScorerState) -> list[_Proxy]:
    parts = torch.split(state["ids"], state["lengths"].tolist())
    return [
        _Proxy(part.tolist(), int(n_prompt))
        for part, n_prompt in zip(parts, state["prompts"], strict=True)
    ]


def _collate(sequences: Sequence[_Sequence], pad_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    longest = max(len(sequence.segments) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad_id)
    marks = torch.full((len(sequences), longest), NOTHING)
    mask = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        length = len(sequence.segments)
        ids[row, :length] = torch.tensor(sequence.tokens.input_ids)
        marks[row, :length] = torch.tensor(sequence.segments)
        mask[row, :length] = 1
    rows = marks == QUERY_RESPONSE
    return ids, mask, rows, marks.where(marks >= 0, NOTHING)
