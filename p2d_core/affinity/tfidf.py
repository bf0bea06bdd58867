"""Affinity by words in common with the proxy samples, weighted by their rarity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from p2d_core.affinity.measuring import only
from p2d_core.affinity.protocol import Scorer, ScorerState, Target, scorers
from p2d_core.affinity.similarity import nearest_mean
from p2d_core.affinity.words import TEXTS, counts_in, sample_counts, table_counts
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample


@scorers.register("tfidf")
@dataclass(frozen=True)
class Tfidf(Scorer):
    """Cosine to the nearest proxy samples in TF-IDF space.

    Costs no forward pass; words are counted twice.

    Source: scikit-learn's TfidfTransformer (smoothed idf).
    """

    neighbours: Annotated[int, Field(ge=1)] = 5
    """How many proxy samples, the nearest ones, the similarity is averaged over."""
    features: Annotated[int, Field(ge=2)] = 2**18
    """Size of the hashed vocabulary."""

    version: ClassVar[str] = "1"
    measures_target: ClassVar[bool] = False
    measured_by: ClassVar[tuple[str, ...]] = ()
    runs_model: ClassVar[bool] = False

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """Hashed word counts of the proxy samples, as the arrays of a CSR matrix."""
        return sample_counts(target.proxy, self.features) if target.proxy else {}

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """Nothing."""
        return {}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """In [0, 1]."""
        documents, containing = 0, np.zeros(self.features)
        for table in only(measured, *TEXTS):
            counts = table_counts(table, self.features)
            documents += counts.shape[0]
            containing += np.bincount(counts.indices, minlength=self.features)
        idf = np.log((1 + documents) / (1 + containing)) + 1
        proxies = _weighted(counts_in(state, self.features), idf)
        for table in only(measured, *TEXTS):
            weighted = _weighted(table_counts(table, self.features), idf)
            similarities = torch.from_numpy((weighted @ proxies.T).toarray())
            yield pa.array(nearest_mean(similarities, self.neighbours).numpy())


def _weighted(counts: Any, idf: np.ndarray[Any, Any]) -> Any:
    from scipy.sparse import csr_array
    from sklearn.preprocessing import normalize

    return normalize(csr_array(counts.multiply(idf[None, :])))
