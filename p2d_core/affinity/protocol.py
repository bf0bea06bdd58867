"""What a scorer is: prepare, measure, compare; and how scorers chain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast, runtime_checkable

import pyarrow as pa
from torch import Tensor

from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel, ParameterCounts
from p2d_core.registry import Registry
from p2d_core.samples.schema import Sample

ScorerState = dict[str, Tensor]
"""Plain arrays, so that a shard can be measured on another machine."""


@dataclass(frozen=True, slots=True)
class Target:
    """What scorers may know of the domain to adapt to."""

    proxy: Sequence[Sample]
    held_out: Sequence[Sample]
    """Target samples that no tuning saw: what is typical is gauged on them."""


@runtime_checkable
class Scorer(Protocol):
    """Gives every sample one affinity, in three steps of which only the middle one is dear.

    A scorer is a frozen dataclass whose fields are its settings. What it inherits holds for any:
    one that leaves something out is measured more often than it need be, never less.
    """

    @property
    def version(self) -> str:
        """Changes when the same inputs give other affinities."""
        ...

    @property
    def measures_target(self) -> bool:
        """Does measure() need to know the target? True: another target measures everything."""
        return True

    @property
    def measured_by(self) -> tuple[str, ...]:
        """The settings that measure() reads: changing others measures nothing again."""
        return tuple(field.name for field in fields(cast(Any, self)))

    @property
    def runs_model(self) -> bool:
        """Does measure() run the model? False: it measures nothing."""
        return True

    @property
    def needs_heads(self) -> bool:
        """Does it look at the task heads? False: it is given none."""
        return False

    @property
    def needs_head_proxy(self) -> bool:
        """Does it look through the task heads as tuned on the proxy set?"""
        return False

    def bytes_a_sample(self, counts: ParameterCounts, heads: HeadMap | None) -> int:
        """About how much measure() gives of a sample, at the most: the disk is looked at before."""
        return 16 * (2 + (len(heads.task_heads) if heads is not None else 0))

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """What measure and affinity need; without target samples only what measure needs."""
        ...

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """Arrow columns of what the model has to be run for, a row a sample, in order.

        Depends neither on the other samples of the shard nor on their order.
        """
        ...

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """One float64 array a table, in order. May iterate ``measured`` more than once.

        The tables have ``sample_id, source, prompt, response, n_tokens, n_response_tokens`` and
        the columns of `measure`; together they are the whole corpus.
        """
        ...


@runtime_checkable
class Gauged(Protocol):
    """A scorer that can say what affinities the target's own samples have."""

    def own_affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Tensor:
        """Affinities of target samples as if they stood in the corpus, float64, shape ``[n]``."""
        ...


@runtime_checkable
class InParts(Protocol):
    """A scorer whose affinities are made of named parts, each a column of the scores."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """Of the columns."""
        ...

    def affinity_parts(
        self, state: ScorerState, measured: Iterable[pa.Table]
    ) -> Iterator[dict[str, pa.Array]]:
        """Of each table ``affinity`` and each part, float64 arrays by name."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """A scorer whose affinities, gauge and all, need something of the whole corpus first."""

    def fit(self, state: ScorerState, measured: Iterable[pa.Table]) -> ScorerState:
        """The state with it, so that the corpus is read for it once; a fitted one as it is."""
        ...


@runtime_checkable
class ByHead(Protocol):
    """A scorer whose affinities are sums over the task heads that it looks at."""

    def head_parts(self, state: ScorerState, table: pa.Table) -> Tensor | None:
        """What each head adds to the affinity of each row, float64, ``[n, n_heads]``.

        The heads are in the order of ``state["heads"]``; the state is fitted. None where a setting
        makes the affinities something else than sums.
        """
        ...


@runtime_checkable
class ByProxy(Protocol):
    """A scorer that compares a sample with the proxy samples one by one."""

    def similarities(self, state: ScorerState, table: pa.Table) -> Tensor:
        """Cosine of each row to each proxy sample, float64, ``[n, n_proxy]``; fitted state."""
        ...


@runtime_checkable
class TakesOver(Protocol):
    """A scorer of which the step before may have measured some columns already."""

    @property
    def takes_over(self) -> tuple[str, ...]:
        """Columns of `measure`, by name."""
        ...

    def measure_rest(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample], there: pa.Table
    ) -> dict[str, Any]:
        """As `measure`, with the columns that are ``there``, a row a sample, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One scorer of a chain, with the gate to the next."""

    name: str
    """Names its column of the scores."""
    scorer: Scorer
    gate: float | None = None
    """Quantile, in [0, 1], of the target's own affinities that a sample has to reach."""


@runtime_checkable
class Chain(Protocol):
    """Scorers in order; a later one measures only what the gates before it let pass."""

    @property
    def version(self) -> str:
        """Changes when the same inputs give other scores."""
        ...

    @property
    def steps(self) -> tuple[Step, ...]:
        """At least one; every step but the last has a gate."""
        ...


scorers: Registry[type[Any]] = Registry("scorer")


def steps_of(scorer: Scorer | Chain) -> tuple[Step, ...]:
    """The steps of a chain; a single scorer is a chain of one step without a gate."""
    return scorer.steps if isinstance(scorer, Chain) else (Step("affinity", scorer),)
