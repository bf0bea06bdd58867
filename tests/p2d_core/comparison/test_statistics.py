"""Intervals and paired differences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d_core.comparison.statistics import mean_interval, paired_difference


def test_a_mean_and_its_t_interval():
    # t(0.975, 2) is 4.303 in every table; the standard error of 1, 2, 3 is 1 / sqrt(3)
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.high - 2 == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert interval.high - 2 == pytest.approx(2 - interval.low)


def test_one_value_has_no_interval_and_shows_nothing():
    interval = mean_interval([5.0])
    assert interval.mean == 5
    assert np.isnan(interval.low)
    assert interval.shows == 0


def test_no_value_has_no_mean():
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_a_difference_is_paired_by_seed_and_sample():
    hard = {f"s{i}": float(i) for i in range(50)}
    better = {sample: value + 0.1 for sample, value in hard.items()}
    gain = paired_difference({0: better, 1: better}, {0: hard, 1: hard})
    assert gain.mean == pytest.approx(0.1)
    # the samples differ by far more than the arms do: paired, that does not matter
    assert gain.low == pytest.approx(0.1)
    assert gain.shows == 1


def test_only_what_both_have_counts():
    assert paired_difference({0: {"a": 1.0}}, {1: {"a": 0.0}}) is None
    gain = paired_difference({0: {"a": 1.0, "b": 9.0}}, {0: {"a": 0.0, "c": 9.0}})
    assert gain.mean == 1


def test_a_gain_that_seeds_disagree_on_is_not_shown():
    samples = [f"s{i}" for i in range(100)]
    one = {s: 1.0 for s in samples}
    none = {s: 0.0 for s in samples}
    assert paired_difference({0: one, 1: none, 2: none}, {0: none, 1: none, 2: one}).shows == 0
    assert paired_difference({0: one, 1: one, 2: one}, {0: none, 1: none, 2: none}).shows == 1


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from("abcdef"),
            st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
            min_size=1,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_the_other_way_round_is_the_opposite(pairs):
    a = {seed: {s: v[0] for s, v in each.items()} for seed, each in enumerate(pairs)}
    b = {seed: {s: v[1] for s, v in each.items()} for seed, each in enumerate(pairs)}
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert forth.mean == pytest.approx(-back.mean)
    assert forth.low == pytest.approx(-back.high)
    assert forth.low <= forth.mean + 1e-9
    assert forth.mean <= forth.high + 1e-9


def test_half_of_the_intervals_level_is_right():
    """95% intervals of a mean of normal draws cover it about that often."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        a = {0: {f"s{i}": float(v) for i, v in enumerate(rng.normal(0.3, 1, 60))}}
        gain = paired_difference(a, {0: dict.fromkeys(a[0], 0.0)}, seed=trial)
        covered += gain.low <= 0.3 <= gain.high
    assert 0.89 <= covered / 200 <= 0.99
