"""An affinity taken apart: by head, by proxy sample, and where it stands in the corpus."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from p2d_core.affinity import Target, scorers
from p2d_core.affinity.explain import HeadShare, looks, standings
from p2d_core.affinity.head_activation import HeadActivation
from p2d_core.affinity.measuring import measure_shard
from p2d_core.affinity.protocol import ByHead, ByProxy, Fitted
from p2d_core.heads.head_map import HeadMap
from tests.small_scoring import NO_TARGET, TARGET, joined, sample_of, samples


def outputs(*vectors: list[float]) -> pa.Table:
    flat = pa.array(np.array(vectors, np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, len(vectors[0]))
    return pa.table({"sample_id": [f"s{i}" for i in range(len(vectors))], "head_outputs": column})


def scored(scorer, model, heads, corpus):
    """Fitted state, the corpus as one table, and its affinities."""
    prepared = scorer.prepare(model, heads, TARGET if scorer.measures_target else NO_TARGET)
    table = joined(corpus, measure_shard(scorer, model, prepared, corpus))
    state = scorer.prepare(model, heads, TARGET)
    if isinstance(scorer, Fitted):
        state = scorer.fit(state, [table])
    (affinity,) = scorer.affinity(state, [table])
    return state, table, np.asarray(affinity)


def test_head_parts_worked_by_hand():
    """Two heads of width 2, as they are. The sample is (3, 4 | 0, 12) of length 13.

    Proxy 0 is (1, 0 | 0, 0), cosine 3/13, all of it the first head's; proxy 1 is (0, 4 | 0, 3) of
    length 5, cosine 16/65 + 36/65. The mean of both: head 0 has (15 + 16) / 130.
    """
    scorer = HeadActivation(neighbours=2, whiten=False)
    state = {
        "heads": torch.tensor([[4, 1], [2, 7]]),
        "proxy": torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 3.0]]]),
    }
    state = scorer.fit(state, [])
    table = outputs([3, 4, 0, 12])
    assert scorer.head_parts(state, table)[0].tolist() == pytest.approx([31 / 130, 36 / 130])
    assert scorer.similarities(state, table)[0].tolist() == pytest.approx([3 / 13, 52 / 65])
    ((look,),) = looks(scorer, state, table, {"affinity": [67 / 130]}, nearest=1)
    assert look.scorer == "head-activation"
    assert look.heads == (
        HeadShare(2, 7, pytest.approx(36 / 130)),
        HeadShare(4, 1, pytest.approx(31 / 130)),
    )
    assert look.left_over == pytest.approx(0, abs=1e-12)
    assert look.proxies == ((1, pytest.approx(52 / 65)),)
    alone = HeadActivation(neighbours=1, whiten=False)
    assert alone.head_parts(state, table)[0].tolist() == pytest.approx([16 / 65, 36 / 65])
    # the mean of (1, 0 | 0, 0) and (0, .8 | 0, .6) has the direction (1, .8 | 0, .6) / sqrt 2
    mean = HeadActivation(compare="mean", whiten=False)
    assert mean.head_parts(state, table)[0].tolist() == pytest.approx(
        [(3 + 4 * 0.8) / 13 / 2**0.5, 12 * 0.6 / 13 / 2**0.5]
    )


def test_whitening_by_hand_scales_a_head_and_mixes_it_with_no_other():
    """Head 0 has variance 4 around 10 in both directions, head 1 variance 1 around 0."""
    scorer = HeadActivation(neighbours=1, shrinkage=0.0)
    corpus = outputs([12, 12, 1, 1], [12, 8, 1, -1], [8, 12, -1, 1], [8, 8, -1, -1])
    state = {
        "heads": torch.tensor([[0, 0], [0, 1]]),
        "proxy": torch.tensor([[[14.0, 10.0], [2.0, 0.0]]]),  # whitened (2, 0 | 2, 0)
    }
    state = scorer.fit(state, [corpus])
    # the sample whitened is (1, 1 | 1, -1), of length 2; both heads agree with the proxy alike
    table = outputs([12, 12, 1, -1])
    assert scorer.head_parts(state, table)[0].tolist() == pytest.approx([2 / 2 / 8**0.5] * 2)
    # another value of head 1 moves what head 0 adds only by the length that they share
    other = scorer.head_parts(state, outputs([12, 12, 0, 0]))[0]
    assert other.tolist() == pytest.approx([2 / 2**0.5 / 8**0.5, 0], abs=1e-9)


@pytest.mark.parametrize("compare", ["nearest", "mean"])
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("neighbours", [1, 3, 50])
def test_what_heads_add_is_the_affinity(model, heads, compare, whiten, neighbours):
    """On a model whose 8 query heads share 4 KV groups; three task heads, of two layers."""
    scorer = HeadActivation(neighbours=neighbours, compare=compare, whiten=whiten)
    corpus = [*samples(30), TARGET.proxy[0]]
    state, table, affinity = scored(scorer, model, heads, corpus)
    parts = scorer.head_parts(state, table)
    assert parts.shape == (31, 3)
    np.testing.assert_allclose(parts.sum(dim=1), affinity, atol=1e-12)
    of_rows = looks(scorer, state, table, {"affinity": affinity.tolist()}, nearest=2)
    for (look,) in of_rows:
        assert {(share.layer, share.head) for share in look.heads} == {*heads.task_heads}
        assert [share.adds for share in look.heads] == sorted(
            (share.adds for share in look.heads), reverse=True
        )
        assert abs(look.left_over) < 1e-12
    ((_, itself), _) = of_rows[30][0].proxies
    assert of_rows[30][0].proxies[0][0] == 0
    assert itself == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("bias", ["measured", "per-token"])
@pytest.mark.parametrize("weigh_by_gain", [True, False])
def test_what_heads_pay_in_context_adds_up_too(model, heads, bias, weigh_by_gain):
    """But for a bias taken off in logarithms and then weighed by gain: that is a product."""
    scorer = scorers.make("icl-attention", {"bias": bias, "weigh_by_gain": weigh_by_gain})
    state, table, affinity = scored(scorer, model, heads, samples(12))
    parts = scorer.head_parts(state, table)
    if weigh_by_gain and bias == "measured":
        assert parts is None
    else:
        assert parts.shape == (12, 3)
        np.testing.assert_allclose(parts.sum(dim=1), affinity, rtol=1e-9, atol=1e-12)
    ((look,), *_) = looks(scorer, state, table, {"affinity": affinity.tolist()}, nearest=1)
    assert (look.heads is None) == (parts is None)


def test_query_heads_of_one_kv_group_have_shares_of_their_own(model):
    """Heads 6 and 7 read the same keys and values, and put out what their own queries found."""
    scores = torch.zeros(3, 8, dtype=torch.float64)
    scores[1, 6], scores[1, 7] = 2, 1
    both = HeadMap.from_scores(scores, n_kv_groups=4, fraction=2 / 24)
    scorer = HeadActivation()
    state, table, affinity = scored(scorer, model, both, samples(20))
    parts = scorer.head_parts(state, table)
    assert state["heads"].tolist() == [[1, 6], [1, 7]]
    np.testing.assert_allclose(parts.sum(dim=1), affinity, atol=1e-12)
    assert not torch.allclose(parts[:, 0], parts[:, 1], atol=1e-2)


def test_an_affinity_that_is_not_the_heads_own_leaves_something_over(model, heads):
    scorer = HeadActivation()
    state, table, affinity = scored(scorer, model, heads, samples(5))
    ((look,), *_) = looks(scorer, state, table, {"affinity": (affinity + 0.25).tolist()}, nearest=1)
    assert look.left_over == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "options"),
    [("head-activation", {}), ("rds-plus", {"choose": "mean"}), ("head-gradient", {})],
)
def test_similarities_are_those_that_the_affinity_is_made_of(model, heads, name, options):
    scorer = scorers.make(name, options)
    state, table, affinity = scored(scorer, model, heads, samples(20))
    assert isinstance(scorer, ByProxy)
    cosines = scorer.similarities(state, table)
    assert cosines.shape == (20, len(TARGET.proxy))
    if name == "head-activation":
        expected = cosines.sort(dim=1, descending=True).values[:, :5].mean(dim=1)
    elif name == "rds-plus":
        expected = cosines.mean(dim=1)
    else:
        # to the mean direction: the mean of the cosines, over the mean's length
        expected = cosines.mean(dim=1) / state["proxy"].double().mean(dim=0).norm()
    np.testing.assert_allclose(expected, affinity, atol=1e-5)


@pytest.mark.parametrize("name", ["head-activation", "icl-attention", "sum"])
def test_a_fitted_state_is_not_fitted_again(model, heads, name):
    """It may be all that is kept: no measurement but a sample's own is read then."""
    parts = {"head-activation": 1.0, "bm25": 1.0, "icl-attention": 1.0}
    scorer = scorers.make(name, {"parts": parts} if name == "sum" else {})
    state, _, _ = scored(scorer, model, heads, samples(12))

    class Gone:
        def __iter__(self):
            raise FileNotFoundError("measurements")

    again = scorer.fit(state, Gone())
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    with pytest.raises(FileNotFoundError):
        scorer.fit(scorer.prepare(model, heads, TARGET), Gone())


def test_the_parts_of_a_sum_are_looked_at_one_by_one(model, heads):
    parts = {"head-activation": 1.0, "loss-shift": -0.5, "head-influence": 0.25, "tfidf": 2.0}
    scorer = scorers.make("sum", {"parts": parts})
    corpus = samples(30)
    state, table, _ = scored(scorer, model, heads, corpus)
    (columns,) = scorer.affinity_parts(state, [table])
    affinities = {name: np.asarray(column)[:4].tolist() for name, column in columns.items()}
    of_rows = looks(scorer, state, table.slice(0, 4), affinities, nearest=3)
    alone = HeadActivation()
    _, _, raw = scored(alone, model, heads, corpus)
    for row, of_parts in enumerate(of_rows):
        assert [look.scorer for look in of_parts] == list(parts)
        activation, shift, influence, tfidf = of_parts
        assert activation.affinity == pytest.approx(raw[row], abs=1e-6)
        assert sum(share.adds for share in activation.heads) == pytest.approx(raw[row], abs=1e-6)
        assert set(shift.measured) == {"base_loss", "tuned_loss"}
        assert shift.affinity == pytest.approx(
            shift.measured["base_loss"] - shift.measured["tuned_loss"], abs=1e-5
        )
        assert set(influence.measured) == {"base_loss", "silenced_loss"}
        assert influence.heads is None
        assert influence.needs_heads
        assert tfidf.measured == {}
        assert tfidf.heads is None
        assert not tfidf.needs_heads
        assert tfidf.proxies is None


def test_a_scorer_that_sees_all_heads_at_once_claims_no_shares():
    assert isinstance(scorers.make("head-activation", {}), ByHead)
    for name in ("head-influence", "head-gradient", "loss-shift", "tfidf"):
        assert not isinstance(scorers.make(name, {}), ByHead)


def test_standings_worked_by_hand():
    values = np.array([0.5, 2.0, np.nan, 2.0, -1.0])
    first, tied, none, last = standings(values, [0, 1, 2, 4])
    assert (first.value, first.rank, first.of, first.lower) == (0.5, 3, 4, 0.25)
    assert (tied.rank, tied.lower) == (1, 0.5)
    assert none is None
    assert (last.rank, last.lower) == (4, 0.0)


def test_the_gates_passed_come_before_the_affinity():
    values = np.array([-0.1, -3.0, 1.0, -0.1])
    passed = np.array([0, 1, 2, 0])
    ranks = [each.rank for each in standings(values, [0, 1, 2, 3], passed)]
    assert ranks == [3, 2, 1, 3]


def test_a_single_proxy_sample_is_the_nearest_and_all_of_the_affinity(model, heads):
    one = Target([sample_of("w1 w2 w3", "w4")], ())
    scorer = HeadActivation()
    corpus = samples(6)
    table = joined(
        corpus, measure_shard(scorer, model, scorer.prepare(model, heads, NO_TARGET), corpus)
    )
    state = scorer.fit(scorer.prepare(model, heads, one), [table])
    (affinity,) = scorer.affinity(state, [table])
    ((look,), *_) = looks(scorer, state, table, {"affinity": affinity.to_pylist()}, nearest=5)
    assert look.proxies == ((0, pytest.approx(affinity[0].as_py())),)
    assert abs(look.left_over) < 1e-12
