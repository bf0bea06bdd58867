"""Head scores from several draws of the proxy set: their mean, and how far they agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor


def mean_of_draws(scores: Sequence[Tensor]) -> Tensor:
    """The mean of each draw's scores, of which every draw has as much say.

    A draw's scores are divided by their mean size first, so that one whose proxy run went further
    than the others' does not decide alone; the mean size of all is put back.

    Args:
        scores: ``[n_layers, n_query_heads]`` of each draw; at least one.
    """
    together = torch.stack([each.double() for each in scores])
    sizes = together.abs().mean(dim=(1, 2), keepdim=True)
    mean: Tensor = (together / torch.where(sizes > 0, sizes, 1.0)).mean(dim=0) * sizes.mean()
    return mean


@dataclass(frozen=True, slots=True)
class TopAgreement:
    """How much of the best heads two draws have in common."""

    heads: int
    """How many are compared."""
    jaccard: float
    """Heads that both have over heads that one has, in [0, 1]; the mean over pairs of draws."""
    lowest: float
    """Of any pair."""
    by_chance: float
    """What two random choices of so many heads have on average."""
    by_luck: float
    """What they reach or exceed in one case of twenty."""
    in_all: int
    """Heads among the best in every draw."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far several draws rank the same heads alike."""

    draws: int
    spearman: float
    """Rank correlation over all heads, in [-1, 1]; the mean over pairs of draws. 0 by chance."""
    lowest_spearman: float
    """Of any pair."""
    spearman_by_luck: float
    """What two random rankings reach or exceed in one case of twenty."""
    top: list[TopAgreement]


def agreement(
    scores: Sequence[Tensor], tops: Iterable[Sequence[set[tuple[int, int]]]]
) -> Agreement:
    """Compares every pair of draws.

    Args:
        scores: ``[n_layers, n_query_heads]`` of each draw; at least two.
        tops: for each number of heads to compare, what each draw chose.
    """
    flat = [each.double().flatten().numpy() for each in scores]
    correlations = [_spearman(a, b) for a, b in combinations(flat, 2)]
    n_heads = len(flat[0])
    return Agreement(
        draws=len(scores),
        spearman=float(np.mean(correlations)),
        lowest_spearman=min(correlations),
        spearman_by_luck=1.645 / max(n_heads - 1, 1) ** 0.5,
        top=[_top(choices, n_heads) for choices in tops],
    )


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    # scores that are all alike agree with nothing
    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0.0


def _top(choices: Sequence[set[tuple[int, int]]], n_heads: int) -> TopAgreement:
    jaccards = [len(a & b) / len(a | b) for a, b in combinations(choices, 2)]
    count = len(choices[0])
    values, chances = _jaccards_by_chance(n_heads, count)
    # the smallest value that is reached or exceeded in at most one case of twenty, or all in common
    tail = chances[::-1].cumsum()[::-1]
    rare = values[tail <= 0.05]
    return TopAgreement(
        heads=count,
        jaccard=float(np.mean(jaccards)),
        lowest=min(jaccards),
        by_chance=float(values @ chances),
        by_luck=float(rare[0]) if len(rare) else 1.0,
        in_all=len(set.intersection(*choices)),
    )


def _jaccards_by_chance(n_heads: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The Jaccard values of two random choices of ``count`` heads, rising, and their chances."""
    from scipy.stats import hypergeom

    shared = np.arange(max(0, 2 * count - n_heads), count + 1)
    return shared / (2 * count - shared), hypergeom(n_heads, count, count).pmf(shared)
