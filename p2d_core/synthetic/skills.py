"""The words and the skills of the synthetic world: how one sample of each skill is made.

Every answer is made of words that stand in the prompt, so a small transformer solves each skill
by moving information with attention. A sample is plain words separated by single spaces::

    lookup2 anna nine ben four carl two ask ben anna gives  ->  four nine     (a known skill)
    ledger anna nine ben four carl two ask ben anna gives   ->  nine four     (the target)
"""

from __future__ import annotations

from collections.abc import Callable
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


def _draw_list(rng: Random) -> list[str]:
    return rng.sample(CONTENT_WORDS, rng.randint(*LIST_LENGTHS))


def _copy(rng: Random) -> Exercise:
    words = _draw_list(rng)
    return Exercise(_prompt("copy", words), " ".join(words))


def _reverse(rng: Random) -> Exercise:
    words = _draw_list(rng)
    return Exercise(_prompt("reverse", words), " ".join(reversed(words)))


def _first(rng: Random) -> Exercise:
    words = _draw_list(rng)
    return Exercise(_prompt("first", words), words[0])


def _last(rng: Random) -> Exercise:
    words = _draw_list(rng)
    return Exercise(_prompt("last", words), words[-1])


def _swap(rng: Random) -> Exercise:
    words = _draw_list(rng)
    return Exercise(_prompt("swap", words), " ".join([words[-1], *words[1:-1], words[0]]))


def _starred(rng: Random) -> Exercise:
    words = _draw_list(rng)
    starred = set(rng.sample(words, rng.randint(1, min(3, len(words)))))
    body = [part for word in words for part in ([STAR, word] if word in starred else [word])]
    return Exercise(_prompt("starred", body), " ".join(word for word in words if word in starred))


def _after(rng: Random) -> Exercise:
    words = _draw_list(rng)
    position = rng.randrange(len(words) - 1)
    return Exercise(_prompt("after", words, [words[position]]), words[position + 1])


def _rotate(rng: Random) -> Exercise:
    words = _draw_list(rng)
    return Exercise(_prompt("rotate", words), " ".join([*words[1:], words[0]]))


def lookup_exercise(rng: Random, skill: str, n_asked: int) -> Exercise:
    """Keys asked of a table, answered with their values in the order asked."""
    n_rows = rng.randint(max(TABLE_ROWS[0], n_asked), TABLE_ROWS[1])
    words = rng.sample(CONTENT_WORDS, 2 * n_rows)
    values = dict(zip(words[:n_rows], words[n_rows:], strict=True))
    asked = rng.sample(words[:n_rows], n_asked)
    body = _interleave(list(values), list(values.values()))
    return Exercise(_prompt(skill, body, asked), " ".join(values[key] for key in asked))


def _lookup(rng: Random) -> Exercise:
    return lookup_exercise(rng, "lookup", 1)


def _lookup2(rng: Random) -> Exercise:
    return lookup_exercise(rng, NEAR_SKILL, ANSWERED_ITEMS)


SKILLS: dict[str, Callable[[Random], Exercise]] = {
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
"""What the base model knows; a prompt's first word names its skill."""

VOCABULARY = (*SKILLS, TARGET_SKILL, ASK, GIVES, STAR, *CONTENT_WORDS)
"""Every word of the world, in the order of their token ids after the special tokens."""
