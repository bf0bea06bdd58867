"""Response loss and exact match on the evaluation samples, sample by sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from p2d_core.models import checked_losses
from p2d_core.response_loss import response_losses
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import EncodedSample, Encoder, batches_by_tokens, collate

HIGHER_IS_BETTER = {"loss": False, "exact_match": True}


@dataclass(frozen=True, slots=True)
class EvaluationSpec:
    """What is measured. The loss always is; exact match only if it is the metric."""

    metric: str = "loss"
    answer_pattern: str | None = None
    """Regular expression; the last match's first group (or the whole match) is compared."""
    max_new_tokens: int | None = None
    """Longest generated answer; None: the longest reference answer plus a quarter."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics over all samples, and a row a sample."""

    metrics: dict[str, float]
    samples: pa.Table
    tokens: int


def evaluate(
    model: Any,
    encoder: Encoder,
    samples: Sequence[Sample],
    spec: EvaluationSpec,
    *,
    device: torch.device,
    tokens_per_batch: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Loss: mean over samples of the response tokens' mean cross-entropy, nats.

    Exact match: share of samples whose greedy answer equals the response, white space apart, or,
    with ``answer_pattern``, whose last match equals the response's.

    Raises:
        NumericalError: a loss is no number.
    """
    encoded = list(encoder.encode_all(samples))
    losses = torch.empty(len(encoded), dtype=torch.float64)
    measured = 0
    for positions in batches_by_tokens(encoded, token_budget=tokens_per_batch):
        batch = collate([encoded[i] for i in positions], encoder.pad_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        losses[positions] = response_losses(model, batch).double().cpu()
        measured += len(positions)
        if progress is not None:
            progress(measured, len(encoded))
    checked_losses(losses, encoded)
    columns: dict[str, Any] = {
        "sample_id": [sample.sample_id for sample in samples],
        "loss": losses.numpy(),
    }
    metrics = {"loss": float(losses.mean())}
    if spec.metric == "exact_match":
        answers = _generate(model, encoder, encoded, spec, device, tokens_per_batch, progress)
        expected = [answer_of(sample.response, spec.answer_pattern) for sample in samples]
        matches = [
            right is not None and answer_of(answer, spec.answer_pattern) == right
            for answer, right in zip(answers, expected, strict=True)
        ]
        columns |= {"exact_match": matches, "answer": answers}
        metrics["exact_match"] = sum(matches) / len(matches)
    return Evaluation(metrics, pa.table(columns), sum(len(sample) for sample in encoded))


def answer_of(text: str, pattern: str | None) -> str | None:
    """What of a text is compared: all of it, or what the pattern finds last (None: nothing)."""
    if pattern is None:
        return " ".join(text.split())
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    match = found[-1]
    return " ".join(match.group(1 if match.groups() else 0).split())


@torch.inference_mode()
def _generate(
    model: Any,
    encoder: Encoder,
    encoded: Sequence[EncodedSample],
    spec: EvaluationSpec,
    device: torch.device,
    tokens_per_batch: int,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    longest = max(sample.n_response for sample in encoded)
    room = spec.max_new_tokens or longest + longest // 4 + 1
    prompts = [
        EncodedSample(sample.sample_id, sample.input_ids[: sample.n_prompt], sample.n_prompt)
        for sample in encoded
    ]
    answers = [""] * len(encoded)
    done = 0
    # what is generated counts: its keys and values are kept beside the prompt's
    for positions in batches_by_tokens(prompts, token_budget=max(1, tokens_per_batch // 2)):
        batch = collate([prompts[i] for i in positions], encoder.pad_id, side="left")
        width = batch["input_ids"].shape[1]
        output = model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            pad_token_id=encoder.pad_id,
            eos_token_id=encoder.end_id,
        )
        texts = encoder.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for position, text in zip(positions, texts, strict=True):
            answers[position] = text
        done += len(positions)
        if progress is not None:
            progress(done, len(encoded))
    return answers
