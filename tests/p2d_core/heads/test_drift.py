"""Whether a head map still holds, worked by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2d_core.heads.drift import drift
from p2d_core.heads.head_map import HeadMap


def head_map(*scores: float) -> HeadMap:
    """Two layers of four query heads in two KV groups; the best two are task heads."""
    return HeadMap.from_scores(torch.tensor(scores).reshape(2, 4), n_kv_groups=2, fraction=0.25)


UP = head_map(1, 2, 3, 4, 5, 6, 7, 8)
ALMOST = head_map(1, 2, 3, 4, 5, 6, 8, 7)
DOWN = head_map(8, 7, 6, 5, 4, 3, 2, 1)
OTHER_TOP = head_map(1, 2, 3, 4, 8, 7, 6, 5)


def test_figures_worked_by_hand():
    # 1 - 6 * sum(d^2) / (8 * 63): against ALMOST d^2 = 2, against OTHER_TOP 9 + 1 + 1 + 9 = 20
    found = drift(UP, [ALMOST, OTHER_TOP], margin=0.1)
    assert found.spearman == pytest.approx((1 - 12 / 504 + 1 - 120 / 504) / 2)
    # {7, 6} and {6, 7} have both in common, {7, 6} and {4, 5} none
    assert found.overlap == pytest.approx(0.5)
    # ALMOST against OTHER_TOP: d^2 = 9 + 1 + 4 + 4
    assert found.floor_spearman == pytest.approx(1 - 6 * 18 / 504)
    assert found.floor_overlap == 0


def test_a_map_that_todays_draws_contradict_has_drifted():
    found = drift(DOWN, [UP, ALMOST], margin=0.1)
    assert found.has_drifted
    assert found.sentence.startswith("The head map has drifted: rank correlation -0.9")


def test_draws_that_contradict_each_other_as_much_say_nothing():
    found = drift(UP, [DOWN, UP], margin=0.1)
    assert not found.has_drifted
    assert found.sentence.startswith("The head map holds: ")


def test_other_task_heads_alone_are_no_drift_while_the_ranking_agrees():
    # today's draws are one and the same, and differ from the map in use in its best heads only
    in_use, today = head_map(1, 2, 3, 4, 5, 6, 7, 8), head_map(1, 2, 3, 4, 7.5, 6, 7, 8)
    found = drift(in_use, [today, today], margin=0.2)
    assert found.floor_overlap - found.overlap > 0.2
    assert not found.has_drifted


def test_the_margin_decides():
    assert drift(OTHER_TOP, [UP, UP], margin=0.1).has_drifted
    assert not drift(OTHER_TOP, [UP, UP], margin=0.5).has_drifted


@given(st.lists(st.permutations(range(8)), min_size=2, max_size=4), st.floats(0.01, 0.99))
def test_a_map_among_equals_never_drifts(orders, margin):
    maps = [head_map(*order) for order in orders]
    assert not drift(maps[0], [maps[0]] * 3, margin=margin).has_drifted
    found = drift(maps[0], maps, margin=margin)
    assert -1 <= found.spearman <= 1
    assert 0 <= found.overlap <= 1
