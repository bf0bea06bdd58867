"""All heads of one layer: the control of choosing a layer in place of heads."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from p2d_core.errors import SettingsError
from p2d_core.heads.ranking import RankingEvidence, rankers


@rankers.register("layer")
@dataclass(frozen=True, slots=True)
class Layer:
    """1 for the heads of one layer, 0 for others. Costs nothing.

    With a fraction of one over the number of layers its heads are the task heads and no others.

    Source: Data Whisperer, arXiv 2505.12212, which looks at all heads of a layer.
    """

    layer: Annotated[int, Field(ge=0)] = 0
    """Its number, from 0 at the embeddings."""
    version: ClassVar[str] = "1"
    needs_proxy_run: ClassVar[bool] = False
    runs_model: ClassVar[bool] = False

    def rank(self, evidence: RankingEvidence) -> Tensor:
        """1 or 0.

        Raises:
            SettingsError: the model has no such layer.
        """
        scores = evidence.empty_scores()
        if self.layer >= len(scores):
            raise SettingsError(
                f"ranker 'layer': `layer` is {self.layer}; the base has layers 0 to "
                f"{len(scores) - 1}."
            )
        scores[self.layer] = 1
        return scores
