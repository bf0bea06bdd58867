"""What single affinities are made of: by head, by proxy sample, and where they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from p2d_core.affinity.protocol import ByHead, ByProxy, Scorer, ScorerState, scorers
from p2d_core.affinity.sum import OF_EVERY_TABLE, Sum, column_of


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one value stands among all of the corpus."""

    value: float
    rank: int
    """From 1, the highest; values that are alike share the best of their ranks."""
    of: int
    """Samples that have a value."""
    lower: float
    """Share of them, in [0, 1], that is lower."""


def standings(
    values: np.ndarray[Any, Any],
    rows: Sequence[int],
    before: np.ndarray[Any, Any] | None = None,
) -> list[Standing | None]:
    """Of each of some rows, None where it has no value. Sorts, so that it costs n log n.

    Args:
        values: of the whole corpus, float64; NaN where there is none.
        before: whole numbers from 0 that come before the values in the order.
    """
    there = ~np.isnan(values)
    keys = values
    if before is not None:
        alike = np.unique(values, return_inverse=True)[1]
        keys = before.astype(np.int64) * len(values) + alike
    rising = np.sort(keys[there])
    here = keys[np.asarray(rows, np.int64)]
    lower = np.searchsorted(rising, here, "left")
    not_higher = np.searchsorted(rising, here, "right")
    return [
        Standing(float(values[row]), len(rising) - int(upto) + 1, len(rising), below / len(rising))
        if there[row]
        else None
        for row, below, upto in zip(rows, lower.tolist(), not_higher.tolist(), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class HeadShare:
    """What one head adds to an affinity."""

    layer: int
    head: int
    adds: float


@dataclass(frozen=True, slots=True)
class Look:
    """What one scorer saw in one sample."""

    scorer: str
    """Its name; of a sum, a part's."""
    affinity: float
    """As it stands in the scores; of a part of a sum, before it was standardised."""
    measured: Mapping[str, float]
    """The plain numbers that it was computed from, such as losses."""
    needs_heads: bool
    """Does it look at the task heads?"""
    heads: tuple[HeadShare, ...] | None
    """All that were looked at, what adds most first; None where no affinity is kept by head."""
    left_over: float
    """The affinity less what the heads add; 0 where they are None."""
    proxies: tuple[tuple[int, float], ...] | None
    """Place in the proxy set and cosine, the nearest first; None where no proxies are compared."""


def looks(
    scorer: Scorer,
    state: ScorerState,
    table: pa.Table,
    affinities: Mapping[str, Sequence[float]],
    nearest: int,
) -> list[list[Look]]:
    """Of each row the look of the scorer, or those of the parts of a sum.

    Args:
        state: fitted.
        table: samples of the corpus with their measurements.
        affinities: what the scores say of these rows: ``affinity``, and each part of a sum.
        nearest: how many proxy samples are named.
    """
    if isinstance(scorer, Sum):
        columns = []
        for part, one, own, view in scorer.taken_apart(state, table):
            mean, spread = own.pop(".moments").tolist()
            raw = [mean + spread * value for value in affinities[column_of(part)]]
            columns.append(_looks(part, one, own, view, raw, nearest))
    else:
        name = scorers.name_of(type(scorer))
        columns = [_looks(name, scorer, state, table, affinities["affinity"], nearest)]
    return [list(row) for row in zip(*columns, strict=True)]


def _looks(
    name: str,
    scorer: Scorer,
    state: ScorerState,
    table: pa.Table,
    affinities: Sequence[float],
    nearest: int,
) -> list[Look]:
    by_head = scorer.head_parts(state, table) if isinstance(scorer, ByHead) else None
    by_proxy = scorer.similarities(state, table) if isinstance(scorer, ByProxy) else None
    measured = _plain_numbers(table)
    return [
        Look(
            scorer=name,
            affinity=affinity,
            measured=measured[row],
            needs_heads=scorer.needs_heads,
            heads=_shares(state["heads"], by_head[row]) if by_head is not None else None,
            left_over=affinity - float(by_head[row].sum()) if by_head is not None else 0.0,
            proxies=_nearest(by_proxy[row], nearest) if by_proxy is not None else None,
        )
        for row, affinity in enumerate(affinities)
    ]


def _shares(heads: Tensor, adds: Tensor) -> tuple[HeadShare, ...]:
    order = adds.argsort(descending=True, stable=True).tolist()
    return tuple(
        HeadShare(int(heads[place, 0]), int(heads[place, 1]), float(adds[place])) for place in order
    )


def _nearest(similarities: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    best = similarities.topk(min(count, len(similarities)))
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _plain_numbers(table: pa.Table) -> list[dict[str, float]]:
    numbers = {
        name: table[name].to_pylist()
        for name in table.column_names
        if name not in OF_EVERY_TABLE and pa.types.is_floating(table[name].type)
    }
    return [{name: values[row] for name, values in numbers.items()} for row in range(len(table))]
