"""The fused loss is the plain one: value and gradients, whatever is done to the logits."""

import pytest
import torch
from torch import Tensor

from p2d_core import fused_loss
from p2d_core.fused_loss import summed_cross_entropy
from p2d_core.shaping import Shaping

SHAPINGS = {
    "as they are": Shaping(),
    "scaled": Shaping(scale=0.0625),
    "capped": Shaping(cap=5.0),
    "scaled and capped": Shaping(scale=2.0, cap=5.0),
}
every_shaping = pytest.mark.parametrize("shaping", SHAPINGS.values(), ids=list(SHAPINGS))
either_head = pytest.mark.parametrize("moves", [False, True], ids=["frozen", "moving"])


@pytest.fixture(autouse=True)
def _few_words_at_once(monkeypatch):
    """The vocabularies below are met in pieces of 7."""
    monkeypatch.setattr(fused_loss, "FEWEST_WORDS", 7)
    monkeypatch.setitem(fused_loss.LOGITS_AT_ONCE, "cpu", 1)


def given(rows=9, width=6, words=30, *, moves=False, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator)).to(dtype)

    hidden, weight, offset = random(rows, width), random(words, width), random(words)
    targets = torch.randint(0, words, (rows,), generator=generator)
    hidden.requires_grad_()
    weight.requires_grad_(moves)
    offset.requires_grad_(moves)
    return hidden, weight, offset if bias else None, targets


def plain(hidden, weight, bias, targets, shaping):
    raw = torch.nn.functional.linear(hidden, weight, bias)
    logits = raw * shaping.scale
    if shaping.cap is not None:
        logits = torch.tanh(logits / shaping.cap) * shaping.cap
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def gradients(loss, tensors):
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return torch.autograd.grad(loss * 0.3, wanted)


@every_shaping
@either_head
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_the_plain_loss(shaping, moves, bias):
    *parts, targets = given(moves=moves, bias=bias)
    expected = plain(*parts, targets, shaping)
    total = summed_cross_entropy(*parts, targets, shaping, torch.float64)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for got, wanted in zip(gradients(total, parts), gradients(expected, parts), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@either_head
def test_float32_is_right_to_a_millionth(moves):
    *parts, targets = given(rows=40, width=64, words=500, moves=moves, dtype=torch.float32)
    with torch.no_grad():
        parts[1].mul_(0.1)  # as large as a model's; float32 logits of 100 are off by more
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in parts]
    expected = plain(*exact, targets, Shaping())
    total = summed_cross_entropy(*parts, targets, Shaping(), torch.float32)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    for got, wanted in zip(gradients(total, parts), gradients(expected, exact), strict=True):
        most = float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6 * most)


def test_a_word_that_is_all_but_certain_keeps_its_small_gradient():
    """1 - p is about 1e-9 there, below what a float32 near 1 can say."""
    weight = torch.tensor([[0.0], [1.0], [-1.0]])
    hidden = torch.tensor([[20.0]], requires_grad=True)
    total = summed_cross_entropy(hidden, weight, None, torch.tensor([1]), Shaping(), torch.float32)
    (gradient,) = torch.autograd.grad(total, [hidden])
    assert gradient.item() == pytest.approx(-torch.tensor(-20.0).exp().item(), rel=1e-5)


@either_head
def test_products_in_bfloat16_are_as_near_as_the_plain_ones(moves):
    *parts, targets = given(rows=40, width=64, words=500, moves=moves, dtype=torch.float32)
    exact = gradients(plain(*parts, targets, Shaping()), parts)
    total = summed_cross_entropy(*parts, targets, Shaping(), torch.bfloat16)
    assert total.dtype == torch.float32
    for got, wanted in zip(gradients(total, parts), exact, strict=True):
        assert got.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.99


@either_head
def test_no_rows_lose_nothing(moves):
    *parts, targets = given(rows=0, moves=moves)
    total = summed_cross_entropy(*parts, targets, Shaping(cap=5.0), torch.float64)
    assert total.item() == 0
    assert not any(gradient.any() for gradient in gradients(total, parts))


def test_under_a_frozen_head_one_gradient_is_kept_and_no_logits():
    hidden, weight, bias, targets = given()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        summed_cross_entropy(hidden, weight, bias, targets, Shaping(cap=5.0), torch.float64)
    assert [tensor.shape for tensor in kept] == [hidden.shape]
