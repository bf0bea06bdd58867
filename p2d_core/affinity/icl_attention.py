"""Affinity by attention in context: how much target queries look at a sample as a demonstration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from p2d_core.affinity.in_context import (
    candidate_attention,
    draw_contexts,
    kept_samples,
    samples_kept,
)
from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample

ATTENTION, CIRCUMSTANCES, GAIN = "attention", "circumstances", "gain"
N_CIRCUMSTANCES = 4


@scorers.register("icl-attention")
@dataclass(frozen=True)
class IclAttention(Scorer):
    """The attention that the task heads pay to a sample from the answers of target queries.

    The candidate stands among demonstrations of the proxy set before a proxy query with its right
    answer. What a head pays depends on the candidate's length, on its place and on how long the
    others are, whatever it says: by how much is measured on the whole corpus, head by head (least
    squares of the logarithm), and taken off. So a part of the affinity that goes with length is
    lost too. Fellow demonstrations, query and place are drawn from the sample's id alone.

    Needs a model that can learn in context: small ones cannot, and for them this says nothing.
    Costs ``draws`` forward passes of ``demonstrations`` + 1 samples each, as deep as the deepest
    task head; three times that, and whole passes, if weighed by gain.

    Source: P2D (arXiv 2605.21558), after Data Whisperer (arXiv 2505.12212); one candidate a
    sequence, so that a measurement does not depend on its neighbours, and the biases that are
    measured, are ours.
    """

    demonstrations: Annotated[int, Field(ge=2)] = 3
    """Samples before the query, the candidate among them; at least 2."""
    draws: Annotated[int, Field(ge=1)] = 2
    """How many queries a candidate is tried with."""
    bias: Literal["measured", "per-token"] = "measured"
    """measured: length and place are taken off; per-token: attention over length, as the papers."""
    weigh_by_gain: bool = False
    """Weigh a draw by how many times likelier the candidate makes a token of the answer."""
    seed: int = 0

    version: ClassVar[str] = "2"
    measures_target: ClassVar[bool] = True
    measured_by: ClassVar[tuple[str, ...]] = ("demonstrations", "draws", "weigh_by_gain", "seed")
    needs_heads: ClassVar[bool] = True

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """The task heads and the proxy samples' token ids."""
        assert heads is not None
        state = {"heads": torch.tensor(heads.task_heads, dtype=torch.int64)}
        return state | kept_samples(model, target.proxy)

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """By draw: ``attention`` of each task head, a share; ``circumstances``; ``gain`` if wanted.

        Circumstances are the demonstrations between candidate and query, and the tokens of
        candidate, other demonstrations and query. The gain is in nats a token of the answer.
        """
        heads = [(int(layer), int(head)) for layer, head in state["heads"]]
        contexts = draw_contexts(
            model, shard, samples_kept(state), self.demonstrations, self.draws, self.seed
        )
        paid = candidate_attention(model, heads, contexts)
        circumstances = torch.tensor([context.circumstances for context in contexts])
        columns = {
            ATTENTION: _lists(paid.view(len(shard), -1)),
            CIRCUMSTANCES: _lists(circumstances.float().view(len(shard), -1)),
        }
        if self.weigh_by_gain:
            without = model.response_losses([context.without for context in contexts])
            gain = without - model.response_losses([context.tokens for context in contexts])
            columns[GAIN] = _lists(gain.view(len(shard), -1))
        return columns

    def fit(self, state: ScorerState, measured: Iterable[pa.Table]) -> ScorerState:
        """``effects`` too: of the circumstances on the logarithm of each head's attention."""
        if "effects" in state:
            return state
        n_heads = len(state["heads"])
        width = self.demonstrations + N_CIRCUMSTANCES - 1
        squares, products = np.zeros((width, width)), np.zeros((width, n_heads))
        for table in only(measured, ATTENTION, CIRCUMSTANCES):
            given, paid = self._given(table), _draws(table, ATTENTION, n_heads)
            squares += given.T @ given
            products += given.T @ np.log(paid)
        return state | {"effects": torch.from_numpy(np.linalg.pinv(squares) @ products)}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """Mean over task heads and draws.

        measured: nats, 0 is what is usual in a sample's circumstances; weighed, a factor of it.
        per-token: a share of attention.
        """
        if self.bias == "measured":
            state = self.fit(state, measured)
        gain = (GAIN,) if self.weigh_by_gain else ()
        for table in only(measured, ATTENTION, CIRCUMSTANCES, *gain):
            of_draws = self._by_head(state, table).mean(axis=1)
            if self.weigh_by_gain:
                factor = np.exp(of_draws) if self.bias == "measured" else of_draws
                of_draws = factor * np.exp(_draws(table, GAIN, 1)[:, 0])
            yield pa.array(of_draws.reshape(len(table), -1).mean(axis=1))

    def head_parts(self, state: ScorerState, table: pa.Table) -> Tensor | None:
        """Each head's share of the mean, ``[n, n_heads]``; a measured bias that is then weighed by
        gain makes a product of them, and None."""
        by_head = self._by_head(state, table)
        if self.weigh_by_gain:
            if self.bias == "measured":
                return None
            by_head = by_head * np.exp(_draws(table, GAIN, 1))
        n_heads = by_head.shape[1]
        of_samples = by_head.reshape(len(table), -1, n_heads).mean(axis=1)
        return torch.from_numpy(of_samples / n_heads)

    def _by_head(self, state: ScorerState, table: pa.Table) -> np.ndarray[Any, Any]:
        """A row a draw, a column a head: what it pays, without what length and place make of it."""
        paid = _draws(table, ATTENTION, len(state["heads"]))
        if self.bias == "per-token":
            lengths = _draws(table, CIRCUMSTANCES, N_CIRCUMSTANCES)[:, 1:2]
            found = paid / np.maximum(lengths, 1)
        else:
            found = np.log(paid) - self._given(table) @ state["effects"].numpy()
        return np.asarray(found)

    def _given(self, table: pa.Table) -> np.ndarray[Any, Any]:
        """A row a draw: which place it is, and the logarithms of three lengths."""
        circumstances = _draws(table, CIRCUMSTANCES, N_CIRCUMSTANCES)
        place = circumstances[:, :1].astype(np.int64) == np.arange(self.demonstrations)
        return np.concatenate([place, np.log1p(circumstances[:, 1:])], axis=1)


def _lists(values: Tensor) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(
        pa.array(values.contiguous().view(-1).numpy()), values.shape[1]
    )


def _draws(table: pa.Table, column: str, width: int) -> np.ndarray[Any, Any]:
    """``[samples * draws, width]``; attention is at least so much that it has a logarithm."""
    flat = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    values = np.asarray(flat, np.float64).reshape(-1, width)
    return np.maximum(values, 1e-9) if column == ATTENTION else values
