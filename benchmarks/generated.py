"""Models with random weights and samples with lengths like GSM8K's; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.sizes import Shape, Size
from p2d_core.models import CapturedModel, pick_device
from p2d_core.samples.schema import Sample, sample_id_of
from p2d_core.samples.tokens import TextFormat

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = 8_000
"""The tokenizer's words; a model's further embeddings are not met."""
PROMPT = (3.95, 0.40)
RESPONSE = (4.65, 0.50)
"""Mean and spread of log tokens: about 56 and 118 tokens, as GSM8K under Llama's tokenizer."""


def tokenizer(words: int = WORDS) -> Any:
    """A word a token: w0, w1, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(words))])}
    fast = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def random_model(shape: Shape, size: Size, **changes: Any) -> Any:
    """In evaluation mode, SDPA, nothing requires a gradient."""
    from transformers import AutoModelForCausalLM

    device = pick_device(size.device)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(
                shape.config(**changes), attn_implementation="sdpa"
            )
    finally:
        torch.set_default_dtype(before)
    return model.to(device=device, dtype=size.dtype).eval().requires_grad_(False)


def captured(model: Any, size: Size, **changes: Any) -> CapturedModel:
    """A model that stands in memory, as scorers see it."""
    from pathlib import Path

    seen = CapturedModel(
        Path("random-weights"),
        precision=size.precision,
        device=pick_device(size.device),
        text=TextFormat(separator=" ", max_tokens=1024),
        tokens_per_batch=size.tokens_per_batch,
        **changes,
    )
    seen.model = model
    seen.tokenizer = tokenizer()
    return seen


def samples(n: int, *, seed: int = 0, in_domain: float = 1.0, shorter: float = 1.0) -> list[Sample]:
    """``in_domain`` of them speak of the first half of the words, the others of the second.

    Args:
        shorter: divides all lengths.
    """
    rng = np.random.default_rng(seed)
    prompts = _lengths(rng, n, *PROMPT, shorter)
    responses = _lengths(rng, n, *RESPONSE, shorter)
    target = rng.random(n) < in_domain
    half = WORDS // 2
    made = []
    for row in range(n):
        words = rng.integers(0, half, prompts[row] + responses[row]) + (0 if target[row] else half)
        text = [f"w{i}" for i in words.tolist()]
        prompt, response = " ".join(text[: prompts[row]]), " ".join(text[prompts[row] :])
        source = f"source-{row % 4}"
        made.append(Sample(sample_id_of(prompt, response), source, prompt, response, row))
    return made


def _lengths(
    rng: np.random.Generator, n: int, mean: float, spread: float, shorter: float
) -> np.ndarray:
    drawn = rng.lognormal(mean, spread, n).clip(12, 450) / shorter
    return np.maximum(2, drawn.round()).astype(int)
