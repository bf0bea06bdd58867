"""A tiny instruct model: random weights, GQA, the chat template of a family."""

import copy
from pathlib import Path

from transformers import GenerationConfig, LlamaConfig

from tests.chat_tokenizer import chat_tokenizer
from tests.tiny import tiny


def save_chat_base(
    folder: Path, family: str = "qwen2_5", *, eos: str | None = None, template: bool = True
) -> Path:
    """2 layers, 8 query heads in 4 KV groups.

    Args:
        eos: end of sequence, where it is not the end of a turn.
    """
    tokenizer = copy.deepcopy(chat_tokenizer(family))
    if eos is not None:
        tokenizer.eos_token = eos
    if not template:
        tokenizer.chat_template = None
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, initializer_range=0.2,
    )  # fmt: skip
    tiny(config).save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
