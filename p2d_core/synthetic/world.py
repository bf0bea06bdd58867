"""Writes the files of the synthetic world: a target, a corpus with a known answer, test sets.

The corpus is labelled sample by sample with what it is. The pipeline never sees the label; it is
how the precision of a selection is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Literal

from p2d_core.synthetic.skills import NEAR_SKILL, SKILLS, Exercise, draw_ledger

Label = Literal["clean", "wrong", "near", "other"]
"""Target with its right answer, target with wrong amounts, near the target, any other skill."""

N_TARGET = 200
"""Target samples given: the proxy set and as many held out from it."""
N_CLEAN = 450
N_WRONG = 300
N_NEAR = 450
N_OTHER = 1800
N_EVALUATION = 300
N_OLD_SKILLS = 300

BASE_FOLDER = Path(__file__).parent / "base"
"""The base model that ships with the world: config, safetensors, tokenizer, hash and quality."""
IN_CONTEXT_BASE_FOLDER = Path(__file__).parent / "in_context_base"
"""One that learns from demonstrations which function is meant, with the words of `disguise` too."""


@dataclass(frozen=True, slots=True)
class WorldSample:
    """One row of a world file; the first word of the prompt names the skill."""

    prompt: str
    response: str
    label: Label


@dataclass(frozen=True, slots=True)
class WorldFiles:
    """The JSONL files of one world; no prompt stands in two of them, or twice in one."""

    target: Path
    """200 clean target samples: the proxy set is drawn from them, the rest is held out."""
    ledgers: Path
    """Corpus source: 450 clean target samples and 300 with wrong amounts, shuffled."""
    lookups: Path
    """Corpus source: 450 samples of the skill nearest to the target."""
    drills: Path
    """Corpus source: 1,800 samples of the other skills, about the same number each."""
    evaluation: Path
    """300 held-out target samples."""
    skills: Path
    """300 held-out samples of what the base knows, the same number of each skill."""

    @property
    def corpus(self) -> tuple[Path, ...]:
        """The sources that samples are chosen from, 3,000 samples in all."""
        return (self.ledgers, self.lookups, self.drills)


def write_world(folder: Path, seed: int) -> WorldFiles:
    """Draw a world and write its files; the same seed writes the same bytes.

    Args:
        folder: made where it does not exist; files of the same names are overwritten.
        seed: draws every sample. The skills, and so the base that knows them, are the same in
            every world.
    """
    files = WorldFiles(
        target=folder / "target.jsonl",
        ledgers=folder / "corpus" / "ledgers.jsonl",
        lookups=folder / "corpus" / "lookups.jsonl",
        drills=folder / "corpus" / "drills.jsonl",
        evaluation=folder / "evaluation.jsonl",
        skills=folder / "skills.jsonl",
    )
    rng = Random(seed)
    unique = Unique()
    drills = [name for name in SKILLS if name != NEAR_SKILL]
    ledgers = unique.draw(N_CLEAN, lambda _: _clean(rng))
    ledgers += unique.draw(N_WRONG, lambda _: _wrong(rng))
    contents = {
        files.target: unique.draw(N_TARGET, lambda _: _clean(rng)),
        files.evaluation: unique.draw(N_EVALUATION, lambda _: _clean(rng)),
        files.ledgers: ledgers,
        files.lookups: unique.draw(N_NEAR, lambda _: _known(rng, NEAR_SKILL)),
        files.drills: unique.draw(N_OTHER, lambda row: _known(rng, drills[row % len(drills)])),
        files.skills: unique.draw(
            N_OLD_SKILLS, lambda row: _known(rng, tuple(SKILLS)[row % len(SKILLS)])
        ),
    }
    for path, samples in contents.items():
        rng.shuffle(samples)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines(samples)), encoding="utf-8", newline="\n")
    return files


class Unique:
    """Draws samples whose prompts have not been drawn before."""

    def __init__(self) -> None:
        self._prompts: set[str] = set()

    def draw(self, n_samples: int, draw_row: Callable[[int], WorldSample]) -> list[WorldSample]:
        samples: list[WorldSample] = []
        while len(samples) < n_samples:
            sample = draw_row(len(samples))
            if sample.prompt not in self._prompts:
                self._prompts.add(sample.prompt)
                samples.append(sample)
        return samples


def _clean(rng: Random) -> WorldSample:
    ledger = draw_ledger(rng)
    return WorldSample(ledger.prompt, ledger.response, "clean")


def _wrong(rng: Random) -> WorldSample:
    ledger = draw_ledger(rng)
    return WorldSample(ledger.prompt, ledger.wrong_response(rng), "wrong")


def _known(rng: Random, skill: str) -> WorldSample:
    exercise: Exercise = SKILLS[skill](rng)
    label: Label = "near" if skill == NEAR_SKILL else "other"
    return WorldSample(exercise.prompt, exercise.response, label)


def lines(samples: list[WorldSample]) -> Iterator[str]:
    for sample in samples:
        yield json.dumps(asdict(sample)) + "\n"
