"""Means over seeds, and paired differences over seeds and evaluation samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% interval; the bounds are NaN where one value is all there is."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Such as ``0.953 ± 0.010``; the mean alone of one value."""
        alone = f"{self.mean:.3f}"
        return alone if self.n == 1 else f"{alone} ± {self.high - self.mean:.3f}"

    @property
    def shows(self) -> int:
        """1 if all of it is above 0, -1 if all is below, else 0."""
        return (self.low > 0) - (self.high < 0)


def plain(value: Any) -> Any:
    """For JSON, which has no NaN: null where one value alone leaves no interval."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t over independent runs.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no values to take a mean of")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1))
    half /= math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def paired_difference(
    a: Mapping[int, Mapping[str, float]], b: Mapping[int, Mapping[str, float]], *, seed: int = 0
) -> Interval | None:
    """Mean of a - b over the (seed, sample) pairs that both have; None where they share none.

    The interval is a percentile bootstrap in two steps, seeds and then the samples of each, so that
    it covers what another seed and another evaluation set would give. With one seed it covers the
    evaluation samples alone.

    Args:
        a, b: value by sample id, by seed.

    Source: ours; the two-step bootstrap is Davison and Hinkley 1997, section 3.8.
    """
    by_seed = []
    for each in sorted(set(a) & set(b)):
        shared = sorted(set(a[each]) & set(b[each]))
        if shared:
            by_seed.append(np.array([a[each][s] - b[each][s] for s in shared], dtype=np.float64))
    if not by_seed:
        return None
    mean = float(np.mean([differences.mean() for differences in by_seed]))
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(by_seed), (RESAMPLES, len(by_seed)))
    means = np.zeros(RESAMPLES)
    for place in range(len(by_seed)):
        for number, differences in enumerate(by_seed):
            rows = np.flatnonzero(drawn[:, place] == number)
            picked = rng.integers(0, len(differences), (len(rows), len(differences)))
            means[rows] += differences[picked].mean(axis=1) / len(by_seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), len(by_seed))
