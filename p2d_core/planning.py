"""What a run will take, from the time of a few of its steps: estimates that add up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

REUSED, NEW, PARTLY = "reused", "new", "partly reused"
UNTIMED_STEPS = 3
"""At the front of timed steps: they set up what the others find."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds and their standard error. Estimates add with ``+``, their errors as independent."""

    seconds: float = 0.0
    spread: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.seconds + other.seconds, math.hypot(self.spread, other.spread))

    def times(self, count: float) -> Estimate:
        """So many times the same: the error is the same each time, too."""
        return Estimate(self.seconds * count, self.spread * count)


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Their sum."""
    return sum(estimates, Estimate())


def guess(seconds: float) -> Estimate:
    """What was not timed itself: the error may be as large."""
    return Estimate(seconds, seconds)


@dataclass(frozen=True, slots=True)
class Steps:
    """When each of the first of many equal steps ended."""

    marks: Sequence[float]
    """Seconds from when the work began; at least two, unless all was run."""
    count: int
    """All steps that there are."""
    ended: float = 0.0
    """When all of it ended, in the same seconds; 0 if it was stopped before."""

    @property
    def step(self) -> Estimate:
        """One of those that are under way: the mean, with its standard error."""
        untimed = self._untimed
        timed = [self.marks[i] - self.marks[i - 1] for i in range(untimed, len(self.marks))]
        mean = statistics.fmean(timed)
        if len(timed) < 2:
            return guess(mean)
        return Estimate(mean, statistics.stdev(timed) / math.sqrt(len(timed)))

    @property
    def all(self) -> Estimate:
        """Every step, and what the first few took longer than the others."""
        if self.ended:
            return Estimate(self.ended)
        step, untimed = self.step, self._untimed
        start = max(0.0, self.marks[untimed - 1] - untimed * step.seconds)
        return Estimate(start) + step.times(self.count)

    @property
    def _untimed(self) -> int:
        return min(UNTIMED_STEPS, len(self.marks) - 1)


def scaled(timed: Sequence[tuple[int, float]], items: float) -> Estimate:
    """Seconds for ``items``, from (how many, seconds) of growing parts of such work.

    The last and largest part says what an item takes; what the first took beyond that is set-up,
    which comes once. The error is the difference to what the part before would have said; with one
    part alone it is as large as the estimate, unless that part was all.
    """
    count, seconds = timed[-1]
    each = seconds / count
    if len(timed) == 1:
        return Estimate(seconds) if items == count else guess(each * items)
    start = max(0.0, timed[0][1] - each * timed[0][0])
    before = timed[-2][1] / timed[-2][0]
    return Estimate(start + each * items, abs(each - before) * max(0.0, items - count))


@dataclass(frozen=True, slots=True)
class Part:
    """A stage of a run, or one call of it, as far as it is known beforehand."""

    stage: str
    """The line of the report that it counts to, such as model_random."""
    state: str
    """`REUSED`, `NEW`, `PARTLY`, or what has to be made before it is known."""
    now: Estimate
    """What the run will spend on it; what is not known to be there counts as made."""
    cold: Estimate
    """What making all of it takes, or took."""


def by_stage(parts: Iterable[Part]) -> list[Part]:
    """One part for each stage, in the order in which they come first."""
    stages: dict[str, list[Part]] = {}
    for part in parts:
        stages.setdefault(part.stage, []).append(part)
    return [
        Part(
            stage,
            state_of(part.state for part in of),
            total(part.now for part in of),
            total(part.cold for part in of),
        )
        for stage, of in stages.items()
    ]


def state_of(states: Iterable[str]) -> str:
    """Of a stage, from those of its parts: the common one, what is not known, or `PARTLY`."""
    different = list(dict.fromkeys(states))
    if len(different) == 1:
        return different[0]
    return next((each for each in different if each not in (REUSED, NEW, PARTLY)), PARTLY)
