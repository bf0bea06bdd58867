"""Samples as counts of hashed words: what scorers that run no model compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from p2d_core.samples.schema import Sample

TEXTS = ("prompt", "response")
"""What `table_counts` looks at."""


def word_counts(texts: list[str], features: int) -> Any:
    """Of each text how often it has each word, a CSR matrix ``[texts, features]``.

    Words are hashed, so that a corpus is streamed and never whole in memory.
    """
    # a second to import, and most runs do without
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=features, alternate_sign=False, norm=None, token_pattern=r"(?u)\b\w+\b"
    )
    return vectorizer.transform(texts)


def sample_counts(samples: Sequence[Sample], features: int) -> dict[str, Tensor]:
    """`word_counts` of prompts with responses, as the arrays of the CSR matrix."""
    counts = word_counts([f"{s.prompt} {s.response}" for s in samples], features)
    return {
        "data": torch.from_numpy(counts.data),
        "indices": torch.from_numpy(counts.indices.astype(np.int64)),
        "indptr": torch.from_numpy(counts.indptr.astype(np.int64)),
    }


def counts_in(state: dict[str, Tensor], features: int) -> Any:
    """The inverse of `sample_counts`."""
    from scipy.sparse import csr_array

    arrays = (state["data"].numpy(), state["indices"].numpy(), state["indptr"].numpy())
    return csr_array(arrays, shape=(len(state["indptr"]) - 1, features))


def table_counts(table: pa.Table, features: int) -> Any:
    """`word_counts` of prompts with responses."""
    pairs = zip(table["prompt"].to_pylist(), table["response"].to_pylist(), strict=True)
    return word_counts([f"{prompt} {response}" for prompt, response in pairs], features)
