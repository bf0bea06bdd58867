"""The loss of samples' responses under a model."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from p2d_core.samples.tokens import IGNORED_LABEL, EncodedSample, collate


def batches(samples: Sequence[EncodedSample], batch_size: int) -> Iterator[list[EncodedSample]]:
    """Samples of like length together."""
    by_length = sorted(samples, key=len)
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def summed_loss(model: Any, batch: Sequence[EncodedSample], pad_id: int) -> tuple[Tensor, int]:
    """The loss summed over the batch's response tokens, a scalar in float32, and their number."""
    device = next(model.parameters()).device
    rows = collate(batch, pad_id)
    targets = rows["labels"][:, 1:]
    # the head over the vocabulary is the dearest part, and what only prompts reach needs none
    first = min(sample.n_prompt for sample in batch) - 1
    targets = targets[:, first:].to(device)
    n_kept = targets.shape[1] + 1
    settings: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        settings["logits_to_keep"] = n_kept
    output = model(
        input_ids=rows["input_ids"].to(device),
        attention_mask=rows["attention_mask"].to(device),
        **settings,
    )
    logits = output.logits[:, -n_kept:-1]
    wanted = targets != IGNORED_LABEL
    loss = torch.nn.functional.cross_entropy(
        logits[wanted].float(), targets[wanted], reduction="sum"
    )
    return loss, int(wanted.sum())


@torch.inference_mode()
def mean_loss(model: Any, samples: Sequence[EncodedSample], pad_id: int, batch_size: int) -> float:
    """The loss over all response tokens of all samples, nats a token."""
    total, n_tokens = 0.0, 0
    for batch in batches(samples, batch_size):
        loss, n = summed_loss(model, batch, pad_id)
        total += float(loss)
        n_tokens += n
    return total / n_tokens
