"""Scorers made of gradients, against autograd one sample at a time; and what a sketch keeps."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import normalize

from p2d_core.affinity import scorers
from p2d_core.affinity.gradients import Sketch, few_at_once
from p2d_core.affinity.measuring import measure_shard
from p2d_core.attention.layout import ROLES, slices_of
from tests.small_scoring import NO_TARGET, TARGET, affinities, samples


def gradients_of(network, weights, encoded) -> list[list[torch.Tensor]]:
    """Of each sample's mean response loss, alone and without padding."""
    found = []
    for each in encoded:
        labels = torch.tensor([each.input_ids])
        labels[:, : each.n_prompt] = -100
        loss = network(input_ids=torch.tensor([each.input_ids]), labels=labels).loss
        found.append(torch.autograd.grad(loss, weights))
    return found


def flat(parts) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts]).double()


@pytest.mark.parametrize("slices", [ROLES, ("k", "v")])
def test_head_gradient_is_the_cosine_of_the_slices_gradients(model, heads, slices):
    corpus = samples(7)
    network = copy.deepcopy(model.model).requires_grad_(True)
    pieces = slices_of(model.layers, heads.task_heads, slices)
    weights = [network.get_submodule(piece.module).weight for piece in pieces]

    def unit_gradients(chosen):
        vectors = [
            flat(
                g.narrow(p.dim, p.start, p.stop - p.start)
                for g, p in zip(grads, pieces, strict=True)
            )
            for grads in gradients_of(network, weights, model.encode(chosen))
        ]
        return normalize(torch.stack(vectors), dim=1)

    wanted = normalize(unit_gradients(TARGET.proxy).mean(dim=0), dim=0)
    expected = (unit_gradients(corpus) @ wanted).numpy()
    assert np.ptp(expected) > 0.1
    whole = {"dimensions": 10**6, "slices": slices}
    got = affinities("head-gradient", model, heads, [corpus], **whole)
    np.testing.assert_allclose(got, expected, atol=1e-3)  # kept in float16
    projected = affinities("head-gradient", model, heads, [corpus], dimensions=2048, slices=slices)
    np.testing.assert_allclose(projected, expected, atol=4 * 2048**-0.5)
    assert not np.allclose(projected, got, atol=1e-4)


def test_head_gradient_leaves_the_model_without_gradients_and_hooks(model, heads):
    # transformers leaves hooks of its own in a model that was asked for its hidden states
    hooks = [set(module._forward_hooks) for module in model.model.modules()]
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    affinities("head-gradient", model, heads, [samples(3)])
    affinities("less", model, heads, [samples(3)], seed=9)
    for name, weight in model.model.named_parameters():
        assert torch.equal(weight, before[name])
        assert not weight.requires_grad
        assert weight.grad is None
    assert [set(module._forward_hooks) for module in model.model.modules()] == hooks


def test_less_is_adams_step_on_a_lora_as_peft_has_it(model, heads):
    """After a warm-up of one step, in which the order of samples does not count."""
    options = {"epochs": 1, "batch_size": 99, "rank": 2, "alpha": 8, "dimensions": 10**6}
    scorer = scorers.make("less", options | {"learning_rate": 1e-2})
    state = scorer.prepare(model, heads, TARGET)
    paths = [path for layer in model.layers for path in (layer.q, layer.k, layer.v, layer.o)]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=paths, task_type="CAUSAL_LM")
    network = get_peft_model(copy.deepcopy(model.model), config)
    parameters = []
    for i, path in enumerate(paths):
        module = network.base_model.model.get_submodule(path)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert not b.any()
        # a step on a LoRA whose b is 0 leaves a as it was
        a.data.copy_(state[f"a.{i}"])
        parameters += [a, b]
    adam = torch.optim.Adam(parameters, lr=1e-2)
    encoded = model.encode(TARGET.proxy)
    total = sum(each.n_response for each in encoded)
    for each, grads in zip(encoded, gradients_of(network, parameters, encoded), strict=True):
        for parameter, grad in zip(parameters, grads, strict=True):
            share = grad * each.n_response / total
            parameter.grad = share if parameter.grad is None else parameter.grad + share
    adam.step()
    for i in range(len(paths)):
        torch.testing.assert_close(
            state[f"b.{i}"], parameters[2 * i + 1].data, atol=1e-5, rtol=1e-3
        )
    square = flat(adam.state[parameter]["exp_avg_sq"] for parameter in parameters)
    assert square.any()
    torch.testing.assert_close(state["square"].double(), square, atol=1e-9, rtol=1e-3)

    def unit(vectors):
        return normalize(torch.stack(list(vectors)), dim=1)

    wanted = unit(map(flat, gradients_of(network, parameters, encoded))).mean(dim=0)
    corpus = samples(6)
    steps = unit(
        flat(g) / (0.999 * square + 0.001 * flat(g) ** 2 + 1e-8).sqrt()
        for g in gradients_of(network, parameters, model.encode(corpus))
    )
    got = affinities("less", model, heads, [corpus], **options, learning_rate=1e-2)
    np.testing.assert_allclose(got, (steps @ wanted).numpy(), atol=1e-3)
    assert np.ptp(got) > 0.01


def test_less_warms_up_once_for_all_shards_and_anew_for_another_target(model, heads, monkeypatch):
    scorer = scorers.make("less", {"seed": 5})
    warmed = []
    inner = type(scorer)._warmed_up

    def counted(self, *args):
        warmed.append(self)
        return inner(self, *args)

    monkeypatch.setattr(type(scorer), "_warmed_up", counted)
    first = scorer.prepare(model, heads, TARGET)
    again = scorer.prepare(model, heads, TARGET)
    assert len(warmed) == 1
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = scorer.prepare(model, heads, type(TARGET)(samples(8, seed=4), ()))
    assert len(warmed) == 2
    assert not torch.equal(first["b.0"], other["b.0"])


def test_a_sketch_keeps_inner_products():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, 50_000, generator=generator)
    vectors[10:] += vectors[:10]  # some are alike
    unit = normalize(vectors, dim=1)
    sketch = Sketch(50_000, 4096)
    short = sketch.empty(20, torch.device("cpu"))
    sketch.add(short, unit[:, :17_001], 0)
    sketch.add(short, unit[:, 17_001:], 17_001)
    off = short @ short.T - unit @ unit.T
    assert float(off.abs().max()) < 5 * 4096**-0.5
    assert float(off.square().mean().sqrt()) == pytest.approx(4096**-0.5, rel=0.3)


def test_places_and_signs_of_a_sketch_are_splitmix64():
    """Worked in numpy's unsigned 64-bit integers."""
    sketch = Sketch(10**6, 1000, seed=3)
    got = sketch.empty(1, torch.device("cpu"))
    sketch.add(got, torch.arange(1.0, 501.0)[None], 700)
    with np.errstate(over="ignore"):
        x = np.arange(700, 1200, dtype=np.uint64) + np.uint64(3 << 40)
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31))) & np.uint64(2**63 - 1)
    expected = np.zeros(1000)
    signs = (x & np.uint64(1)).astype(float) * 2 - 1
    np.add.at(expected, (x >> np.uint64(1)) % np.uint64(1000), signs * np.arange(1.0, 501.0))
    np.testing.assert_allclose(got[0].numpy(), expected)


def test_large_gradients_are_taken_a_few_samples_at_a_time():
    assert list(few_at_once(5, 2**24)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(few_at_once(2, 2**30)) == [slice(0, 1), slice(1, 2)]


def test_a_measurement_does_not_hold_more_than_its_dimensions(model, heads):
    scorer = scorers.make("head-gradient", {"dimensions": 64})
    table = measure_shard(scorer, model, scorer.prepare(model, heads, NO_TARGET), samples(3))
    assert str(table["gradient"].type) == "fixed_size_list<item: halffloat>[64]"
