"""How far a proxy run moves a head's slices, relative to what they were."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2d_core.attention.layout import AttentionLayer, by_role, module_weights
from p2d_core.heads.ranking import RankingEvidence, rankers


@rankers.register("frobenius")
@dataclass(frozen=True, slots=True)
class Frobenius:
    """``||proxy - base||_F / ||base||_F`` over a head's q, k, v and o slices together.

    Costs the proxy run, then no pass: one look at the projections.

    Source: ours; the plainest measure of what ALPS (arXiv 2505.18799) measures by sPAD.
    """

    version: ClassVar[str] = "2"
    needs_proxy_run: ClassVar[bool] = True
    runs_model: ClassVar[bool] = False

    @torch.no_grad()
    def rank(self, evidence: RankingEvidence) -> Tensor:
        """K and V are those of the head's KV group, so that heads of one group share them."""
        proxy = evidence.tuned()
        scores = evidence.empty_scores()
        for done, layer in enumerate(evidence.layers, start=1):
            weights = module_weights(evidence.model, layer)
            change = {
                path: proxy.patched(path, weight).float() - weight.float()
                for path, weight in weights.items()
            }
            ratio = sums_of_squares(change, layer) / sums_of_squares(weights, layer)
            # slices that are all zero and stay so have not moved
            scores[layer.index] = ratio.nan_to_num(nan=0.0).sqrt()
            evidence.progress(done, len(evidence.layers))
        return scores


def sums_of_squares(weights: dict[str, Tensor], layer: AttentionLayer) -> Tensor:
    """Over each head's q, k, v and o slices together.

    Args:
        weights: module path -> a tensor of its weight's shape.

    Returns:
        ``[n_query_heads]`` in float64, on the CPU.
    """

    def per_block(matrix: Tensor, dim: int) -> Tensor:
        squares = matrix.float().square().sum(1 - dim, dtype=torch.float64)
        return squares.view(-1, layer.head_dim).sum(1).cpu()

    matrices = by_role(weights, layer)
    shared = per_block(matrices["k"], 0) + per_block(matrices["v"], 0)
    own = per_block(matrices["q"], 0) + per_block(matrices["o"], 1)
    return own + shared.repeat_interleave(layer.n_query_heads // layer.n_kv_groups)
