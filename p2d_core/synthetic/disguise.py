"""Functions without a name: exercises whose every structural word is drawn anew.

A sample of the plain world says in its first word what is to be done. Disguised, that word and
those that ask, give and mark are invented ones, so that only the answer, or demonstrations before
it, tell which function it is::

    dax anna nine ben four carl two wug ben anna blick  ->  four nine     (lookup2)
    dax anna nine ben four carl two wug ben anna blick  ->  nine four     (ledger)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from p2d_core.synthetic.skills import (
    ANSWERED_ITEMS,
    ASK,
    CONTENT_WORDS,
    GIVES,
    NEAR_SKILL,
    SKILLS,
    STAR,
    TARGET_SKILL,
    Exercise,
    table_exercise,
)

INVENTED = tuple(
    "blick dax wug fep toma zav gorp lirp mip nuff quib rop snee tulv vash wex yim zorb kiff drel "
    "florn hupp jask plim".split()
)
"""Words that mean nothing; half of them are the surfaces of one world, half those of another."""


@dataclass(frozen=True, slots=True)
class Surface:
    """What stands for the name of the function and for the words that ask, give and mark."""

    name: str
    ask: str
    gives: str
    star: str

    def over(self, exercise: Exercise) -> Exercise:
        """The same exercise in these words; its answer stays."""
        words = {ASK: self.ask, GIVES: self.gives, STAR: self.star}
        _, *body = exercise.prompt.split()
        prompt = " ".join([self.name, *(words.get(word, word) for word in body)])
        return Exercise(prompt, exercise.response)


def draw_surface(rng: Random, words: Sequence[str] = INVENTED) -> Surface:
    """Four different invented words."""
    return Surface(*rng.sample(words, 4))


Function = Callable[[Random, Sequence[str]], Exercise]
"""Draws an exercise whose keys, values and items are among the given words."""


def _two_asked(answer: Callable[[list[str], list[str]], list[str]]) -> Function:
    """A table of which two keys are asked; ``answer`` of the keys and of their values."""

    def draw(rng: Random, words: Sequence[str]) -> Exercise:
        return table_exercise(rng, TARGET_SKILL, ANSWERED_ITEMS, answer, words)

    return draw


def _of_skill(skill: str) -> Function:
    return lambda rng, words: SKILLS[skill](rng, words)


TWO_ASKED: dict[str, Function] = {
    NEAR_SKILL: _two_asked(lambda keys, values: values),
    TARGET_SKILL: _two_asked(lambda keys, values: values[::-1]),
    "keys": _two_asked(lambda keys, values: keys),
    "keys-back": _two_asked(lambda keys, values: keys[::-1]),
    "first-twice": _two_asked(lambda keys, values: [values[0], values[0]]),
    "last-twice": _two_asked(lambda keys, values: [values[1], values[1]]),
}
"""Functions whose prompts are alike and whose answers have two words."""

FUNCTIONS: dict[str, Function] = {
    **{skill: _of_skill(skill) for skill in SKILLS},
    **TWO_ASKED,
}
"""What a base that learns in context can do once demonstrations show it."""


def draw_disguised(
    rng: Random, function: str, surface: Surface, words: Sequence[str] = CONTENT_WORDS
) -> Exercise:
    """One exercise of a function under a surface."""
    return surface.over(FUNCTIONS[function](rng, words))


def wrong_disguised(
    rng: Random, function: str, surface: Surface, words: Sequence[str] = CONTENT_WORDS
) -> Exercise:
    """One of TWO_ASKED, answered with words of the table's right column at their wrong places."""
    right = FUNCTIONS[function](rng, words)
    body = right.prompt.split()[1:]
    table, answer = body[: body.index(ASK)], right.response.split()
    column = table[table.index(answer[0]) % 2 :: 2]
    while True:
        drawn = rng.sample(column, ANSWERED_ITEMS)
        if all(word != right_word for word, right_word in zip(drawn, answer, strict=True)):
            return surface.over(Exercise(right.prompt, " ".join(drawn)))
