"""What a model does to its head's logits is told from its config and from what it gives."""

import pytest
import torch

from p2d_core.shaping import Shaping, shaping_of
from tests.families import FAMILIES, family_model
from tests.tiny import token_batch


def seen(model):
    """What the head gave and what the model returned, for the last position of a row."""
    raw = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _i, o: raw.append(o))
    with torch.no_grad():
        logits = model(input_ids=token_batch([5])[0]).logits[:, -1:]
    hook.remove()
    return raw[0][:, -1:], logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shaping_of_every_family_is_known(family):
    model = family_model(family)
    raw, logits = seen(model)
    shaping = shaping_of(model.config, raw, logits)
    assert shaping is not None
    shaped, _ = shaping.shape_(raw.clone())
    torch.testing.assert_close(shaped, logits)


def test_gemma_2_caps_and_cohere_scales():
    def of(family):
        model = family_model(family)
        return shaping_of(model.config, *seen(model)), model.config

    gemma, config = of("gemma2")
    assert gemma == Shaping(cap=config.final_logit_softcapping)
    cohere, config = of("cohere")
    assert cohere == Shaping(scale=config.logit_scale)


class Config:
    """With the names that are given."""

    def __init__(self, **names: float) -> None:
        self.__dict__ |= names

    def get_text_config(self):
        return self


RAW = torch.randn(1, 1, 20, generator=torch.Generator().manual_seed(0))


def test_a_name_in_the_config_that_the_model_does_not_look_at_means_nothing():
    assert shaping_of(Config(logit_scale=0.5), RAW, RAW) == Shaping()


def test_granite_divides():
    assert shaping_of(Config(logits_scaling=8.0), RAW, RAW / 8) == Shaping(scale=1 / 8)


def test_a_shaping_that_has_no_name_is_not_known():
    assert shaping_of(Config(), RAW, RAW + 1) is None
    assert shaping_of(Config(final_logit_softcapping=3.0), RAW, RAW.clamp(-1, 1)) is None
    assert shaping_of(Config(), RAW, RAW[..., :10]) is None


def test_a_head_of_zeros_leaves_it_to_the_config():
    nothing = torch.zeros_like(RAW)
    assert shaping_of(Config(final_logit_softcapping=3.0), nothing, nothing) == Shaping(cap=3.0)


def test_the_slope_is_the_derivative():
    raw = RAW.double().requires_grad_()
    capped = 3.0 * torch.tanh(2.0 * raw / 3.0)
    (wanted,) = torch.autograd.grad(capped.sum(), [raw])
    shaped, slope = Shaping(scale=2.0, cap=3.0).shape_(raw.detach().clone())
    torch.testing.assert_close(shaped, capped.detach())
    torch.testing.assert_close(slope, wanted)
