"""Heads in random order: the control that a ranking has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2d_core.heads.ranking import RankingEvidence, rankers


@rankers.register("random")
@dataclass(frozen=True, slots=True)
class Random:
    """Scores drawn from [0, 1). Costs nothing.

    Source: the usual control.
    """

    seed: int = 0
    version: ClassVar[str] = "1"
    needs_proxy_run: ClassVar[bool] = False
    runs_model: ClassVar[bool] = False

    def rank(self, evidence: RankingEvidence) -> Tensor:
        """The same for the same seed and number of heads, on any machine."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(evidence.empty_scores().shape, generator=generator, dtype=torch.float64)
