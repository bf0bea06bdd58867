"""Which samples a subset holds, and what it says of how they came in."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from p2d_core.errors import InputError, SettingsError
from p2d_core.selection.spec import SelectionSpec
from tests.small_selection import Corpus


def test_without_gates_the_highest_affinities_are_chosen(tmp_path):
    corpus = Corpus(tmp_path, [0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.4, 0.6, 0.5, 0.0])
    assert sorted(corpus.choose(fraction=0.3)) == [1, 3, 5]
    assert corpus.chosen.cut_off == pytest.approx(0.7)
    assert corpus.chosen.by_source == {"a": 2, "b": 1}


def test_ties_go_by_sample_id(tmp_path):
    corpus = Corpus(tmp_path, [0.5] * 10)
    by_id = sorted(range(10), key=lambda i: corpus.samples[i].sample_id)
    assert sorted(corpus.choose(fraction=0.4)) == sorted(by_id[:4])


def test_rounding_moves_ties_at_the_boundary_alone(tmp_path):
    """Other numbers of threads add in another order: 30 samples stand within rounding of it."""
    rng = np.random.default_rng(0)
    exact = np.concatenate([rng.uniform(0.6, 1, 25), np.full(30, 0.5), rng.uniform(0, 0.4, 345)])
    exact[25:55] *= 1 + 1e-9 * np.arange(30)
    chosen = []
    for _ in range(2):
        rounded = exact * (1 + 1e-7 * rng.uniform(-1, 1, 400))
        corpus = Corpus(tmp_path, rounded.tolist())
        chosen.append(set(corpus.choose(fraction=0.1)))
    moved = chosen[0] ^ chosen[1]
    assert moved
    assert moved <= set(range(25, 55))
    assert set(range(25)) <= chosen[0] & chosen[1]


def test_a_tie_at_a_gate_moves_no_more_than_itself_and_what_takes_its_place(tmp_path):
    """What passes is drawn from by chance, but no sample's chance hangs on which others pass."""
    lengths = [3 + i % 5 for i in range(200)]
    passed = [int(i % 2 == 0) for i in range(200)]
    one = Corpus(tmp_path, [1.0] * 200, passed, gates=1, lengths=lengths)
    before = set(one.choose(proxy_lengths=(3, 4, 5, 6, 7), fraction=0.1, match_lengths=True))
    for out in sorted(before):
        without = [0 if i == out else gate for i, gate in enumerate(passed)]
        other = Corpus(tmp_path, [1.0] * 200, without, gates=1, lengths=lengths)
        after = set(other.choose(proxy_lengths=(3, 4, 5, 6, 7), fraction=0.1, match_lengths=True))
        assert out in before - after
        assert len(before - after) == len(after - before) == 1


def test_a_pool_is_drawn_from_by_chance_and_not_from_its_top(tmp_path):
    corpus = Corpus(tmp_path, [float(i) for i in range(100)])
    chosen = set(corpus.choose(fraction=0.1, pool=4.0))
    assert chosen <= set(range(60, 100))
    assert chosen != set(range(90, 100))
    assert set(corpus.choose(fraction=0.1, pool=4.0, seed=1)) != chosen


def test_with_gates_only_what_passed_all_of_them_is_drawn_from(tmp_path):
    passed = [2 if i % 3 == 0 else 1 for i in range(30)]
    corpus = Corpus(tmp_path, [float(-i) for i in range(30)], passed, gates=2)
    assert all(row % 3 == 0 for row in corpus.choose(fraction=0.2))
    assert corpus.chosen.notes == []


def test_too_few_passing_relaxes_the_last_gate_first_and_says_so(tmp_path):
    passed = [2, 2, 1, 1, 1, 0, 0, 0, 0, 0]
    margins = [1.0, 1.0, -0.9, -0.1, -0.5, -0.01, -1, -2, -3, -4]
    corpus = Corpus(tmp_path, margins, passed, gates=2)
    assert sorted(corpus.choose(fraction=0.4)) == [0, 1, 3, 4]
    assert "2 samples passed every gate, 4 were wanted" in corpus.chosen.notes[0]


def test_lengths_follow_the_proxies(tmp_path):
    lengths = [5] * 50 + [50] * 50
    corpus = Corpus(tmp_path, [1.0] * 100, [1] * 100, gates=1, lengths=lengths)
    proxies = [5] * 90 + [50] * 10
    chosen = corpus.choose(fraction=0.4, proxy_lengths=proxies)
    assert sum(row < 50 for row in chosen) == pytest.approx(36, abs=2)
    unmatched = corpus.choose(fraction=0.4, proxy_lengths=proxies, match_lengths=False)
    assert 12 <= sum(row < 50 for row in unmatched) <= 28


def test_a_bin_that_lacks_samples_is_made_up_by_the_others(tmp_path):
    corpus = Corpus(tmp_path, [1.0] * 20, [1] * 20, gates=1, lengths=[5] * 2 + [50] * 18)
    assert len(corpus.choose(fraction=0.5, proxy_lengths=[5] * 10)) == 10


def test_replay_comes_from_the_other_sources_and_out_of_the_budget(tmp_path):
    affinities = [1.0 if i < 50 else 0.0 for i in range(100)]
    corpus = Corpus(tmp_path, affinities)
    chosen = corpus.choose(fraction=0.2, replay=0.25)
    assert len(chosen) == 20
    assert {row for row, by in chosen.items() if by == "replay"} <= set(range(50, 100))
    assert corpus.chosen.replayed == 5


def test_replay_that_finds_no_other_source_says_so(tmp_path):
    corpus = Corpus(tmp_path, [1.0, 2.0])  # one of each source, and both are in the pool
    corpus.choose(fraction=1.0, pool=2.0, replay=0.5)
    assert corpus.chosen.notes == [
        "replay: 1 samples were wanted, other sources have 0; the rest is by affinity"
    ]


def test_a_corpus_of_one_source_has_nothing_to_replay(tmp_path):
    """All is drawn by affinity then, and the lowest that was is the cut-off."""
    corpus = Corpus(tmp_path, [float(i) for i in range(100)], sources="a")
    chosen = corpus.choose(fraction=0.2, replay=0.2)
    assert chosen == dict.fromkeys(range(80, 100), "affinity")
    assert corpus.chosen.cut_off == 80
    assert corpus.chosen.notes == ["replay: 4 samples were wanted, and there is no other source"]


def test_what_fills_up_replay_counts_for_the_cut_off_and_says_if_gates_were_relaxed(tmp_path):
    affinities = [10.0, 9.0, 8.0, 1.0, 0.5, 7.0, 2.0, 2.0, 2.0, 2.0]
    corpus = Corpus(tmp_path, affinities)
    chosen = corpus.choose(fraction=1.0, replay=0.6)
    assert [row for row, by in sorted(chosen.items()) if by == "filled"] == [3, 4]
    assert corpus.chosen.cut_off == 0.5
    corpus = Corpus(tmp_path, affinities, [1, 1, 1, 0, 1, 1, 0, 0, 0, 0], gates=1)
    corpus.choose(fraction=1.0, replay=0.6)
    assert corpus.chosen.notes[-1] == "replay: 1 of the rest did not pass every gate"


def test_a_quota_is_what_a_source_gets_and_the_best_of_it(tmp_path):
    affinities = [float(i) for i in range(100)]  # source b has all the high ones
    corpus = Corpus(tmp_path, affinities)
    chosen = corpus.choose(fraction=0.2, quotas=(("a", 0.25),))
    assert sorted(chosen) == [*range(45, 50), *range(85, 100)]
    assert corpus.chosen.by_source == {"a": 5, "b": 15}
    assert corpus.chosen.cut_off == 45


def test_a_quota_that_its_source_cannot_fill_goes_to_the_others_and_says_so(tmp_path):
    corpus = Corpus(tmp_path, [float(-i) for i in range(10)])
    corpus.choose(fraction=0.8, quotas=(("a", 0.9),))
    assert corpus.chosen.by_source == {"a": 5, "b": 3}
    assert corpus.chosen.notes == ["quota: 7 samples of a were wanted, it has 5"]


def test_a_source_that_is_taken_whole_leaves_the_others_their_quotas(tmp_path):
    corpus = Corpus(tmp_path, [float(i) for i in range(10)])
    chosen = corpus.choose(fraction=0.8, quotas=(("a", 0.65), ("b", 0.35)))
    assert sorted(chosen) == [0, 1, 2, 3, 4, 7, 8, 9]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    passed=st.lists(st.integers(0, 2), min_size=4, max_size=30),
    gates=st.sampled_from([0, 2]),
    fraction=st.floats(0.05, 1),
    quotas=st.sampled_from([(), (("a", 0.3),), (("a", 0.6), ("b", 0.4)), (("a", 0.1), ("b", 0.2))]),
    replay=st.sampled_from([0.0, 0.2]),
)
def test_no_combination_fails_or_takes_more_than_was_asked(
    tmp_path, passed, gates, fraction, quotas, replay
):
    corpus = Corpus(tmp_path, [float(i % 7) for i in range(len(passed))], passed, gates)
    try:
        chosen = corpus.choose(fraction=fraction, quotas=quotas, replay=replay)
    except InputError:
        assume(False)  # all quotas round to no sample, which another test is of
    assert 1 <= len(chosen) <= max(1, round(fraction * len(passed)))


def test_quotas_hold_among_what_passed_the_gates_and_with_ties(tmp_path):
    corpus = Corpus(tmp_path, [1.0] * 100, [i % 2 for i in range(100)], gates=1)
    chosen = corpus.choose([3], fraction=0.2, quotas=(("a", 0.3), ("b", 0.7)))
    assert corpus.chosen.by_source == {"a": 6, "b": 14}
    assert {row % 2 for row in chosen} == {1}
    corpus = Corpus(tmp_path, [1.0] * 100)
    corpus.choose(fraction=0.2, quotas=(("a", 0.3), ("b", 0.7)))
    assert corpus.chosen.by_source == {"a": 6, "b": 14}


def test_a_quota_of_a_source_that_is_not_there_names_those_that_are(tmp_path):
    corpus = Corpus(tmp_path, [1.0, 2.0])
    with pytest.raises(InputError, match="has no source 'c'"):
        corpus.choose(fraction=0.5, quotas=(("c", 0.5),))


def test_places_that_no_quota_takes_and_no_other_source_fills_are_said(tmp_path):
    corpus = Corpus(tmp_path, [float(i) for i in range(10)])
    # 5 x 0.3 rounds to 2, 5 x 0.5 to 2
    assert len(corpus.choose(fraction=0.5, quotas=(("a", 0.3), ("b", 0.5)))) == 4
    assert corpus.chosen.notes == [
        "quotas: 5 samples were wanted, 4 were taken: of the 1 that no quota takes, sources "
        "without one have 0"
    ]
    assert len(corpus.choose(fraction=0.8, quotas=(("a", 0.25),))) == 7
    assert corpus.chosen.notes == [
        "quotas: 8 samples were wanted, 7 were taken: of the 6 that no quota takes, sources "
        "without one have 5"
    ]


@pytest.mark.parametrize("replay", [0.0, 0.5])
@pytest.mark.parametrize("gates", [0, 1])
def test_quotas_that_all_round_to_no_sample_are_refused_where_no_source_is_left(
    gates, replay, tmp_path
):
    corpus = Corpus(tmp_path, [1.0] * 10, [1] * 10, gates=gates)
    with pytest.raises(
        InputError,
        match=r"selection\.quotas: the quotas \(a 0\.5, b 0\.5\) of a budget of 1 round to 0 .* "
        r"Raise selection\.fraction, or take out a quota\.",
    ):
        corpus.choose(
            fraction=0.2 if replay else 0.1, replay=replay, quotas=(("a", 0.5), ("b", 0.5))
        )
    assert len(corpus.choose(fraction=0.1, quotas=(("a", 0.5),))) == 1


@pytest.mark.parametrize("quotas", [(("a", 0.7), ("b", 0.4)), (("a", 0.0),), (("a", 0.1),) * 2])
def test_quotas_that_cannot_be_are_refused(quotas):
    with pytest.raises(SettingsError, match=r"selection\.quotas"):
        SelectionSpec(fraction=0.5, quotas=quotas)


def test_at_random_looks_at_no_affinity(tmp_path):
    corpus = Corpus(tmp_path, [float(i) for i in range(200)], [i % 2 for i in range(200)], 1)
    rows = set(corpus.choose(fraction=0.1, at_random=True, replay=0.5))
    assert len(rows) == 20
    assert min(rows) < 100 < max(rows)
    assert {row % 2 for row in rows} == {0, 1}


def test_the_query_is_kept_without_file_names(tmp_path):
    corpus = Corpus(tmp_path, [1.0, 2.0])
    corpus.choose(fraction=0.5)
    query = (tmp_path / "query.sql").read_text()
    assert "in the order gates_passed DESC, affinity DESC, sample_id" in query
    assert str(tmp_path) not in query


def test_the_same_choice_gives_the_same_bytes(tmp_path):
    corpus = Corpus(tmp_path, [float(i % 7) for i in range(50)])
    corpus.choose(fraction=0.3, replay=0.2)
    first = (tmp_path / "subset.parquet").read_bytes()
    corpus.choose(fraction=0.3, replay=0.2)
    assert (tmp_path / "subset.parquet").read_bytes() == first


def test_an_empty_corpus_is_refused(tmp_path):
    corpus = Corpus(tmp_path, [])
    with pytest.raises(InputError, match="the corpus has no samples to choose from"):
        corpus.choose(fraction=0.5)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.tuples(st.floats(-5, 5), st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=60
    ),
    fraction=st.floats(0.01, 1),
    replay=st.floats(0, 0.9),
    seed=st.integers(0, 3),
)
def test_a_subset_has_its_budget_and_no_sample_twice(tmp_path, rows, fraction, replay, seed):
    affinities, gates, lengths = (list(column) for column in zip(*rows, strict=True))
    corpus = Corpus(tmp_path, affinities, gates, gates=2, lengths=lengths)
    chosen = corpus.choose([3, 9, 20], fraction=fraction, replay=replay, seed=seed)
    budget = max(1, round(fraction * len(rows)))
    assert len(chosen) == corpus.chosen.rows == budget


def test_only_samples_that_meet_the_condition_are_candidates(tmp_path):
    corpus = Corpus(tmp_path, [float(i) for i in range(20)], lengths=[5] * 15 + [50] * 5)
    chosen = corpus.choose(fraction=0.2, where="n_response_tokens < 10", match_lengths=False)
    assert sorted(chosen) == [11, 12, 13, 14]
    assert corpus.chosen.corpus_by_source == {"a": 10, "b": 10}
    assert corpus.chosen.notes == ["selection.where: 15 of 20 samples meet n_response_tokens < 10"]
    assert "WHERE (n_response_tokens < 10)" in (tmp_path / "query.sql").read_text()


def test_a_budget_is_no_larger_than_what_meets_the_condition_and_says_so(tmp_path):
    corpus = Corpus(tmp_path, [float(i) for i in range(20)])
    assert sorted(corpus.choose(fraction=0.5, where="affinity >= 17")) == [17, 18, 19]
    assert corpus.chosen.notes[0].endswith("3 of 20 samples meet affinity >= 17, 10 were wanted")


def test_a_random_subset_is_as_large_but_from_the_whole_corpus(tmp_path):
    corpus = Corpus(tmp_path, [float(i) for i in range(60)])
    chosen = corpus.choose(fraction=0.5, where="affinity >= 40", at_random=True)
    assert len(chosen) == 20
    assert min(chosen) < 40


def test_replay_and_what_fills_it_up_meet_the_condition_too(tmp_path):
    corpus = Corpus(tmp_path, [1.0 if i < 50 else 0.0 for i in range(100)], lengths=[1, 2] * 50)
    for replay in (0.25, 0.9):
        chosen = corpus.choose(fraction=0.2, replay=replay, where="n_response_tokens = 2")
        assert len(chosen) == 20
        assert all(row % 2 for row in chosen)


def test_quotas_are_filled_within_the_condition(tmp_path):
    corpus = Corpus(tmp_path, [float(i) for i in range(100)])
    chosen = corpus.choose(fraction=0.2, quotas=(("a", 0.5),), where="affinity < 60")
    assert sorted(chosen) == [*range(40, 60)]
    with pytest.raises(InputError, match=r"no source 'b' that meets selection.where"):
        corpus.choose(fraction=0.2, quotas=(("b", 0.5),), where="source = 'a'")


def test_a_condition_that_nothing_meets_is_refused(tmp_path):
    corpus = Corpus(tmp_path, [1.0, 2.0])
    with pytest.raises(InputError, match=r"none of the 2 samples of the corpus meets"):
        corpus.choose(fraction=0.5, where="affinity > 5")


def test_a_condition_that_cannot_be_computed_is_refused_with_its_words(tmp_path):
    corpus = Corpus(tmp_path, [1.0, 2.0])
    where = " * ".join(["n_tokens"] * 10) + " > 1"
    with pytest.raises(InputError, match=r"selection.where: .* cannot be computed of every sample"):
        corpus.choose(fraction=0.5, where=where)
    # of a negative affinity it is NaN, which is above 0 in DuckDB
    with pytest.raises(SettingsError, match="the function ln is not allowed here"):
        corpus.choose(fraction=0.5, where="ln(affinity) > 0")


def test_a_condition_is_checked_here_too(tmp_path):
    corpus = Corpus(tmp_path, [1.0, 2.0])
    with pytest.raises(SettingsError, match="it has a subquery"):
        corpus.choose(fraction=0.5, where="affinity > (SELECT 1)")


def test_with_gates_the_condition_comes_before_the_pool_is_drawn(tmp_path):
    passed = [2 if i % 3 == 0 else 1 for i in range(30)]
    corpus = Corpus(tmp_path, [float(-i) for i in range(30)], passed, gates=2)
    chosen = corpus.choose(fraction=0.1, where="affinity <= -15")
    assert all(row % 3 == 0 and row >= 15 for row in chosen)
    assert len(chosen) == 3
