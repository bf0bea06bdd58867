"""One row a family: a tiny model of random weights from the family's own config, and by hand what
its attention's values are, so that what was found by structure can be held against it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.tiny import tiny

N_LAYERS, N_HEADS, WIDTH = 3, 8, 64
HEAD_DIM = WIDTH // N_HEADS
WINDOW = 3
"""Tokens that a sliding window has; less than samples have."""

SMALL = {
    "vocab_size": 50,
    "hidden_size": WIDTH,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
GATED = SMALL | {"intermediate_size": 96}
GROUPED = GATED | {"num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": 50, "n_embd": WIDTH, "n_layer": N_LAYERS, "n_head": N_HEADS, **TOKENS}
GPT |= {"n_positions": 64, "initializer_range": 0.15}

Values = Callable[[Any, Tensor], Tensor]
"""From an attention and what it is given to ``[batch, tokens, groups, head_dim]``."""


def separate(attention: Any, given: Tensor) -> Tensor:
    return attention.v_proj(given).unflatten(-1, (-1, HEAD_DIM))


def last_of(name: str) -> Values:
    """All of q, then all of k, then all of v."""

    def values(attention: Any, given: Tensor) -> Tensor:
        fused = getattr(attention, name)(given)
        n_groups = (fused.shape[-1] // HEAD_DIM - N_HEADS) // 2
        return fused[..., -n_groups * HEAD_DIM :].unflatten(-1, (n_groups, HEAD_DIM))

    return values


def last_of_each(name: str, n_groups: int) -> Values:
    """The q of a group's heads, its k and its v; then those of the next group."""

    def values(attention: Any, given: Tensor) -> Tensor:
        fused = getattr(attention, name)(given)
        return fused.unflatten(-1, (n_groups, N_HEADS // n_groups + 2, HEAD_DIM))[..., -1, :]

    return values


def codegen(attention: Any, given: Tensor) -> Tensor:
    """Four parts of two heads each; in a part first both q, then both v, then both k."""
    parts = attention.qkv_proj(given).unflatten(-1, (4, 3, 2, HEAD_DIM))
    return parts[..., 1, :, :].flatten(-3, -2)


@dataclass(frozen=True)
class Family:
    """A family's config and what is known of it."""

    config: Callable[[], Any]
    values: Values
    n_kv_groups: int = N_HEADS
    fused: bool = False
    transposed: bool = False
    shares_norm: bool = False


def _gemma(kind: Any, **settings: Any) -> Any:
    config = kind(
        **GROUPED,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        sliding_window=WINDOW,
        # the middle layer sees everything
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **settings,
    )
    return config


def _falcon(**settings: Any) -> Any:
    return hf.FalconConfig(**SMALL, ffn_hidden_size=96, **settings)


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: hf.LlamaConfig(**GROUPED), separate, 2),
    "mistral": Family(lambda: hf.MistralConfig(**GROUPED, sliding_window=WINDOW), separate, 2),
    "qwen2": Family(lambda: hf.Qwen2Config(**GROUPED), separate, 2),
    "qwen3": Family(lambda: hf.Qwen3Config(**GROUPED, head_dim=HEAD_DIM), separate, 2),
    "gemma2": Family(
        lambda: _gemma(hf.Gemma2Config, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        separate,
        2,
    ),
    "gemma3": Family(lambda: _gemma(hf.Gemma3TextConfig), separate, 2),
    "phi3": Family(
        lambda: hf.Phi3Config(**GROUPED, sliding_window=WINDOW), last_of("qkv_proj"), 2, fused=True
    ),
    "gpt_neox": Family(
        lambda: hf.GPTNeoXConfig(**GATED), last_of_each("query_key_value", N_HEADS), fused=True
    ),
    "gpt2": Family(lambda: hf.GPT2Config(**GPT), last_of("c_attn"), fused=True, transposed=True),
    "falcon, multi-query": Family(
        lambda: _falcon(multi_query=True), last_of_each("query_key_value", 1), 1, fused=True
    ),
    "falcon, by group": Family(
        lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2, bias=True),
        last_of_each("query_key_value", 2),
        2,
        fused=True,
    ),
    "opt": Family(
        lambda: hf.OPTConfig(
            **{k: v for k, v in SMALL.items() if k != "initializer_range"},
            init_std=0.15,
            ffn_dim=96,
            word_embed_proj_dim=32,
        ),
        separate,
    ),
    "mixtral": Family(
        lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=WINDOW), separate, 2
    ),
    "gpt_oss": Family(
        lambda: hf.GptOssConfig(
            **GROUPED,
            head_dim=HEAD_DIM,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
        ),
        separate,
        2,
    ),
    "olmo2": Family(lambda: hf.Olmo2Config(**GROUPED), separate, 2, shares_norm=True),
    "starcoder2": Family(
        lambda: hf.Starcoder2Config(**GROUPED, sliding_window=WINDOW), separate, 2
    ),
    "cohere": Family(
        lambda: hf.CohereConfig(**GROUPED, logit_scale=0.25, use_qk_norm=True), separate, 2
    ),
    "bloom": Family(
        lambda: hf.BloomConfig(
            vocab_size=50,
            hidden_size=WIDTH,
            n_layer=N_LAYERS,
            n_head=N_HEADS,
            initializer_range=0.15,
            **TOKENS,
        ),
        last_of_each("query_key_value", N_HEADS),
        fused=True,
    ),
    "mpt": Family(
        lambda: hf.MptConfig(
            vocab_size=50,
            d_model=WIDTH,
            n_layers=N_LAYERS,
            n_heads=N_HEADS,
            max_seq_len=64,
            initializer_range=0.15,
            **TOKENS,
        ),
        last_of("Wqkv"),
        fused=True,
    ),
    "gpt_bigcode, multi-query": Family(
        lambda: hf.GPTBigCodeConfig(**GPT), last_of("c_attn"), 1, fused=True
    ),
    "gpt_bigcode, by head": Family(
        lambda: hf.GPTBigCodeConfig(**GPT, multi_query=False),
        last_of_each("c_attn", N_HEADS),
        fused=True,
    ),
    "codegen": Family(lambda: hf.CodeGenConfig(**GPT, rotary_dim=4), codegen, fused=True),
}

LATENT = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "intermediate_size": 96,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 2,
}
"""Of multi-head latent attention (DeepSeek-V3)."""


@cache
def _made(family: str) -> Any:
    model = tiny(FAMILIES[family].config())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            # families begin with biases of 0 and norms of 1, which would hide that they were lost
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def family_model(family: str) -> Any:
    """A model of its own, the same each time."""
    return copy.deepcopy(_made(family))
