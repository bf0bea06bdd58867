import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from p2d_core.attention.kv_groups import kv_group_of
from p2d_core.attention.layout import (
    WeightSlice,
    all_heads,
    attention_layers,
    head_slices,
    slices_of,
)
from p2d_core.errors import HeadMapError, UnsupportedModelError
from tests.tiny import tiny, tiny_llama

SMALL = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_query_heads_share_the_kv_group_of_their_block():
    groups = [kv_group_of(head, n_query_heads=8, n_kv_groups=2) for head in range(8)]
    assert groups == [0, 0, 0, 0, 1, 1, 1, 1]


@given(st.integers(1, 8), st.integers(1, 8))
def test_kv_groups_are_even_blocks_that_use_every_group(per_group, n_groups):
    n_heads = per_group * n_groups
    groups = [kv_group_of(head, n_heads, n_groups) for head in range(n_heads)]
    assert groups == sorted(groups)
    assert [groups.count(group) for group in range(n_groups)] == [per_group] * n_groups


def test_llama_layers_are_found_with_their_module_paths():
    layers = attention_layers(tiny_llama())
    assert [layer.index for layer in layers] == [0, 1, 2]
    middle = layers[1]
    assert (middle.n_query_heads, middle.n_kv_groups, middle.head_dim) == (8, 4, 8)
    assert middle.name == "model.layers.1.self_attn"
    assert middle.q == "model.layers.1.self_attn.q_proj"
    assert middle.o == "model.layers.1.self_attn.o_proj"


def test_the_head_width_is_the_models_own_where_it_is_not_hidden_size_over_heads():
    layer = attention_layers(tiny_llama(head_dim=16))[0]
    assert (layer.n_query_heads, layer.n_kv_groups, layer.head_dim) == (8, 4, 16)


@pytest.mark.parametrize(
    ("config", "n_kv_groups"),
    [
        (Qwen2Config(**SMALL, num_key_value_heads=2), 2),
        (MistralConfig(**SMALL, num_key_value_heads=2), 2),
        (
            OPTConfig(
                **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
                ffn_dim=96,
                word_embed_proj_dim=64,
            ),
            8,
        ),
    ],
    ids=["qwen2", "mistral", "opt"],
)
def test_other_families_with_separate_projections_are_found(config, n_kv_groups):
    layers = attention_layers(tiny(config))
    assert len(layers) == 2
    assert {(layer.n_query_heads, layer.n_kv_groups, layer.head_dim) for layer in layers} == {
        (8, n_kv_groups, 8)
    }


def test_a_feed_forward_layer_of_the_same_shapes_is_no_attention():
    # gate and up give 8 + 2 x 4 heads' worth together, and down takes 8: as q, k, v and o do
    layers = attention_layers(tiny_llama(intermediate_size=64))
    assert [layer.name for layer in layers] == [f"model.layers.{i}.self_attn" for i in range(3)]


def test_heads_whose_rows_do_not_stand_together_are_refused(monkeypatch):
    model = tiny_llama()
    forward = type(model.model.layers[0].self_attn).forward

    def strided(attention, *given, **named):
        with monkeypatch.context() as inside:
            plain = attention.q_proj.forward

            def spread(inputs):
                return plain(inputs).unflatten(-1, (8, 8)).transpose(-1, -2).flatten(-2)

            inside.setattr(attention.q_proj, "forward", spread)
            return forward(attention, *given, **named)

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", strided)
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.0\.self_attn.*Head 0's q is made of q_proj 0, 8, 16, \.\.\., and not of 8",
    ):
        attention_layers(model)


def test_attention_that_cannot_be_run_alone_is_refused_with_the_reason(monkeypatch):
    model = tiny_llama()

    def by_weight(attention, hidden_states, **named):
        return nn.functional.linear(hidden_states, attention.q_proj.weight), None

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", by_weight)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.self_attn.*It cannot be run alone: AttributeError"
    ):
        attention_layers(model)


def test_a_model_in_which_only_some_layers_attend_is_refused():
    config = Qwen3NextConfig(
        **SMALL,
        num_key_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    with pytest.raises(UnsupportedModelError, match=r"self_attn"):
        attention_layers(tiny(config))


def test_projections_that_make_no_heads_are_refused_with_their_shapes():
    model = tiny_llama()
    model.model.layers[1].self_attn.k_proj = nn.Linear(64, 12, bias=False)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.self_attn.*heads of 8.*k_proj Linear \[12, 64\]"
    ):
        attention_layers(model)


def test_layers_that_differ_in_heads_are_refused():
    model = tiny_llama()
    attention = model.model.layers[2].self_attn
    attention.k_proj, attention.v_proj = nn.Linear(64, 16), nn.Linear(64, 16)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.2.* in 2 KV groups, but .*layers\.0.* in 4 KV groups"
    ):
        attention_layers(model)


def test_a_model_without_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match="no attention was found in Sequential"):
        attention_layers(nn.Sequential(nn.Linear(4, 4)))


def test_the_slices_of_a_head_worked_by_hand():
    layer = attention_layers(tiny_llama())[0]  # 8 heads of 8 in 4 groups: head 5 reads group 2
    prefix = "model.layers.0.self_attn"
    assert head_slices(layer, 5) == {
        "q": WeightSlice(f"{prefix}.q_proj", 0, 40, 48),
        "k": WeightSlice(f"{prefix}.k_proj", 0, 16, 24),
        "v": WeightSlice(f"{prefix}.v_proj", 0, 16, 24),
        "o": WeightSlice(f"{prefix}.o_proj", 1, 40, 48),
    }


def test_k_and_v_can_be_left_out():
    layer = attention_layers(tiny_llama())[0]
    assert set(head_slices(layer, 0, roles=("q", "o"))) == {"q", "o"}


def test_what_two_heads_share_comes_once():
    layers = attention_layers(tiny_llama())
    assert len(slices_of(layers, [(0, 4), (0, 5)])) == 6  # two q, two o, one k, one v
    assert len(slices_of(layers, [(0, 4), (0, 6)])) == 8


def test_a_head_that_is_not_there_is_refused():
    layers = attention_layers(tiny_llama())
    with pytest.raises(HeadMapError, match=r"no query head 8: it has 8 query heads of 8"):
        head_slices(layers[0], 8)
    with pytest.raises(HeadMapError, match=r"head \(3, 0\) is not in the model.*0 to 2"):
        slices_of(layers, [(3, 0)])


def test_all_heads_slices_cover_every_projection_once():
    model = tiny_llama()
    layers = attention_layers(model)
    heads = all_heads(layers)
    assert len(heads) == 24
    covered = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for piece in slices_of(layers, heads):
        weight = covered[f"{piece.module}.weight"]
        weight.narrow(piece.dim, piece.start, piece.stop - piece.start).add_(1)
    for name, counts in covered.items():
        assert bool((counts == (1 if "self_attn" in name else 0)).all())
