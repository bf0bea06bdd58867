"""How strongly the target's loss pulls at a head's slices in the base model."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2d_core.attention.layout import AttentionLayer, by_role, module_weights
from p2d_core.heads.frobenius import sums_of_squares
from p2d_core.heads.frozen import frozen
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.heads.response_loss import batches, summed_losses


@rankers.register("gradient")
@dataclass(frozen=True, slots=True)
class Gradient:
    """Root-mean-square of the gradient of the mean response loss over a head's slices.

    The slices are q, k, v and o together, K and V those of the head's KV group. No proxy run.

    Costs one forward and one backward pass over the proxy samples, and a float32 copy of the
    projections.

    Source: ours; the size of a gradient, as gradient-based pruning takes it.
    """

    version: ClassVar[str] = "1"
    needs_proxy_run: ClassVar[bool] = False
    runs_model: ClassVar[bool] = True

    def rank(self, evidence: RankingEvidence) -> Tensor:
        """In nats a token and unit of weight."""
        samples = evidence.checked_samples()
        model, layers = evidence.model, evidence.layers
        weights = [module_weights(model, layer) for layer in layers]
        n_tokens = sum(sample.n_learnt for sample in samples)
        n_batches = sum(1 for _ in batches(samples, evidence.batch_size))
        # float32 sums: gradients of many batches in bf16 would swallow the small ones
        sums = [
            {path: torch.zeros_like(w, dtype=torch.float32) for path, w in of.items()}
            for of in weights
        ]
        with frozen(model):
            flat = [weight.requires_grad_(True) for of in weights for weight in of.values()]
            flat_sums = [total for of in sums for total in of.values()]
            for done, batch in enumerate(batches(samples, evidence.batch_size), start=1):
                with torch.enable_grad():
                    loss = summed_losses(model, batch, evidence.pad_id).sum()
                for total, grad in zip(
                    flat_sums, torch.autograd.grad(loss / n_tokens, flat), strict=True
                ):
                    total += grad
                evidence.progress(done, n_batches)
        scores = evidence.empty_scores()
        for layer, of_layer in zip(layers, sums, strict=True):
            scores[layer.index] = (
                sums_of_squares(of_layer, layer) / n_values(layer, of_layer)
            ).sqrt()
        return scores


def n_values(layer: AttentionLayer, weights: dict[str, Tensor]) -> int:
    """How many weights one head's q, k, v and o slices have together."""
    matrices = by_role(weights, layer)
    return sum(layer.head_dim * matrices[role].shape[1] for role in "qkv") + (
        layer.head_dim * matrices["o"].shape[0]
    )
