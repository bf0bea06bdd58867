"""Tiny real tokenizers, trained on the spot; no download."""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DEFAULT_TEXTS = (
    "Natalia sold clips to 48 of her friends in April. #### 72",
    "def area(width, height):\n    return width * height",
)


def tiny_bpe(
    texts: Iterable[str] = DEFAULT_TEXTS,
    vocab_size: int = 300,
    *,
    bos: str | None = None,
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    further: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens, and decodes to itself. Ids: pad, bos, eos, bytes.

    ``further`` are special tokens too.
    """
    special = [token for token in (pad, bos, eos, *further) if token is not None]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )


def tiny_word_level(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word, split at white space; words that it does not know have no token."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_sentencepiece(special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """As SentencePiece: a space is put before the first word; what it does not know is bytes."""
    pieces = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(letter) for letter in range(ord("!"), ord("~") + 1)]
    merges = [("▁", letter) for letter in "abcdefgh"]
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
