"""Which samples the last gate is tried on, and on how many of them."""

from hypothesis import given
from hypothesis import strategies as st

from p2d_core.affinity.tried import SHARES, first_share, is_tried
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
    assert first_share(4130, 881, 0.1) == 1 / 4
    assert first_share(4130, 930, 0.1) == 1 / 2
    assert first_share(4130, 10, 0.1) == 1 / 16
    assert first_share(750, 375, 0.1) == 1.0
    assert first_share(100, 1, 1.0) == 1.0
    assert first_share(0, 1, 0.1) == 1.0


@given(st.integers(0, 10**9), st.floats(1, 1e9), st.floats(0, 1))
def test_it_is_the_smallest_that_is_expected_to_be_enough(reached, enough, gate):
    share = first_share(reached, enough, gate)
    assert share == 1 or reached * share * (1 - gate) >= enough
    assert all(reached * s * (1 - gate) < enough for s in SHARES if s < share)
