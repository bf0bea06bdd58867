"""Batches of samples of like length: little of what a step computes is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

BATCHES = 50
"""Sorted together, or what makes four parts of a smaller whole: as transformers has it."""


def like_length(
    lengths: Sequence[int], batch_size: int, seed: int, n_in_all: int | None = None
) -> list[int]:
    """An order in which samples of like length stand together, batch by batch.

    The samples are shuffled and sorted within parts of them, as transformers does it; the batches
    are shuffled once more, so that a pass does not go from long to short.

    Args:
        n_in_all: of how many samples these are a draw, whose batches they are to be like.

    Returns:
        Places in ``lengths``, each once; the last batch may be short.
    """
    together = max(1, min((n_in_all or len(lengths)) // (4 * batch_size), BATCHES))
    drawn = torch.Generator().manual_seed(seed)
    order: list[int] = get_length_grouped_indices(  # type: ignore[no-untyped-call]
        list(lengths), batch_size, together, generator=drawn
    )
    whole = len(order) // batch_size * batch_size
    batches = torch.tensor(order[:whole], dtype=torch.int64).view(-1, batch_size)
    shuffled = batches[torch.randperm(len(batches), generator=drawn)]
    return [*shuffled.flatten().tolist(), *order[whole:]]


class LikeLength(Sampler[int]):
    """`like_length` anew for each epoch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop, also when it goes on from a checkpoint."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(like_length(self.lengths, self.batch_size, self.seed + self.epoch))
