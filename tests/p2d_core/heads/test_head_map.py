import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from p2d_core.attention.layout import attention_layers
from p2d_core.errors import HeadMapError
from p2d_core.heads.head_map import HEAD_SCHEMA, HeadMap, HeadPick, read_head_map
from tests.tiny import tiny_llama

# 2 layers x 4 query heads in 2 KV groups, worked by hand
SCORES = torch.tensor([[0.1, 0.9, 0.3, 0.3], [0.5, 0.0, 0.9, 0.2]])


def small_map():
    return HeadMap.from_scores(SCORES, n_kv_groups=2, fraction=0.5)


def rows_with(**changes):
    """The table of `small_map` as rows, with changes to the first."""
    rows = small_map().to_table().to_pylist()
    rows[0].update(changes)
    return rows


def from_rows(rows):
    return HeadMap.from_table(pa.Table.from_pylist(rows, schema=HEAD_SCHEMA))


def test_the_best_heads_come_first_and_ties_go_to_the_lower_layer_then_head():
    assert small_map().task_heads == ((0, 1), (1, 2), (1, 0), (0, 2))
    assert small_map().ranks().tolist() == [[7, 1, 4, 5], [3, 8, 2, 6]]


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.1, 1), (0.125, 1), (0.13, 2), (0.25, 2), (0.9, 8), (1.0, 8)]
)
def test_the_share_of_heads_is_rounded_up_and_at_least_one(fraction, count):
    assert len(HeadMap.from_scores(SCORES, 2, fraction).task_heads) == count


def test_seven_hundredths_of_a_hundred_are_seven():
    # 0.07 * 100 is 7.000000000000001 in floating point
    assert len(HeadMap.from_scores(torch.rand(10, 10), 10, 0.07).task_heads) == 7


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_fraction_outside_its_bounds_is_refused(fraction):
    with pytest.raises(HeadMapError, match=r"fraction of task heads is .* in \(0, 1\]"):
        HeadMap.from_scores(SCORES, 2, fraction)


def test_with_a_limit_per_layer_the_next_best_of_other_layers_take_their_place():
    # in order: (0, 1), (1, 2), (1, 0), (0, 2), (0, 3) ...
    capped = HeadPick(0.25, max_per_layer=1).of(SCORES, 2)
    assert capped.task_heads == ((0, 1), (1, 2))
    scores = torch.tensor([[5.0, 4, 3, 2], [1, 0, 0, 0]])
    assert HeadPick(0.375).of(scores, 2).task_heads == ((0, 0), (0, 1), (0, 2))
    three = HeadPick(0.375, max_per_layer=2).of(scores, 2)
    assert three.task_heads == ((0, 0), (0, 1), (1, 0))


def test_of_heads_that_share_keys_and_values_one_is_taken():
    # groups of two: (0, 0) and (0, 1); (0, 2) and (0, 3)
    scores = torch.tensor([[5.0, 4, 3, 2], [1, 0, 0, 0]])
    one_each = HeadPick(0.375, one_per_kv_group=True).of(scores, 2)
    assert one_each.task_heads == ((0, 0), (0, 2), (1, 0))
    assert HeadMap.from_table(one_each.to_table()).task_heads == one_each.task_heads


@settings(deadline=None)  # the first one may wait for a busy machine
@given(
    arrays("float64", (3, 4), elements=st.floats(-5, 5)),
    st.sampled_from([None, 1, 2, 3]),
    st.booleans(),
    st.floats(0.01, 1),
)
def test_limits_hold_and_no_better_head_was_left_out_without_one(scores, most, one_each, fraction):
    try:
        got = HeadPick(fraction, most, one_each).of(torch.from_numpy(scores), 2)
    except HeadMapError as error:
        assert "lift the limit" in str(error)  # noqa: PT017
        assert math.ceil(fraction * 12 - 1e-9) > 3 * min(most or 4, 2 if one_each else 4)
        return
    chosen = set(got.task_heads)
    assert len(chosen) == max(1, math.ceil(fraction * 12 - 1e-9))
    ranks = got.ranks()
    for layer in range(3):
        heads = [head for at, head in chosen if at == layer]
        assert most is None or len(heads) <= most
        assert not one_each or len({head // 2 for head in heads}) == len(heads)
        full = len(heads) == most
        for head in range(4):
            taken = one_each and head // 2 in {other // 2 for other in heads}
            if (layer, head) not in chosen and not full and not taken:
                assert all(ranks[layer, head] > ranks[other] for other in chosen)


def test_more_heads_than_the_limits_leave_are_refused():
    with pytest.raises(
        HeadMapError,
        match=r"fraction 0\.5 asks for 4 of 8 heads, but heads\.max_per_layer 1 leave at most 2",
    ):
        HeadPick(0.5, max_per_layer=1).of(SCORES, 2)
    with pytest.raises(HeadMapError, match=r"max_per_layer 3 and heads\.one_per_kv_group leave at"):
        HeadPick(0.9, max_per_layer=3, one_per_kv_group=True).of(SCORES, 2)
    with pytest.raises(HeadMapError, match=r"max_per_layer is 0; it has to be at least 1"):
        HeadPick(0.5, max_per_layer=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(bad):
    scores = SCORES.clone()
    scores[1, 3] = bad
    with pytest.raises(HeadMapError, match=r"score of head \(1, 3\) is (nan|inf).*1 of all"):
        HeadMap.from_scores(scores, 2)


def test_heads_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(HeadMapError, match="4 query heads do not divide into 3 KV groups"):
        HeadMap.from_scores(SCORES, 3)
    with pytest.raises(HeadMapError, match=r"shape \[8\]"):
        HeadMap.from_scores(SCORES.flatten(), 2)


def test_the_table_worked_by_hand():
    table = small_map().to_table()
    assert table.schema == HEAD_SCHEMA
    assert table.slice(1, 2).to_pylist() == [
        {
            "layer": 0,
            "head": 1,
            "kv_group": 0,
            "score": pytest.approx(0.9),
            "rank": 1,
            "is_task_head": True,
        },
        {
            "layer": 0,
            "head": 2,
            "kv_group": 1,
            "score": pytest.approx(0.3),
            "rank": 4,
            "is_task_head": True,
        },
    ]


@settings(deadline=None)  # the first one may wait for a busy machine
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)).flatmap(
        lambda n: st.tuples(
            arrays("float64", (n[0], n[1] * n[2]), elements=st.floats(-9, 9)),
            st.just(n[1]),
        )
    ),
    st.floats(0.01, 1),
    st.randoms(),
)
def test_a_map_survives_its_table_in_any_order(scores_and_groups, fraction, shuffler):
    scores, n_groups = scores_and_groups
    head_map = HeadMap.from_scores(torch.from_numpy(scores), n_groups, fraction)
    rows = head_map.to_table().to_pylist()
    shuffler.shuffle(rows)
    again = from_rows(rows)
    assert torch.equal(again.scores, head_map.scores)
    assert again.task_heads == head_map.task_heads
    assert again.n_kv_groups == head_map.n_kv_groups
    assert sorted(again.ranks().flatten().tolist()) == list(range(1, len(rows) + 1))


@settings(deadline=None)  # the first one may wait for a busy machine
@given(arrays("float64", (3, 4), elements=st.floats(-9, 9), unique=True), st.floats(0.01, 1))
def test_no_head_outside_scores_higher_than_a_task_head(scores, fraction):
    head_map = HeadMap.from_scores(torch.from_numpy(scores), 2, fraction)
    chosen = [scores[head] for head in head_map.task_heads]
    assert chosen == sorted(scores.flatten(), reverse=True)[: len(chosen)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_with(head=1), r"head \(0, 1\) is there twice"),
        (rows_with()[1:], r"only 7 are there; head \(0, 0\) is missing"),
        (rows_with(layer=-1), r"head \(-1, 0\) in KV group 0 is out of range"),
        (rows_with(kv_group=1), r"head \(0, 0\) is in KV group 1.*has to be 0"),
        (rows_with(score=math.nan), r"score of head \(0, 0\) is nan"),
        (rows_with(rank=3), r"head \(0, 0\) has rank 3; by its score it has to be 7"),
        ([row | {"is_task_head": False} for row in rows_with()], "no head has is_task_head"),
        ([], "there are no rows"),
    ],
)
def test_a_broken_map_is_refused(rows, message):
    with pytest.raises(HeadMapError, match=message):
        from_rows(rows)


def test_missing_and_wrong_columns_are_refused():
    table = small_map().to_table()
    with pytest.raises(HeadMapError, match=r"no column kv_group, score\. It has to have"):
        HeadMap.from_table(table.drop_columns(["score", "kv_group"]))
    words = pa.array(["a"] * 8)
    with pytest.raises(HeadMapError, match="not of the right types"):
        HeadMap.from_table(table.set_column(3, "score", words))
    empty = pa.array([None] * 8, pa.float64())
    with pytest.raises(HeadMapError, match="column score has empty values"):
        HeadMap.from_table(table.set_column(3, "score", empty))


def test_a_file_is_read_and_named_when_it_is_broken(tmp_path):
    path = tmp_path / "heads.parquet"
    pq.write_table(small_map().to_table(), path)
    assert read_head_map(path).task_heads == small_map().task_heads
    pq.write_table(small_map().to_table().slice(1), path)
    with pytest.raises(HeadMapError, match=r"heads\.parquet: head map: of 2 layers x 4"):
        read_head_map(path)
    path.write_text("no")
    with pytest.raises(HeadMapError, match=r"heads\.parquet cannot be read as a head map"):
        read_head_map(path)
    with pytest.raises(HeadMapError, match=r"missing\.parquet cannot be read"):
        read_head_map(tmp_path / "missing.parquet")


def test_a_map_of_another_model_is_refused_with_both_shapes():
    layers = attention_layers(tiny_llama())
    HeadMap.from_scores(torch.rand(3, 8), 4).check_fits(layers)
    with pytest.raises(
        HeadMapError,
        match=r"2 layers of 4 query heads in 2 KV groups, but this model has 3 layers of 8 query "
        r"heads in 4 KV groups",
    ):
        small_map().check_fits(layers)
    with pytest.raises(HeadMapError, match=r"in 2 KV groups, but this model has .* in 4 KV"):
        HeadMap.from_scores(torch.rand(3, 8), 2).check_fits(layers)
