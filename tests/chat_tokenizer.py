"""Tiny tokenizers with the chat templates of models that people use."""

import functools
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.tiny_tokenizer import tiny_bpe, tiny_sentencepiece

TEMPLATES = Path(__file__).parent / "chat_templates"
FAMILIES = ("llama3", "qwen2_5", "mistral_v0_3", "gemma2", "chatml_generation")
"""Those that write earlier answers as they asked for them; qwen3 does not."""
CHATML = {"eos": "<|im_end|>", "pad": "<|endoftext|>", "further": ("<|im_start|>",)}


@functools.cache
def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The template of a family with its special tokens; words and bytes are tiny ones."""
    tokenizer = _without_template(family)
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return tokenizer


def _without_template(family: str) -> PreTrainedTokenizerFast:
    if family == "llama3":
        heads = ("<|start_header_id|>", "<|end_header_id|>")
        return tiny_bpe(bos="<|begin_of_text|>", eos="<|eot_id|>", further=heads)
    if family == "gemma2":
        return tiny_bpe(bos="<bos>", eos="<eos>", further=("<start_of_turn>", "<end_of_turn>"))
    if family == "mistral_v0_3":
        tokenizer = tiny_sentencepiece(("<s>", "</s>", "[INST]", "[/INST]"))
        tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
        return tokenizer
    tokenizer = tiny_bpe(**CHATML)
    if family == "qwen3":
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer
