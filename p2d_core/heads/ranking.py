"""What a ranker is, what it is given, and the rankers by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from p2d_core.adaptation.slices import TunedSlices
from p2d_core.attention.layout import AttentionLayer
from p2d_core.errors import InputError
from p2d_core.progress import Progress, no_progress
from p2d_core.registry import Registry
from p2d_core.samples.tokens import EncodedSample


@dataclass(frozen=True, eq=False)
class RankingEvidence:
    """What rankers look at.

    ``model`` is a Hugging Face causal language model with the base weights; a ranker leaves it as
    it was. ``proxy`` is what the proxy run made of its heads, where there was one; ``samples`` are
    the proxy samples. ``progress`` is told how many of how many steps are done.
    """

    model: Any
    layers: Sequence[AttentionLayer]
    proxy: TunedSlices | None
    samples: Sequence[EncodedSample]
    pad_id: int = 0
    batch_size: int = 16
    progress: Progress = no_progress

    def tuned(self) -> TunedSlices:
        """The proxy run's slices.

        Raises:
            InputError: there was no proxy run.
        """
        if self.proxy is None:
            raise InputError(
                "this ranker compares the base with a proxy run, and there was none. "
                "Run the proxy first, or choose a ranker that needs none (gradient)."
            )
        return self.proxy

    def checked_samples(self) -> Sequence[EncodedSample]:
        """The samples.

        Raises:
            InputError: there are none.
        """
        if not self.samples:
            raise InputError("this ranker takes a loss on the proxy samples, and there are none.")
        return self.samples

    def empty_scores(self) -> Tensor:
        """Zeros, ``[n_layers, n_query_heads]`` in float64."""
        return torch.zeros(len(self.layers), self.layers[0].n_query_heads, dtype=torch.float64)


class Ranker(Protocol):
    """Scores every query head for a target."""

    @property
    def version(self) -> str:
        """Changes when the same evidence gives other scores."""

    @property
    def needs_proxy_run(self) -> bool:
        """False: the base and the proxy samples are enough."""

    @property
    def runs_model(self) -> bool:
        """False: it looks at weights alone, in float32 where a proxy run moved them."""

    def rank(self, evidence: RankingEvidence) -> Tensor:
        """``[n_layers, n_query_heads]`` in float64; higher is more task-sensitive."""


rankers: Registry[type[Ranker]] = Registry("ranker")
