"""Which samples the gates after the first are tried on, and on how many of them."""

from hypothesis import given
from hypothesis import strategies as st

from p2d_core.affinity.tried import SHARES, first_share, is_tried, next_share
from p2d_core.samples.schema import sample_id_of

IDS = [sample_id_of(f"prompt {i}", "response") for i in range(4000)]


def test_a_share_has_about_so_many_samples_and_all_of_every_smaller_one():
    before: set[str] = set()
    for share in SHARES:
        tried = {sample_id for sample_id in IDS if is_tried(sample_id, share)}
        assert before <= tried
        assert abs(len(tried) - share * len(IDS)) <= 4 * (share * (1 - share) * len(IDS)) ** 0.5
        before = tried
    assert before == set(IDS)


def test_the_first_share_is_worked_out_by_hand():
    # 4,130 reached it, nine in ten should pass; a quarter gives 929
    assert first_share(4130, 881, 0.9) == 1 / 4
    assert first_share(4130, 930, 0.9) == 1 / 2
    assert first_share(4130, 10, 0.9) == 1 / 16
    assert first_share(750, 375, 0.9) == 1.0
    assert first_share(100, 1, 0.0) == 1.0
    assert first_share(0, 1, 0.9) == 1.0


@given(st.integers(0, 10**9), st.floats(1, 1e9), st.floats(0, 1))
def test_it_is_the_smallest_that_is_expected_to_be_enough(reached, enough, passing):
    share = first_share(reached, enough, passing)
    assert share == 1 or reached * share * passing >= enough
    assert all(reached * s * passing < enough for s in SHARES if s < share)


def test_the_next_share_goes_by_what_passed_of_the_one_before():
    assert next_share(1 / 16, 50, 100) == 1 / 8
    assert next_share(1 / 16, 49, 100) == 1 / 4
    assert next_share(1 / 8, 0, 100) == 1.0
    assert next_share(1 / 4, 10, 100) == 1.0
