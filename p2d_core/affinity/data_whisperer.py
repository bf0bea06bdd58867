"""Affinity as in Data Whisperer: how well the model answers with a sample as a demonstration."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from p2d_core.affinity.in_context import (
    Context,
    candidate_attention,
    draw_contexts,
    kept_samples,
    samples_kept,
)
from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.evaluation.generation import generate
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample

SCORE = "score"


@scorers.register("data-whisperer")
@dataclass(frozen=True)
class DataWhisperer(Scorer):
    """How well the query is answered in a context, times the attention a token of the sample gets.

    The answer that the model generates is judged by ROUGE-L against the right one, or the right
    one's likelihood is taken (the geometric mean over its tokens): no generation, and a number also
    where a small model answers nothing right. The attention is that of the right answer's tokens
    in all heads of one layer, over the sample's length. Averaged over draws.

    Needs a model that can learn in context. Costs ``draws`` generated answers, each after
    ``demonstrations`` samples and a question, or as many whole forward passes; and as many passes
    down to the layer.

    Source: Data Whisperer, arXiv 2505.12212. Differs: queries and other demonstrations are proxy
    samples, one query a context, and not all from the corpus, so that a sample's affinity does not
    depend on the others; attention is paid from the right answer and not from the question.
    """

    demonstrations: Annotated[int, Field(ge=2)] = 3
    """Samples before the query, the candidate among them; at least 2."""
    draws: Annotated[int, Field(ge=1)] = 2
    """How many queries a candidate is tried with."""
    layer: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Which layer attention is looked at in, as a share of the depth, in (0, 1]."""
    judged_by: Literal["generation", "likelihood"] = "generation"
    """What says how well the query is answered."""
    seed: int = 0

    version: ClassVar[str] = "3"
    measures_target: ClassVar[bool] = True

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """The proxy samples' token ids."""
        return kept_samples(model, target.proxy)

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """``score``: how well, times attention a token, the mean over draws; float64."""
        layer = model.layers[math.ceil(self.layer * len(model.layers)) - 1]
        heads = [(layer.index, head) for head in range(layer.n_query_heads)]
        contexts = draw_contexts(
            model, shard, samples_kept(state), self.demonstrations, self.draws, self.seed
        )
        paid = candidate_attention(model, heads, contexts).double().sum(dim=1)
        lengths = torch.tensor([context.stop - context.start for context in contexts])
        answered = _rouge_l if self.judged_by == "generation" else _likelihood
        of_draws = answered(model, contexts) * paid / lengths
        return {SCORE: of_draws.view(len(shard), -1).mean(dim=1).numpy()}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """At least 0."""
        for table in only(measured, SCORE):
            yield pa.array(np.asarray(table[SCORE], dtype=np.float64))


def _likelihood(model: CapturedModel, contexts: Sequence[Context]) -> Tensor:
    """Of the right answer a token, ``[contexts]`` in float64."""
    return (-model.response_losses([each.tokens for each in contexts]).double()).exp()


def _rouge_l(model: CapturedModel, contexts: Sequence[Context]) -> Tensor:
    """F1 of the generated answer, ``[contexts]`` in float64; words are what spaces part.

    An answer may be as long as the right one, so that it does not depend on the others' lengths.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    decode = model.tokenizer.decode
    scores = torch.zeros(len(contexts), dtype=torch.float64)
    by_length: dict[int, list[int]] = defaultdict(list)
    for place, context in enumerate(contexts):
        by_length[context.tokens.n_response].append(place)
    for length, places in sorted(by_length.items()):
        chosen = [contexts[place].tokens for place in places]
        # in a sum, another thread may have tuned slices in the model, or silenced heads
        with model.looking_through(tuned=False):
            answers = generate(
                model.model,
                model.encoder,
                [each.input_ids[: each.n_prompt] for each in chosen],
                length,
                device=model.device,
                budget=model.budget,
            )
        for place, each, answer in zip(places, chosen, answers, strict=True):
            right = decode(each.input_ids[each.n_prompt :], skip_special_tokens=True)
            scores[place] = scorer.score(right, answer)["rougeL"].fmeasure
    return scores


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return text.split()
