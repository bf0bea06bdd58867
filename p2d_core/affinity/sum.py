"""Affinity as a weighted sum of other scorers' affinities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from p2d_core.affinity.measuring import SAMPLE_COLUMNS, only
from p2d_core.affinity.protocol import Chain, Fitted, Scorer, ScorerState, Target, scorers
from p2d_core.errors import SettingsError
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel, ParameterCounts
from p2d_core.samples.schema import Sample

OF_EVERY_TABLE = ("sample_id", *SAMPLE_COLUMNS, "n_tokens", "n_response_tokens")


@scorers.register("sum")
@dataclass(frozen=True)
class Sum(Scorer):
    """Other scorers' affinities, each standardised on the corpus, weighted and added.

    Standardised is: its mean over the corpus is 0 and its standard deviation 1 (where all are
    alike, all are 0). Each part is a column of the scores too, by its scorer's name with
    underscores.

    Costs what its parts cost, and one more look at their measurements.

    Source: ours.
    """

    parts: Mapping[str, float]
    """The weight of each scorer by its name, such as {head-activation: 1.0, loss-shift: 0.5}."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The settings of each scorer by its name; its defaults if empty."""
    seed: int = 0
    """Of parts that draw by chance and whose settings give them none."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise SettingsError("scorer 'sum': `parts` is empty; give scorers and their weights.")
        strangers = sorted(set(self.options) - set(self.parts))
        if strangers:
            raise SettingsError(
                f"scorer 'sum': `options` has settings of {', '.join(strangers)}, which "
                f"is no part. Parts: {', '.join(self.parts)}."
            )
        for name, weight in self.parts.items():
            if not math.isfinite(weight):
                raise SettingsError(f"scorer 'sum': the weight of {name} is {weight}.")
            if name == "sum" or isinstance(self._made[name], Chain):
                raise SettingsError(
                    f"scorer 'sum': {name} is itself made of scorers. Name these as parts."
                )

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {
            name: scorers.make(name, self.options.get(name, {}), seed=self.seed)
            for name in self.parts
        }

    @property
    def version(self) -> str:
        """Its own, and that of every part."""
        return "-".join(["1", *(each.version for each in self._made.values())])

    @property
    def measures_target(self) -> bool:
        """Does a part?"""
        return any(each.measures_target for each in self._made.values())

    @property
    def measured_by(self) -> tuple[str, ...]:
        """Not the weights: with others nothing is measured again."""
        return ("measurers",)

    @property
    def measurers(self) -> tuple[Any, ...]:
        """Of each part what its measurements depend on."""
        return tuple(
            (name, each.version, tuple((key, getattr(each, key)) for key in each.measured_by))
            for name, each in sorted(self._made.items())
        )

    @property
    def runs_model(self) -> bool:
        """Does a part?"""
        return any(each.runs_model for each in self._made.values())

    @property
    def needs_heads(self) -> bool:
        """Does a part?"""
        return any(each.needs_heads for each in self._made.values())

    @property
    def needs_head_proxy(self) -> bool:
        """Does a part?"""
        return any(each.needs_head_proxy for each in self._made.values())

    @property
    def part_names(self) -> tuple[str, ...]:
        """The scorers' names with underscores."""
        return tuple(map(column_of, self.parts))

    def bytes_a_sample(self, counts: ParameterCounts, heads: HeadMap | None) -> int:
        """Of all parts together."""
        return sum(each.bytes_a_sample(counts, heads) for each in self._made.values())

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """What each part prepares, under ``<part>/``."""
        return {
            f"{name}/{key}": value
            for name, each in self._made.items()
            for key, value in each.prepare(
                model, heads if each.needs_heads else None, target
            ).items()
        }

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """What each part measures, under ``<part>/``."""
        return {
            f"{name}/{key}": column
            for name, each in self._made.items()
            for key, column in each.measure(model, _inside(state, name), shard).items()
        }

    def fit(self, state: ScorerState, measured: Iterable[pa.Table]) -> ScorerState:
        """What each part fits, and ``<part>/.moments``: its mean and standard deviation."""
        if all(f"{name}/.moments" in state for name in self.parts):
            return state
        fitted = dict(state)
        for name, each in self._made.items():
            own, view = _inside(state, name), _View(measured, name)
            if isinstance(each, Fitted):
                own = each.fit(own, view)
            values = np.concatenate([np.asarray(a) for a in each.affinity(own, view)])
            moments = torch.tensor([values.mean(), values.std()], dtype=torch.float64)
            fitted |= {f"{name}/{key}": value for key, value in own.items()}
            fitted[f"{name}/.moments"] = moments
        return fitted

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """In standard deviations of the parts."""
        for parts in self.affinity_parts(state, measured):
            yield parts["affinity"]

    def affinity_parts(
        self, state: ScorerState, measured: Iterable[pa.Table]
    ) -> Iterator[dict[str, pa.Array]]:
        """The sum, and every part standardised."""
        state = self.fit(state, measured)
        streams = []
        for name, each in self._made.items():
            own = _inside(state, name)
            mean, spread = own.pop(".moments").tolist()
            streams.append(_standardised(each, own, _View(measured, name), mean, spread))
        for values in zip(*streams, strict=True):
            weighted = zip(self.parts.values(), values, strict=True)
            parts = dict(zip(self.part_names, map(pa.array, values), strict=True))
            yield {"affinity": pa.array(sum(weight * value for weight, value in weighted)), **parts}

    def taken_apart(
        self, state: ScorerState, table: pa.Table
    ) -> Iterator[tuple[str, Scorer, ScorerState, pa.Table]]:
        """Each part's name and scorer, with what it prepared, fitted and measured itself."""
        for name, each in self._made.items():
            (own,) = _View([table], name)
            yield name, each, _inside(state, name), own


def column_of(part: str) -> str:
    """The column of the scores that a part has."""
    return part.replace("-", "_")


@dataclass(frozen=True)
class _View:
    """The tables as one part wrote them."""

    measured: Iterable[pa.Table]
    name: str

    def only(self, *columns: str) -> _View:
        """The same, of which no other columns are read."""
        kept = (
            column if column in OF_EVERY_TABLE else f"{self.name}/{column}" for column in columns
        )
        return replace(self, measured=only(self.measured, *kept))

    def __iter__(self) -> Iterator[pa.Table]:
        for table in self.measured:
            columns = {
                key.removeprefix(f"{self.name}/"): table[key]
                for key in table.column_names
                if key in OF_EVERY_TABLE or key.startswith(f"{self.name}/")
            }
            yield pa.table(columns)


def _inside(state: ScorerState, name: str) -> ScorerState:
    start = f"{name}/"
    return {key.removeprefix(start): v for key, v in state.items() if key.startswith(start)}


def _standardised(
    scorer: Scorer, state: ScorerState, measured: Iterable[pa.Table], mean: float, spread: float
) -> Iterator[np.ndarray[Any, Any]]:
    scale = 1 / spread if spread > 1e-12 * max(1.0, abs(mean)) else 0.0
    for affinity in scorer.affinity(state, measured):
        yield (np.asarray(affinity, dtype=np.float64) - mean) * scale
