"""Affinity by what the task heads put out: near to the proxy samples' outputs is high."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.affinity.similarity import nearest_mean, nearest_mean_of_others
from p2d_core.attention.capture import mean_head_outputs
from p2d_core.errors import InputError, SettingsError
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel, ParameterCounts
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import IGNORED_LABEL

OUTPUTS = "head_outputs"


@scorers.register("head-activation")
@dataclass(frozen=True)
class HeadActivation(Scorer):
    """Cosine to the nearest proxy samples in the whitened space of the task heads' outputs.

    A head's output, before the output projection, is averaged over all tokens of the sample, or
    those of the response; whitened, unless told otherwise, with the corpus' own mean and
    covariance, a head at a time; the heads stand side by side in one vector. Costs one forward pass
    a sample, only as deep as the deepest task head that is looked at.

    Source: ours; P2D (arXiv 2605.21558) uses the task heads as a filter through attention.
    """

    neighbours: Annotated[int, Field(ge=1)] = 5
    """How many proxy samples, the nearest ones, the similarity is averaged over."""
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Weight, in [0, 1], of a round covariance beside the measured one."""
    depth: Literal["heads"] | float = "heads"
    """Share of the layers, in (0, 1], beyond which task heads are not looked at (but those of the
    first layer that has any are); heads: none is."""
    tokens: Literal["all", "response"] = "all"
    """Which tokens' outputs are averaged."""
    compare: Literal["nearest", "mean"] = "nearest"
    """nearest: to the nearest proxy samples one by one; mean: to the mean of all of them."""
    whiten: bool = True
    """False: the outputs as they are, neither centred nor scaled; shrinkage says nothing then."""

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    measured_by: ClassVar[tuple[str, ...]] = ("depth", "tokens")
    needs_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.depth != "heads" and not (
            isinstance(self.depth, int | float) and 0 < self.depth <= 1
        ):
            raise SettingsError(
                f"head-activation: depth is {self.depth!r}; it has to be 'heads' or a share of the "
                "layers in (0, 1]."
            )

    def bytes_a_sample(self, counts: ParameterCounts, heads: HeadMap | None) -> int:
        """A vector for each head that is looked at."""
        assert heads is not None
        return 4 * len(self.looked_at(heads)) * counts.layers[0].head_dim

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """``heads`` [n_heads, 2] and, with a target, ``proxy`` [n_proxy, n_heads, head_dim]."""
        assert heads is not None
        state = {"heads": torch.tensor(self.looked_at(heads), dtype=torch.int64)}
        if target.proxy:
            state["proxy"] = self._outputs(model, state, target.proxy)
        return state

    def looked_at(self, heads: HeadMap) -> tuple[tuple[int, int], ...]:
        """The task heads in the first ``depth`` of the layers, the best first.

        Where none is so deep, those of the first layer that has any.
        """
        if self.depth == "heads":
            return heads.task_heads
        wanted = max(1, math.ceil(self.depth * heads.n_layers - 1e-9))
        last = max(wanted, 1 + min(layer for layer, _ in heads.task_heads))
        return tuple(head for head in heads.task_heads if head[0] < last)

    def score_kept(self, heads: HeadMap) -> float:
        """Share of the task heads' score that the heads looked at have, in [0, 1]."""
        total = sum(float(heads.scores[head]) for head in heads.task_heads)
        kept = sum(float(heads.scores[head]) for head in self.looked_at(heads))
        return kept / total if total else 1.0

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``head_outputs``: float32 list of n_heads x head_dim."""
        outputs = self._outputs(model, state, shard)
        width = outputs[0].numel()
        flat = pa.array(outputs.reshape(-1).numpy())
        return {OUTPUTS: pa.FixedSizeListArray.from_arrays(flat, width)}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """In [-1, 1]."""
        unit = self._whitening(state, measured)
        references = unit(state["proxy"])
        mean = _mean_of(references)
        for table in only(measured, OUTPUTS):
            vectors = unit(_outputs_of(table, state))
            if self.compare == "mean":
                yield pa.array((vectors @ mean).numpy())
            else:
                yield pa.array(nearest_mean(vectors @ references.T, self.neighbours).numpy())

    def fit(self, state: ScorerState, measured: Iterable[pa.Table]) -> ScorerState:
        """``mean`` and ``matrix`` of the whitening too."""
        whitening = self._whitening(state, measured)
        return state | {"mean": whitening.mean, "matrix": whitening.matrix}

    def head_parts(self, state: ScorerState, table: pa.Table) -> Tensor:
        """The heads' shares of the scalar product that the cosine is, ``[n, n_heads]``.

        Exact: whitening mixes no two heads, and the length that a vector is divided by is one
        number for all of them. With ``compare: nearest``, against the mean of the neighbours.
        """
        vectors, references = self._units(state, table)
        if self.compare == "mean":
            against = _mean_of(references).expand_as(vectors)
        else:
            count = min(self.neighbours, len(references))
            nearest = (vectors @ references.T).topk(count, dim=1).indices
            against = references[nearest].mean(dim=1)
        return (vectors * against).view(len(vectors), len(state["heads"]), -1).sum(dim=2)

    def similarities(self, state: ScorerState, table: pa.Table) -> Tensor:
        """Cosine to each proxy sample, ``[n, n_proxy]``."""
        vectors, references = self._units(state, table)
        return vectors @ references.T

    def _units(self, state: ScorerState, table: pa.Table) -> tuple[Tensor, Tensor]:
        """Unit vectors of the table's samples and of the proxy samples, of a fitted state."""
        unit = _Whitening(state["mean"], state["matrix"])
        return unit(_outputs_of(table, state)), unit(state["proxy"])

    def own_affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Tensor:
        """Of the proxy samples, each left out of its own neighbours, or of the mean.

        Raises:
            InputError: there are fewer than 2 proxy samples.
        """
        if len(state["proxy"]) < 2:
            raise InputError(
                "head-activation: a proxy sample's own affinity is that to the other ones, but "
                f"there is {len(state['proxy'])} in all. Give at least 2, or set no gate."
            )
        references = self._whitening(state, measured)(state["proxy"])
        if self.compare == "mean":
            of_others = normalize(references.sum(dim=0) - references, dim=1)
            return (references * of_others).sum(dim=1)
        return nearest_mean_of_others(references @ references.T, self.neighbours)

    def _outputs(
        self, model: CapturedModel, state: ScorerState, samples: Sequence[Sample]
    ) -> Tensor:
        heads = [(int(layer), int(head)) for layer, head in state["heads"]]
        # copied from the device once a shard: to wait for every batch would leave it idle between
        shape = (len(samples), len(heads), model.layers[0].head_dim)
        outputs = torch.empty(shape, device=model.device)

        def of(batch: dict[str, Tensor]) -> Tensor:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            chosen = batch["labels"] != IGNORED_LABEL if self.tokens == "response" else None
            return mean_head_outputs(model.model, model.layers, heads, ids, mask, chosen)

        for positions, part in model.each_batch(model.encode(samples), of):
            outputs[positions] = part
        return outputs.cpu()

    def _whitening(self, state: ScorerState, measured: Iterable[pa.Table]) -> _Whitening:
        if "matrix" in state:
            return _Whitening(state["mean"], state["matrix"])
        n_heads, head_dim = state["proxy"].shape[1:]
        if not self.whiten:
            plain = torch.eye(head_dim, dtype=torch.float64).repeat(n_heads, 1, 1)
            return _Whitening(torch.zeros(n_heads, head_dim, dtype=torch.float64), plain)
        moments = _Moments(n_heads, head_dim)
        for table in only(measured, OUTPUTS):
            moments.add(_outputs_of(table, state))
        return moments.whitening(self.shrinkage)


def _mean_of(references: Tensor) -> Tensor:
    """The direction of the mean of unit vectors."""
    return normalize(references.mean(dim=0), dim=0)


def _outputs_of(table: pa.Table, state: ScorerState) -> Tensor:
    column = table[OUTPUTS].combine_chunks()
    values = np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    return torch.from_numpy(values.copy()).view(len(table), *state["proxy"].shape[1:])


class _Moments:
    """Mean and covariance of each head's outputs, summed shard by shard in float64."""

    def __init__(self, n_heads: int, head_dim: int) -> None:
        self.count = 0
        self.total = torch.zeros(n_heads, head_dim, dtype=torch.float64)
        self.products = torch.zeros(n_heads, head_dim, head_dim, dtype=torch.float64)

    def add(self, outputs: Tensor) -> None:
        by_head = outputs.double().transpose(0, 1)
        self.count += len(outputs)
        self.total += by_head.sum(dim=1)
        self.products += by_head.transpose(1, 2) @ by_head

    def whitening(self, shrinkage: float) -> _Whitening:
        count = max(self.count, 1)
        mean = self.total / count
        covariance = self.products / count - mean[:, :, None] * mean[:, None, :]
        width = mean.shape[1]
        variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=0)
        # samples that are all alike have no variance: any scale does, so take 1
        variance = torch.where(variance > 1e-18, variance, torch.ones_like(variance))
        round_one = variance[:, None, None] * torch.eye(width, dtype=torch.float64)
        values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * round_one)
        scales = values.clamp(min=1e-9 * float(variance.max())).rsqrt()
        return _Whitening(mean, vectors * scales[:, None, :])


@dataclass(frozen=True)
class _Whitening:
    mean: Tensor
    matrix: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        """Unit vectors, ``[n, n_heads * head_dim]`` float64."""
        centred = (outputs.double() - self.mean).transpose(0, 1)
        flat = (centred @ self.matrix).transpose(0, 1).flatten(1)
        return normalize(flat, dim=1)
