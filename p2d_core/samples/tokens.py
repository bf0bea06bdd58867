"""Samples as token ids, and token ids as padded batches of about equal cost."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from p2d_core.errors import DataError, DeviceMemoryError, SettingsError
from p2d_core.samples.chat_tokens import ChatEncoding, ChatIds
from p2d_core.samples.schema import Sample

IGNORED_LABEL = -100
"""What the loss leaves out."""

_TOKENIZED_AT_ONCE = 1024

log = logging.getLogger(__name__)

_Role = Literal["prompt", "response"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TextFormat:
    """How a sample becomes one text: prompt, separator, response, end of sequence.

    Raises:
        SettingsError: ``max_tokens`` leaves no room for a prompt and a response.
    """

    separator: str = "\n"
    """Not used by ``chat``."""
    max_tokens: int = 1024
    """Of prompt and response together, special tokens included."""
    template: Literal["plain", "chat"] = "plain"
    """chat: every sample is written by the tokenizer's chat template, see `ChatEncoding`."""

    def __post_init__(self) -> None:
        if self.max_tokens < 4:
            raise SettingsError(
                f"max_tokens is {self.max_tokens}; a sample needs at least 4: "
                "beginning, prompt, response, end."
            )


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Token ids of prompt and response; the first ``n_prompt`` are the prompt, at least 1."""

    sample_id: str
    input_ids: list[int]
    n_prompt: int
    earlier: tuple[tuple[int, int], ...] = ()
    """Where in the prompt earlier answers stand that are learnt too: start and end of each."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_response(self) -> int:
        """Response tokens, the end of sequence included; at least 1."""
        return len(self.input_ids) - self.n_prompt

    @property
    def n_learnt(self) -> int:
        """Tokens that the loss is on: those of the response and of earlier answers."""
        return self.n_response + sum(end - start for start, end in self.earlier)


class Encoder:
    """Turns samples into token ids.

    The prompt with its separator and the response are tokenised apart, so that the prompt's ids
    are the same whether a response follows or not. The tokenizer's beginning of sequence stands
    first if it has one; its end of sequence (or padding, if it has no end) stands last. What is
    too long loses the beginning of its prompt; a response that is too long with a single prompt
    token loses its end, and then has no end of sequence. Special tokens that a text names
    count as these tokens, so that a template can write the turns of a chat.

    With ``template: chat`` all of this is the chat template's doing: see `ChatEncoding`.

    Args:
        vocabulary: ids that the model knows are below it; None: all that the tokenizer has.

    Raises:
        DataError: the tokenizer has neither end of sequence nor padding, a text has no tokens, or
            one that the model does not know, or the chat template refuses a sample.
        ModelError: there is no chat template that can be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        fmt: TextFormat | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        # most tokenizers have no token that their model lacks, and nothing is to be looked for
        self.vocabulary = vocabulary if vocabulary and len(tokenizer) > vocabulary else None
        self.format = fmt or TextFormat()
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        if end is None and pad is None:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has neither "
                "an end-of-sequence nor a padding token. Set `eos_token` in its "
                "tokenizer_config.json."
            )
        self.end_id: int = pad if end is None else end
        self.pad_id: int = end if pad is None else pad
        self._start: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.chat = ChatEncoding(tokenizer) if self.format.template == "chat" else None

    @property
    def always_used(self) -> list[int]:
        """Tokens that stand in samples and batches, whatever the texts."""
        return [self.end_id, self.pad_id, *self._start]

    def encode(self, sample: Sample) -> EncodedSample:
        """Token ids of one sample."""
        return next(self.encode_all([sample]))

    def encode_all(self, samples: Iterable[Sample]) -> Iterator[EncodedSample]:
        """Token ids of many samples, in order; tokenised in batches, streamed."""
        pending: list[Sample] = []
        for sample in samples:
            pending.append(sample)
            if len(pending) == _TOKENIZED_AT_ONCE:
                yield from self._known(pending)
                pending = []
        if pending:
            yield from self._known(pending)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens at which an answer ends."""
        end = None if self.chat is None else self.chat.end_id
        return [self.end_id] if end is None or end == self.end_id else [end, self.end_id]

    def _known(self, samples: Sequence[Sample]) -> Iterator[EncodedSample]:
        """Refuses a token that the model lacks: its embedding would have no row for it."""
        for sample, encoded in zip(samples, self._encode_batch(samples), strict=True):
            if self.vocabulary is not None and max(encoded.input_ids) >= self.vocabulary:
                token = self.tokenizer.convert_ids_to_tokens(max(encoded.input_ids))
                raise DataError(
                    f"row {sample.row + 1} of source {sample.source!r} has the token {token!r}, "
                    "which the tokenizer knows and the model does not. Remove the row."
                )
            yield encoded

    def _encode_batch(self, samples: Sequence[Sample]) -> Iterator[EncodedSample]:
        if self.chat is not None:
            chats = self.chat.encoded(samples, self.format.max_tokens, self.end_id)
            for sample, chat in zip(samples, chats, strict=True):
                yield self._cut(sample, chat)
            return
        prompts = self._tokenized("prompt", samples)
        responses = self._tokenized("response", samples)
        for sample, prompt, response in zip(samples, prompts, responses, strict=True):
            response = [*response, self.end_id]
            prompt = self._prompt(prompt, self.format.max_tokens - len(response))
            response = response[: self.format.max_tokens - len(prompt)]
            yield EncodedSample(sample.sample_id, prompt + response, len(prompt))

    def _cut(self, sample: Sample, chat: ChatIds) -> EncodedSample:
        """As `_encode_batch` cuts, where a beginning of sequence was written."""
        most = self.format.max_tokens
        n_start = len(self._start) if chat.prompt[:1] == self._start else 0
        kept = max(1, most - len(chat.response) - n_start)
        n_cut = max(0, len(chat.prompt) - n_start - kept)
        prompt = chat.prompt[:n_start] + chat.prompt[n_start + n_cut :]
        earlier = tuple(
            (max(start - n_cut, n_start, 1), end - n_cut)
            for start, end in chat.earlier
            if end - n_cut > max(n_start, 1)
        )
        response = chat.response[: most - len(prompt)]
        return EncodedSample(sample.sample_id, prompt + response, len(prompt), earlier)

    def _prompt(self, ids: list[int], most: int) -> list[int]:
        kept = max(1, most - len(self._start))
        return self._start + ids[-kept:]

    def _tokenized(self, role: _Role, samples: Sequence[Sample]) -> list[list[int]]:
        texts = [
            sample.prompt + self.format.separator if role == "prompt" else sample.response
            for sample in samples
        ]
        try:
            encoded = self.tokenizer(
                texts,
                add_special_tokens=False,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        except Exception as error:
            # tokenizers without an unknown token raise a bare Exception that names no text
            if len(samples) > 1:
                return [self._tokenized(role, [sample])[0] for sample in samples]
            raise _not_tokenized(role, samples[0], f"cannot be said ({error}) by") from error
        batch: list[list[int]] = encoded["input_ids"]
        for sample, ids in zip(samples, batch, strict=True):
            if not ids:
                raise _not_tokenized(role, sample, "has no tokens in")
        return batch


def _not_tokenized(role: _Role, sample: Sample, what: str) -> DataError:
    text = sample.prompt if role == "prompt" else sample.response
    return DataError(
        f"row {sample.row + 1} of source {sample.source!r}: the {role} {text[:40]!r} {what} this "
        "model's tokenizer. Remove the row, or use a model that knows its words."
    )


@dataclass
class TokenBudget:
    """How many tokens a padded batch may have; who shares it shares what was learnt of it."""

    tokens: int


def each_batch(
    encoded: Sequence[Sized], budget: TokenBudget, work: Callable[[list[int]], _T]
) -> Iterator[tuple[list[int], _T]]:
    """What ``work`` makes of each batch, given and yielded as indices of samples.

    When the device's memory runs out, the batch is cut in half and so is the budget, for all
    batches to come.

    Raises:
        DeviceMemoryError: a single sample does not fit.
    """
    for batch in batches_by_tokens(encoded, budget):
        waiting = [batch]
        while waiting:
            indices = waiting.pop()
            failed = None
            try:
                made = work(indices)
            except torch.OutOfMemoryError as error:
                if len(indices) == 1:
                    raise DeviceMemoryError(
                        f"out of memory: a single sample of {len(encoded[indices[0]])} tokens does "
                        "not fit. Set precision: bfloat16, or lower format.max_tokens."
                    ) from error
                failed = str(error)
            if failed is None:
                yield indices, made
                continue
            # outside of `except`: there the error would still hold the tensors of what failed
            torch.cuda.empty_cache()
            budget.tokens = max(1, min(budget.tokens, _padded(encoded, indices) // 2))
            log.warning("out of memory: batches have at most %d tokens now", budget.tokens)
            half = (len(indices) + 1) // 2
            waiting += [indices[half:], indices[:half]]


def _padded(encoded: Sequence[Sized], indices: Sequence[int]) -> int:
    return len(indices) * max(len(encoded[index]) for index in indices)


A_BATCH_COSTS = 1 / 32
"""What a batch costs beside its tokens, as a share of the budget: small ones fill no device."""


def batches_by_tokens(
    encoded: Sequence[Sized],
    token_budget: int | TokenBudget = 8192,
    window: int = 2048,
) -> Iterator[list[int]]:
    """Indices of samples of like length; a padded batch has at most ``token_budget`` tokens.

    Samples are sorted by length inside windows of ``window`` samples, the longest first: what does
    not fit into memory shows at once. A sample longer than the budget is a batch of its own. Where
    batches end is the cheapest there is, of padded tokens and `A_BATCH_COSTS`.
    """
    budget = TokenBudget(token_budget) if isinstance(token_budget, int) else token_budget
    for start in range(0, len(encoded), window):
        indices = range(start, min(start + window, len(encoded)))
        left = sorted(indices, key=lambda each: (-len(encoded[each]), each))
        while left:
            planned = budget.tokens
            for size in _batch_sizes([len(encoded[index]) for index in left], planned):
                yield left[:size]
                left = left[size:]
                if budget.tokens != planned:
                    break


def _batch_sizes(lengths: Sequence[int], token_budget: int) -> list[int]:
    """How many samples each batch has, of samples sorted by length, the longest first.

    Samples of neighbouring lengths are padded to the longest of them, in as many batches as the
    budget asks for; dynamic programming over the lengths finds the cheapest way to group them.
    """
    widths, counts = np.unique(lengths, return_counts=True)
    shorter = np.concatenate([[0], np.cumsum(counts)])  # how many are shorter than each width
    cheapest, begins = np.zeros(len(widths) + 1), np.zeros(len(widths) + 1, dtype=np.int64)
    for end, width in enumerate(widths, start=1):
        n = shorter[end] - shorter[:end]
        n_batches = np.ceil(n / max(1, token_budget // width))
        cost = cheapest[:end] + n * width + n_batches * A_BATCH_COSTS * token_budget
        begins[end] = cost.argmin()
        cheapest[end] = cost[begins[end]]
    sizes: list[int] = []
    end = len(widths)
    while end:
        n = shorter[end] - shorter[begins[end]]
        n_batches = math.ceil(n / max(1, token_budget // widths[end - 1]))
        sizes += [len(part) for part in np.array_split(np.arange(n), n_batches)]
        end = begins[end]
    return sizes


def needed_mask(attention_mask: Tensor) -> Tensor | None:
    """None where padding stands on the right alone: no token sees any of it under causal attention.

    Attention without a mask takes faster kernels, and keeps one copy of shared keys and values.
    """
    right = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
    return None if right else attention_mask


def collate(
    encoded: Sequence[EncodedSample], pad_id: int, side: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask``, ``labels``: int64, shape ``[samples, longest]``.

    Labels are `IGNORED_LABEL` on padding and on the prompt, but for earlier answers in it.
    """
    lengths = np.array([[len(each)] for each in encoded])
    prompts = np.array([[each.n_prompt] for each in encoded])
    longest = lengths.max()
    start = longest - lengths if side == "left" else np.zeros_like(lengths)
    # of each place in the batch its place in its own sample, before and behind which is padding
    place = np.arange(longest) - start
    real = (place >= 0) & (place < lengths)
    input_ids = np.full(real.shape, pad_id)
    input_ids[real] = np.fromiter(
        chain.from_iterable(each.input_ids for each in encoded), np.int64, lengths.sum()
    )
    learnt = real & (place >= prompts)
    for row, each in enumerate(encoded):
        for first, last in each.earlier:
            learnt[row] |= (place[row] >= first) & (place[row] < last)
    labels = np.where(learnt, input_ids, IGNORED_LABEL)
    columns = {"input_ids": input_ids, "attention_mask": real.astype(np.int64), "labels": labels}
    return {name: torch.from_numpy(column) for name, column in columns.items()}
