"""Affinity by BM25: how well a sample answers to the proxy samples as queries."""

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


@scorers.register("bm25")
@dataclass(frozen=True)
class Bm25(Scorer):
    """BM25 of a sample for each proxy sample as a query, averaged over the best of them.

    ``sum over the query's words of idf * tf / (tf + k1 * (1 - b + b * length / mean length))``,
    with ``idf = ln(1 + (N - df + 0.5) / (df + 0.5))`` over the corpus; a word that the query has
    twice counts twice. Lengths are whole, not Lucene's single byte.

    Costs no forward pass; words are counted twice.

    Source: Robertson and Zaragoza 2009 (The Probabilistic Relevance Framework); the variant is
    "Lucene (accurate)" of Kamphuis et al. 2020 (Which BM25 Do You Mean?).
    """

    neighbours: Annotated[int, Field(ge=1)] = 5
    """How many proxy samples, those with the highest scores, are averaged over."""
    k1: Annotated[float, Field(ge=0)] = 0.9
    """How slowly a repeated word stops to count."""
    b: Annotated[float, Field(ge=0, le=1)] = 0.4
    """How much a long sample is held against it, in [0, 1]."""
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
        """0 without a word in common; no upper bound."""
        documents, words, containing = 0, 0.0, np.zeros(self.features)
        for table in only(measured, *TEXTS):
            counts = table_counts(table, self.features)
            documents += counts.shape[0]
            words += float(counts.sum())
            containing += np.bincount(counts.indices, minlength=self.features)
        mean_length = max(words / max(documents, 1), 1.0)
        idf = np.log1p((documents - containing + 0.5) / (containing + 0.5))
        queries = counts_in(state, self.features).multiply(idf[None, :]).tocsr()
        for table in only(measured, *TEXTS):
            counts = table_counts(table, self.features)
            lengths = np.asarray(counts.sum(axis=1)).reshape(-1) / mean_length
            norm = self.k1 * (1 - self.b + self.b * lengths)
            counts.data /= counts.data + np.repeat(norm, np.diff(counts.indptr))
            scores = torch.from_numpy((counts @ queries.T).toarray())
            yield pa.array(nearest_mean(scores, self.neighbours).numpy())
