"""How a subset is to be chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from p2d_core.errors import SettingsError


@dataclass(frozen=True, slots=True)
class SelectionSpec:
    """How many samples, and how they are drawn."""

    fraction: float
    """Share of the corpus, in (0, 1]."""
    pool: float = 1.0
    """Draw from the best ``pool`` times the budget; scores with gates: from all that passed."""
    match_lengths: bool = True
    """Spread the response lengths as those of the proxy samples."""
    replay: float = 0.0
    """Share of the subset, in [0, 1), drawn at random from the corpus' other sources."""
    quotas: tuple[tuple[str, float], ...] = ()
    """(source, share of what is chosen by affinity) of sources that get no more and no less of it;
    the others get the rest. Replay comes beside it, from any source."""
    seed: int = 0
    where: str | None = None
    """SQL condition over the scores' columns, see `where.checked_condition`; only samples that meet
    it are candidates, for replay too. With ``at_random`` it bounds how many samples are drawn, and
    the whole corpus is drawn from all the same."""
    at_random: bool = False
    """Draw from the whole corpus; no affinity, no quota: what a selection has to beat."""
    rows: int | None = None
    """Samples that are chosen; None: the ``fraction``."""

    @property
    def identity(self) -> dict[str, Any]:
        """As it stands in keys."""
        return {k: v for k, v in asdict(self).items() if k != "rows" or v is not None}

    def budget(self, n_corpus: int) -> int:
        """How many samples of a corpus are chosen, replay among them."""
        return self.rows or max(1, round(self.fraction * n_corpus))

    def wanted(self, n_corpus: int) -> int:
        """How many of these by affinity."""
        budget = self.budget(n_corpus)
        return budget - self.replayed(budget)

    def replayed(self, budget: int) -> int:
        """How many of so many are replay."""
        return 0 if self.at_random else min(round(self.replay * budget), budget - 1)

    def __post_init__(self) -> None:
        shares = [share for _, share in self.quotas]
        named = {source for source, _ in self.quotas}
        if any(not 0 < share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
            raise SettingsError(
                f"selection.quotas has the shares {shares}; each has to be in (0, 1], and together "
                "at most 1."
            )
        if len(named) < len(shares):
            raise SettingsError("selection.quotas names a source twice; name each once.")
