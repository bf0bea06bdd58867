"""The worst heads of another ranking: the control that shows whether the order matters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from p2d_core.errors import SettingsError
from p2d_core.heads.ranking import Ranker, RankingEvidence, rankers


@rankers.register("bottom")
@dataclass(frozen=True, slots=True)
class Bottom:
    """Minus the scores of another ranker, so that its worst heads become the task heads.

    If these adapt as well as its best, the ranking says nothing. Costs what the other one costs.

    Source: the usual control.
    """

    of: str = "frobenius"
    """The other ranker."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its settings."""

    def __post_init__(self) -> None:
        if self.of == "bottom":
            raise SettingsError("ranker 'bottom': `of` is bottom itself; name another ranker.")
        _ = self.version  # a name or setting that is not known is refused at once

    @property
    def version(self) -> str:
        """Its own and the other's."""
        return f"1-{self._other.version}"

    @property
    def needs_proxy_run(self) -> bool:
        """Does the other?"""
        return self._other.needs_proxy_run

    @property
    def runs_model(self) -> bool:
        """Does the other?"""
        return self._other.runs_model

    @property
    def _other(self) -> Ranker:
        made: Ranker = rankers.make(self.of, self.options)
        return made

    def rank(self, evidence: RankingEvidence) -> Tensor:
        """Minus the other's unit."""
        return -self._other.rank(evidence)
