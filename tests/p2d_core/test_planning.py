"""The arithmetic of a plan, worked by hand."""

import pytest

from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.planning import Estimate, Part, Steps, by_stage, scaled, total


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "steps"),
    [
        (100, 8, 3, 39),  # 12.5 batches are 13, three times
        (100, 8, 2.5, 33),  # 32.5 steps
        (3, 8, 0.1, 1),  # at least one
    ],
)
def test_a_training_has_so_many_steps(samples, batch, epochs, steps):
    assert TrainingSpec(epochs, 1e-3, batch).steps(samples) == steps


def test_estimates_add_and_their_errors_add_as_independent_ones():
    assert Estimate(10, 3) + Estimate(5, 4) == Estimate(15, 5)
    assert total([]) == Estimate(0, 0)


def test_the_same_step_many_times_has_the_same_error_each_time():
    assert Estimate(0.5, 0.1).times(100) == Estimate(50, pytest.approx(10))


def test_steps_are_timed_after_those_that_set_up():
    # 5 s up to the end of the first step, then steps of 1, 1, and of 1, 2, 1, 2 that are timed
    timed = Steps([5, 6, 7, 8, 10, 11, 13], count=100)
    # variance 1 / 3, of four
    assert timed.step == Estimate(1.5, pytest.approx((1 / 3) ** 0.5 / 2))
    # three steps of 1.5 would have ended after 4.5 s, not after 7
    assert timed.all.seconds == 2.5 + 150


def test_of_two_steps_the_second_is_timed_and_no_error_known():
    timed = Steps([10, 14], count=5)
    assert timed.step == Estimate(4, 4)
    assert timed.all == Estimate(6 + 5 * 4, 5 * 4)


def test_work_that_was_run_to_its_end_took_what_it_took():
    assert Steps([1, 2, 3], count=3, ended=3.5).all == Estimate(3.5)
    assert Steps([], count=0, ended=0.2).all == Estimate(0.2)


def test_growing_parts_say_what_an_item_takes_and_what_comes_once():
    # 8 took 3 s, of which 1 was set-up; 32 took 8 s: 0.25 each
    estimate = scaled([(8, 3.0), (32, 8.0)], items=1000)
    assert estimate.seconds == pytest.approx(1 + 250)
    assert estimate.spread == pytest.approx((3 / 8 - 0.25) * (1000 - 32))
    assert scaled([(8, 3.0), (32, 8.0)], items=32) == Estimate(9, 0)


def test_one_part_is_exact_only_if_it_was_all():
    assert scaled([(8, 2.0)], items=8) == Estimate(2, 0)
    assert scaled([(8, 2.0)], items=16) == Estimate(4, 4)


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (["new", "new"], "new"),
        (["reused", "new"], "partly reused"),
        (["new", "partly reused"], "partly reused"),
        (["reused", "unknown until scores is made"], "unknown until scores is made"),
    ],
)
def test_calls_of_a_stage_are_one_line(states, state):
    calls = [Part("scores", each, Estimate(2), Estimate(3, 1)) for each in states]
    other = Part("subset", "new", Estimate(1), Estimate(1))
    (line, last) = by_stage([calls[0], other, calls[1]])
    assert (line.stage, line.state, line.now) == ("scores", state, Estimate(4))
    assert line.cold == Estimate(6, pytest.approx(2**0.5))
    assert last == other
