"""Averaging head scores over draws, and how far draws agree."""

from itertools import combinations

import numpy as np
import pytest
import torch

from p2d_core.heads.draws import agreement, mean_of_draws


def grid(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_mean_of_draws_gives_each_the_same_say():
    # mean sizes 1 and 100: the second is 100 times the mirror of the first
    first, second = grid([0.0, 2], [1, 1]), grid([200.0, 0], [100, 100])
    got = mean_of_draws([first, second])
    torch.testing.assert_close(got, grid([1.0, 1], [1, 1]) * 50.5)
    torch.testing.assert_close(mean_of_draws([first]), first)
    torch.testing.assert_close(mean_of_draws([-first, -first]), -first)


def test_a_draw_without_any_score_says_nothing():
    first = grid([0.0, 2], [1, 1])
    got = mean_of_draws([first, torch.zeros(2, 2)])
    torch.testing.assert_close(got / got.sum(), first / first.sum())


def test_agreement_worked_by_hand():
    # ranks 1 2 3 4, 1 2 4 3 and 4 3 2 1: rank correlations .8, -1 and -.8
    scores = [grid([4.0, 3], [2, 1]), grid([9.0, 8], [1, 2]), grid([0.0, 1], [2, 3])]
    heads = [(0, 0), (0, 1), (1, 0), (1, 1)]
    best = [{heads[0], heads[1]}, {heads[0], heads[2]}, {heads[3], heads[0]}]
    got = agreement(scores, [best])
    assert got.draws == 3
    assert got.spearman == pytest.approx((0.8 - 1 - 0.8) / 3)
    assert got.lowest_spearman == pytest.approx(-1)
    (top,) = got.top
    assert (top.heads, top.in_all) == (2, 1)
    assert top.jaccard == pytest.approx(1 / 3)
    assert top.lowest == pytest.approx(1 / 3)
    # of the 6 pairs of two heads, one is the same, four share one, one shares none
    assert top.by_chance == pytest.approx((1 + 4 / 3) / 6)
    assert top.by_luck == 1.0


@pytest.mark.parametrize(("n_heads", "count"), [(8, 3), (7, 5), (6, 6), (9, 1)])
def test_chance_is_that_of_all_choices(n_heads, count):
    everything = [set(choice) for choice in combinations(range(n_heads), count)]
    one = everything[0]
    jaccards = np.array([len(one & other) / len(one | other) for other in everything])
    scores = [torch.arange(float(n_heads))[None]] * 2
    top = agreement(scores, [[one, one]]).top[0]
    assert top.by_chance == pytest.approx(jaccards.mean())
    if top.by_luck < 1:
        assert (jaccards >= top.by_luck - 1e-9).mean() <= 0.05
    below = jaccards[jaccards < top.by_luck - 1e-9]
    assert not len(below) or (jaccards >= below.max() - 1e-9).mean() > 0.05


def test_the_same_ranking_twice_agrees_wholly_and_equal_scores_with_nothing():
    scores = torch.arange(40.0).view(5, 8)
    same = agreement([scores, scores], [[{(0, 1)}, {(0, 1)}]])
    assert same.spearman == pytest.approx(1)
    assert same.top[0].jaccard == 1
    assert same.spearman > same.spearman_by_luck
    flat = agreement([scores, torch.zeros(5, 8)], [[{(0, 1)}, {(0, 2)}]])
    assert (flat.spearman, flat.top[0].jaccard) == (0, 0)
