"""What rounding does to an adapted model: the moves that it loses, and how far logits shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from p2d_core.export.moved import Moved
from p2d_core.samples.tokens import EncodedSample

SAMPLES, TOKENS = 4, 128
"""How many samples logits are compared on, and how many tokens of each from its beginning."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a lower precision keeps of what moved."""

    moved: int
    """Numbers that differ from the base's."""
    lost: int
    """Of these, that have the base's value again once both are rounded."""

    @property
    def share_lost(self) -> float:
        """In [0, 1]."""
        return self.lost / self.moved if self.moved else 0.0


@dataclass(frozen=True, slots=True)
class Shift:
    """How far logits are from the adapted model's own, over all tokens and words."""

    highest: float
    mean: float
    largest: float
    """The largest of the adapted model's own logits, whatever its sign."""


@torch.no_grad()
def rounded(moved: Moved, base: nn.Module, dtype: torch.dtype) -> Rounding:
    """What rounding to ``dtype`` does to what moved, each number by itself."""
    n_moved = lost = 0
    for name, block in moved.items():
        before = base.get_parameter(name).detach().cpu().index_select(block.dim, block.index)
        differs = block.values != before
        same = block.values.to(dtype) == before.to(dtype)
        n_moved += int(differs.sum())
        lost += int((differs & same).sum())
    return Rounding(n_moved, lost)


@torch.inference_mode()
def logits_of(model: nn.Module, samples: Sequence[EncodedSample]) -> list[Tensor]:
    """Float32, ``[tokens, words]``, of the first `SAMPLES` and their first `TOKENS`."""
    found = []
    for sample in samples[:SAMPLES]:
        ids = torch.tensor([sample.input_ids[:TOKENS]])
        found.append(model(input_ids=ids).logits[0].float())
    return found


def shift(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Shift | None:
    """None where there were no samples."""
    if not expected:
        return None
    away = torch.cat([(a - b).abs().flatten() for a, b in zip(expected, found, strict=True)])
    largest = max(float(each.abs().max()) for each in expected)
    return Shift(float(away.max()), float(away.mean(dtype=torch.float64)), largest)
