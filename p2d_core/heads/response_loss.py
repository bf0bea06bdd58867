"""The loss of the proxy samples' responses, for rankers."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from p2d_core.response_loss import token_losses
from p2d_core.samples.tokens import EncodedSample, collate


def batches(samples: Sequence[EncodedSample], batch_size: int) -> Iterator[list[EncodedSample]]:
    """Samples of like length together."""
    by_length = sorted(samples, key=len)
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def summed_losses(
    model: Any, batch: Sequence[EncodedSample], pad_id: int, copies: int = 1
) -> Tensor:
    """The loss (nats) summed over the batch's response tokens, ``[copies]`` in float32.

    Of each of ``copies`` of the batch, which go through the model one after another in one pass.
    """
    device = next(model.parameters()).device
    rows = {k: v.to(device) for k, v in collate([*batch] * copies, pad_id).items()}
    losses, _ = token_losses(model, rows)
    return losses.view(copies, -1).sum(dim=1)
