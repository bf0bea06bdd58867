"""What metrics look at: losses, answers and likelihoods, each computed when first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from p2d_core.evaluation.generation import generate, without_reasoning
from p2d_core.evaluation.metric import EvaluationSpec
from p2d_core.models import checked_losses
from p2d_core.progress import Progress, no_progress
from p2d_core.response_loss import response_losses, token_losses
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import EncodedSample, Encoder, TokenBudget, collate, each_batch


class Evidence:
    """A model, the samples that it is judged on, and what it makes of them."""

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        samples: Sequence[Sample],
        spec: EvaluationSpec,
        *,
        device: torch.device,
        tokens_per_batch: int = 8192,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.encoder, self.samples, self.spec = model, encoder, samples, spec
        self.device, self.progress = device, progress or no_progress
        self.budget = TokenBudget(tokens_per_batch)

    @cached_property
    def encoded(self) -> list[EncodedSample]:
        """Each sample as tokens."""
        return list(self.encoder.encode_all(self.samples))

    @cached_property
    def losses(self) -> Tensor:
        """Mean cross-entropy (nats) of each response's tokens, its end included; float64.

        Raises:
            NumericalError: one is no number.
        """

        def mean(batch: dict[str, Tensor]) -> Tensor:
            return response_losses(self.model, batch)

        return checked_losses(self._of_each(self.encoded, mean), self.encoded)

    @cached_property
    def answers(self) -> list[str]:
        """What the model answers each prompt, greedily: the same however samples are batched."""
        longest = max(sample.n_response for sample in self.encoded)
        return generate(
            self.model,
            self.encoder,
            [sample.input_ids[: sample.n_prompt] for sample in self.encoded],
            self.spec.max_new_tokens or longest + longest // 4 + 1,
            device=self.device,
            budget=self.budget,
            progress=self.progress,
        )

    @cached_property
    def compared(self) -> list[tuple[str, str]]:
        """Of each sample the response and the answer; of a chat without reasoning before them."""
        said = without_reasoning if self.encoder.chat is not None else str
        return [
            (said(sample.response), said(answer))
            for sample, answer in zip(self.samples, self.answers, strict=True)
        ]

    def log_likelihoods(self, encoded: Sequence[EncodedSample]) -> Tensor:
        """Sum of the log-probabilities (nats) of each response's tokens; float64.

        Raises:
            NumericalError: one is no number.
        """

        @torch.inference_mode()
        def total(batch: dict[str, Tensor]) -> Tensor:
            return token_losses(self.model, batch)[0].double().sum(dim=1)

        return -checked_losses(self._of_each(encoded, total), encoded)

    def _of_each(self, encoded: Sequence[EncodedSample], work: Any) -> Tensor:
        """A number for each, by batches of like length."""
        found = torch.empty(len(encoded), dtype=torch.float64)
        done = 0

        def of_batch(positions: list[int]) -> Tensor:
            batch = collate([encoded[i] for i in positions], self.encoder.pad_id)
            made: Tensor = work({name: each.to(self.device) for name, each in batch.items()})
            return made.double().cpu()

        for positions, made in each_batch(encoded, self.budget, of_batch):
            found[positions] = made
            done += len(positions)
            self.progress(done, len(encoded))
        return found
