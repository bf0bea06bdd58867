"""Answers that a model generates: greedy, in batches of like length, up to a limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from p2d_core.models import positions_of
from p2d_core.progress import Progress, no_progress
from p2d_core.samples.tokens import EncodedSample, Encoder, TokenBudget, collate, each_batch


def stop_ids(model: Any, encoder: Encoder) -> int | list[int]:
    """Where an answer ends; in a chat also where the model's own settings say so."""
    if encoder.chat is None:
        return encoder.end_id
    own = getattr(model.generation_config, "eos_token_id", None)
    also = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({*encoder.stop_ids, *also})


def without_reasoning(text: str) -> str:
    """The answer behind what a model thinks before it, where that is marked."""
    return re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.DOTALL)


@torch.inference_mode()
def generate(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    device: torch.device,
    budget: TokenBudget,
    progress: Progress = no_progress,
) -> list[str]:
    """What the model writes after each prompt, without special tokens.

    The likeliest token is taken each time, so that answers repeat; prompts of a batch are padded on
    the left, which their positions leave out, so that an answer does not depend on the batch.

    Args:
        prompts: token ids; one that would not leave room for the answer within the model's
            positions loses its beginning.
        max_new_tokens: of an answer.
        budget: of a batch, prompts and answers together, whose keys and values are all kept.
    """
    _, limit = positions_of(model.config)
    kept = max(1, limit - max_new_tokens) if isinstance(limit, int) else max(map(len, prompts))
    rows = [EncodedSample("", list(ids[-kept:]), len(ids[-kept:])) for ids in prompts]
    answers = [""] * len(rows)
    done = 0

    def answered(positions: list[int]) -> list[str]:
        batch = collate([rows[i] for i in positions], encoder.pad_id, side="left")
        output = model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=encoder.pad_id,
            eos_token_id=stop_ids(model, encoder),
        )
        new = output[:, batch["input_ids"].shape[1] :]
        return list(encoder.tokenizer.batch_decode(new, skip_special_tokens=True))

    for positions, texts in each_batch(
        [range(len(row) + max_new_tokens) for row in rows], budget, answered
    ):
        for position, text in zip(positions, texts, strict=True):
            answers[position] = text
        done += len(positions)
        progress(done, len(rows))
    return answers
