"""Scorers that look at the gradients of single samples do so for every family of models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import normalize

from p2d_core.affinity import Target, scorers
from p2d_core.attention.layout import ROLES, attention_layers, slices_of
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.response_loss import batch_loss
from p2d_core.samples.tokens import collate
from tests.families import FAMILIES, N_HEADS, N_LAYERS, family_model
from tests.small_scoring import WORDS, samples
from tests.tiny_tokenizer import tiny_word_level

HEADS = [(1, 3), (0, 2), (1, 0), (2, 7)]

every_family = pytest.mark.parametrize("family", FAMILIES)


def captured_family(family, folder):
    captured = CapturedModel(folder)
    captured.model = family_model(family).requires_grad_(False)
    captured.tokenizer = tiny_word_level(WORDS)
    return captured


def cosines_one_by_one(model, encoded, gradient):
    """Between samples' gradients, each sample's from a backward pass of its own."""
    vectors = []
    for sample in encoded:
        model.zero_grad()
        batch_loss(model, collate([sample], 0)).backward()
        vectors.append(torch.cat([part.flatten() for part in gradient()]))
    unit = normalize(torch.stack(vectors), dim=1)
    return unit @ unit.T


@every_family
@pytest.mark.parametrize("slices", [ROLES, ("q", "o")])
def test_head_gradient_is_that_of_the_heads_own_slices(family, slices, tmp_path):
    scores = torch.zeros(N_LAYERS, N_HEADS)
    for layer, head in HEADS:
        scores[layer, head] = 1
    heads = HeadMap.from_scores(scores, FAMILIES[family].n_kv_groups, len(HEADS) / scores.numel())
    captured, target = captured_family(family, tmp_path), samples(5)
    scorer = scorers.make("head-gradient", {"dimensions": 10**6, "slices": slices})
    proxy = scorer.prepare(captured, heads, Target(target, ()))["proxy"]
    model = family_model(family)

    def gradient():
        for piece in slices_of(attention_layers(family_model(family)), HEADS, slices):
            grad = model.get_submodule(piece.module).weight.grad
            yield grad.narrow(piece.dim, piece.start, piece.stop - piece.start)

    expected = cosines_one_by_one(model, captured.encode(target), gradient)
    assert expected.min() < 0.9
    torch.testing.assert_close(proxy @ proxy.T, expected, atol=1e-4, rtol=0)


@every_family
def test_less_has_the_gradients_of_one_lora_a_projection_as_peft_has_them(family, tmp_path):
    captured, target = captured_family(family, tmp_path), samples(5)
    options = {"rank": 2, "alpha": 8, "epochs": 1, "learning_rate": 1e-2, "dimensions": 10**6}
    state = scorers.make("less", options).prepare(captured, None, Target(target, ()))
    paths = [path for layer in attention_layers(family_model(family)) for path in layer.modules]
    assert sum(name.startswith("a.") for name in state) == len(paths)
    config = LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=paths,
        fan_in_fan_out=FAMILIES[family].transposed,
        task_type="CAUSAL_LM",
    )
    network = get_peft_model(family_model(family), config)
    weights = []
    for i, path in enumerate(paths):
        module = network.base_model.model.get_submodule(path)
        weights += [module.lora_A["default"].weight, module.lora_B["default"].weight]
        weights[-2].data.copy_(state[f"a.{i}"])
        weights[-1].data.copy_(state[f"b.{i}"])
        assert weights[-1].any()
    expected = cosines_one_by_one(
        network, captured.encode(target), lambda: [weight.grad for weight in weights]
    )
    proxy = state["proxy"]
    torch.testing.assert_close(proxy @ proxy.T, expected, atol=1e-4, rtol=0)
