"""Whether a head map still holds: how far today's draws agree with it, against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2d_core.heads.draws import Agreement, agreement
from p2d_core.heads.head_map import HeadMap


@dataclass(frozen=True, slots=True)
class Drift:
    """A head map in use against maps of today's data. Source: ours."""

    draws: int
    spearman: float
    """Rank correlation over all heads of the map in use with a draw of today; mean over draws."""
    overlap: float
    """Task heads that both have over those that one has (Jaccard); mean over draws."""
    floor_spearman: float
    """The same between two draws of today: what noise alone does to the ranking."""
    floor_overlap: float
    margin: float

    @property
    def has_drifted(self) -> bool:
        """Whether both figures lie below their noise floor by more than the margin.

        One alone is not enough: a ranking that changed where no task head is changes nothing, and
        task heads that change while the ranking agrees as well as ever are ties.
        """
        return (
            self.floor_spearman - self.spearman > self.margin
            and self.floor_overlap - self.overlap > self.margin
        )

    @property
    def sentence(self) -> str:
        """For a person."""
        figures = (
            f"rank correlation {self.spearman:.2f} (between today's own draws "
            f"{self.floor_spearman:.2f}), overlap of the task heads {self.overlap:.2f} "
            f"({self.floor_overlap:.2f}), margin {self.margin:g}"
        )
        if self.has_drifted:
            return f"The head map has drifted: {figures}."
        return f"The head map holds: {figures}."


def drift(in_use: HeadMap, today: Sequence[HeadMap], *, margin: float) -> Drift:
    """Compares the map in use with each of today's, and those with each other.

    Args:
        today: at least two maps of the same model, each ranked on another proxy set.
        margin: by how much a figure has to lie below the noise floor, in (0, 1).
    """
    against = [agreement_of([in_use, one]) for one in today]
    floor = agreement_of(today)
    return Drift(
        draws=len(today),
        spearman=sum(each.spearman for each in against) / len(against),
        overlap=sum(each.top[0].jaccard for each in against) / len(against),
        floor_spearman=floor.spearman,
        floor_overlap=floor.top[0].jaccard,
        margin=margin,
    )


def agreement_of(maps: Sequence[HeadMap]) -> Agreement:
    """How far the scores and the task heads of at least two maps agree."""
    return agreement([each.scores for each in maps], [[set(each.task_heads) for each in maps]])
