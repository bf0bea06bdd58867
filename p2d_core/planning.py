"""What a run will take, from the time of a few of its steps: estimates that add up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

REUSED, NEW = "reused", "new"
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


@dataclass(frozen=True, slots=True)
class Pace:
    """How some of many equal steps went."""

    start: Estimate
    """Before the first step, and what the first few took longer than the others."""
    step: Estimate
    """One step, once under way."""
    steps: int
    """All there are."""
    whole: float | None = None
    """Seconds of all of them, if they were run."""

    @property
    def total(self) -> Estimate:
        """Of all steps."""
        if self.whole is not None:
            return Estimate(self.whole)
        return self.start + self.step.times(self.steps)


def pace_of(marks: Sequence[float], steps: int, ended: float | None = None) -> Pace:
    """From when each of the first steps ended, in seconds from when their work began.

    Args:
        marks: at least two, unless ``ended`` is given.
        steps: how many steps there are in all.
        ended: when the work ended, if all steps were run.
    """
    if len(marks) < 2:
        assert ended is not None
        return Pace(Estimate(), Estimate(ended / max(1, steps)), steps, ended)
    untimed = min(UNTIMED_STEPS, len(marks) - 1)
    step = mean_of([marks[i] - marks[i - 1] for i in range(untimed, len(marks))])
    start = max(0.0, marks[untimed - 1] - untimed * step.seconds)
    return Pace(Estimate(start), step, steps, ended)


def mean_of(seconds: Sequence[float]) -> Estimate:
    """Their mean with its standard error; of a single one the error is not known: as large."""
    mean = statistics.fmean(seconds)
    if len(seconds) < 2:
        return Estimate(mean, mean)
    return Estimate(mean, statistics.stdev(seconds) / math.sqrt(len(seconds)))


def scaled(timed: Sequence[tuple[int, float]], items: float) -> Estimate:
    """Seconds for ``items``, from (how many, seconds) of growing parts of such work.

    The last and largest part says what an item takes; what the first took beyond that is set-up,
    which comes once. The error is the difference to what the part before would have said; with one
    part alone it is as large as the estimate, unless that part was all.
    """
    count, seconds = timed[-1]
    each = seconds / count
    if len(timed) == 1:
        return Estimate(each * items, 0.0 if items == count else each * items)
    start = max(0.0, timed[0][1] - each * timed[0][0])
    before = timed[-2][1] / timed[-2][0]
    return Estimate(start + each * items, abs(each - before) * max(0.0, items - count))


def saves(training_seconds: float, checkpoint_seconds: float) -> int:
    """How many checkpoints a training of that length writes."""
    return int(training_seconds // checkpoint_seconds)


@dataclass(frozen=True, slots=True)
class Part:
    """One artifact of a run, as far as it is known beforehand."""

    stage: str
    """The line of the report that it counts to, such as model_random."""
    state: str
    """`REUSED`, `NEW`, or what has to be made before it is known."""
    cold: Estimate
    """What making it takes, or took."""

    @property
    def now(self) -> Estimate:
        """What the run will spend on it; what is not known counts as made."""
        return Estimate() if self.state == REUSED else self.cold


def state_of(states: Iterable[str]) -> str:
    """Of a stage, from those of its artifacts: the common one, what is not known, or `partly`."""
    different = list(dict.fromkeys(states))
    if len(different) == 1:
        return different[0]
    return next((each for each in different if each not in (REUSED, NEW)), "partly reused")
