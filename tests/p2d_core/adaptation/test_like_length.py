"""Batches of like length: each sample once a pass, little padding, another order each time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2d_core.adaptation.calibration import UNTIMED_STEPS, calibrate_full
from p2d_core.adaptation.like_length import LikeLength, like_length
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.adaptation.training import train
from p2d_core.planning import padded_sizes
from p2d_core.samples.tokens import EncodedSample
from tests.tiny import tiny_llama

SPEC = TrainingSpec(epochs=2, learning_rate=1e-2, batch_size=4, group_by_length=True)


class Asked(list):
    """Samples that note the lengths of those that are asked for, one by one."""

    def __init__(self, lengths):
        super().__init__(EncodedSample(str(i), [3 + i % 40] * n, 1) for i, n in enumerate(lengths))
        self.lengths = []

    def __getitem__(self, index):
        self.lengths.append(len(super().__getitem__(index)))
        return super().__getitem__(index)


def mixed(n: int = 64) -> Asked:
    """Of 2 to 33 tokens, in an order that has nothing to do with it."""
    return Asked([2 + (7 * i) % 32 for i in range(n)])


def padding(lengths) -> float:
    """Over tokens, in steps of 4 samples."""
    return sum(padded_sizes(lengths, 4)) / sum(lengths) - 1


@given(st.lists(st.integers(1, 500), min_size=1, max_size=300), st.integers(1, 9))
def test_each_sample_stands_once(lengths, batch_size):
    assert sorted(like_length(lengths, batch_size, 0)) == list(range(len(lengths)))


def test_a_tenth_is_padding_where_it_was_a_third():
    lengths = torch.randint(50, 300, (800,), generator=torch.Generator().manual_seed(0)).tolist()
    order = like_length(lengths, 8, 0)
    assert sum(padded_sizes(lengths, 8)) > 1.4 * sum(lengths)
    assert sum(padded_sizes([lengths[i] for i in order], 8)) < 1.1 * sum(lengths)


def test_a_pass_does_not_go_from_long_to_short():
    lengths = list(range(1, 801))
    order = like_length(lengths, 8, 0)
    first, second = order[:400], order[400:]
    assert abs(sum(first) - sum(second)) < 0.2 * sum(lengths)


def test_an_epoch_has_an_order_of_its_own_that_repeats():
    def orders(seed):
        sampler = LikeLength([2 + i % 30 for i in range(64)], 4, seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            yield list(sampler)

    assert list(orders(0)) == list(orders(0))
    first, second = orders(0)
    assert first != second
    assert list(orders(1)) != [first, second]


def test_training_asks_for_samples_of_like_length_together(tmp_path):
    samples, usual = mixed(), mixed()
    train(tiny_llama(), samples, SPEC, pad_id=0, scratch=tmp_path / "a")
    plain = replace(SPEC, group_by_length=False)
    train(tiny_llama(), usual, plain, pad_id=0, scratch=tmp_path / "b")
    for epoch in (slice(0, 64), slice(64, 128)):
        assert sorted(samples.lengths[epoch]) == sorted(usual.lengths[epoch])
        assert padding(samples.lengths[epoch]) < 0.2
        assert padding(usual.lengths[epoch]) > 0.3
    assert samples.lengths[:64] != samples.lengths[64:]


def test_a_run_that_goes_on_ends_the_same(tmp_path):
    """In the second epoch, whose order is not the first one's; equal to the last bit."""

    def weights(scratch, stop_at=None):
        model = tiny_llama()

        def progress(done, total):
            if done == stop_at:
                raise KeyboardInterrupt

        train(
            model, mixed(), replace(SPEC, learning_rate=1e-3), pad_id=0, scratch=scratch,
            checkpoint_seconds=0, progress=progress,
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "stopped", stop_at=22)
    assert torch.equal(weights(tmp_path / "stopped"), weights(tmp_path / "undisturbed"))


def test_full_fine_tuning_is_timed_on_such_steps(tmp_path):
    """Padded as those of the whole corpus, of which more are sorted together."""

    def padded(n_samples):
        samples = mixed()
        steps = 16 - UNTIMED_STEPS
        calibrate_full(tiny_llama(), samples, SPEC, pad_id=0, n_samples=n_samples, steps=steps)
        return padding(samples.lengths)

    assert padded(10_000) < 0.05 < padded(64) < 0.2


def test_where_it_is_off_a_key_is_what_it_was_before_there_was_the_setting():
    assert "group_by_length" not in replace(SPEC, group_by_length=False).identity
    assert SPEC.identity["group_by_length"] is True
