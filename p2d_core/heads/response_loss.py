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
    losses, wanted = token_losses(model, _on_its_device(model, batch, pad_id))
    return losses.sum(), int(wanted.sum())


def summed_losses(
    model: Any, batch: Sequence[EncodedSample], pad_id: int, copies: int = 1
) -> Tensor:
    """That of each of ``copies`` of the batch, which stand one after another; ``[copies]``."""
    losses, _ = token_losses(model, _on_its_device(model, [*batch] * copies, pad_id))
    return losses.view(copies, -1).sum(dim=1)


def _on_its_device(model: Any, batch: Sequence[EncodedSample], pad_id: int) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in collate(batch, pad_id).items()}
