"""The loss of samples' responses under a model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from p2d_core.samples.tokens import IGNORED_LABEL


def token_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) of each response token, and where there is one.

    Logits are made only from the first position that some row's loss needs: with a large
    vocabulary they outweigh the rest of the pass.

    Args:
        batch: as `collate` makes it, on the model's device.

    Returns:
        Losses in float32, 0 where no response token stands, and a mask; ``[batch, positions]``.
    """
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORED_LABEL
    columns = wanted.any(dim=0).nonzero()
    first = int(columns[0]) if len(columns) else targets.shape[1] - 1
    targets, wanted = targets[:, first:], wanted[:, first:]
    n_kept = targets.shape[1] + 1
    settings: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        settings["logits_to_keep"] = n_kept
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
    logits = output.logits[:, -n_kept:-1]
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    losses[wanted] = cross_entropy(logits[wanted].float(), targets[wanted], reduction="none")
    return losses, wanted


@torch.inference_mode()
def response_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy (nats) of each row's response tokens, float32, shape ``[batch]``."""
    losses, wanted = token_losses(model, batch)
    return losses.sum(dim=1) / wanted.sum(dim=1).clamp(min=1)
