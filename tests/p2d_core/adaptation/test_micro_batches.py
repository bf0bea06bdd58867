"""A step's gradients are those of the whole step, however it is cut, and when memory ran out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2d_core.adaptation import micro_batches
from p2d_core.adaptation.adaptations import adaptations
from p2d_core.adaptation.calibration import UNTIMED_STEPS, calibrate_full
from p2d_core.adaptation.micro_batches import MicroBatches
from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.adaptation.spread import Spread
from p2d_core.adaptation.training import train
from p2d_core.attention.layout import attention_layers
from p2d_core.errors import DeviceMemoryError
from p2d_core.heads.head_map import HeadMap
from p2d_core.processes import ALONE
from p2d_core.response_loss import batch_loss, summed_loss
from p2d_core.samples.tokens import EncodedSample, collate
from tests.tiny import tiny_llama

LENGTHS = (30, 6, 12, 7, 29, 11)


def rows(lengths=LENGTHS) -> list[EncodedSample]:
    """Prompts of 4 tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        EncodedSample(str(i), torch.randint(3, 50, (n,), generator=generator).tolist(), 4)
        for i, n in enumerate(lengths)
    ]


def model_of(adaptation: str = "heads"):
    """8 query heads in 4 KV groups; one of them moves."""
    model = tiny_llama()
    scores = torch.zeros(3, 8, dtype=torch.float64)
    scores[1, 5] = 1
    heads = HeadMap.from_scores(scores, n_kv_groups=4, fraction=1 / 24)
    return adaptations.make(adaptation, {}).attach(model, attention_layers(model), heads, "").model


def steps_of(model, tokens: int | None = None) -> MicroBatches:
    return MicroBatches(Spread(model, model), pad_id=0, tokens=tokens)


def gradients(model) -> Tensor:
    moving = (p for p in model.parameters() if p.requires_grad)
    return torch.cat([p.grad.flatten() for p in moving])


def expected(model, samples) -> tuple[Tensor, Tensor]:
    """Loss and gradients of one padded batch of all."""
    loss = batch_loss(model, collate(samples, 0))
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return loss.detach(), found


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, int]]:
    """Samples and padded length of each part that was begun with."""
    begun: list[tuple[int, int]] = []

    def seen(model, batch, run=None):
        begun.append(tuple(batch["input_ids"].shape))
        return summed_loss(model, batch, run)

    monkeypatch.setattr(micro_batches, "summed_loss", seen)
    return begun


@pytest.mark.parametrize("adaptation", ["heads", "attention", "full", "lora"])
def test_a_step_that_is_not_cut_is_the_batch_bit_by_bit(adaptation):
    model = model_of(adaptation)
    loss, found = expected(model, rows())
    assert torch.equal(steps_of(model).backward(rows()), loss)
    assert torch.equal(gradients(model), found)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(5, 40), min_size=1, max_size=9),
    st.integers(1, 200),
    st.sampled_from(["heads", "full"]),
)
def test_however_a_step_is_cut_its_gradients_are_those_of_the_whole(lengths, tokens, adaptation):
    """The mean over all response tokens, not that of the parts' means."""
    model = model_of(adaptation)
    loss, found = expected(model, rows(lengths))
    assert steps_of(model, tokens).backward(rows(lengths)) == pytest.approx(float(loss), rel=1e-5)
    torch.testing.assert_close(gradients(model), found, rtol=1e-4, atol=1e-6)


def test_parts_are_of_like_length_and_within_the_tokens(passes):
    steps_of(model_of(), 60).backward(rows())
    assert passes == [(2, 30), (2, 12), (2, 7)]


def test_when_memory_runs_out_the_step_begins_anew_in_smaller_parts(passes, monkeypatch, caplog):
    """The second part fails, in its backward pass: what came of the first must not count twice."""
    model = model_of("full")
    loss, found = expected(model, rows())
    counted = micro_batches.summed_loss

    def short(model, batch, run=None):
        total, n = counted(model, batch, run)
        if batch["input_ids"].shape == (2, 12):
            total.register_hook(no_room)
        return total, n

    monkeypatch.setattr(micro_batches, "summed_loss", short)
    steps = steps_of(model, 60)
    assert steps.backward(rows()) == pytest.approx(float(loss), rel=1e-5)
    torch.testing.assert_close(gradients(model), found, rtol=1e-4, atol=1e-6)
    one_by_one = [(1, 30), (1, 29), (1, 12), (1, 11), (1, 7), (1, 6)]
    assert passes == [(2, 30), (2, 12), *one_by_one]
    assert steps.tokens == 12
    assert "steps pass in parts of at most 12 tokens now" in caplog.text

    model.zero_grad()
    passes.clear()
    steps.backward(rows())
    assert passes == one_by_one


def no_room(*_: object) -> None:
    raise torch.OutOfMemoryError("no room")


def test_a_training_in_which_memory_runs_out_ends_as_one_in_which_it_does_not(
    passes, monkeypatch, tmp_path
):
    spec = TrainingSpec(epochs=3, learning_rate=1e-2, batch_size=6)
    whole, parts = model_of("full"), model_of("full")
    train(whole, rows(), spec, pad_id=0, scratch=tmp_path / "whole")
    assert passes == [(6, 30)] * 3
    passes.clear()
    counted = micro_batches.summed_loss

    def short(model, batch, run=None):
        total, n = counted(model, batch, run)
        if len(batch["input_ids"]) > 4:
            no_room()
        return total, n

    monkeypatch.setattr(micro_batches, "summed_loss", short)
    train(parts, rows(), spec, pad_id=0, scratch=tmp_path / "parts")
    assert passes == [(6, 30)] + [(2, 30), (2, 12), (2, 7)] * 3
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        # AdamW's first steps are as long for a gradient of 1e-8 as for one of 1
        torch.testing.assert_close(one, other, rtol=0, atol=3e-4)


def test_a_sample_that_does_not_fit_is_an_error_with_a_cure(monkeypatch):
    monkeypatch.setattr(micro_batches, "summed_loss", no_room)
    cure = r"single sample of 30 tokens.*gradient_checkpointing: true or .* lower format.max_tokens"
    with pytest.raises(DeviceMemoryError, match=cure):
        steps_of(model_of()).backward(rows())


def test_of_several_processes_one_cannot_go_on_in_smaller_parts(monkeypatch):
    monkeypatch.setattr(micro_batches, "summed_loss", no_room)
    steps = replace(steps_of(model_of()), processes=replace(ALONE, size=2))
    with pytest.raises(DeviceMemoryError, match=r"Set training\.micro_batch_tokens: 45\."):
        steps.backward(rows())


def test_full_fine_tuning_is_timed_as_it_would_be_trained(passes):
    spec = TrainingSpec(epochs=1, learning_rate=0.0, batch_size=6)
    timed = {"pad_id": 0, "n_samples": 6, "steps": 1, "micro_batch_tokens": 60}
    calibrate_full(tiny_llama(), rows(), spec, **timed)
    assert passes == [(2, 30), (2, 12), (2, 7)] * (UNTIMED_STEPS + 1)
