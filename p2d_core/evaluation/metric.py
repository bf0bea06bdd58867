"""What a metric is, what it is asked for, and the metrics by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from p2d_core.registry import Registry
from p2d_core.samples.schema import Sample

if TYPE_CHECKING:
    from p2d_core.evaluation.evidence import Evidence

Normalise = Literal["none", "tokens", "bytes"]
ALWAYS = "loss"
"""The metric that is measured whatever else is."""
FIRST = "1"
"""Version of a metric that is in no key."""


@dataclass(frozen=True, slots=True)
class EvaluationSpec:
    """What is measured, and how."""

    metric: str = ALWAYS
    """The one that arms are judged by."""
    answer_pattern: str | None = None
    """Regular expression; the last match's first group (or all of it) is compared."""
    max_new_tokens: int | None = None
    """Longest generated answer; None: the longest reference answer plus a quarter."""
    also: tuple[str, ...] = ()
    """Further metrics."""
    choices: str | None = None
    """Column of the choices that `accuracy` is over."""
    answer: str | None = None
    """Column that says which choice is right; None: the response does."""
    normalise: Normalise = "none"
    """What a choice's log-likelihood is divided by."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Every metric, each once: the loss, the one that counts, the further ones."""
        return tuple(dict.fromkeys((ALWAYS, self.metric, *self.also)))

    @property
    def identity(self) -> dict[str, Any]:
        """What can change a result. Of what came later only what is used, so that keys stay."""
        values: dict[str, Any] = {
            "metric": self.metric,
            "answer_pattern": self.answer_pattern,
            "max_new_tokens": self.max_new_tokens,
        }
        values |= self._identity_of(self.metric)
        if also := {*self.measured} - {ALWAYS, self.metric}:
            values["also"] = {name: self._identity_of(name) for name in sorted(also)}
        return values

    def _identity_of(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if name == "accuracy":
            values |= {"choices": self.choices, "answer": self.answer, "normalise": self.normalise}
        version = metrics.get(name).version
        return values | ({"version": version} if version != FIRST else {})


@dataclass(frozen=True, slots=True)
class Measured:
    """What a metric found: a number over all samples, a number a sample, and what else it saw."""

    value: float
    values: Sequence[float] | Sequence[bool]
    """In the samples' order; comparisons pair them."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Further columns of the samples' table."""


class Metric(Protocol):
    """Judges a model on the evaluation samples."""

    version: ClassVar[str]
    """Changes when the same model on the same samples is given another number."""
    higher_is_better: ClassVar[bool]
    generates: ClassVar[bool]
    """Whether it looks at `Evidence.answers`, which are dear."""

    def check(self, sample: Sample, spec: EvaluationSpec) -> None:
        """Refuses what the metric could say nothing of, before anything is started.

        Raises:
            InputError: names the row or the setting, and the cure.
        """

    def measure(self, seen: Evidence) -> Measured:
        """Over all samples, of which there is at least one."""


metrics: Registry[type[Metric]] = Registry("metric")
