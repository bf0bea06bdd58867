"""Samples as token ids of a chat: what the chat template writes, tokenised turn by turn."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat

from p2d_core.errors import DataError
from p2d_core.samples.chat_template import (
    ChatTemplate,
    Rendered,
    TemplateProblem,
    has_marked_tokens,
)
from p2d_core.samples.conversation import Turn, turns_of
from p2d_core.samples.schema import Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChatIds:
    """Token ids of a conversation up to the end of its last answer."""

    prompt: list[int]
    """With the generation prompt at its end; at least 1."""
    response: list[int]
    """With the end of the turn; at least 2."""
    earlier: tuple[tuple[int, int], ...]
    """Where in the prompt earlier answers stand that are learnt."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class ChatEncoding:
    """From samples to the token ids of a chat.

    A sample that is no conversation is a user's question with its answer. What a generation prompt
    ends and an answer begins is tokenised apart, so that the prompt's ids are those that the model
    is asked with. What is too long loses its oldest questions with their answers; the system's turn
    stays, and so does the last question.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        end = self.template.end
        self.end_id = None if end is None else tokenizer.get_vocab()[end]
        """The token that ends a turn; None where the template writes none."""
        self._told = False

    def encoded(self, samples: Sequence[Sample], most: int, end_id: int) -> Iterator[ChatIds]:
        """Token ids of each sample, in order, with at most ``most`` tokens if questions can go.

        Args:
            end_id: ends a response that the template does not end itself.

        Raises:
            DataError: the template refuses a sample; names its row, from 1.
        """
        turns = [turns_of(sample) for sample in samples]
        chats = self._ids(samples, turns, end_id)
        for sample, own, chat in zip(samples, turns, chats, strict=True):
            shorter: list[Turn] | None = own
            while len(chat) > most and (shorter := without_first_question(shorter)) is not None:
                (chat,) = self._ids([sample], [shorter], end_id)
            yield chat

    def _ids(
        self, samples: Sequence[Sample], turns: Sequence[Sequence[Turn]], end_id: int
    ) -> list[ChatIds]:
        rendered = [self._rendered(sample, own) for sample, own in zip(samples, turns, strict=True)]
        try:
            return self._ids_of(rendered, end_id)
        except Exception as error:
            # tokenizers without an unknown token raise a bare Exception that names no text
            if len(samples) > 1:
                return [
                    self._ids([sample], [own], end_id)[0]
                    for sample, own in zip(samples, turns, strict=True)
                ]
            sample = samples[0]
            raise DataError(
                f"row {sample.row + 1} of source {sample.source!r}: the conversation that ends "
                f"{sample.response[:40]!r} cannot be said ({error}) by this model's tokenizer. "
                "Remove the row, or use a model that knows its words."
            ) from error

    def _ids_of(self, rendered: Sequence[Rendered], end_id: int) -> list[ChatIds]:
        # a piece after the one before it: some tokenizers put a space before what stands first
        texts = [
            text
            for each in rendered
            for before, piece in zip(("", *each.pieces), each.pieces, strict=False)
            for text in (piece, before + piece)
        ]
        ids = iter(self._tokenized(texts))
        return [self._joined(each, ids, end_id) for each in rendered]

    def _joined(self, rendered: Rendered, ids: Iterator[list[int]], end_id: int) -> ChatIds:
        parts: list[list[int]] = []
        before: list[int] = []
        for piece in rendered.pieces:
            alone, after = next(ids), next(ids)
            if not parts or after[: len(before)] != before:
                parts.append(alone if not parts else self._apart(piece))
            else:
                parts.append(after[len(before) :])
            before = alone
        if not rendered.is_ended:
            parts[-1] = [*parts[-1], end_id]
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + len(part))
        earlier = tuple(zip(ends[1:-2:2], ends[2:-2:2], strict=True))
        return ChatIds(list(chain.from_iterable(parts[:-1])), parts[-1], earlier)

    def _apart(self, piece: str) -> list[int]:
        """A piece that would melt into the one before it; after a line break nothing is added."""
        line, alone, after = self._tokenized(["\n", piece, f"\n{piece}"])
        return after[len(line) :] if after[: len(line)] == line else alone

    def _tokenized(self, texts: list[str]) -> list[list[int]]:
        batch: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for place, text in enumerate(texts):
            if has_marked_tokens(text):
                batch[place] = encode_marked_chat(self.tokenizer, text)
        return batch

    def _rendered(self, sample: Sample, turns: Sequence[Turn]) -> Rendered:
        try:
            rendered = self.template.render(turns)
        except TemplateProblem as problem:
            raise DataError(
                f"row {sample.row + 1} of source {sample.source!r}: the base's chat template does "
                f"not take this conversation: {problem} Its turns are: "
                f"{', '.join(turn.role for turn in turns)}. Mend the row or leave it out, or set "
                "`format.template: plain`."
            ) from problem
        if rendered.n_rewritten and not self._told:
            self._told = True
            log.warning(
                "the chat template writes earlier answers in another way than it asks for them "
                "(row %d of source %r is the first): such answers are read and not learnt",
                sample.row + 1,
                sample.source,
            )
        return rendered


def without_first_question(turns: Sequence[Turn] | None) -> list[Turn] | None:
    """The same without its first question and what answers it; None where there is one alone."""
    if turns is None:
        return None
    asked = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if len(asked) < 2:
        return None
    return [*(turn for turn in turns[:1] if turn.role == "system"), *turns[asked[1] :]]
