import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Qwen2Config
from transformers.pytorch_utils import Conv1D

from p2d_core.adaptation.masked import Sliced, attach_head_deltas, sliced
from p2d_core.attention.layout import ROLES, all_heads, attention_layers, slices_of
from p2d_core.errors import HeadMapError, TrainingError
from tests.tiny import tiny, tiny_llama, token_batch

HEADS = [(0, 1), (1, 2), (1, 3), (1, 7), (2, 0)]  # 2 and 3 of layer 1 share a KV group
IDS, MASK = token_batch([6, 9, 4])


def loss_of(model):
    labels = IDS.masked_fill(MASK == 0, -100)
    return model(input_ids=IDS, attention_mask=MASK, labels=labels).loss


def train(model, deltas, steps=5, lr=1e-2, weight_decay=0.1):
    optimizer = torch.optim.AdamW(deltas.parameters(), lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def full_gradients(model):
    """Of every weight of a copy of the model, with nothing frozen."""
    model = copy.deepcopy(model).requires_grad_(True)
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def mask_of(model, heads, roles=ROLES):
    """True where a weight is in a slice of these heads; made slice by slice."""
    masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    for piece in slices_of(attention_layers(model), heads, roles):
        weight = masks[f"{piece.module}.weight"]
        weight.narrow(piece.dim, piece.start, piece.stop - piece.start).fill_(True)
    return masks


def tiny_qwen2():
    return tiny(
        Qwen2Config(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            initializer_range=0.2,
        )
    )


def test_a_fresh_delta_changes_nothing():
    model = tiny_llama()
    before = model(input_ids=IDS, attention_mask=MASK).logits
    attach_head_deltas(model, attention_layers(model), HEADS)
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, before)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("roles", [ROLES, ("q", "o"), ("v",)])
def test_a_deltas_gradient_is_the_masked_full_gradient(make, roles):
    model = make()
    expected = full_gradients(model)
    deltas = attach_head_deltas(model, attention_layers(model), HEADS, roles)
    loss_of(model).backward()
    assert len(deltas.modules) == 3 * len(roles)
    for path, module in deltas.modules.items():
        wanted = expected[f"{path}.weight"].index_select(module.dim, module.index)
        torch.testing.assert_close(module.delta.grad, wanted, atol=1e-6, rtol=1e-5)
        assert wanted.abs().max() > 1e-4


def test_the_gradient_is_right_away_from_zero_too():
    model = tiny_llama()
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    train(model, deltas, lr=3e-2)
    moved = copy.deepcopy(tiny_llama())
    deltas.tuned().apply_(moved)
    expected = full_gradients(moved)
    loss_of(model).backward()
    for path, module in deltas.modules.items():
        wanted = expected[f"{path}.weight"].index_select(module.dim, module.index)
        torch.testing.assert_close(module.delta.grad, wanted, atol=1e-6, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([0, 1]),
    st.sampled_from(["bias", "no bias", "transposed"]),
    st.sets(st.integers(0, 5), min_size=1),
    st.integers(0, 1000),
)
def test_the_product_and_its_gradients_are_those_of_the_whole_weight(dim, kind, chosen, seed):
    generator = torch.Generator().manual_seed(seed)
    transposed = kind == "transposed"
    linear = Conv1D(7, 6) if transposed else nn.Linear(6, 7, bias=kind == "bias")
    linear = linear.double()
    index = torch.tensor(sorted(chosen))
    module = sliced(linear, dim, index)
    with torch.no_grad():
        module.delta.normal_(generator=generator)
    whole = linear.weight.detach().index_add(dim, index, module.delta.detach()).requires_grad_()
    inputs = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    same = inputs.detach().clone().requires_grad_()
    outputs = module(inputs)
    expected = nn.functional.linear(same, whole.t() if transposed else whole, linear.bias)
    torch.testing.assert_close(outputs, expected)
    weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(inputs.grad, same.grad)
    torch.testing.assert_close(module.delta.grad, whole.grad.index_select(dim, index))


@pytest.mark.parametrize("roles", [ROLES, ("q", "o"), ("v",)])
def test_after_training_only_the_slices_differ_bit_for_bit(roles):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = mask_of(model, HEADS, roles)
    deltas = attach_head_deltas(model, attention_layers(model), HEADS, roles)
    train(model, deltas)
    for name, weight in before.items():
        # while it trains too
        assert torch.equal(model.get_parameter(name)[~masks[name]], weight[~masks[name]])
    deltas.detach(merge=True)
    assert not any(isinstance(module, Sliced) for module in model.modules())
    for name, weight in model.named_parameters():
        assert torch.equal(weight[~masks[name]], before[name][~masks[name]])
        assert bool((weight[masks[name]] != before[name][masks[name]]).all())


def test_training_the_deltas_is_training_the_masked_weights():
    model, reference = tiny_llama(), tiny_llama()
    masks = mask_of(reference, HEADS)
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    train(model, deltas, weight_decay=0)
    deltas.detach(merge=True)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(5):
        loss_of(reference).backward()
        for name, parameter in reference.named_parameters():
            parameter.grad[~masks[name]] = 0
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, reference.get_parameter(name), atol=1e-4, rtol=1e-4)


def test_only_the_slices_have_optimizer_state():
    model = tiny_llama()
    n_in_slices = sum(int(mask.sum()) for mask in mask_of(model, HEADS).values())
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    optimizer = train(model, deltas, steps=1)
    for kind in ("exp_avg", "exp_avg_sq"):
        assert sum(state[kind].numel() for state in optimizer.state.values()) == n_in_slices
    # 5 heads, of which two share their group: 5 q, 5 o, 4 k and 4 v of 8 x 64
    assert n_in_slices == 18 * 8 * 64


def test_nothing_but_the_deltas_requires_a_gradient_and_detaching_gives_it_back():
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moving == {f"{path}.delta" for path in deltas.modules}
    deltas.detach(merge=False)
    assert not model.lm_head.weight.requires_grad
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "lm_head.weight")


def test_names_in_the_state_dict_stay_those_of_the_base():
    model = tiny_llama()
    names = set(model.state_dict())
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    assert set(model.state_dict()) - names == {f"{path}.delta" for path in deltas.modules}
    assert names <= set(model.state_dict())
    assert attention_layers(model) == attention_layers(tiny_llama())


def test_detaching_without_merging_gives_the_base_back():
    model, base = tiny_llama(), tiny_llama()
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    train(model, deltas)
    deltas.detach(merge=False)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, base.get_parameter(name))


def test_the_tuned_slices_are_what_merging_gives():
    model, base = tiny_llama(), tiny_llama()
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    train(model, deltas)
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    tuned = deltas.tuned()
    deltas.detach(merge=True)
    with tuned.applied(base):
        for name, weight in model.named_parameters():
            assert torch.equal(weight, base.get_parameter(name))
        again = base(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-5)


def test_training_helps():
    model = tiny_llama()
    before = loss_of(model).item()
    train(model, attach_head_deltas(model, attention_layers(model), HEADS), steps=20)
    assert loss_of(model).item() < 0.8 * before


def test_a_base_in_bf16_is_trained_by_deltas_in_float32():
    model = tiny_llama(initializer_range=0.05).to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    expected = full_gradients(exact)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    first = loss_of(model)
    first.backward()
    for path, module in deltas.modules.items():
        assert module.delta.dtype == module.delta.grad.dtype == torch.float32
        wanted = expected[f"{path}.weight"].index_select(module.dim, module.index)
        got = module.delta.grad
        assert nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.99
    model.zero_grad()
    train(model, deltas, steps=10)
    assert loss_of(model).item() < first.item()
    masks = mask_of(exact, HEADS)
    deltas.detach(merge=True)
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight[~masks[name]], before[name][~masks[name]])


def test_autocast_gives_the_gradients_of_bf16():
    model = tiny_llama(initializer_range=0.05)
    expected = full_gradients(model)
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    for path, module in deltas.modules.items():
        wanted = expected[f"{path}.weight"].index_select(module.dim, module.index)
        got = module.delta.grad
        assert got.dtype == torch.float32
        assert nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.98


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = tiny_llama().train()
        deltas = attach_head_deltas(model, attention_layers(model), HEADS)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model).backward()
        grads.append([delta.grad for delta in deltas.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_every_head_can_be_tuned():
    model = tiny_llama()
    layers = attention_layers(model)
    deltas = attach_head_deltas(model, layers, all_heads(layers))
    assert sum(delta.numel() for delta in deltas.parameters()) == 3 * (2 * 64 * 64 + 2 * 32 * 64)


def test_no_heads_and_wrong_heads_are_refused():
    model = tiny_llama()
    layers = attention_layers(model)
    with pytest.raises(TrainingError, match="no heads were given to tune"):
        attach_head_deltas(model, layers, [])
    with pytest.raises(HeadMapError, match=r"\(7, 0\) is not in the model"):
        attach_head_deltas(model, layers, [(7, 0)])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_deltas_do_not_go_on_top_of_deltas():
    model = tiny_llama()
    layers = attention_layers(model)
    attach_head_deltas(model, layers, HEADS)
    with pytest.raises(ValueError, match="is SlicedLinear, not a plain linear"):
        attach_head_deltas(model, layers, HEADS)


def test_values_that_are_not_finite_are_refused():
    model = tiny_llama()
    deltas = attach_head_deltas(model, attention_layers(model), HEADS)
    with torch.no_grad():
        next(deltas.parameters())[0, 0] = torch.inf
    with pytest.raises(TrainingError, match=r"q_proj gave values that are not finite"):
        deltas.tuned()
