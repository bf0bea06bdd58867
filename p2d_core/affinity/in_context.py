"""A candidate among demonstrations before a query: what in-context scorers run the model on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2d_core.attention.paid import attention_paid
from p2d_core.models import CapturedModel, most_tokens
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import EncodedSample, each_batch


@dataclass(frozen=True)
class Context:
    """Demonstrations, the candidate among them, and a query with its right answer."""

    tokens: EncodedSample
    """The whole; its response is the query's answer."""
    without: EncodedSample
    """The same without the candidate."""
    start: int
    stop: int
    """The candidate's tokens."""
    circumstances: tuple[int, int, int, int]
    """Demonstrations after the candidate; tokens of the candidate, of the others, of the query."""


def kept_samples(model: CapturedModel, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Token ids, end to end, with their lengths and those of the prompts."""
    encoded = model.encode(samples)
    return {
        "ids": torch.tensor([i for sample in encoded for i in sample.input_ids]),
        "lengths": torch.tensor([len(sample.input_ids) for sample in encoded]),
        "prompts": torch.tensor([sample.n_prompt for sample in encoded]),
    }


def samples_kept(state: dict[str, Tensor]) -> list[EncodedSample]:
    """The inverse of `kept_samples`."""
    parts = torch.split(state["ids"], state["lengths"].tolist())
    return [
        EncodedSample("", part.tolist(), int(n_prompt))
        for part, n_prompt in zip(parts, state["prompts"], strict=True)
    ]


def draw_contexts(
    model: CapturedModel,
    shard: Sequence[Sample],
    target: Sequence[EncodedSample],
    demonstrations: int,
    draws: int,
    seed: int,
) -> list[Context]:
    """Of each sample ``draws`` contexts; fellows, query and place are drawn from its id.

    What is more than the model has positions for is left out: demonstrations first, then the
    beginning of the candidate, then that of the query.
    """
    most = most_tokens(model.folder)
    return [
        _context(candidate, target, demonstrations, f"{seed}:{draw}:{candidate.sample_id}", most)
        for candidate in model.encode(shard)
        for draw in range(draws)
    ]


def candidate_attention(
    model: CapturedModel, heads: list[tuple[int, int]], contexts: Sequence[Context]
) -> Tensor:
    """Share of the answer's attention that the candidate gets, ``[contexts, heads]``."""
    paid = torch.empty(len(contexts), len(heads))

    def of(positions: list[int]) -> Tensor:
        chosen = [contexts[i] for i in positions]
        longest = max(len(context.tokens) for context in chosen)
        ids = torch.full((len(chosen), longest), model.pad_id)
        mask = torch.zeros(len(chosen), longest, dtype=torch.int64)
        answers = torch.zeros(len(chosen), longest, dtype=torch.bool)
        segments = torch.full((len(chosen), longest), -1)
        for row, context in enumerate(chosen):
            length = len(context.tokens)
            ids[row, :length] = torch.tensor(context.tokens.input_ids)
            mask[row, :length] = 1
            answers[row, context.tokens.n_prompt : length] = True
            segments[row, context.start : context.stop] = 0
        # in a sum, another thread may have tuned slices in the model, or silenced heads
        with model.looking_through(tuned=False):
            shares = attention_paid(
                model.model, model.layers, heads, ids, mask, answers, segments, n_segments=1
            )
        return shares[..., 0].cpu()

    for positions, part in each_batch([each.tokens for each in contexts], model.budget, of):
        paid[positions] = part
    return paid


def _context(
    candidate: EncodedSample, target: Sequence[EncodedSample], wanted: int, drawn_by: str, most: int
) -> Context:
    rng = random.Random(hashlib.sha256(drawn_by.encode()).digest())
    drawn = [target[i] for i in rng.sample(range(len(target)), min(wanted, len(target)))]
    query = drawn.pop()
    place = rng.randrange(len(drawn) + 1)
    before, after = drawn[:place], drawn[place:]
    while (before or after) and most < sum(map(len, (candidate, query, *before, *after))):
        (before or after).pop(0)
    own = candidate.input_ids[-max(most - len(query), most // 4) :]
    asked = query.input_ids[-(most - len(own)) :]
    first, last = ([i for each in part for i in each.input_ids] for part in (before, after))
    n_answer = min(query.n_response, len(asked) - 1)
    whole, without = first + own + last + asked, first + last + asked
    return Context(
        tokens=EncodedSample(candidate.sample_id, whole, len(whole) - n_answer),
        without=EncodedSample(candidate.sample_id, without, len(without) - n_answer),
        start=len(first),
        stop=len(first) + len(own),
        circumstances=(len(after), len(own), len(first) + len(last), len(asked)),
    )
