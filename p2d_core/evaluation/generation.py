"""Answers that a model generates: greedy, in batches of like length, up to a limit."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from p2d_core.models import positions_of
from p2d_core.progress import Progress, no_progress
from p2d_core.samples.tokens import EncodedSample, Encoder, TokenBudget, collate, each_batch

_ASIDE = threading.Lock()
"""Threads may share a model, and would give it each other's settings back."""


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
        prompts: token ids; one that takes all of the model's positions loses its beginning.
        max_new_tokens: of an answer, or fewer where the model's positions end.
        budget: of a batch, prompts and answers together, whose keys and values are all kept.
    """
    _, limit = positions_of(model.config)
    positions = limit if isinstance(limit, int) else max(map(len, prompts)) + max_new_tokens
    rows, room = [], []
    for ids in prompts:
        room.append(max(1, min(max_new_tokens, positions - len(ids))))
        kept = list(ids[-max(1, positions - room[-1]) :])
        rows.append(EncodedSample("", kept, len(kept)))
    answers = [""] * len(rows)
    done = 0

    def answered(tokens: int, places: list[int], batched: list[int]) -> list[str]:
        batch = collate([rows[places[i]] for i in batched], encoder.pad_id, side="left")
        output = model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=encoder.pad_id,
            eos_token_id=ends,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        return list(encoder.tokenizer.batch_decode(new, skip_special_tokens=True))

    with _own_settings_aside(model, encoder) as ends:
        # who has as much room shares batches: what an answer is must not hang on its neighbours
        for tokens in sorted(set(room), reverse=True):
            places = [place for place, each in enumerate(room) if each == tokens]
            sizes = [range(len(rows[place]) + tokens) for place in places]
            for batched, texts in each_batch(sizes, budget, partial(answered, tokens, places)):
                for i, text in zip(batched, texts, strict=True):
                    answers[places[i]] = text
                done += len(batched)
                progress(done, len(rows))
    return answers


@contextmanager
def _own_settings_aside(model: Any, encoder: Encoder) -> Iterator[int | list[int]]:
    """In its block nothing but what a call is given counts: no repetition penalty of the model's.

    What a model brings in ``generation_config.json`` is taken for whatever a call leaves out.
    Gives `stop_ids`, which are of it.
    """
    # PEFT's hands its own to the model inside it
    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    with _ASIDE:
        ends = stop_ids(model, encoder)
        own = [holder.generation_config for holder in holders]
        for holder in holders:
            holder.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        try:
            yield ends
        finally:
            for holder, settings in zip(holders, own, strict=True):
                holder.generation_config = settings
