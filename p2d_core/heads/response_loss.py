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


def summed_loss(model: Any, batch: Sequence[EncodedSample], pad_id: int) -> tuple[Tensor, int]:
    """The loss summed over the batch's response tokens, a scalar in float32, and their number."""
    device = next(model.parameters()).device
    rows = {name: tensor.to(device) for name, tensor in collate(batch, pad_id).items()}
    losses, wanted = token_losses(model, rows)
    return losses.sum(), int(wanted.sum())
