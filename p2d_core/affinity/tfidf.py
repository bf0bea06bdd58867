"""Affinity by words in common with the proxy samples, weighted by their rarity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from p2d_core.affinity.protocol import ScorerState, Target, scorers
from p2d_core.affinity.similarity import nearest_mean
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample


@scorers.register("tfidf")
@dataclass(frozen=True)
class Tfidf:
    """Cosine to the nearest proxy samples in TF-IDF space. Runs no model.

    Words are hashed, so that the corpus is streamed and never whole in memory.

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
    needs_heads: ClassVar[bool] = False
    needs_head_proxy: ClassVar[bool] = False

    def prepare(self, model: CapturedModel, heads: HeadMap | None, target: Target) -> ScorerState:
        """Hashed word counts of the proxy samples, as the arrays of a CSR matrix."""
        if not target.proxy:
            return {}
        counts = self._counts([f"{s.prompt} {s.response}" for s in target.proxy])
        return {
            "data": torch.from_numpy(counts.data),
            "indices": torch.from_numpy(counts.indices.astype(np.int64)),
            "indptr": torch.from_numpy(counts.indptr.astype(np.int64)),
        }

    def measure(
        self, model: CapturedModel, state: ScorerState, shard: Sequence[Sample]
    ) -> dict[str, Any]:
        """Nothing."""
        return {}

    def affinity(self, state: ScorerState, measured: Iterable[pa.Table]) -> Iterator[pa.Array]:
        """In [0, 1]."""
        documents, containing = 0, np.zeros(self.features)
        for table in measured:
            counts = self._counts(_texts(table))
            documents += counts.shape[0]
            containing += np.bincount(counts.indices, minlength=self.features)
        idf = np.log((1 + documents) / (1 + containing)) + 1
        from scipy.sparse import csr_array

        arrays = (state["data"].numpy(), state["indices"].numpy(), state["indptr"].numpy())
        shape = (len(state["indptr"]) - 1, self.features)
        proxies = _weighted(csr_array(arrays, shape=shape), idf)
        for table in measured:
            similarities = (_weighted(self._counts(_texts(table)), idf) @ proxies.T).toarray()
            yield pa.array(nearest_mean(torch.from_numpy(similarities), self.neighbours).numpy())

    def _counts(self, texts: list[str]) -> Any:
        # a second to import, and most runs do without
        from sklearn.feature_extraction.text import HashingVectorizer

        vectorizer = HashingVectorizer(
            n_features=self.features, alternate_sign=False, norm=None, token_pattern=r"(?u)\b\w+\b"
        )
        return vectorizer.transform(texts)


def _texts(table: pa.Table) -> list[str]:
    pairs = zip(table["prompt"].to_pylist(), table["response"].to_pylist(), strict=True)
    return [f"{prompt} {response}" for prompt, response in pairs]


def _weighted(counts: Any, idf: np.ndarray[Any, Any]) -> Any:
    from scipy.sparse import csr_array
    from sklearn.preprocessing import normalize

    return normalize(csr_array(counts.multiply(idf[None, :])))
