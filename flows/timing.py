"""How the time for planning is spent: a few steps of long work, growing parts of wide work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from p2d_core.planning import Estimate, Steps, scaled
from p2d_core.progress import Progress

LEAST_STEPS, MOST_STEPS = 2, 60
"""Steps of a training that are timed: the least even when time is short; beyond the most, no more
after `ENOUGH_SECONDS`."""
ENOUGH_SECONDS = 3.0
FIRST, GROWTH = 8, 4
"""Samples of the first part that is timed, and how much larger the next is."""


class _Enough(Exception):
    """Enough steps are timed."""


@dataclass
class Budget:
    """Seconds for all that is to be timed; each call gets an even share of what is left."""

    seconds: float
    calls: int = 1
    """Still to come."""
    share: float = 0.0
    """Seconds of the present one."""
    _began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds, of all; negative when more was taken."""
        return self.seconds - (time.monotonic() - self._began)

    def begin(self) -> None:
        """The next call; it gets at least a moment."""
        self.share = max(0.1, self.left / max(1, self.calls))
        self.calls -= 1


def time_steps(run: Callable[[Progress], object], seconds: float) -> Steps:
    """Times the steps that ``run`` tells of, and stops it once that is enough."""
    begin = time.perf_counter()
    marks: list[float] = []
    steps = 0

    def tell(done: int, of: int) -> None:
        nonlocal steps
        steps = of
        if not done:  # that it begins
            return
        marks.append(time.perf_counter() - begin)
        if done == of or len(marks) < LEAST_STEPS:
            return
        if marks[-1] > seconds or (len(marks) >= MOST_STEPS and marks[-1] > ENOUGH_SECONDS):
            raise _Enough

    try:
        run(tell)
    except _Enough:
        return Steps(marks, steps)
    return Steps(marks, steps, ended=time.perf_counter() - begin)


def time_parts(
    work: Callable[[int], object],
    weights: Sequence[float],
    whole: float,
    seconds: float,
    first: int = FIRST,
) -> Estimate:
    """Seconds that ``work`` takes for all, from growing parts of what is at hand.

    Args:
        work: is given how many of the items at hand to do.
        weights: what each of them adds to the work.
        whole: what all adds to it, in the same unit.
    """
    timed: list[tuple[float, float]] = []
    available = len(weights)
    size = min(first, available)
    end = time.perf_counter() + seconds
    while size:
        start = time.perf_counter()
        work(size)
        took = time.perf_counter() - start
        timed.append((sum(weights[:size]), took))
        if size == available or time.perf_counter() + took * GROWTH > end:
            break
        size = min(available, size * GROWTH)
    return scaled(timed, whole) if timed else Estimate()


@dataclass
class Timed:
    """Seconds, once the block has ended."""

    seconds: float = 0.0

    @property
    def estimate(self) -> Estimate:
        """Sure."""
        return Estimate(self.seconds)


@contextmanager
def stopwatch() -> Iterator[Timed]:
    """Of its block."""
    block = Timed()
    start = time.perf_counter()
    yield block
    block.seconds = time.perf_counter() - start
