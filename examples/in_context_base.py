"""Train a base that learns in context, from the base of the synthetic world.

    python examples/in_context_base.py --out p2d_core/synthetic/in_context_base

Three steps in four are of sequences of exercises end to end, all of one function, whose name and
structural words are invented and drawn anew for every sequence: what was shown before is the only
way to know what is asked. The fourth is of the base's own skills under their names, so that they
stay.
Starts from the weights of the base (the skills are there; what is learned is to tell from
demonstrations which of them is meant), with new words beside its own. Writes what
``synthetic_base.py`` writes; ``quality.json`` has, for each function, exact match by the number of
demonstrations. The log says what a step takes.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from random import Random

import torch
from synthetic_base import (
    IGNORED,
    SPECIAL_TOKENS,
    Batches,
    exact_match,
    fit,
    measure,
    word_tokenizer,
    write_base,
)
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from p2d_core.synthetic import BASE_FOLDER
from p2d_core.synthetic.disguise import FUNCTIONS, INVENTED, draw_disguised, draw_surface
from p2d_core.synthetic.skills import VOCABULARY, Exercise

EXERCISES = 5
"""In a sequence; the first one's answer cannot be known, and counts for nothing."""
POSITIONS = 256
BATCH_SEQUENCES = 24
NAMED_EVERY = 4
"""One step in this many is of the base's own skills."""
DEMONSTRATIONS = (0, 1, 2, 4)
"""That quality is measured with."""


def grown_base(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The base of the synthetic world, with a row for each new word and more positions."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(str(BASE_FOLDER), dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.max_position_embeddings = POSITIONS
    return model


class Sequences(Batches):
    """Draws training batches: exercises in a row, or named skills."""

    def in_context(self) -> tuple[Tensor, Tensor]:
        """Exercises of one function under one surface; loss on every answer but the first."""
        rows = []
        for _ in range(BATCH_SEQUENCES):
            function = self._rng.choice(tuple(FUNCTIONS))
            surface = draw_surface(self._rng)
            ids, labels = [], []
            for place in range(EXERCISES):
                more, answer = self._encode(draw_disguised(self._rng, function, surface))
                ids += more
                labels += answer if place else [IGNORED] * len(answer)
            rows.append((ids, labels))
        return self._pad_rows(rows)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batches: Sequences, n_steps: int
) -> None:
    """Mostly exercises in a row, and named skills."""

    def draw(step: int) -> tuple[str, Tensor, Tensor]:
        if step % NAMED_EVERY == NAMED_EVERY - 1:
            return "named skills", *batches.skills()
        return "exercises in a row", *batches.in_context()

    fit(model, n_steps, draw, lambda: in_context_quality(model, tokenizer, n_samples=30))


def in_context_quality(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, n_samples: int = 100
) -> dict[str, dict[str, float]]:
    """Exact match of each function by the number of demonstrations before the question."""
    quality: dict[str, dict[str, float]] = {}
    for function in FUNCTIONS:
        rng = Random(f"in context {function}")
        by_number = {}
        for shown in DEMONSTRATIONS:
            exercises = []
            for _ in range(n_samples):
                surface = draw_surface(rng)
                *before, asked = (draw_disguised(rng, function, surface) for _ in range(shown + 1))
                context = [f"{each.prompt} {each.response} <eos>" for each in before]
                exercises.append(Exercise(" ".join([*context, asked.prompt]), asked.response))
            by_number[str(shown)] = exact_match(model, tokenizer, exercises)
        quality[function] = by_number
    return quality


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a base that learns in context.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the base to")
    parser.add_argument("--steps", type=int, default=5000, help="training steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = word_tokenizer((*SPECIAL_TOKENS, *VOCABULARY, *INVENTED))
    model = grown_base(tokenizer, arguments.seed)
    train(model, tokenizer, Sequences(tokenizer, arguments.seed), arguments.steps)
    quality = {
        "named": measure(model, tokenizer),
        "by_demonstrations": in_context_quality(model, tokenizer),
    }
    write_base(model, tokenizer, quality, arguments.out)


if __name__ == "__main__":
    main()
