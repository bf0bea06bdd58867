"""Worlds in which words do not tell the target: only what is done with them does.

In the world of the demo the target has a word of its own and its own kind of tables, so that any
scorer that looks at content finds it. Here that is taken away, one thing at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from p2d_core.synthetic.disguise import (
    INVENTED,
    TWO_ASKED,
    Surface,
    draw_disguised,
    draw_surface,
    wrong_disguised,
)
from p2d_core.synthetic.skills import (
    ASK,
    CONTENT_WORDS,
    GIVES,
    NEAR_SKILL,
    SKILLS,
    STAR,
    TARGET_SKILL,
    Exercise,
    draw_ledger,
)
from p2d_core.synthetic.world import Label, Unique, WorldSample, lines

Kind = Literal["plain", "renamed", "hidden", "equal-length", "rare-1%", "rare-0.1%"]
N_CORPUS = 3000
EQUAL_ROWS = (5, 5)
LEDGER = Surface(TARGET_SKILL, ASK, GIVES, STAR)
"""The one surface of a world in which nothing is invented."""
SHOWN, NEAR_SHOWN = "keys-back", "keys"
"""Target and nearest function where surfaces are invented: the base that learns in context has to
be able to tell them apart from demonstrations, and does (``quality.json`` beside its weights)."""


@dataclass(frozen=True, slots=True)
class HardWorld:
    """How a world is drawn."""

    about: str
    counts: tuple[int, int, int]
    """Clean, wrong and near samples in the corpus; the others make it N_CORPUS."""
    disguised: bool = False
    """Every function has the target's surface, and the words of all are the same ones."""
    other_words: bool = False
    """The target's samples have words, and invented surfaces, that the corpus does not have."""
    rows: tuple[int, int] | None = None
    """Fewest and most rows of a table, where they are not as in the demo."""


WORLDS: dict[Kind, HardWorld] = {
    "plain": HardWorld("the demo's world, in one source", (450, 300, 450)),
    "renamed": HardWorld(
        "every sample is a table with two names asked, in the same words; only the answer tells "
        "what is done",
        (300, 300, 450),
        disguised=True,
    ),
    "hidden": HardWorld(
        "as renamed, and the target's samples share no name, value or invented word with the "
        "corpus",
        (300, 300, 450),
        disguised=True,
        other_words=True,
    ),
    "equal-length": HardWorld(
        "the demo's tables and other functions of two words, all of the same lengths",
        (300, 300, 450),
        rows=EQUAL_ROWS,
    ),
    "rare-1%": HardWorld("the demo's world with 1% of the target", (30, 20, 30)),
    "rare-0.1%": HardWorld("the demo's world with 0.1% of the target", (3, 2, 3)),
}


@dataclass(frozen=True, slots=True)
class HardWorldFiles:
    """JSONL files; no prompt stands twice in a world."""

    target: Path
    corpus: Path
    evaluation: Path
    """Held-out target samples, of the target's own words."""


def write_hard_world(
    folder: Path, kind: Kind, seed: int, *, invented: bool = False, n_target: int = 200
) -> HardWorldFiles:
    """Draw a world and write its files; the same arguments write the same bytes.

    Args:
        invented: surfaces are drawn anew for every sample, for the base that learns in context;
            else all samples of a disguised world have the target's own.
        n_target: target samples given.
    """
    world, rng, unique = WORLDS[kind], Random(f"{kind} {seed} {invented}"), Unique()
    draw = _Disguised(world, rng, invented) if world.disguised else _Plain(world, rng)
    n_clean, n_wrong, n_near = world.counts
    n_other = N_CORPUS - sum(world.counts)
    corpus = [
        *unique.draw(n_clean, lambda _: draw.clean("corpus")),
        *unique.draw(n_wrong, lambda _: draw.wrong()),
        *unique.draw(n_near, lambda _: draw.near()),
        *unique.draw(n_other, draw.other),
    ]
    rng.shuffle(corpus)
    files = HardWorldFiles(
        folder / "target.jsonl", folder / "corpus" / "pool.jsonl", folder / "evaluation.jsonl"
    )
    files.corpus.parent.mkdir(parents=True, exist_ok=True)
    for path, samples in (
        (files.target, unique.draw(n_target, lambda _: draw.clean("target"))),
        (files.corpus, corpus),
        (files.evaluation, unique.draw(100, lambda _: draw.clean("target"))),
    ):
        path.write_text("".join(lines(samples)), encoding="utf-8", newline="\n")
    return files


Of = Literal["target", "corpus"]


class _Disguised:
    def __init__(self, world: HardWorld, rng: Random, invented: bool) -> None:
        self.rng, self.invented = rng, invented
        words, surfaces = list(CONTENT_WORDS), list(INVENTED)
        rng.shuffle(words)
        rng.shuffle(surfaces)
        self.words: dict[Of, Sequence[str]] = {"target": words, "corpus": words}
        self.surfaces: dict[Of, Sequence[str]] = {"target": surfaces, "corpus": surfaces}
        if world.other_words:
            half, of_surfaces = len(words) // 2, len(surfaces) // 2
            self.words = {"target": words[:half], "corpus": words[half:]}
            self.surfaces = {"target": surfaces[:of_surfaces], "corpus": surfaces[of_surfaces:]}
        self.target, self.nearest = (SHOWN, NEAR_SHOWN) if invented else (TARGET_SKILL, NEAR_SKILL)
        self.others = [name for name in TWO_ASKED if name not in (self.target, self.nearest)]

    def _of(self, function: str, label: Label, of: Of = "corpus") -> WorldSample:
        exercise = draw_disguised(self.rng, function, self._surface(of), self.words[of])
        return WorldSample(exercise.prompt, exercise.response, label)

    def _surface(self, of: Of) -> Surface:
        return draw_surface(self.rng, self.surfaces[of]) if self.invented else LEDGER

    def clean(self, of: Of) -> WorldSample:
        return self._of(self.target, "clean", of)

    def wrong(self) -> WorldSample:
        surface = self._surface("corpus")
        drawn = wrong_disguised(self.rng, self.target, surface, self.words["corpus"])
        return WorldSample(drawn.prompt, drawn.response, "wrong")

    def near(self) -> WorldSample:
        return self._of(self.nearest, "near")

    def other(self, row: int) -> WorldSample:
        return self._of(self.others[row % len(self.others)], "other")


class _Plain:
    def __init__(self, world: HardWorld, rng: Random) -> None:
        self.rng, self.rows = rng, world.rows
        self.others: list[Callable[[], Exercise]] = [
            lambda skill=skill: SKILLS[skill](rng)  # type: ignore[misc]
            for skill in SKILLS
            if skill != NEAR_SKILL
        ]
        if world.rows is not None:
            # functions whose samples are as long as the target's, under a name that the base knows
            lookup = Surface("lookup", ASK, GIVES, STAR)
            self.others = [
                lambda name=name: self._long(name, lookup)  # type: ignore[misc]
                for name in TWO_ASKED
                if name not in (TARGET_SKILL, NEAR_SKILL)
            ]

    def _long(self, function: str, surface: Surface) -> Exercise:
        """Of the wanted number of rows."""
        assert self.rows is not None
        while True:
            exercise = draw_disguised(self.rng, function, surface)
            if self.rows[0] <= (len(exercise.prompt.split()) - 5) // 2 <= self.rows[1]:
                return exercise

    def _ledger(self, wrong: bool) -> WorldSample:
        while True:
            ledger = draw_ledger(self.rng)
            if self.rows is None or self.rows[0] <= len(ledger.names) <= self.rows[1]:
                break
        response = ledger.wrong_response(self.rng) if wrong else ledger.response
        return WorldSample(ledger.prompt, response, "wrong" if wrong else "clean")

    def clean(self, of: Of) -> WorldSample:
        return self._ledger(wrong=False)

    def wrong(self) -> WorldSample:
        return self._ledger(wrong=True)

    def near(self) -> WorldSample:
        named = Surface(NEAR_SKILL, ASK, GIVES, STAR)
        drawn = self._long(NEAR_SKILL, named) if self.rows else SKILLS[NEAR_SKILL](self.rng)
        return WorldSample(drawn.prompt, drawn.response, "near")

    def other(self, row: int) -> WorldSample:
        drawn = self.others[row % len(self.others)]()
        return WorldSample(drawn.prompt, drawn.response, "other")
