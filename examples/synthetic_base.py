"""Train the base model of the synthetic world from scratch, with its tokenizer.

    python examples/synthetic_base.py --out p2d_core/synthetic/base

A Llama with 4 layers x 8 query heads over 4 KV groups (32 query heads). It sees every skill of
the world and never the target: the word ``ledger`` is in its vocabulary and in none of its
training samples. Writes ``model.safetensors``, ``config.json``, the tokenizer,
``base.sha256`` (hash of the weights) and ``quality.json`` (exact match per skill). Takes about
10 minutes on one free core.

A sequence is the ids of the prompt, the ids of the response and ``<eos>``; there is no start token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from p2d_core.synthetic.skills import (
    CONTENT_WORDS,
    SKILLS,
    VOCABULARY,
    Exercise,
    draw_ledger,
    lookup_exercise,
)

log = logging.getLogger("synthetic_base")

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
SEQUENCE_TOKENS = 24
"""Longest sequence trained on, in tokens; the world's longest sample has 20."""
BATCH_SAMPLES = 64
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
INDUCTION_FIRST_SHARE = 0.08
"""Share of the steps, at the start, that see repeated segments only: the skills alone teach a
model of this size copying, and leave look-ups at chance for thousands of steps."""
INDUCTION_EVERY = 4
"""After that, one step in this many still sees repeated segments."""
QUALITY_EVERY = 1000
"""Steps between two measurements in the log."""
N_TEST = 100
"""Held-out samples per skill in ``quality.json``."""
IGNORED = -100


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The special tokens and the words of the world."""
    return word_tokenizer((*SPECIAL_TOKENS, *VOCABULARY))


def word_tokenizer(tokens: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """One token a word; no token is added to a text."""
    vocabulary = {word: index for index, word in enumerate(tokens)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained base: 4 layers x 128, 8 query heads and 4 KV groups a layer."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Batches:
    """Draws training batches as pairs of token ids and labels, both ``[rows, tokens]``."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._ids = tokenizer.get_vocab()
        self._eos = self._ids["<eos>"]
        self._pad = self._ids["<pad>"]
        self._content = [self._ids[word] for word in CONTENT_WORDS]
        self._skills = tuple(SKILLS.values())
        self._rng = Random(seed)

    def skills(self) -> tuple[Tensor, Tensor]:
        """Samples of every skill and tables with many questions; loss on the response only."""
        rows = []
        for _ in range(BATCH_SAMPLES):
            kind = self._rng.randrange(len(self._skills) + 1)
            if kind == len(self._skills):
                # one answered question teaches little about looking up: these tables ask many
                exercise = lookup_exercise(self._rng, "lookup2", self._rng.randint(2, 4))
            else:
                exercise = self._skills[kind](self._rng)
            rows.append(self._encode(exercise))
        return self._pad_rows(rows)

    def induction(self) -> tuple[Tensor, Tensor]:
        """A segment of 4 to 10 words, repeated; loss on everything after its first time."""
        rows = []
        for _ in range(BATCH_SAMPLES):
            length = self._rng.randint(4, 10)
            segment = self._rng.sample(self._content, length)
            ids = (segment * (SEQUENCE_TOKENS // length + 1))[:SEQUENCE_TOKENS]
            rows.append((ids, [IGNORED] * length + ids[length:]))
        return self._pad_rows(rows)

    def _encode(self, exercise: Exercise) -> tuple[list[int], list[int]]:
        prompt = [self._ids[word] for word in exercise.prompt.split()]
        answer = [*(self._ids[word] for word in exercise.response.split()), self._eos]
        return prompt + answer, [IGNORED] * len(prompt) + answer

    def _pad_rows(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        ids = [ids + [self._pad] * (longest - len(ids)) for ids, _ in rows]
        labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]
        return torch.tensor(ids), torch.tensor(labels)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batches: Batches, n_steps: int
) -> None:
    """Repeated segments first, then the skills."""

    def draw(step: int) -> tuple[str, Tensor, Tensor]:
        only_induction = step < INDUCTION_FIRST_SHARE * n_steps
        if only_induction or step % INDUCTION_EVERY == 0:
            return "repeated segments", *batches.induction()
        return "skills", *batches.skills()

    fit(model, n_steps, draw, lambda: measure(model, tokenizer, n_samples=40))


def fit(
    model: LlamaForCausalLM,
    n_steps: int,
    draw: Callable[[int], tuple[str, Tensor, Tensor]],
    quality: Callable[[], object],
) -> None:
    """AdamW without weight decay, cosine schedule.

    Args:
        draw: of a step what its batch is called, its token ids and its labels.
        quality: what is logged now and then.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / n_steps))),
    )
    model.train()
    start = time.monotonic()
    for step in range(n_steps):
        name, ids, labels = draw(step)
        # padding stands on the right, where a causal model never looks from a word: no mask
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == n_steps - 1:
            log.info(
                "step %d/%d: loss %.3f on %s, %.0f s",
                step, n_steps, loss.item(), name, time.monotonic() - start,
            )  # fmt: skip
        if step % QUALITY_EVERY == QUALITY_EVERY - 1:
            log.info("exact match: %s", quality())
            model.train()


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, exercises: list[Exercise]
) -> float:
    """Share of exercises whose greedy answer, up to ``<eos>``, is the response word for word."""
    model.eval()
    right = 0
    by_length: dict[int, list[Exercise]] = {}
    for exercise in exercises:
        by_length.setdefault(len(exercise.prompt.split()), []).append(exercise)
    for n_prompt_tokens, same_length in by_length.items():
        ids = tokenizer([e.prompt for e in same_length], return_tensors="pt").input_ids
        longest = max(len(e.response.split()) for e in same_length) + 1
        for _ in range(longest):
            next_ids = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, next_ids], dim=1)
        for exercise, row in zip(same_length, ids[:, n_prompt_tokens:].tolist(), strict=True):
            answer = [*tokenizer(exercise.response).input_ids, tokenizer.eos_token_id]
            right += row[: len(answer)] == answer
    return right / len(exercises)


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, n_samples: int = N_TEST
) -> dict[str, float]:
    """Exact match of every skill and of the target, on samples drawn from a seed of their own."""
    quality = {}
    for name, draw in SKILLS.items():
        rng = Random(f"quality {name}")
        exercises = [draw(rng) for _ in range(n_samples)]
        quality[name] = exact_match(model, tokenizer, exercises)
    rng = Random("quality ledger")
    ledgers = [draw_ledger(rng) for _ in range(n_samples)]
    targets = [Exercise(ledger.prompt, ledger.response) for ledger in ledgers]
    quality["ledger"] = exact_match(model, tokenizer, targets)
    return quality


def write_base(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, quality: object, out: Path
) -> None:
    """The model's folder, with the hash of its weights and its quality."""
    log.info("exact match: %s", quality)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    (out / "base.sha256").write_text(f"{digest}  model.safetensors\n")
    (out / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the base model of the synthetic world.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the base to")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of 64 samples")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, arguments.seed)
    train(model, tokenizer, Batches(tokenizer, arguments.seed), arguments.steps)
    write_base(model, tokenizer, measure(model, tokenizer), arguments.out)


if __name__ == "__main__":
    main()
