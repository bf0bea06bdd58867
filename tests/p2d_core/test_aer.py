"""Costs add up, and the AER is what they add up to over full fine-tuning."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d_core.aer import AER, Cost, Reference, in_turn, machine_name, measured

costs = st.builds(
    Cost,
    wall_seconds=st.integers(0, 1000).map(float),
    device_seconds=st.integers(0, 1000).map(float),
    samples=st.integers(0, 10**6),
    tokens=st.integers(0, 10**9),
    peak_memory_bytes=st.integers(0, 10**12),
    machine=st.sampled_from(["", "a", "b", "a + b"]),
)


def test_costs_add_field_by_field_and_of_memory_the_larger_counts():
    total = Cost(1, 2, 3, 4, 5, 500, "a") + Cost(10, 20, 30, 40, 50, 60, "b")
    assert total == Cost(11, 22, 33, 44, 55, 500, "a + b")


@given(costs, costs, costs)
def test_the_order_of_adding_does_not_matter(one, two, three):
    assert one + two == two + one
    assert (one + two) + three == one + (two + three)
    assert one + Cost() == one


def test_a_block_is_measured():
    with measured() as watch:
        watch.samples, watch.tokens = 3, 70
        sum(range(100_000))
    assert 0 < watch.cost.wall_seconds < 10
    assert (watch.cost.samples, watch.cost.tokens) == (3, 70)
    assert watch.cost.peak_memory_bytes > 10**6
    assert watch.cost.machine == machine_name() != ""


def test_aer_by_hand():
    # (2 + 1 + 4 + 0 + 3) seconds against 70: a seventh, the paper's speedup
    stages = {"proxy": 2.0, "heads": 1.0, "scores": 4.0, "subset": 0.0, "model": 3.0}
    aer = AER(stages, Reference("measured", 70.0))
    assert aer.ratio == pytest.approx(1 / 7)
    assert aer.speedup == pytest.approx(7)


def test_waiting_for_another_threads_turn_is_no_cost():
    lock = threading.RLock()
    both_there = threading.Barrier(2)

    def work(_: int) -> float:
        both_there.wait()
        with measured() as watch, in_turn(lock), in_turn(lock):
            time.sleep(0.3)
        return watch.cost.wall_seconds

    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(work, range(2)))
    # one of them came 0.3 s later to its turn
    assert taken == pytest.approx([0.3, 0.3], abs=0.1)
