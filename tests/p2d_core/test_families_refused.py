"""Attention that is not what heads are taken for is refused, with its module and shapes."""

import pytest
import torch
import transformers as hf

from p2d_core.attention.capture import capture_head_outputs
from p2d_core.attention.layout import attention_layers, head_slices
from p2d_core.attention.paid import attention_paid
from p2d_core.errors import UnsupportedModelError
from tests.families import HEAD_DIM, LATENT, N_HEADS, SMALL, WIDTH, family_model, last_of_each
from tests.tiny import tiny, token_batch

HEADS = [(1, 3), (0, 2), (1, 0), (2, 7)]
LENGTHS = [5, 9, 7]


@pytest.mark.parametrize("q_lora_rank", [16, None])
def test_multi_head_latent_attention_is_refused_with_its_module_and_shapes(q_lora_rank):
    model = tiny(hf.DeepseekV3Config(**SMALL, **LATENT, q_lora_rank=q_lora_rank))
    with pytest.raises(
        UnsupportedModelError,
        match=r"model\.layers\.0\.self_attn \(DeepseekV3Attention\).*kv_b_proj Linear \[128, 16\]"
        r".*kv_b_proj works? on what another projection gives \(multi-head latent attention\)"
        r".*docs/families\.md",
    ):
        attention_layers(model)


def test_gated_attention_in_some_layers_only_is_refused():
    config = hf.Qwen3NextConfig(
        **SMALL,
        intermediate_size=96,
        num_key_value_heads=2,
        layer_types=["linear_attention", "full_attention", "full_attention"],
        head_dim=HEAD_DIM,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    with pytest.raises(
        UnsupportedModelError, match=rf"Qwen3NextAttention.*q_proj Linear \[{2 * WIDTH}, {WIDTH}\]"
    ):
        attention_layers(tiny(config))


def test_attention_is_not_read_in_eager_mode_where_that_is_another_attention():
    # transformers' Falcon adds its position biases once with SDPA and twice without
    config = hf.FalconConfig(**SMALL, ffn_hidden_size=96, multi_query=False, alibi=True)
    model = tiny(config)
    layers = attention_layers(model)
    ids, mask = token_batch(LENGTHS)
    with pytest.raises(
        UnsupportedModelError,
        match=r"FalconForCausalLM's eager attention is not its sdpa attention.*looks at head outp",
    ):
        attention_paid(model, layers, HEADS, ids, mask, mask, mask - 1, 1)
    assert model.config._attn_implementation == "sdpa"
    # a first token sees itself alone, whatever the biases
    attention = model.get_submodule(layers[0].name)
    given = []
    attention.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0]))
    got = capture_head_outputs(model, layers, [(0, 5)], ids, mask)
    values = last_of_each("query_key_value", N_HEADS)(attention, given[0].clone())
    torch.testing.assert_close(got[:, 0, 0], values[:, 0, 5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_eager_attention_is_not_taken_for_the_same_where_outputs_show_nothing(value):
    model = family_model("falcon, multi-query")
    layers = attention_layers(model)
    values = head_slices(layers[0], 0)["v"]  # of all heads
    weight = model.get_submodule(values.module).weight.data
    weight.narrow(values.dim, values.start, values.stop - values.start).fill_(value)
    ids, mask = token_batch(LENGTHS)
    with pytest.raises(
        UnsupportedModelError,
        match=r"whether FalconForCausalLM's eager attention is its sdpa attention cannot be told: "
        r".* all 0 or no numbers\. Look at the weights",
    ):
        attention_paid(model, layers, HEADS, ids, mask, mask, mask - 1, 1)
