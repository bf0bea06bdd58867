"""What a metric is, what it is asked for, and the metrics by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from p2d_core.errors import SettingsError
from p2d_core.registry import Registry
from p2d_core.samples.schema import Sample

if TYPE_CHECKING:
    from p2d_core.evaluation.evidence import Evidence

Normalise = Literal["none", "tokens", "bytes"]
ALWAYS = "loss"
"""The metric that is measured whatever else is."""
FIRST = "1"
"""Version of a metric that is in no key."""
EVERY_KEY = ("metric", "answer_pattern", "max_new_tokens")
"""In the key of every evaluation, whichever metric reads them."""


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
        values = {each: getattr(self, each) for each in EVERY_KEY}
        values |= self._identity_of(self.metric)
        if also := {*self.measured} - {ALWAYS, self.metric}:
            values["also"] = {name: self._identity_of(name) for name in sorted(also)}
        return values

    def _identity_of(self, name: str) -> dict[str, Any]:
        metric = metrics.get(name)
        values = {each: getattr(self, each) for each in metric.reads if each not in EVERY_KEY}
        return values | ({"version": metric.version} if metric.version != FIRST else {})

    def check_read(self) -> None:
        """Raises SettingsError: something is set that none of the metrics reads."""
        read = {each for name in self.measured for each in metrics.get(name).reads}
        for each in fields(self):
            readers = [name for name in metrics if each.name in metrics.get(name).reads]
            given = getattr(self, each.name)
            if readers and each.name not in read and given != each.default:
                raise SettingsError(
                    f"evaluation.{each.name} is {given!r}, but {' and '.join(self.measured)} do "
                    f"not read it. Leave it out, or let evaluation.metric (or also) have "
                    f"{' or '.join(readers)}."
                )


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
    reads: ClassVar[tuple[str, ...]]
    """Fields of `EvaluationSpec` that say something to it."""
    counts_tokens: ClassVar[bool]
    """Whether it is of tokens and not of texts: of two tokenizers it cannot be compared."""

    def check(self, sample: Sample, spec: EvaluationSpec) -> None:
        """Refuses what the metric could say nothing of, before anything is started.

        Raises:
            InputError: names the row or the setting, and the cure.
        """

    def measure(self, seen: Evidence) -> Measured:
        """Over all samples, of which there is at least one."""


metrics: Registry[type[Metric]] = Registry("metric")
