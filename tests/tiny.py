"""Tiny real models, built from their family's own config with random weights; no download."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig


def tiny_llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """3 layers of width 64, 8 query heads of 8 in 4 KV groups, 50 words; ready for inference."""
    model = tiny(
        LlamaConfig(
            **{
                "vocab_size": 50,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "max_position_embeddings": 128,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "tie_word_embeddings": False,
                "initializer_range": 0.2,
                **settings,
            }
        ),
        seed,
    )
    assert isinstance(model, LlamaForCausalLM)
    return model


def tiny(config: PretrainedConfig, seed: int = 0) -> Any:
    """A causal language model of that config; the caller's random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def token_batch(
    lengths: list[int], vocab_size: int = 50, seed: int = 0, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their mask, ``[batch, longest]`` each, padded with 0 on that side."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place] = torch.randint(3, vocab_size, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask
