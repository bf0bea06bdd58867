"""The search for a learning rate: a climb over the loss on samples that training does not see."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d_core.adaptation.rates import MOST, best_rate, gentle_rate, rate_at, rate_for
from p2d_core.errors import TrainingError


def test_rates_are_half_a_power_of_ten_apart():
    assert [rate_at(notch) for notch in range(-3, 4)] == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.5}, 3e-3),
        ({1e-3: 1.0, 3e-3: 1.5, 3e-4: 1.2}, 1e-3),
        ({1e-3: 2.0, 3e-3: 3.0, 3e-4: 1.5, 1e-4: 1.4, 3e-5: 1.6}, 1e-4),
        ({1e-3: 2.0, 3e-3: math.inf, 3e-4: 2.5}, 1e-3),
        ({1e-3: math.inf, 3e-3: math.inf, 3e-4: math.inf, 1e-4: 2.0, 3e-5: 2.2}, 1e-4),
        ({1e-3: 2.0, 3e-3: 2.0, 3e-4: 2.0, 1e-4: 2.1}, 3e-4),
    ],
)
def test_it_climbs_until_the_next_is_no_better_and_tries_no_other(losses, best):
    asked = []

    def loss_at(rate):
        asked.append(rate)
        return losses[rate]

    assert best_rate(loss_at) == (best, losses)
    assert len(asked) == len(losses), "none is tried twice"


@given(valley=st.integers(-5, 5), steepness=st.floats(0.01, 100))
def test_the_lowest_point_of_any_one_valley_is_found(valley, steepness):
    def loss_at(rate):
        return steepness * abs(math.log(rate / rate_at(valley)))

    best, losses = best_rate(loss_at)
    assert best == rate_at(valley)
    assert len(losses) <= MOST


@pytest.mark.parametrize(
    ("tried", "steps", "rate"),
    [(38, 38, 1e-2), (38, 3, 1e-2), (38, 250, 5.5e-3), (38, 3750, 2.3e-3), (30, 60, 8e-3)],
)
def test_a_longer_training_gets_a_lower_rate(tried, steps, rate):
    """By hand: (38 / 250) ** 0.32 is 0.547, (38 / 3750) ** 0.32 is 0.230, 0.5 ** 0.32 is 0.801."""
    assert rate_for(1e-2, tried, steps) == rate


def test_where_training_always_runs_away_the_error_says_what_to_look_at():
    with pytest.raises(TrainingError, match=r"every learning rate from 0.001 down to 1e-06\. Look"):
        best_rate(lambda rate: math.inf)


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        # the best takes 9 off 10: 95% of it is 8.55, so that 1.45 is good enough and 1.5 is not
        ({1e-3: 1.5, 3e-3: 1.45, 1e-2: 1.0, 3e-2: math.inf}, 3e-3),
        ({1e-3: 1.5, 3e-3: 1.46, 1e-2: 1.0, 3e-2: 4.0}, 1e-2),
        # the next higher one would do too: the best is far from where training runs away
        ({1e-3: 1.2, 3e-3: 1.0, 1e-2: 1.1}, 3e-3),
        ({1e-3: 1.2, 3e-3: 1.0, 1e-2: 1.46}, 1e-3),
        # lower still would be too little where training lasts longer
        ({1e-3: 1.2, 3e-3: 1.1, 1e-2: 1.0, 3e-2: 4.0}, 3e-3),
        ({1e-3: 1.0, 3e-3: 1.0, 3e-4: 9.0}, 1e-3),
        ({1e-3: 1.2, 3e-3: 1.0}, 3e-3),  # no higher one was tried
        # where no rate is any good the best is the one that does least harm
        ({1e-3: 12.0, 3e-3: 13.0, 3e-4: 11.0, 1e-4: 10.0, 3e-5: 10.0}, 3e-5),
    ],
)
def test_at_the_edge_the_next_lower_rate_is_taken_where_it_is_nearly_as_good(losses, rate):
    assert gentle_rate(losses, untuned=10.0) == rate


@given(st.dictionaries(st.integers(-4, 4).map(rate_at), st.floats(0, 20), min_size=1))
def test_a_gentle_rate_is_no_higher_than_the_best_and_no_worse_than_it_says(losses):
    found = gentle_rate(losses, untuned=10.0)
    best = min(losses, key=losses.get)
    assert found <= best
    assert 10.0 - losses[found] >= min(0.95 * (10.0 - losses[best]), 10.0 - losses[best])
