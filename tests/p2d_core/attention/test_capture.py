import logging
import threading

import pytest
import torch
from transformers import MistralConfig, Qwen2Config

from p2d_core.attention.capture import capture_head_outputs, mean_head_outputs
from p2d_core.attention.layout import attention_layers, head_slices
from p2d_core.attention.paid import attention_paid, attention_to_copies
from p2d_core.attention.silence import silenced
from p2d_core.errors import HeadMapError, UnsupportedModelError
from tests.families import family_model
from tests.tiny import tiny, tiny_llama, token_batch

HEADS = [(1, 3), (0, 2), (1, 0)]
LENGTHS = [5, 9, 7]


def eager(model):
    model.set_attn_implementation("eager")
    return model


def outputs_by_hand(model, ids, mask, layer, head):
    """Attention probabilities of the eager path times the head's values."""
    result = eager(model)(
        input_ids=ids, attention_mask=mask, output_attentions=True, output_hidden_states=True
    )
    block = model.model.layers[layer]
    attention = block.self_attn
    normed = block.input_layernorm(result.hidden_states[layer])
    values = attention.v_proj(normed).view(*ids.shape, -1, attention.head_dim)
    group = head // attention.num_key_value_groups
    return result.attentions[layer][:, head] @ values[:, :, group]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("n_groups", [2, 4])
def test_captured_outputs_equal_those_of_the_eager_path(side, n_groups):
    ids, mask = token_batch(LENGTHS, side=side)
    model = tiny_llama(num_key_value_heads=n_groups)
    got = capture_head_outputs(model, attention_layers(model), HEADS, ids, mask)
    assert got.shape == (3, 9, 3, 8)
    for place, (layer, head) in enumerate(HEADS):
        by_hand = outputs_by_hand(tiny_llama(num_key_value_heads=n_groups), ids, mask, layer, head)
        real = mask.bool()
        torch.testing.assert_close(got[:, :, place][real], by_hand[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_mean_is_over_the_tokens_that_are_not_padding(side):
    model = tiny_llama()
    layers = attention_layers(model)
    ids, mask = token_batch(LENGTHS, side=side)
    whole = capture_head_outputs(model, layers, HEADS, ids, mask)
    means = torch.stack([whole[row][mask[row].bool()].mean(0) for row in range(3)])
    got = mean_head_outputs(model, layers, HEADS, ids, mask)
    torch.testing.assert_close(got, means, atol=1e-6, rtol=1e-5)


def test_the_mean_can_be_over_some_tokens_only():
    model = tiny_llama()
    layers = attention_layers(model)
    ids, mask = token_batch(LENGTHS)
    response = mask.clone()
    response[:, :4] = 0
    whole = capture_head_outputs(model, layers, HEADS, ids, mask)
    means = torch.stack([whole[row][response[row].bool()].mean(0) for row in range(3)])
    got = mean_head_outputs(model, layers, HEADS, ids, mask, token_mask=response)
    torch.testing.assert_close(got, means, atol=1e-6, rtol=1e-5)


def test_a_sample_gives_the_same_alone_and_in_a_batch():
    model = tiny_llama()
    layers = attention_layers(model)
    ids, mask = token_batch(LENGTHS)
    together = mean_head_outputs(model, layers, HEADS, ids, mask)
    alone = mean_head_outputs(model, layers, HEADS, ids[:1, :5], mask[:1, :5])
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=1e-5)


def test_the_model_runs_no_deeper_than_the_deepest_head():
    model = tiny_llama()
    layers = attention_layers(model)
    ran = []
    watched = ["model.layers.0.mlp", "model.layers.1.self_attn.q_proj", layers[1].o]
    watched += ["model.layers.1.mlp", "model.layers.2", "model.norm", "lm_head"]
    for path in watched:
        module = model.get_submodule(path)
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    mean_head_outputs(model, layers, [(1, 3), (0, 2)], *token_batch(LENGTHS))
    assert ran == ["model.layers.0.mlp", "model.layers.1.self_attn.q_proj"]


def test_the_model_is_left_without_hooks_and_in_its_mode():
    model = tiny_llama(attention_dropout=0.5).train()
    layers = attention_layers(model)
    first = mean_head_outputs(model, layers, HEADS, *token_batch(LENGTHS))
    second = mean_head_outputs(model, layers, HEADS, *token_batch(LENGTHS))
    assert torch.equal(first, second)  # dropout is off
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("heads", [[], [(3, 0)], [(0, 8)]])
def test_heads_that_are_not_there_are_refused(heads):
    model = tiny_llama()
    with pytest.raises(HeadMapError, match=r"no heads were given|is not in the model"):
        mean_head_outputs(model, attention_layers(model), heads, *token_batch(LENGTHS))


def test_silencing_heads_is_zeroing_their_o_columns():
    model = tiny_llama()
    layers = attention_layers(model)
    ids, mask = token_batch(LENGTHS)
    before = model(input_ids=ids, attention_mask=mask).logits
    with silenced(model, layers, HEADS):
        quiet = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    with torch.no_grad():
        for layer, head in HEADS:
            piece = head_slices(layers[layer], head)["o"]
            model.get_submodule(piece.module).weight[:, piece.start : piece.stop] = 0
    torch.testing.assert_close(quiet, model(input_ids=ids, attention_mask=mask).logits)
    assert (quiet - before).abs().max() > 0.1


def paid_by_hand(model, ids, mask, heads, rows, segments, n_segments):
    attentions = eager(model)(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    paid = torch.zeros(len(ids), len(heads), n_segments)
    for sample in range(len(ids)):
        for place, (layer, head) in enumerate(heads):
            mean = attentions[layer][sample, head][rows[sample]].mean(0)
            for segment in range(n_segments):
                paid[sample, place, segment] = mean[segments[sample] == segment].sum()
    return paid


def query_and_segments(mask, side):
    """The last two tokens pay; the first two tokens are segment 0, the next two segment 1."""
    rows = torch.zeros_like(mask, dtype=torch.bool)
    segments = torch.full_like(mask, -1)
    for sample, real in enumerate(mask.bool()):
        places = real.nonzero().flatten()
        # in the second sample three tokens pay: samples may differ in how many do
        rows[sample, places[-3 if sample == 1 else -2 :]] = True
        segments[sample, places[:2]] = 0
        segments[sample, places[2:4]] = 1
    return rows, segments


FAMILIES = {
    "llama, 4 groups": lambda: tiny_llama(),
    "llama, 2 groups": lambda: tiny_llama(num_key_value_heads=2),
    "qwen2": lambda: tiny(
        Qwen2Config(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ),
    "mistral, window of 3": lambda: tiny(
        MistralConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            sliding_window=3,
            initializer_range=0.2,
        )
    ),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_paid_equals_the_eager_paths_attentions(family, side):
    model = FAMILIES[family]()
    ids, mask = token_batch(LENGTHS, side=side)
    rows, segments = query_and_segments(mask, side)
    got = attention_paid(model, attention_layers(model), HEADS, ids, mask, rows, segments, 2)
    assert model.config._attn_implementation == "sdpa"
    by_hand = paid_by_hand(model, ids, mask, HEADS, rows, segments, 2)
    torch.testing.assert_close(got, by_hand, atol=1e-6, rtol=1e-5)
    assert got.std() > 0.01


def test_all_attention_paid_sums_to_one():
    model = tiny_llama()
    ids, mask = token_batch(LENGTHS)
    rows, _ = query_and_segments(mask, "right")
    got = attention_paid(model, attention_layers(model), HEADS, ids, mask, rows, mask - 1, 1)
    torch.testing.assert_close(got, torch.ones(3, 3, 1))


def copies_by_hand(model, ids, mask, heads, rows):
    attentions = eager(model)(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    found = torch.zeros(len(ids), len(heads))
    for sample in range(len(ids)):
        for place, (layer, head) in enumerate(heads):
            lifts = []
            for row in rows[sample].nonzero().flatten().tolist():
                seen = [t for t in range(row + 1) if mask[sample, t]]
                alike = [t for t in seen if ids[sample, t] == ids[sample, row + 1]]
                there = attentions[layer][sample, head, row][alike].sum().item()
                lifts.append(there - len(alike) / len(seen))
            found[sample, place] = sum(lifts) / len(lifts)
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama, 4 groups", "llama, 2 groups", "qwen2"])
def test_attention_to_copies_is_what_goes_to_the_next_token_where_it_stood_before(family, side):
    model = FAMILIES[family]()
    ids, mask = token_batch(LENGTHS, vocab_size=7, side=side)  # so few that many stand twice
    rows = torch.zeros_like(mask, dtype=torch.bool)
    for sample, real in enumerate(mask.bool()):
        rows[sample, real.nonzero().flatten()[-4 if sample == 1 else -3 : -1]] = True
    got = attention_to_copies(model, attention_layers(model), HEADS, ids, mask, rows)
    by_hand = copies_by_hand(model, ids, mask, HEADS, rows)
    torch.testing.assert_close(got, by_hand, atol=1e-6, rtol=1e-5)
    assert got.std() > 0.01


def test_attention_to_copies_is_0_where_the_next_token_stood_nowhere():
    model = tiny_llama()
    ids = torch.arange(3, 13)[None]
    rows = torch.zeros(1, 10, dtype=torch.bool)
    rows[0, 5:9] = True
    mask = torch.ones_like(ids)
    got = attention_to_copies(model, attention_layers(model), HEADS, ids, mask, rows)
    assert torch.equal(got, torch.zeros(1, len(HEADS)))


def test_attention_paid_stops_at_the_deepest_head_and_restores_the_model():
    model = eager(tiny_llama())
    ran = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: ran.append("deeper"))
    ids, mask = token_batch(LENGTHS)
    rows, segments = query_and_segments(mask, "right")
    attention_paid(model, attention_layers(model), HEADS, ids, mask, rows, segments, 2)
    assert ran == []
    assert model.config._attn_implementation == "eager"


def test_attention_paid_from_several_threads_at_once():
    model = tiny_llama()
    layers = attention_layers(model)
    ids, mask = token_batch(LENGTHS)
    rows, segments = query_and_segments(mask, "right")
    one = attention_paid(model, layers, HEADS, ids, mask, rows, segments, 2)
    found = []

    def work():
        for _ in range(5):
            found.append(attention_paid(model, layers, HEADS, ids, mask, rows, segments, 2))
            model(input_ids=ids, attention_mask=mask)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(each, one) for each in found)
    assert model.config._attn_implementation == "sdpa"


def test_a_sample_without_query_rows_is_refused():
    model = tiny_llama()
    ids, mask = token_batch(LENGTHS)
    rows, segments = query_and_segments(mask, "right")
    rows[1] = False
    with pytest.raises(ValueError, match="every sample needs at least one query row"):
        attention_paid(model, attention_layers(model), HEADS, ids, mask, rows, segments, 2)


def test_soft_capped_attention_is_read_in_eager_mode_and_that_is_said_once(caplog):
    model = family_model("gemma2")
    layers = attention_layers(model)
    ids, mask = token_batch(LENGTHS)
    rows, segments = query_and_segments(mask, "right")
    with caplog.at_level(logging.WARNING, logger="p2d_core"):
        for _ in range(2):
            got = attention_paid(model, layers, HEADS, ids, mask, rows, segments, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "Gemma2ForCausalLM computes attention with softcap: what its heads attend to is read in "
        "eager mode, which is slower"
    ]
    by_hand = paid_by_hand(model, ids, mask, HEADS, rows, segments, 2)
    torch.testing.assert_close(got, by_hand, atol=1e-6, rtol=1e-5)


def test_reading_in_eager_mode_stops_at_the_deepest_head_and_restores_the_model():
    model = family_model("falcon, multi-query")
    layers = attention_layers(model)
    ran = []
    model.transformer.h[1].mlp.register_forward_hook(lambda *_: ran.append("deeper"))
    ids, mask = token_batch(LENGTHS)
    rows, segments = query_and_segments(mask, "right")
    attention_paid(model, layers, [(0, 2)], ids, mask, rows, segments, 2)
    assert ran == []
    assert model.config._attn_implementation == "sdpa"
    assert not model.get_submodule(layers[0].name)._forward_hooks


def test_attention_that_gives_no_probabilities_is_refused():
    model = family_model("bloom")
    layers = attention_layers(model)
    for layer in layers:
        attention = model.get_submodule(layer.name)
        attention.register_forward_hook(lambda _module, _given, outputs: (outputs[0], None))
    ids, mask = token_batch(LENGTHS)
    rows, segments = query_and_segments(mask, "right")
    with pytest.raises(
        UnsupportedModelError,
        match=r"BloomForCausalLM does not give its attention probabilities.*looks at head outputs",
    ):
        attention_paid(model, layers, HEADS, ids, mask, rows, segments, 2)
