import pytest
import torch
from safetensors.torch import save_file

from p2d_core.adaptation.slices import TunedSlices, merged
from p2d_core.attention.layout import WeightSlice, attention_layers, slices_of
from p2d_core.errors import ArtifactError, ModelError
from tests.tiny import tiny_llama

HEADS = [(0, 1), (0, 2), (1, 5)]


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def tuned_slices(model, heads=HEADS, by=0.5):
    """Those heads' slices, each weight moved by that much."""
    tuned = TunedSlices.from_model(model, slices_of(attention_layers(model), heads))
    for block in tuned.blocks.values():
        block.values.add_(by)
    return tuned


def test_slices_of_one_module_are_merged_and_rise():
    pieces = [WeightSlice("m", 0, 8, 10), WeightSlice("m", 0, 2, 4), WeightSlice("m", 0, 9, 11)]
    dim, index = merged(pieces)["m"]
    assert dim == 0
    assert index.tolist() == [2, 3, 8, 9, 10]


def test_rows_and_columns_of_one_module_are_refused():
    with pytest.raises(ValueError, match="m has slices of rows and of columns"):
        merged([WeightSlice("m", 0, 0, 1), WeightSlice("m", 1, 0, 1)])


def test_taking_slices_from_a_model_worked_by_hand():
    model = tiny_llama()
    tuned = TunedSlices.from_model(model, slices_of(attention_layers(model), HEADS))
    attention = model.model.layers[0].self_attn
    q = tuned.blocks["model.layers.0.self_attn.q_proj"]
    k = tuned.blocks["model.layers.0.self_attn.k_proj"]  # head 1 reads group 0, head 2 group 1
    o = tuned.blocks["model.layers.0.self_attn.o_proj"]
    assert torch.equal(q.values, attention.q_proj.weight[8:24])
    assert torch.equal(k.values, attention.k_proj.weight[0:16])
    assert torch.equal(o.values, attention.o_proj.weight[:, 8:24])
    sizes = [block.values.numel() for block in tuned.blocks.values()]
    assert sum(sizes) == 4 * 16 * 64 + 4 * 8 * 64


def test_values_are_swapped_in_and_restored_bit_for_bit():
    model = tiny_llama()
    before = weights_of(model)
    tuned = tuned_slices(model)
    with tuned.applied(model):
        inside = weights_of(model)
        moved = {name for name in before if not torch.equal(before[name], inside[name])}
        assert moved == {f"{module}.weight" for module in tuned.blocks}
        q = inside["model.layers.0.self_attn.q_proj.weight"]
        was = before["model.layers.0.self_attn.q_proj.weight"]
        assert torch.equal(q[8:24], was[8:24] + 0.5)
        assert torch.equal(q[:8], was[:8])
        assert torch.equal(q[24:], was[24:])
    assert same(before, weights_of(model))


def test_values_are_restored_after_an_error():
    model = tiny_llama()
    before = weights_of(model)
    with pytest.raises(KeyError), tuned_slices(model).applied(model):
        raise KeyError
    assert same(before, weights_of(model))


def test_nothing_is_written_when_one_block_does_not_fit():
    model = tiny_llama()
    tuned = tuned_slices(model)
    other = tiny_llama(num_hidden_layers=1)
    before = weights_of(other)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn.*has no such module.*base model"):
        tuned.apply_(other)
    with pytest.raises(ModelError), tuned.applied(other):
        pass
    assert same(before, weights_of(other))


def test_another_width_is_refused_with_both_shapes():
    with pytest.raises(ModelError, match=r"they are \[16, 64\].*its weight is \[64, 32\]"):
        tuned_slices(tiny_llama()).apply_(tiny_llama(hidden_size=32, head_dim=8))


def test_a_patched_weight_is_what_the_model_would_have():
    model = tiny_llama()
    tuned = tuned_slices(model)
    path, other = "model.layers.0.self_attn.o_proj", "model.layers.2.self_attn.o_proj"
    weight = model.get_submodule(path).weight
    before = weight.detach().clone()
    patched = tuned.patched(path, weight)
    assert torch.equal(weight, before)
    assert tuned.patched(other, model.get_submodule(other).weight) is (
        model.get_submodule(other).weight
    )
    with tuned.applied(model):
        assert torch.equal(weight, patched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_file_gives_the_same_values(tmp_path, dtype):
    tuned = tuned_slices(tiny_llama().to(dtype))
    tuned.save(tmp_path / "tuned.safetensors")
    loaded = TunedSlices.load(tmp_path / "tuned.safetensors")
    assert set(loaded.blocks) == set(tuned.blocks)
    for module, block in tuned.blocks.items():
        assert loaded.blocks[module].dim == block.dim
        assert torch.equal(loaded.blocks[module].index, block.index)
        assert torch.equal(loaded.blocks[module].values, block.values)
        assert loaded.blocks[module].values.dtype == dtype


def test_the_same_values_make_the_same_file(tmp_path):
    tuned = tuned_slices(tiny_llama())
    backwards = TunedSlices(dict(reversed(tuned.blocks.items())))
    tuned.save(tmp_path / "one")
    backwards.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("other", "broken", "missing"):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(ArtifactError, match=rf"{name}\.safetensors cannot be read as tuned"):
            TunedSlices.load(path)
