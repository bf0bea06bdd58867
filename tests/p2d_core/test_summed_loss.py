"""The summed loss is that of the single tokens, in every family, whatever moves."""

import copy

import pytest
import torch
from torch import nn

from p2d_core import response_loss
from p2d_core.adaptation.adaptations import adaptations
from p2d_core.adaptation.masked import attach_head_deltas
from p2d_core.attention.layout import attention_layers
from p2d_core.heads.head_map import HeadMap
from p2d_core.response_loss import batch_loss, summed_loss, token_losses
from p2d_core.shaping import Shaping
from tests.families import FAMILIES, family_model
from tests.tiny import tiny_llama, token_batch

HEADS = [(1, 3), (0, 2)]
every_family = pytest.mark.parametrize("family", FAMILIES)
either_side = pytest.mark.parametrize("side", ["right", "left"])


def batch(side="right", learnt=lambda row, places: places[2:]):
    """The first two tokens of each row are its prompt, or what ``learnt`` leaves out."""
    ids, mask = token_batch([5, 9, 7], side=side)
    labels = torch.full_like(ids, -100)
    for row, real in enumerate(mask.bool()):
        places = learnt(row, real.nonzero().flatten())
        labels[row, places] = ids[row, places]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(total, model):
    moving = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(total, moving, allow_unused=True)


def check_equal(model, given):
    """To some millionths of a gradient's largest value, or of a tenth of the largest of all."""
    losses, wanted = token_losses(model, given)
    expected = gradients(losses.sum(), model)
    least = max(float(each.abs().max()) for each in expected if each is not None) / 10
    total, n_tokens = summed_loss(model, given)
    torch.testing.assert_close(total, losses.sum(), rtol=1e-6, atol=0)
    assert n_tokens == wanted.sum()
    for got, gradient in zip(gradients(total, model), expected, strict=True):
        assert (got is None) == (gradient is None)
        if gradient is not None:
            most = max(least, float(gradient.abs().max()))
            torch.testing.assert_close(got, gradient, rtol=0, atol=5e-6 * most)


@every_family
@either_side
def test_with_deltas_on_heads(family, side):
    model = family_model(family)
    attach_head_deltas(model, attention_layers(model), HEADS)
    check_equal(model, batch(side))


@every_family
def test_with_all_parameters(family):
    check_equal(family_model(family).requires_grad_(True), batch())


def test_with_peft_lora():
    model = tiny_llama()
    scores = HeadMap.from_scores(torch.ones(3, 8), 4, 0.1)
    attached = adaptations.make("lora", {}).attach(model, attention_layers(model), scores, "base")
    check_equal(attached.model, batch())


def test_a_tied_head_gets_both_gradients():
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_equal(model, batch())


def test_rows_of_which_nothing_or_one_token_is_learnt():
    model = tiny_llama()
    attach_head_deltas(model, attention_layers(model), HEADS)
    check_equal(model, batch(learnt=lambda row, places: places[-1:] if row == 1 else places[:0]))
    check_equal(model, batch(learnt=lambda row, places: places[:0]))
    nothing = batch_loss(model, batch(learnt=lambda row, places: places[:0]))
    assert nothing.item() == 0
    nothing.backward()


def logits_made(model, given):
    """Positions whose logits the head gave, at each call; 3 + 7 + 5 are learnt."""
    made = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _head, _inputs, output: made.append(output.shape[:-1].numel())
    )
    batch_loss(model, given)
    hook.remove()
    return made


def test_the_head_gives_the_logits_of_one_position():
    assert logits_made(tiny_llama(), batch()) == [1]


class Shifted(nn.Module):
    """Stands around a model that does to its logits what nobody knows."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output.logits = output.logits + torch.arange(50.0)
        return output


def test_logits_of_unknown_shaping_are_the_models_own():
    model = Shifted(tiny_llama())
    check_equal(model, batch())
    assert logits_made(model, batch()) == [15]


def test_a_head_that_is_no_plain_layer_gives_all_logits():
    class Head(nn.Linear):
        pass

    model = tiny_llama()
    model.lm_head.__class__ = Head
    check_equal(model, batch())
    assert logits_made(model, batch()) == [15]


@either_side
def test_a_batch_of_which_nothing_is_learnt_shows_how_logits_are_shaped(side):
    model = family_model("gemma2")
    response_loss._shapings.pop(model.lm_head, None)
    batch_loss(model, batch(side, learnt=lambda row, places: places[:0]))
    cap = model.config.final_logit_softcapping
    assert response_loss._shapings[model.lm_head] == Shaping(cap=cap)


def test_autocast_is_as_near_to_float32_as_it_was():
    model = tiny_llama(initializer_range=0.05)
    exact = copy.deepcopy(model)
    attach_head_deltas(model, attention_layers(model), HEADS)
    attach_head_deltas(exact, attention_layers(exact), HEADS)
    expected = gradients(summed_loss(exact, batch())[0], exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = summed_loss(model, batch())
    for got, wanted in zip(gradients(total, model), expected, strict=True):
        assert nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.99
