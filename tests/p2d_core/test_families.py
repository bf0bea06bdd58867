"""What holds for every family of models; `tests/families.py` has the rows."""

import copy
import json
from functools import cache

import pytest
import torch
import transformers as hf
from peft import PeftModel

from p2d_core.adaptation.adaptations import adaptations
from p2d_core.adaptation.exact_lora import export_lora
from p2d_core.adaptation.masked import attach_head_deltas
from p2d_core.adaptation.slices import TunedSlices
from p2d_core.attention.capture import capture_head_outputs, mean_head_outputs
from p2d_core.attention.kv_groups import kv_group_of
from p2d_core.attention.layout import all_heads, attention_layers, head_slices, slices_of
from p2d_core.attention.paid import attention_paid
from p2d_core.attention.silence import silenced
from p2d_core.heads.head_map import HeadMap
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.response_loss import batch_loss, token_losses
from p2d_core.samples.tokens import EncodedSample
from tests.families import (
    FAMILIES,
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    WIDTH,
    family_model,
)
from tests.tiny import token_batch

HEADS = [(1, 3), (0, 2), (1, 0), (2, 7)]
LENGTHS = [5, 9, 7]

every_family = pytest.mark.parametrize("family", FAMILIES)
either_side = pytest.mark.parametrize("side", ["right", "left"])


@cache
def layers_of(family):
    return attention_layers(family_model(family))


def logits_of(model, ids, mask):
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask).logits


def batch(side="right"):
    """As `collate` makes it; the first two tokens of each row are its prompt."""
    ids, mask = token_batch(LENGTHS, side=side)
    labels = ids.masked_fill(mask == 0, -100)
    for row, real in enumerate(mask.bool()):
        labels[row, real.nonzero().flatten()[:2]] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def zero(model, piece):
    with torch.no_grad():
        weight = model.get_submodule(piece.module).weight
        weight.narrow(piece.dim, piece.start, piece.stop - piece.start).zero_()


def mask_of(model, heads):
    """True where a weight is in a slice of these heads; made slice by slice."""
    masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    for piece in slices_of(attention_layers(model), heads):
        weight = masks[f"{piece.module}.weight"]
        weight.narrow(piece.dim, piece.start, piece.stop - piece.start).fill_(True)
    return masks


# -- what is found -----------------------------------------------------------------------------


@every_family
def test_all_heads_are_found(family):
    row, layers = FAMILIES[family], layers_of(family)
    assert len(layers) == N_LAYERS
    for layer in layers:
        assert (layer.n_query_heads, layer.n_kv_groups, layer.head_dim) == (
            N_HEADS,
            row.n_kv_groups,
            HEAD_DIM,
        )
        assert len(layer.modules) == (2 if row.fused else 4)
        assert layer.roles["q"].dim == int(row.transposed)
        assert layer.roles["o"].dim == int(not row.transposed)
        assert layer.shares_norm == row.shares_norm


@every_family
def test_the_slices_of_all_heads_are_the_whole_projections_each_weight_once(family):
    model, layers = family_model(family), layers_of(family)
    counts = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for piece in slices_of(layers, all_heads(layers)):
        weight = counts[f"{piece.module}.weight"]
        weight.narrow(piece.dim, piece.start, piece.stop - piece.start).add_(1)
    inside = {f"{path}.weight" for layer in layers for path in layer.modules}
    for name, count in counts.items():
        assert bool((count == (1 if name in inside else 0)).all()), name


@every_family
def test_a_config_alone_says_the_same_as_a_model(family):
    with torch.device("meta"):
        without_weights = hf.AutoModelForCausalLM.from_config(FAMILIES[family].config())
    assert attention_layers(without_weights) == layers_of(family)


@every_family
def test_looking_leaves_the_model_as_it_was(family):
    model = family_model(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    implementation = model.config._attn_implementation
    attention_layers(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == implementation


# -- (a) slices and outputs --------------------------------------------------------------------


@every_family
def test_zeroing_heads_o_slices_is_zeroing_their_outputs(family):
    model, layers = family_model(family), layers_of(family)
    ids, mask = token_batch(LENGTHS)
    before = logits_of(model, ids, mask)
    with silenced(model, layers, HEADS):
        quiet = logits_of(model, ids, mask)
    assert torch.equal(logits_of(model, ids, mask), before)
    for layer, head in HEADS:
        zero(model, head_slices(layers[layer], head)["o"])
    torch.testing.assert_close(logits_of(model, ids, mask), quiet, atol=1e-5, rtol=1e-5)
    assert (quiet - before).abs().max() > 0.01


@every_family
@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_zeroing_a_slice_changes_the_outputs_of_the_heads_that_read_it_and_no_other(family, role):
    row, layers = FAMILIES[family], layers_of(family)
    ids, mask = token_batch(LENGTHS)
    for layer, head in [(1, 0), (1, 3), (1, 7)]:
        in_layer = [(layer, h) for h in range(N_HEADS)]
        model = family_model(family)
        before = capture_head_outputs(model, layers, in_layer, ids, mask)
        zero(model, head_slices(layers[layer], head)[role])
        after = capture_head_outputs(model, layers, in_layer, ids, mask)
        changed = {h for h in range(N_HEADS) if not torch.equal(before[:, :, h], after[:, :, h])}
        group = kv_group_of(head, N_HEADS, row.n_kv_groups)
        readers = {h for h in range(N_HEADS) if kv_group_of(h, N_HEADS, row.n_kv_groups) == group}
        expected = {head} if role == "q" else readers
        if row.shares_norm and role != "v":
            # the norm is over all heads together, and doctor says so
            assert expected < changed
        else:
            assert changed == expected


# -- (b) captured outputs ----------------------------------------------------------------------


def outputs_by_hand(family, ids, mask, layer, head):
    """Attention probabilities of the eager path times the head's values."""
    row, model = FAMILIES[family], family_model(family)
    model.config._attn_implementation = "eager"
    attention = model.get_submodule(layers_of(family)[layer].name)
    seen = {}

    def look(module, positional, named, outputs):
        seen["given"] = positional[0] if positional else named["hidden_states"]
        seen["probabilities"] = outputs[1]

    attention.register_forward_hook(look, with_kwargs=True)
    model(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False)
    group = kv_group_of(head, N_HEADS, row.n_kv_groups)
    return seen["probabilities"][:, head] @ row.values(attention, seen["given"])[:, :, group]


@every_family
@either_side
def test_captured_outputs_equal_those_of_the_eager_path(family, side):
    ids, mask = token_batch(LENGTHS, side=side)
    got = capture_head_outputs(family_model(family), layers_of(family), HEADS, ids, mask)
    real = mask.bool()
    for place, (layer, head) in enumerate(HEADS):
        by_hand = outputs_by_hand(family, ids, mask, layer, head)
        torch.testing.assert_close(got[:, :, place][real], by_hand[real], atol=1e-5, rtol=1e-5)


@every_family
def test_right_padding_needs_no_mask(family):
    model = family_model(family)
    ids, mask = token_batch(LENGTHS)
    real = mask.bool()
    without = logits_of(model, ids, None)[real]
    torch.testing.assert_close(without, logits_of(model, ids, mask)[real], atol=1e-5, rtol=1e-5)


@every_family
def test_a_sample_gives_the_same_alone_and_in_a_batch(family):
    model, layers = family_model(family), layers_of(family)
    ids, mask = token_batch(LENGTHS)
    together = mean_head_outputs(model, layers, HEADS, ids, mask)
    alone = mean_head_outputs(model, layers, HEADS, ids[:1, :5], mask[:1, :5])
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


@every_family
@either_side
def test_attention_paid_equals_the_eager_paths_probabilities(family, side):
    ids, mask = token_batch(LENGTHS, side=side)
    rows = torch.zeros_like(mask, dtype=torch.bool)
    for sample, real in enumerate(mask.bool()):
        rows[sample, real.nonzero().flatten()[-2:]] = True
    places = torch.arange(ids.shape[1]).expand_as(ids)
    model = family_model(family)
    implementation = model.config._attn_implementation
    for _ in range(2):
        got = attention_paid(model, layers_of(family), HEADS, ids, mask, rows, places, 9)
    assert model.config._attn_implementation == implementation
    model.config._attn_implementation = "eager"
    attentions = []
    for layer in layers_of(family):
        attention = model.get_submodule(layer.name)
        attention.register_forward_hook(lambda _m, _i, outputs: attentions.append(outputs[1]))
    model(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False)
    for sample in range(len(ids)):
        for place, (layer, head) in enumerate(HEADS):
            by_hand = attentions[layer][sample, head][rows[sample]].mean(0)
            torch.testing.assert_close(got[sample, place], by_hand, atol=1e-5, rtol=1e-5)


# -- (c) masked training -----------------------------------------------------------------------


@every_family
def test_a_masked_step_moves_the_slices_and_nothing_else_bit_for_bit(family):
    model = family_model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = mask_of(model, HEADS)
    whole = copy.deepcopy(model)
    batch_loss(whole, batch()).backward()
    deltas = attach_head_deltas(model, layers_of(family), HEADS)
    assert attention_layers(model) == layers_of(family)
    optimizer = torch.optim.AdamW(deltas.parameters(), lr=1e-2)
    batch_loss(model, batch()).backward()
    for path, module in deltas.modules.items():
        of_whole = whole.get_submodule(path).weight.grad.index_select(module.dim, module.index)
        torch.testing.assert_close(module.delta.grad, of_whole, atol=1e-6, rtol=1e-4)
    optimizer.step()
    logits = logits_of(model, batch()["input_ids"], None)
    deltas.detach(merge=True)
    for name, weight in model.named_parameters():
        assert torch.equal(weight[~masks[name]], before[name][~masks[name]]), name
        assert bool((weight[masks[name]] != before[name][masks[name]]).all()), name
    again = logits_of(model, batch()["input_ids"], None)
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)


# -- (d) ranking -------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("ranker", ["spad", "frobenius"])
def test_an_unchanged_head_scores_zero_and_the_changed_one_the_most(family, ranker):
    model, layers = family_model(family), layers_of(family)
    layer, head = 1, 5
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in "qo":
            piece = head_slices(layers[layer], head)[role]
            weight = tuned.get_submodule(piece.module).weight
            part = weight.narrow(piece.dim, piece.start, piece.stop - piece.start)
            part.add_(0.05 * torch.randn(part.shape, generator=generator))
    proxy = TunedSlices.from_model(tuned, slices_of(layers, all_heads(layers)))
    scores = rankers.make(ranker, {}).rank(RankingEvidence(model, layers, proxy, ()))
    assert (scores > 0).nonzero().tolist() == [[layer, head]]
    # what a KV group shares counts for each of its heads
    for role in "kv":
        tuned = copy.deepcopy(model)
        piece = head_slices(layers[layer], head)[role]
        zero(tuned, piece)
        proxy = TunedSlices.from_model(tuned, slices_of(layers, all_heads(layers)))
        scores = rankers.make(ranker, {}).rank(RankingEvidence(model, layers, proxy, ()))
        n_groups = layers[layer].n_kv_groups
        group = kv_group_of(head, N_HEADS, n_groups)
        readers = [[layer, h] for h in range(N_HEADS) if kv_group_of(h, N_HEADS, n_groups) == group]
        assert (scores > 0).nonzero().tolist() == readers


@every_family
def test_the_gradient_ranker_is_the_rms_over_the_heads_own_slices(family):
    model, layers = family_model(family), layers_of(family)
    given = batch()
    samples = [
        EncodedSample(str(row), given["input_ids"][row, :length].tolist(), 2)
        for row, length in enumerate(LENGTHS)
    ]
    scores = rankers.make("gradient", {}).rank(RankingEvidence(model, layers, None, samples))
    batch_loss(model, given).backward()
    for layer, head in HEADS:
        parts = [
            model.get_submodule(piece.module)
            .weight.grad.narrow(piece.dim, piece.start, piece.stop - piece.start)
            .flatten()
            for piece in head_slices(layers[layer], head).values()
        ]
        rms = torch.cat(parts).square().mean().sqrt()
        assert float(scores[layer, head]) == pytest.approx(float(rms), rel=1e-4)


# -- (e) export --------------------------------------------------------------------------------


@every_family
def test_stock_peft_gives_the_tuned_models_logits_and_merges_to_its_weights(family, tmp_path):
    model = family_model(family)
    ids, mask = token_batch(LENGTHS)
    base = logits_of(model, ids, mask)
    deltas = attach_head_deltas(model, layers_of(family), HEADS)
    optimizer = torch.optim.AdamW(deltas.parameters(), lr=1e-2)
    for _ in range(3):
        batch_loss(model, batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = deltas.tuned()
    deltas.detach(merge=True)
    export_lora(tuned, family_model(family), tmp_path / "adapter", "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == FAMILIES[family].transposed  # else PEFT warns, and sets it
    loaded = PeftModel.from_pretrained(family_model(family), tmp_path / "adapter").eval()
    expected = logits_of(model, ids, mask)
    torch.testing.assert_close(logits_of(loaded, ids, mask), expected, atol=1e-5, rtol=1e-5)
    assert (expected - base).abs().max() > 0.01
    merged = loaded.merge_and_unload()
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    tuned.save(tmp_path / "slices.safetensors")
    again = family_model(family)
    TunedSlices.load(tmp_path / "slices.safetensors").apply_(again)
    assert torch.equal(logits_of(again, ids, mask), expected)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(reloaded, ids, mask), expected, atol=1e-6, rtol=1e-6)


# -- (f) losses --------------------------------------------------------------------------------


@every_family
@either_side
def test_token_losses_are_those_of_the_models_full_logits(family, side):
    model, given = family_model(family), batch(side)
    losses, wanted = token_losses(model, given)
    logits = logits_of(model, given["input_ids"], given["attention_mask"])
    by_hand = -logits.log_softmax(-1)[:, :-1].gather(2, given["input_ids"][:, 1:, None])[..., 0]
    assert torch.equal(wanted, given["labels"][:, 1:] != -100)
    torch.testing.assert_close(losses[wanted], by_hand[wanted], atol=1e-5, rtol=1e-5)
    assert not losses[~wanted].any()


@every_family
@pytest.mark.parametrize("name", ["heads", "attention", "lora"])
def test_what_an_adaptation_lets_move_learns(family, name):
    model, layers = family_model(family), layers_of(family)
    scores = torch.zeros(N_LAYERS, N_HEADS)
    scores[1, 3] = 1
    heads = HeadMap.from_scores(scores, FAMILIES[family].n_kv_groups, 1 / scores.numel())
    attached = adaptations.make(name, {}).attach(model, layers, heads, "base")
    moving = [p for p in attached.model.parameters() if p.requires_grad]
    before = float(batch_loss(attached.model, batch()))
    optimizer = torch.optim.AdamW(moving, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        batch_loss(attached.model, batch()).backward()
        assert all(p.grad is not None for p in moving)
        optimizer.step()
    assert float(batch_loss(attached.model, batch())) < before
    n_own = HEAD_DIM * WIDTH  # of one role of one head
    whole = (2 * N_HEADS + 2 * FAMILIES[family].n_kv_groups) * n_own * N_LAYERS
    wanted = {"heads": 4 * n_own, "attention": whole}
    assert name == "lora" or sum(p.numel() for p in moving) == wanted[name]
