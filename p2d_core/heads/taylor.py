"""What switching a head off would do to the loss, to first order."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from p2d_core.attention.layout import AttentionLayer
from p2d_core.heads.frozen import frozen
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.heads.response_loss import batches
from p2d_core.response_loss import token_losses
from p2d_core.samples.tokens import collate


@rankers.register("taylor")
@dataclass(frozen=True, slots=True)
class Taylor:
    """Mean over samples of ``|d loss / d mask|``, a mask of 1 standing on each head's output.

    Of the two first-order forms this is the one over the output mask: it is taken sample by sample,
    so that samples that pull a head in opposite ways do not cancel, as they do in gradients of the
    slices. The loss is the mean over a sample's response tokens, under the base: no proxy run.

    Costs one forward and one backward pass over the proxy samples, for all heads together.

    Source: Michel et al. 2019, arXiv 1905.10650 (its head importance score).
    """

    normalise_layers: bool = False
    """Divide a layer's scores by their Euclidean norm, as the paper does before it prunes."""

    version: ClassVar[str] = "1"
    needs_proxy_run: ClassVar[bool] = False
    runs_model: ClassVar[bool] = True

    def rank(self, evidence: RankingEvidence) -> Tensor:
        """In nats a token; at least 0."""
        samples = evidence.checked_samples()
        model, layers = evidence.model, evidence.layers
        device = next(model.parameters()).device
        scores = evidence.empty_scores()
        all_batches = list(batches(samples, evidence.batch_size))
        with frozen(model):
            for number, batch in enumerate(all_batches, start=1):
                rows = {n: t.to(device) for n, t in collate(batch, evidence.pad_id).items()}
                scores += _mask_gradients(model, layers, rows).abs().sum(1).double().cpu()
                evidence.progress(number, len(all_batches))
        scores /= len(samples)
        if self.normalise_layers:
            scores /= scores.norm(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return scores


def _mask_gradients(
    model: Any, layers: Sequence[AttentionLayer], rows: dict[str, Tensor]
) -> Tensor:
    """``[n_layers, samples, n_query_heads]``: of each sample's own loss."""
    shape = (len(layers), len(rows["labels"]), layers[0].n_query_heads)
    masks = torch.ones(shape, device=rows["labels"].device, requires_grad=True)

    def masked(layer: AttentionLayer) -> Callable[..., tuple[Tensor, ...]]:
        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            whole = inputs[0]
            by_head = whole.view(*whole.shape[:-1], layer.n_query_heads, layer.head_dim)
            mask = masks[layer.index][:, None, :, None].to(by_head.dtype)
            return ((by_head * mask).view(whole.shape), *inputs[1:])

        return before

    with ExitStack() as hooks, torch.enable_grad():
        for layer in layers:
            hook = model.get_submodule(layer.o).register_forward_pre_hook(masked(layer))
            hooks.callback(hook.remove)
        losses, wanted = token_losses(model, rows)
        total = (losses.sum(dim=1) / wanted.sum(dim=1).clamp(min=1)).sum()
        (gradient,) = torch.autograd.grad(total, [masks])
    return gradient
