"""Activations that are computed again: the same gradients from less memory."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import Made
from p2d_core.recomputed import recomputed_activations
from p2d_core.response_loss import batch_loss
from tests.families import FAMILIES, family_model
from tests.tiny import tiny_llama, token_batch

IDS, MASK = token_batch([6, 9, 4])


def loss_of(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def kept(model, run):
    """What is held between the passes, and the loss that holds it."""
    there = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with Made(but=there) as made:
        loss = run()
    return made.still_there(), loss


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_bit_for_bit(family):
    model = family_model(family).requires_grad_(True)
    expected = gradients(model, loss_of(model))
    with recomputed_activations(model):
        loss = loss_of(model)
    for got, wanted in zip(gradients(model, loss), expected, strict=True):
        assert torch.equal(got, wanted)


def again(model):
    with recomputed_activations(model):
        return loss_of(model)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_gated_mlp_keeps_one_tensor_of_its_width_less(frozen):
    model = tiny_llama(intermediate_size=512)
    if frozen:
        for layer in model.model.layers:
            layer.mlp.requires_grad_(False)
    before, _held = kept(model, lambda: loss_of(model))
    after, _held = kept(model, lambda: again(model))
    assert before - after == 3 * IDS.numel() * 512 * 4


def test_an_mlp_of_one_activation_keeps_what_it_was_given_alone():
    """What comes out of GELU is kept for the next weight's gradient, and made again."""
    model = family_model("gpt_neox").requires_grad_(True)
    width = model.config.intermediate_size
    before, _held = kept(model, lambda: loss_of(model))
    after, _held = kept(model, lambda: again(model))
    assert before - after == 3 * IDS.numel() * width * 4


def test_what_relu_gave_is_kept_because_its_own_backward_pass_needs_it():
    model = family_model("opt").requires_grad_(True)
    assert isinstance(model.model.decoder.layers[0].activation_fn, nn.ReLU)
    before, _held = kept(model, lambda: loss_of(model))
    after, _held = kept(model, lambda: again(model))
    assert after == before


def test_checkpointed_layers_keep_what_they_kept():
    model = tiny_llama().train()
    expected = gradients(model, loss_of(model))
    model.activation_checkpointing_enable({"use_reentrant": False})
    before, _held = kept(model, lambda: loss_of(model))
    after, loss = kept(model, lambda: again(model))
    assert after == before
    for got, wanted in zip(gradients(model, loss), expected, strict=True):
        torch.testing.assert_close(got, wanted)


class Mlp(nn.Module):
    """Changes what its activation gave, before it is kept for another product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)).mul_(2).add_(1))


def test_an_output_that_was_written_over_is_kept_as_it_is():
    torch.manual_seed(0)
    model = Mlp()
    x = torch.randn(3, 4)
    expected = gradients(model, model(x).sum())
    with recomputed_activations(model):
        loss = model(x).sum()
    for got, wanted in zip(gradients(model, loss), expected, strict=True):
        assert torch.equal(got, wanted)


def test_training_keeps_no_logits_and_no_activations():
    """Under a frozen base, beside the two factors of each MLP, little is kept."""
    model = tiny_llama(intermediate_size=512, vocab_size=5000)
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    labels = IDS.masked_fill(MASK == 0, -100)
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    held, _loss = kept(model, lambda: batch_loss(model, given))
    factors = 3 * 2 * IDS.numel() * 512 * 4
    logits = int((labels[:, 1:] >= 0).sum()) * 5000 * 4
    assert factors < held < factors + logits
