"""A tokenizer's own chat template, and which of the text that it writes is learnt."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import mark_control_tokens, render_jinja_template

from p2d_core.errors import ModelError
from p2d_core.samples.conversation import Turn

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = {
    "%d": "26", "%-d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24",
    "%a": "Fri", "%A": "Friday", "%j": "208", "%H": "12", "%M": "00", "%S": "00",
}  # fmt: skip
_FIXED_DATE = (
    "{% macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('{code}', '{value}')" for code, value in _DATE.items())
    + " }}{%- endmacro +%}"
)
"""Some templates write today's date: tokens, and what is kept of them, would change overnight."""


_MARKERS = tuple(mark_control_tokens("x", re.compile("x")).split("x"))
"""What stands around a special token that is part of a turn's text."""


def has_marked_tokens(text: str) -> bool:
    """Whether some special tokens in it are text, see `ChatTemplate`."""
    return any(marker in text for marker in _MARKERS)


class TemplateProblem(Exception):
    """Why a template does not take some turns; the sample is known to the caller."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, up to the end of its last assistant turn."""

    pieces: tuple[str, ...]
    """What is read and what is learnt in turn; the last is the response."""
    is_ended: bool
    """Whether the template ends the response by a special token."""
    n_rewritten: int
    """Assistant turns that are only read, because the template writes earlier ones in another way
    than it asks for them."""


class ChatTemplate:
    """Renders turns as the tokenizer's template does, in transformers' sandbox.

    An assistant turn is learnt from where the generation prompt ends, up to and with its
    end-of-turn token. Where the template marks what is generated (``{% generation %}``) the marks
    say it. Else it follows from prefixes: the turns before it with the generation prompt, and the
    turns up to it, have to be how the whole begins; an earlier turn that the template writes in
    another way later on is not learnt. The last turn always is, or the conversation is refused.

    Special tokens that a turn's text names are text and no tokens: a text cannot end its own turn.

    Raises:
        ModelError: the tokenizer has no template, or it does not take a question and its answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"the tokenizer of {name} has no chat template. Use the instruct version of the "
                "base, save a template beside it (tokenizer.chat_template = ...), or set "
                "`format.template: plain` to write conversations as plain text."
            ) from error
        self.is_marked = bool(_MARKED.search(template))
        self._template = (_FIXED_DATE if "strftime_now" in template else "") + template
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(special, key=lambda token: (-len(token), token))
        self._special = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._is_special = re.compile(self._special)
        try:
            probe = self.render([Turn("user", "a"), Turn("assistant", "b")])
        except TemplateProblem as problem:
            raise ModelError(
                f"the chat template of {name} cannot be used: {problem} Mend it, or set "
                "`format.template: plain`."
            ) from problem
        self.end = self._last_special(probe.pieces[-1]) if probe.is_ended else None
        """The special token that ends a turn; None where there is none."""

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The text of these turns, the last of which is an assistant's.

        Raises:
            TemplateProblem: the template refuses them, or does not show what is to be learnt.
        """
        messages: list[dict[str, str]] = [
            mark_control_tokens(asdict(turn), self._is_special) for turn in turns
        ]
        whole, marks = self._text(messages, marked=self.is_marked)
        asked = self._text(messages[:-1], asking=True)[0]
        if not whole.startswith(asked):
            whole = asked + self._answer(messages[-1])
        found = (
            self._by_marks(whole, marks, len(asked))
            if self.is_marked
            else self._by_prefixes(whole, messages, len(asked))
        )
        pieces, upto = [], 0
        for start, end in found:
            pieces += [whole[upto:start], whole[start:end]]
            upto = end
        # what is said before anybody asks is no answer, and not learnt
        n_answers = sum(turn.role == "assistant" for turn in turns[1:])
        return Rendered(
            pieces=tuple(pieces),
            is_ended=self._ends_special(pieces[-1]),
            n_rewritten=0 if self.is_marked else n_answers - len(found),
        )

    def _answer(self, message: dict[str, str]) -> str:
        """An answer's text where the whole is not what the model is asked with, going on.

        Mistral's template shows the system's turn only while a question is the last turn.
        """
        pair = [{"role": "user", "content": "?"}, message]
        asked, whole = self._text(pair[:1], asking=True)[0], self._text(pair)[0]
        end = self._end(whole, whole, len(asked), message["content"])
        if end is None or self.is_marked or not whole.startswith(asked):
            raise TemplateProblem(
                "an answer does not begin as its generation prompt does "
                f"({asked[-40:]!r} against {whole[: len(asked)][-40:]!r})."
            )
        return whole[len(asked) : end]

    def _by_marks(
        self, whole: str, marks: Sequence[tuple[int, int]], answer: int
    ) -> list[tuple[int, int]]:
        """Each span with the end-of-turn token that follows it; those of the answer as one."""
        spans = [(start, self._ended(whole, start, end)) for start, end in marks if end > start]
        own = [(max(start, answer), end) for start, end in spans if end > answer]
        if not own:
            raise TemplateProblem(
                "its {% generation %} marks leave out the last assistant turn, so that nothing of "
                "it would be learnt."
            )
        return [span for span in spans if span[1] <= answer] + [(own[0][0], own[-1][1])]

    def _ended(self, whole: str, start: int, end: int) -> int:
        text = whole[start:end].rstrip()
        if self._ends_special(text):
            return start + len(text)
        after = self._is_special.match(whole, end)
        return after.end() if after else end

    def _by_prefixes(
        self, whole: str, messages: list[dict[str, str]], answer: int
    ) -> list[tuple[int, int]]:
        """The answers that stand in the whole as they were asked for; the last one has to."""
        spans = []
        for place, message in enumerate(messages[:-1]):
            if message["role"] != "assistant" or place == 0:
                continue
            asked = self._text(messages[:place], asking=True)[0]
            upto = self._text(messages[: place + 1])[0]
            end = self._end(whole, upto, len(asked), message["content"])
            if end is not None and whole.startswith(asked):
                spans.append((len(asked), end))
        last = self._end(whole, whole, answer, messages[-1]["content"])
        if last is None:
            raise TemplateProblem("it leaves the text of the last turn out, or changes it.")
        return [*spans, (answer, last)]

    def _end(self, whole: str, upto: str, start: int, content: str) -> int | None:
        """Where the turn ends that ``upto`` ends with; None where the whole has it otherwise."""
        shared = os.path.commonprefix([whole, upto])  # noqa: RUF071 (characters are meant)
        text = re.escape(content.strip())
        if ended := re.compile(rf"{text}\s*(?:{self._special})").search(shared, start):
            return ended.end()
        end = len(upto.rstrip())
        return end if start < end <= len(shared) and content.strip() in shared[start:] else None

    def _text(
        self, messages: list[dict[str, str]], *, asking: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            # transformers does not type what it returns beside the texts
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                add_generation_prompt=asking,
                return_assistant_tokens_mask=marked,
                **self._variables,
            )
        except Exception as error:
            # a template may raise anything; jinja2's own errors are many
            said = " ".join(str(error).split())[:200].rstrip(".")
            raise TemplateProblem(f"it refuses the turns ({said}).") from error
        texts, marks = rendered
        return texts[0], marks[0] if marked else []

    def _ends_special(self, text: str) -> bool:
        return re.search(rf"(?:{self._special})\Z", text) is not None

    def _last_special(self, text: str) -> str:
        return str(self._is_special.findall(text)[-1])
