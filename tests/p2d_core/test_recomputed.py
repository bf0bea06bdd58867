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


def kept_less(model):
    """Numbers a token that are not held, where the activations are computed again."""
    before, _held = kept(model, lambda: loss_of(model))
    after, _held = kept(model, lambda: again(model))
    return (before - after) / (4 * IDS.numel())


def moving(model, projection):
    """The model with this projection of each layer to train, and the embeddings below them."""
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.endswith(f"{projection}.weight"):
            parameter.requires_grad_(True)
    return model


N_LAYERS, HIDDEN = 3, 64


@pytest.mark.parametrize(("projection", "norms"), [("q_proj", 1), ("o_proj", 0), ("up_proj", 1)])
def test_a_gated_mlp_and_a_norm_before_tuned_projections_keep_a_tensor_less(projection, norms):
    model = moving(tiny_llama(intermediate_size=512), projection)
    assert kept_less(model) == N_LAYERS * (512 + norms * HIDDEN)


def test_what_a_norm_gave_is_kept_where_its_own_backward_pass_needs_nothing():
    """In the first layer above frozen embeddings there is none."""
    model = moving(tiny_llama(intermediate_size=512), "q_proj")
    model.get_input_embeddings().requires_grad_(False)
    assert kept_less(model) == N_LAYERS * 512 + (N_LAYERS - 1) * HIDDEN


def test_full_fine_tuning_keeps_no_activation_and_no_norms_output():
    """Two norms a layer, and the one before the LM head."""
    model = tiny_llama(intermediate_size=512)
    assert kept_less(model) == N_LAYERS * (512 + 2 * HIDDEN) + HIDDEN


def test_norms_of_queries_and_keys_do_not_hide_the_one_before_them():
    model = moving(family_model("qwen3"), "v_proj")
    assert kept_less(model) == N_LAYERS * (model.config.intermediate_size + HIDDEN)


def test_an_mlp_of_one_activation_keeps_what_it_was_given_alone():
    """What comes out of GELU is kept for the next weight's gradient, and made again."""
    model = moving(family_model("gpt_neox"), "dense_4h_to_h")
    assert kept_less(model) == N_LAYERS * model.config.intermediate_size


def test_what_relu_gave_is_kept_because_its_own_backward_pass_needs_it():
    model = moving(family_model("opt"), "fc2")
    assert isinstance(model.model.decoder.layers[0].activation_fn, nn.ReLU)
    assert kept_less(model) == 0


@pytest.mark.parametrize("random", [nn.Dropout(0.5), nn.RReLU()])
def test_what_is_drawn_at_random_is_not_drawn_again(random):
    model = nn.Sequential(nn.Linear(4, 64), random, nn.Linear(64, 4)).train()
    x = torch.randn(8, 4)
    torch.manual_seed(0)
    expected = gradients(model, model(x).sum())
    torch.manual_seed(0)
    with recomputed_activations(model):
        loss = model(x).sum()
    for got, wanted in zip(gradients(model, loss), expected, strict=True):
        assert torch.equal(got, wanted)


class Cubed(nn.Module):
    """Keeps what it was given; autocast makes squared errors in float32, on the CPU too."""

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.mse_loss(x, torch.zeros_like(x), reduction="none")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.scale = nn.Linear(8, 8), Cubed(), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.up(x)) * self.scale


def test_under_autocast_it_runs_again_as_it_ran():
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(5, 8)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().sum()

    expected = gradients(model, loss())
    before, _held = kept(model, loss)

    def again():
        with recomputed_activations(model):
            return loss()

    after, held = kept(model, again)
    assert after < before
    for got, wanted in zip(gradients(model, held), expected, strict=True):
        assert torch.equal(got, wanted)


def test_checkpointed_layers_keep_what_they_kept():
    """The norm before the LM head is in none of them."""
    model = tiny_llama().train()
    expected = gradients(model, loss_of(model))
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert kept_less(model) == HIDDEN
    for got, wanted in zip(gradients(model, again(model)), expected, strict=True):
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
