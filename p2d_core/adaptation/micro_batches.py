"""The samples of a step through a model: at once, or in parts where memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from p2d_core.adaptation.spread import Spread
from p2d_core.errors import DeviceMemoryError
from p2d_core.processes import ALONE, Processes
from p2d_core.response_loss import summed_loss
from p2d_core.samples.tokens import IGNORED_LABEL, EncodedSample, batches_by_tokens, collate

log = logging.getLogger(__name__)

SMALLER = (
    "Set training.gradient_checkpointing: true or precision: bfloat16, or lower format.max_tokens."
)


@dataclass
class MicroBatches:
    """Forward and backward of a step; its gradients add up over the parts (gradient accumulation).

    However a step is cut, loss and gradients are those of the whole, up to rounding. Where memory
    runs out the step begins anew in parts of half the tokens, and so do those after it. Source:
    ours.
    """

    parts: Spread
    """The model, in evaluation or training mode as the caller wants it."""
    pad_id: int
    tokens: int | None = None
    """Padded tokens of a micro-batch in each process, at least a sample; None: a whole step."""
    processes: Processes = ALONE
    """Each runs its share of every micro-batch. Memory that runs out in one of several is an error:
    the others could not know of it."""

    def backward(
        self,
        rows: Sequence[EncodedSample],
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Tensor:
        """Gradients of the mean cross-entropy (nats) of all response tokens of ``rows``.

        The parameters have none before.

        Args:
            context: what each forward pass runs in, such as autocast.

        Returns:
            That mean, a scalar; of several processes the mean over theirs is.

        Raises:
            DeviceMemoryError: a single sample does not fit in memory, or a part in one of several
                processes.
        """
        while True:
            loss, failed = self._passed(rows, context)
            if failed is None:
                return loss
            # outside of `except`: there the error would still hold the tensors of what failed
            for parameter in self.parts.model.parameters():
                parameter.grad = None
            torch.cuda.empty_cache()
            self._halve(failed)

    def _passed(
        self,
        rows: Sequence[EncodedSample],
        context: Callable[[], AbstractContextManager[object]],
    ) -> tuple[Tensor, Sequence[EncodedSample] | None]:
        """The loss, and the part that memory ran out with, if one did."""
        model, size = self.parts.model, self.processes.size
        device = next(model.parameters()).device
        n_learnt = max(1, sum(row.n_learnt for row in rows))
        loss = torch.zeros((), device=device)
        for part in self._cut(rows):
            # a process that gets no sample runs one of which nothing is learnt: the others wait
            share = self.processes.share(part)
            batch = collate(share or part[:1], self.pad_id)
            if not share:
                batch["labels"].fill_(IGNORED_LABEL)
            try:
                on_device = {name: tensor.to(device) for name, tensor in batch.items()}
                with context():
                    total, _ = summed_loss(model, on_device, self.parts.run)
                of_part = total * size / n_learnt
                of_part.backward()  # type: ignore[no-untyped-call]
            except torch.OutOfMemoryError:
                return loss, part
            loss += of_part.detach()
        return loss, None

    def _cut(self, rows: Sequence[EncodedSample]) -> Iterator[Sequence[EncodedSample]]:
        """The micro-batches of all processes together: each has to find as many as the others."""
        if self.tokens is None:
            yield rows
            return
        for places in batches_by_tokens(rows, self.tokens * self.processes.size):
            yield [rows[place] for place in places]

    def _halve(self, failed: Sequence[EncodedSample]) -> None:
        longest = max(len(row) for row in failed)
        if len(failed) == 1:
            raise DeviceMemoryError(
                f"out of memory: a step of a single sample of {longest} tokens does not fit. "
                f"{SMALLER}"
            )
        tokens = len(failed) * longest // 2
        if self.processes.size > 1:
            raise DeviceMemoryError(
                f"out of memory: {len(failed)} samples of up to {longest} tokens do not fit in "
                f"{self.processes.size} processes at once. Set "
                f"training.micro_batch_tokens: {tokens // self.processes.size}. {SMALLER}"
            )
        self.tokens = tokens
        log.warning("out of memory: steps pass in parts of at most %d tokens now", tokens)
