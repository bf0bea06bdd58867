"""A base model as scorers see it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2d_core.adaptation.slices import TunedSlices
from p2d_core.aer import in_turn
from p2d_core.attention.layout import (
    AttentionLayer,
    attention_layers,
)
from p2d_core.errors import NumericalError
from p2d_core.models.load import load_model, load_tokenizer
from p2d_core.models.shape import vocabulary_of
from p2d_core.response_loss import response_losses
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import (
    EncodedSample,
    Encoder,
    TextFormat,
    TokenBudget,
    collate,
    each_batch,
)


@dataclass
class CapturedModel:
    """A base model as scorers see it: loaded when first needed, never changed for long.

    Threads may share it: one at a time runs the model, while others read, encode and write.
    ``tuned`` holds the task heads' slices after the proxy set (head_proxy), for scorers that look
    through tuned heads.
    """

    folder: Path
    precision: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    text: TextFormat = field(default_factory=TextFormat)
    tokens_per_batch: int = 8192
    tuned: TunedSlices | None = None
    _running: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)
    _of_thread: threading.local = field(default_factory=threading.local, init=False, repr=False)

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded without the weights."""
        return load_tokenizer(self.folder)

    @cached_property
    def encoder(self) -> Encoder:
        """From samples to token ids."""
        return Encoder(self.tokenizer, self.text, vocabulary_of(self.folder))

    @cached_property
    def model(self) -> Any:
        """The weights, on the device."""
        with in_turn(self._running):
            if "model" not in self.__dict__:  # another thread was first
                model = load_model(self.folder, self.precision, self.device)
                self.__dict__["model"] = model.requires_grad_(False)
        return self.__dict__["model"]

    @cached_property
    def layers(self) -> tuple[AttentionLayer, ...]:
        """Where its heads are."""
        return attention_layers(self.model)

    @cached_property
    def budget(self) -> TokenBudget:
        """Of the batches: ``tokens_per_batch``, or less once memory ran out."""
        return TokenBudget(self.tokens_per_batch)

    def with_tuned(self, tuned: TunedSlices) -> CapturedModel:
        """The same with tuned slices at hand; the weights are loaded once and serve both."""
        _ = self.model
        other = replace(self, tuned=tuned)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "tuned"})
        return other

    @property
    def pad_id(self) -> int:
        """Token id that fills batches; never attended to."""
        return self.encoder.pad_id

    def encode(self, samples: Sequence[Sample]) -> list[EncodedSample]:
        """Token ids of each sample, in order; kept until the thread asks for other samples."""
        kept: tuple[Any, list[EncodedSample]] = getattr(self._of_thread, "encoded", (None, []))
        if kept[0] is not samples:
            kept = (samples, list(self.encoder.encode_all(samples)))
            self._of_thread.encoded = kept
        return kept[1]

    def each_batch(
        self, encoded: Sequence[EncodedSample], work: Callable[[dict[str, Tensor]], Tensor]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """What ``work`` makes of each collated batch (on the CPU), with positions in ``encoded``.

        Batches become smaller when memory runs out; see `p2d_core.samples.tokens.each_batch`.
        """

        def of(positions: list[int]) -> Tensor:
            batch = collate([encoded[i] for i in positions], self.pad_id)
            with in_turn(self._running):
                return work(batch)

        return each_batch(encoded, self.budget, of)

    @contextmanager
    def looking_through(self, *, tuned: bool) -> Iterator[None]:
        """With ``tuned`` the task heads' tuned slices stand in the model while the block runs.

        Raises:
            ValueError: ``tuned``, but the model was made without tuned slices.
            ModelError: the tuned slices are of another model.
        """
        if tuned and self.tuned is None:
            raise ValueError("this model was made without tuned slices")
        with (
            in_turn(self._running),
            self.tuned.applied(self.model) if tuned and self.tuned else nullcontext(),
        ):
            yield

    def response_losses(self, encoded: Sequence[EncodedSample]) -> Tensor:
        """Mean cross-entropy (nats) of each sample's response tokens, float32, shape ``[n]``."""
        return self.losses_of(self.model, encoded)

    def losses_of(self, model: nn.Module, encoded: Sequence[EncodedSample]) -> Tensor:
        """`response_losses` under another model on the same device, such as one in training."""

        def of(batch: dict[str, Tensor]) -> Tensor:
            return response_losses(model, {k: v.to(self.device) for k, v in batch.items()})

        losses = torch.empty(len(encoded), dtype=torch.float32, device=self.device)
        for positions, part in self.each_batch(encoded, of):
            losses[positions] = part.float()
        return checked_losses(losses.cpu(), encoded)


def checked_losses(losses: Tensor, encoded: Sequence[EncodedSample]) -> Tensor:
    """The losses as they are, if all are numbers.

    Raises:
        NumericalError: names the first sample whose loss is none.
    """
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        raise NumericalError(
            f"the loss of {len(bad)} of {len(encoded)} responses is no number; the first, of "
            f"sample {encoded[first].sample_id[:12]}, is {float(losses[first])}. Look at that "
            "sample and at the weights of the model, lower the learning rate if it was tuned, or "
            "use precision: float32."
        )
    return losses
