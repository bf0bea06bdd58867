import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d_core.errors import DataError
from p2d_core.samples.schema import Sample, sample_id_of
from p2d_core.samples.split import (
    CorpusCounts,
    assemble_corpus,
    draw_target,
    redraw_proxy,
    refuse_overlap,
)


def sample(text: str, row: int = 0, source: str = "mine") -> Sample:
    return Sample(sample_id_of(text, "r"), source, text, "r", row)


def samples(n: int) -> list[Sample]:
    return [sample(str(row), row) for row in range(n)]


@given(st.lists(st.integers(0, 60), max_size=80), *[st.integers(0, 12)] * 3, st.integers())
def test_the_parts_are_disjoint_and_hold_every_different_sample(
    texts, n_proxy, n_held_out, n_evaluation, seed
):
    target = [sample(str(text), row) for row, text in enumerate(texts)]
    asked = {"n_proxy": n_proxy, "n_held_out": n_held_out, "n_evaluation": n_evaluation}
    if len(set(texts)) < sum(asked.values()):
        with pytest.raises(DataError, match="asked for are"):
            draw_target(target, **asked, seed=seed)
        return
    split = draw_target(target, **asked, seed=seed)
    parts = [split.proxy, split.held_out, split.evaluation, split.rest]
    assert [len(part) for part in parts[:3]] == [n_proxy, n_held_out, n_evaluation]
    ids = [each.sample_id for part in parts for each in part]
    assert len(ids) == len(set(ids))
    assert set(ids) == {each.sample_id for each in target}
    assert [each.row for each in split.rest] == sorted(each.row for each in split.rest)


def test_of_duplicates_the_first_stays():
    split = draw_target(
        [sample("a", 0), sample("b", 1), sample("a", 2)],
        n_proxy=0,
        n_held_out=0,
        n_evaluation=0,
        seed=0,
    )
    assert [each.row for each in split.rest] == [0, 1]


def test_a_draw_depends_on_the_seed_and_not_on_the_order():
    numbers = {"n_proxy": 5, "n_held_out": 5, "n_evaluation": 5}
    forward = draw_target(samples(50), **numbers, seed=1)
    backward = draw_target(samples(50)[::-1], **numbers, seed=1)
    assert forward.proxy == backward.proxy
    assert forward.evaluation == backward.evaluation
    assert forward.proxy != draw_target(samples(50), **numbers, seed=2).proxy


def test_more_proxy_samples_leave_the_other_parts_alone():
    few = draw_target(samples(50), n_proxy=5, n_held_out=5, n_evaluation=5, seed=1)
    more = draw_target(samples(50), n_proxy=9, n_held_out=5, n_evaluation=5, seed=1)
    assert more.proxy[:5] == few.proxy
    assert (more.held_out, more.evaluation) == (few.held_out, few.evaluation)


def test_too_few_samples_are_refused_with_the_numbers_and_the_settings():
    with pytest.raises(
        DataError,
        match=r"the target has 4 samples, 3 of them different; asked for are 6: proxy\.samples 3, "
        r"proxy\.held_out 2, evaluation\.samples 1\. Lower one of these settings",
    ):
        draw_target([*samples(3), sample("0", 3)], n_proxy=3, n_held_out=2, n_evaluation=1, seed=0)


def test_an_overlap_with_the_evaluation_is_refused_with_the_first_rows():
    target = [*samples(5), sample("0", 5)]
    evaluation = [sample("x", 0, "test"), sample("3", 1, "test"), sample("0", 2, "test")]
    with pytest.raises(
        DataError,
        match=r"target and evaluation share 2 samples; the first: row 4 of 'mine' is row 2 of "
        r"'test' \(rows count from 1\)",
    ):
        refuse_overlap(target, evaluation)


def test_sets_without_an_overlap_pass():
    refuse_overlap(samples(5), [sample("x"), sample("x")])


def test_a_corpus_holds_each_sample_once_and_none_of_the_excluded():
    first = [sample("a"), sample("b"), sample("a"), sample("proxy")]
    second = [sample("b", source="other"), sample("c", source="other")]
    counts = CorpusCounts()
    corpus = assemble_corpus([first, second], {sample("proxy").sample_id}, counts)
    assert counts.total == 0
    assert [each.prompt for each in corpus] == ["a", "b", "c"]
    assert counts == CorpusCounts({"mine": 2, "other": 1}, duplicates=2, excluded=1)
    assert counts.total == 3


def test_a_corpus_is_streamed():
    def endless():
        row = 0
        while True:
            yield sample(str(row), row)
            row += 1

    corpus = assemble_corpus([endless()], set(), CorpusCounts())
    assert [next(corpus).row for _ in range(3)] == [0, 1, 2]


def test_counts_add():
    one = CorpusCounts(duplicates=1)
    one.kept["a"] += 2
    two = CorpusCounts(excluded=3)
    two.kept["b"] += 1
    total = one + two
    assert (dict(total.kept), total.duplicates, total.excluded) == ({"a": 2, "b": 1}, 1, 3)


def test_another_draw_of_the_proxy_set_leaves_the_other_parts_alone():
    split = draw_target(samples(60), n_proxy=10, n_held_out=5, n_evaluation=5, seed=1)
    first, again, other = (redraw_proxy(split, draw) for draw in (1, 1, 2))
    assert first == again
    assert first.proxy != other.proxy
    for each in (first, other):
        assert (each.held_out, each.evaluation) == (split.held_out, split.evaluation)
        assert len(each.proxy) == 10
        ids = [sample.sample_id for sample in [*each.proxy, *each.rest]]
        assert sorted(ids) == sorted(s.sample_id for s in [*split.proxy, *split.rest])


def test_a_target_without_rest_has_no_other_draw():
    split = draw_target(samples(20), n_proxy=10, n_held_out=5, n_evaluation=5, seed=1)
    with pytest.raises(DataError, match=r"beside its 10 proxy samples .* no other proxy set"):
        redraw_proxy(split, 1)
