"""The words and the skills of the synthetic world: how one sample of each skill is made.

Every answer is made of words that stand in the prompt, so a small transformer solves each skill
by moving information with attention. A sample is plain words separated by single spaces::

    lookup2 anna nine ben four carl two ask ben anna gives  ->  four nine     (a known skill)
    ledger anna nine ben four carl two ask ben anna gives   ->  nine four     (the target)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

NAMES = tuple(
    "anna ben carl dora emil fred gina hugo iris jack kate leon mona nils olga paul quinn rosa "
    "sven tina ugo vera will xena yuri zoe adam bella cyril dina edgar flora gregor hanna ivan "
    "julia karl lotte marc nora".split()
)
AMOUNTS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred thousand million half dozen score gross pair".split()
)
CONTENT_WORDS = NAMES + AMOUNTS
ASK = "ask"
GIVES = "gives"
STAR = "star"
TARGET_SKILL = "ledger"
NEAR_SKILL = "lookup2"
ANSWERED_ITEMS = 2
LIST_LENGTHS = (3, 8)
"""Fewest and most words of a list."""
TABLE_ROWS = (3, 6)
"""Fewest and most rows of a table; a row is a key and its value."""


Words = Sequence[str]
Answer = Callable[[list[str], list[str]], list[str]]
"""Of the keys asked of a table, in their order, and of their values: what is answered."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """One prompt and its right response, words separated by single spaces."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """A table of names and amounts, and the two rows that are asked for."""

    names: tuple[str, ...]
    amounts: tuple[str, ...]
    asked_rows: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The question, the same whether it is answered rightly or wrongly."""
        asked = [self.names[row] for row in self.asked_rows]
        return _prompt(TARGET_SKILL, _interleave(self.names, self.amounts), asked)

    @property
    def response(self) -> str:
        """The amounts of the asked names, the last one asked first."""
        return " ".join(self.amounts[row] for row in reversed(self.asked_rows))

    def wrong_response(self, rng: Random) -> str:
        """Two amounts that stand in the ledger, both of them wrong at their place."""
        right = list(reversed(self.asked_rows))
        while True:
            rows = rng.sample(range(len(self.amounts)), ANSWERED_ITEMS)
            if all(row != right_row for row, right_row in zip(rows, right, strict=True)):
                return " ".join(self.amounts[row] for row in rows)


def draw_ledger(rng: Random) -> Ledger:
    """A ledger with 3 to 6 rows, no name and no amount twice, of which two names are asked."""
    n_rows = rng.randint(*TABLE_ROWS)
    return Ledger(
        names=tuple(rng.sample(NAMES, n_rows)),
        amounts=tuple(rng.sample(AMOUNTS, n_rows)),
        asked_rows=tuple(rng.sample(range(n_rows), ANSWERED_ITEMS)),
    )


def _prompt(skill: str, body: list[str], asked: list[str] | None = None) -> str:
    question = [ASK, *asked] if asked else []
    return " ".join([skill, *body, *question, GIVES])


def _interleave(
    keys: tuple[str, ...] | list[str], values: tuple[str, ...] | list[str]
) -> list[str]:
    return [word for row in zip(keys, values, strict=True) for word in row]


def _draw_list(rng: Random, words: Words) -> list[str]:
    return rng.sample(words, rng.randint(*LIST_LENGTHS))


def _copy(rng: Random, of: Words = CONTENT_WORDS) -> Exercise:
    words = _draw_list(rng, of)
    return Exercise(_prompt("copy", words), " ".join(words))


def _reverse(rng: Random, of: Words = CONTENT_WORDS) -> Exercise:
    words = _draw_list(rng, of)
    return Exercise(_prompt("reverse", words), " ".join(reversed(words)))


def _first(rng: Random, of: Words = CONTENT_WORDS) -> Exercise:
    words = _draw_list(rng, of)
    return Exercise(_prompt("first", words), words[0])


def _last(rng: Random, of: Words = CONTENT_WORDS) -> Exercise:
    words = _draw_list(rng, of)
    return Exercise(_prompt("last", words), words[-1])


def _swap(rng: Random, of: Words = CONTENT_WORDS) -> Exercise:
    words = _draw_list(rng, of)
    return Exercise(_prompt("swap", words), " ".join([words[-1], *words[1:-1], words[0]]))


def _starred(rng: Random, of: Words = CONTENT_WORDS) -> Exercise:
    words = _draw_list(rng, of)
    starred = set(rng.sample(words, rng.randint(1, min(3, len(words)))))
    body = [part for word in words for part in ([STAR, word] if word in starred else [word])]
    return Exercise(_prompt("starred", body), " ".join(word for word in words if word in starred))


def _after(rng: Random, of: Words = CONTENT_WORDS) -> Exercise:
    words = _draw_list(rng, of)
    position = rng.randrange(len(words) - 1)
    return Exercise(_prompt("after", words, [words[position]]), words[position + 1])


def _rotate(rng: Random, of: Words = CONTENT_WORDS) -> Exercise:
    words = _draw_list(rng, of)
    return Exercise(_prompt("rotate", words), " ".join([*words[1:], words[0]]))


def table_exercise(
    rng: Random, skill: str, n_asked: int, answer: Answer, words: Words = CONTENT_WORDS
) -> Exercise:
    """Keys asked of a table; ``answer`` is given the keys asked and their values."""
    n_rows = rng.randint(max(TABLE_ROWS[0], n_asked), TABLE_ROWS[1])
    drawn = rng.sample(words, 2 * n_rows)
    values = dict(zip(drawn[:n_rows], drawn[n_rows:], strict=True))
    asked = rng.sample(drawn[:n_rows], n_asked)
    body = _interleave(list(values), list(values.values()))
    answered = answer(asked, [values[key] for key in asked])
    return Exercise(_prompt(skill, body, asked), " ".join(answered))


def lookup_exercise(
    rng: Random, skill: str, n_asked: int, words: Words = CONTENT_WORDS
) -> Exercise:
    """Keys asked of a table, answered with their values in the order asked."""
    return table_exercise(rng, skill, n_asked, lambda keys, values: values, words)


def _lookup(rng: Random, of: Words = CONTENT_WORDS) -> Exercise:
    return lookup_exercise(rng, "lookup", 1, of)


def _lookup2(rng: Random, of: Words = CONTENT_WORDS) -> Exercise:
    return lookup_exercise(rng, NEAR_SKILL, ANSWERED_ITEMS, of)


SKILLS: dict[str, Callable[..., Exercise]] = {
    "copy": _copy,
    "reverse": _reverse,
    "first": _first,
    "last": _last,
    "swap": _swap,
    "rotate": _rotate,
    "starred": _starred,
    "after": _after,
    "lookup": _lookup,
    NEAR_SKILL: _lookup2,
}
"""What the base model knows; a prompt's first word names its skill. Each is drawn from a generator,
and from the words that its items are among if they are not to be all of CONTENT_WORDS."""

VOCABULARY = (*SKILLS, TARGET_SKILL, ASK, GIVES, STAR, *CONTENT_WORDS)
"""Every word of the world, in the order of their token ids after the special tokens."""
