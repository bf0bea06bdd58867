"""Layers whose outputs are given do not run; what comes after them is as if they had."""

import pytest
import torch

from p2d_core.attention.layout import attention_layers
from p2d_core.attention.replay import recorded, replayed
from p2d_core.attention.silence import silenced, silenced_in_turn
from tests.families import FAMILIES, N_LAYERS, family_model

BATCH = {
    "input_ids": torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
}


@torch.no_grad()
def logits(model, batch=BATCH):
    return model(**batch, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_given", range(N_LAYERS))
def test_a_pass_goes_on_from_where_it_is_changed(family, n_given):
    model = family_model(family).eval()
    layers = attention_layers(model)
    with recorded(model, layers) as outputs:
        whole = logits(model)
    assert len(outputs) == N_LAYERS
    ran = []
    for layer in layers:
        model.get_submodule(layer.o).register_forward_hook(
            lambda *_, index=layer.index: ran.append(index)
        )
    with silenced(model, layers, [(n_given, 1)]):
        expected = logits(model)
        ran.clear()
        with replayed(model, layers, outputs[:n_given]):
            got = logits(model)
    assert ran == list(range(n_given, N_LAYERS))
    assert torch.equal(got, expected)
    assert not torch.equal(got, whole)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("index", range(N_LAYERS))
def test_copies_of_a_batch_go_on_with_another_head_silenced_in_each(family, index):
    model = family_model(family).eval()
    layers = attention_layers(model)
    with recorded(model, layers) as outputs:
        logits(model)
    copies = {name: tensor.repeat(2, 1) for name, tensor in BATCH.items()}
    with (
        replayed(model, layers, outputs[:index], 2),
        silenced_in_turn(model, layers[index], [1, 0]),
    ):
        got = logits(model, copies)
    for part, head in zip(got.split(2), (1, 0), strict=True):
        with silenced(model, layers, [(index, head)]):
            torch.testing.assert_close(part, logits(model))


def test_a_forward_of_its_own_comes_back_to_a_layer():
    model = family_model("llama").eval()
    layers = attention_layers(model)
    block = model.get_submodule(layers[0].name.rpartition(".")[0])
    block.forward = own = block.forward
    with replayed(model, layers, [torch.zeros(1)]):
        assert block.forward is not own
    assert block.forward is own
