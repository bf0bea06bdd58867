"""A candidate among demonstrations before a query: what in-context scorers run the model on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2d_core.models import CapturedModel, most_tokens
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import EncodedSample


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
