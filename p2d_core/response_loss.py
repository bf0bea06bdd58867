"""The loss of samples' responses under a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from p2d_core.samples.tokens import IGNORED_LABEL, needed_mask


def token_losses(model: Any, batch: dict[str, Tensor], run: Any = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) of each response token, and where there is one.

    Logits are made only where the loss needs them: with a large vocabulary they outweigh the rest
    of the pass.

    Args:
        batch: as `collate` makes it, on the model's device.
        run: what runs the model where it is not called itself (DDP).

    Returns:
        Losses in float32, 0 where no response token stands, and a mask; ``[batch, positions]``.
    """
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORED_LABEL

    def keep(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][:, :-1][wanted].unsqueeze(0),)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        mask = needed_mask(batch["attention_mask"])
        output = (model if run is None else run)(
            input_ids=batch["input_ids"], attention_mask=mask, use_cache=False
        )
    finally:
        hook.remove()
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    losses[wanted] = cross_entropy(output.logits[0].float(), targets[wanted], reduction="none")
    return losses, wanted


def batch_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy (nats) of all response tokens of a batch: what training minimises."""
    losses, wanted = token_losses(model, batch)
    return losses.sum() / wanted.sum().clamp(min=1)


@torch.inference_mode()
def response_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy (nats) of each row's response tokens, float32, shape ``[batch]``."""
    losses, wanted = token_losses(model, batch)
    return losses.sum(dim=1) / wanted.sum(dim=1).clamp(min=1)
