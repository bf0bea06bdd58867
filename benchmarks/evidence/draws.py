"""Ways to draw from what passed the gates that the product does not have, to see what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_CLUSTERS = 15


@dataclass(frozen=True)
class Passed:
    """The samples that passed every gate."""

    affinity: NDArray[np.float64]
    """``[n]``."""
    vectors: NDArray[np.float64]
    """Whitened outputs of the task heads, unit length, ``[n, width]``."""


Draw = Callable[[Passed, int, np.random.Generator], Sequence[int]]
"""Rows of ``passed``, so many of them, without repetition."""


def top(passed: Passed, wanted: int, rng: np.random.Generator) -> Sequence[int]:
    """The highest affinity."""
    order: list[int] = np.argsort(-passed.affinity, kind="stable")[:wanted].tolist()
    return order


def uniform(passed: Passed, wanted: int, rng: np.random.Generator) -> Sequence[int]:
    """Without favour."""
    drawn: list[int] = rng.permutation(len(passed.affinity))[:wanted].tolist()
    return drawn


def clusters(passed: Passed, wanted: int, rng: np.random.Generator) -> Sequence[int]:
    """The same number of each of `N_CLUSTERS` clusters of head vectors, as far as they have it."""
    from sklearn.cluster import KMeans

    fitted = KMeans(N_CLUSTERS, n_init=3, random_state=int(rng.integers(2**31)))
    of = fitted.fit_predict(passed.vectors)
    drawn = rng.permutation(len(of))
    turn = {row: int(np.sum(of[drawn[:place]] == of[row])) for place, row in enumerate(drawn)}
    return sorted((int(row) for row in drawn), key=lambda row: turn[row])[:wanted]


def facility_location(passed: Passed, wanted: int, rng: np.random.Generator) -> Sequence[int]:
    """Greedily those that leave every passed sample a near one: the sum over all of the cosine to
    the nearest drawn one. Source: Mirzasoleiman et al. 2020, arXiv 1906.01827."""
    likeness = passed.vectors @ passed.vectors.T
    covered = np.full(len(likeness), -1.0)
    drawn: list[int] = []
    for _ in range(min(wanted, len(likeness))):
        gains = np.maximum(likeness, covered).sum(axis=1)
        gains[drawn] = -np.inf
        drawn.append(int(np.argmax(gains)))
        covered = np.maximum(covered, likeness[drawn[-1]])
    return drawn


DRAWS: dict[str, Draw] = {
    "top": top,
    "uniform": uniform,
    "clusters": clusters,
    "facility-location": facility_location,
}
