"""Scorers that count words, against counting them by hand."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from p2d_core.affinity import scorers
from tests.small_scoring import TARGET, affinities, sample_of, samples


def words_of(sample) -> list[str]:
    return f"{sample.prompt} {sample.response}".split()


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.2, 1.0), (0.0, 0.0)])
def test_bm25_is_lucenes_sum_over_the_querys_words(model, heads, k1, b):
    corpus = samples(30)
    documents = [words_of(sample) for sample in corpus]
    mean_length = sum(map(len, documents)) / len(documents)
    containing = Counter(word for document in documents for word in set(document))

    def score(query: list[str], document: list[str]) -> float:
        total = 0.0
        for word in query:
            df, tf = containing[word], document.count(word)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            norm = k1 * (1 - b + b * len(document) / mean_length)
            total += idf * tf / (tf + norm) if tf else 0
        return total

    expected = [
        np.mean(sorted(score(words_of(query), document) for query in TARGET.proxy)[-3:])
        for document in documents
    ]
    got = affinities("bm25", model, heads, [corpus[:9], corpus[9:]], neighbours=3, k1=k1, b=b)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_tfidf_is_scikit_learns_cosine_to_the_nearest_proxies(model, heads):
    """Its own vectoriser, whose vocabulary is no hash."""
    corpus = samples(30)
    vectors = TfidfVectorizer(token_pattern=r"\S+", lowercase=False)
    documents = vectors.fit_transform([" ".join(words_of(sample)) for sample in corpus])
    proxies = vectors.transform([" ".join(words_of(sample)) for sample in TARGET.proxy])
    for neighbours in (1, 3):
        expected = np.sort((documents @ proxies.T).toarray(), axis=1)[:, -neighbours:].mean(axis=1)
        got = affinities("tfidf", model, heads, [corpus[:9], corpus[9:]], neighbours=neighbours)
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["tfidf", "bm25"])
def test_in_a_vocabulary_of_two_hashes_words_are_taken_for_each_other(name, model, heads):
    corpus = samples(30)
    few, many = (affinities(name, model, heads, [corpus], features=n) for n in (2, 2**18))
    assert not np.allclose(few, many)


def test_bm25_without_a_word_in_common_is_0(model, heads):
    scorer = scorers.make("bm25", {})
    shard = [sample_of("nothing of", "theirs"), TARGET.proxy[0]]
    table = pa.table({name: [getattr(s, name) for s in shard] for name in ("prompt", "response")})
    (got,) = scorer.affinity(scorer.prepare(model, heads, TARGET), [table])
    assert got[0].as_py() == 0 < got[1].as_py()
