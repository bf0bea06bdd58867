"""How large the benchmarks are: a default for two cores, and one for a GPU."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights; they need not be trained to be timed."""

    name: str
    hidden: int
    layers: int
    query_heads: int
    kv_groups: int
    head_dim: int
    feed_forward: int
    vocabulary: int

    def config(self, **changes: Any) -> Any:
        """As transformers takes it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            **{
                "vocab_size": self.vocabulary,
                "hidden_size": self.hidden,
                "intermediate_size": self.feed_forward,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.query_heads,
                "num_key_value_heads": self.kv_groups,
                "head_dim": self.head_dim,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **changes,
            }
        )


@dataclass(frozen=True)
class Size:
    """Everything that `make bench` and `make bench SIZE=gpu` differ in."""

    device: str
    precision: str
    shapes: tuple[Shape, ...]
    """That are scored with."""
    trained_shapes: tuple[Shape, ...]
    """Whose training steps are timed."""
    kept_shapes: tuple[Shape, ...]
    """Of whose training steps it is said what they keep in memory."""
    ranking_shapes: tuple[Shape, ...]
    scored: int
    """Samples in a run of `scoring_vs_forward`."""
    tokens_per_batch: int
    train_rows: int
    """Samples in a training step."""
    chain_scored: int
    ranked_layers: int = 24
    """That scipy ranks beside ours: of wide heads it takes a tenth of a second each."""
    growth: tuple[int, ...] = (1_000, 10_000, 100_000)
    subset_rows: int = 10_000_000

    @property
    def dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.precision]


SMALL = Shape("31M-llama", 384, 16, 12, 4, 32, 1024, 16_000)
SMOLLM2 = Shape("smollm2-135m-shape", 576, 30, 9, 3, 64, 1536, 49_152)
LLAMA_1B = Shape("llama-3.2-1b-shape", 2048, 16, 32, 8, 64, 8192, 128_256)
QWEN_HALF_B = Shape("qwen2.5-0.5b-shape", 896, 24, 14, 2, 64, 4864, 151_936)
QWEN_7B = Shape("qwen2.5-7b-shape", 3584, 28, 28, 4, 128, 18_944, 152_064)

SIZES = {
    "cpu": Size(
        device="cpu",
        precision="float32",
        shapes=(SMALL,),
        trained_shapes=(SMOLLM2,),
        kept_shapes=(SMOLLM2, QWEN_HALF_B),
        ranking_shapes=(QWEN_HALF_B,),
        scored=16,
        tokens_per_batch=2048,
        train_rows=2,
        chain_scored=32,
    ),
    "gpu": Size(
        device="cuda",
        precision="bfloat16",
        shapes=(LLAMA_1B, QWEN_7B),
        trained_shapes=(LLAMA_1B, QWEN_7B),
        kept_shapes=(LLAMA_1B, QWEN_7B),
        ranking_shapes=(QWEN_HALF_B, QWEN_7B),
        scored=512,
        tokens_per_batch=32_768,
        train_rows=64,
        chain_scored=512,
        ranked_layers=2,
    ),
}
