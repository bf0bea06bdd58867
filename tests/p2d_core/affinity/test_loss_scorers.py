"""Scorers made of losses, against transformers' own loss of one sample at a time."""

import copy

import numpy as np
import pyarrow as pa
import pytest
import torch

from p2d_core.affinity import scorers
from p2d_core.attention.layout import head_slices
from tests.small_scoring import affinities, samples


def own_loss(network, ids: list[int], n_prompt: int) -> float:
    labels = torch.tensor([ids])
    labels[:, :n_prompt] = -100
    with torch.inference_mode():
        return float(network(input_ids=torch.tensor([ids]), labels=labels).loss)


def own_losses(network, model, corpus) -> np.ndarray:
    encoded = model.encode(corpus)
    return np.array([own_loss(network, each.input_ids, each.n_prompt) for each in encoded])


def test_loss_prefers_low_unless_told_otherwise(model, heads):
    corpus = samples(9)
    expected = own_losses(model.model, model, corpus)
    np.testing.assert_allclose(affinities("loss", model, heads, [corpus]), -expected, rtol=1e-5)
    high = affinities("loss", model, heads, [corpus], prefer="high")
    np.testing.assert_allclose(high, expected, rtol=1e-5)


def test_mid_perplexity_worked_by_hand():
    # in order: 1, 2, 2, 8; the two that are alike share the middle, 1 is at 1/8 and 8 at 7/8
    tables = [pa.table({"base_loss": [2.0, 8.0]}), pa.table({"base_loss": [1.0, 2.0]})]
    got = scorers.make("mid-perplexity", {}).affinity({}, tables)
    assert [part.to_pylist() for part in got] == [[0.0, -0.375], [-0.375, 0.0]]
    low = scorers.make("mid-perplexity", {"middle": 0.125}).affinity({}, tables)
    assert [part.to_pylist() for part in low] == [[-0.375, -0.75], [0.0, -0.375]]


def test_ifd_is_the_loss_with_the_prompt_over_the_loss_without(model, heads):
    corpus = samples(12)
    begin = model.tokenizer.bos_token_id
    ratios = []
    for each in model.encode(corpus):
        response = each.input_ids[each.n_prompt :]
        given = own_loss(model.model, each.input_ids, each.n_prompt)
        ratios.append(given / own_loss(model.model, [begin, *response], 1))
    assert min(ratios) < 1 < max(ratios)
    expected = [ratio if ratio <= 1 else 1 - ratio for ratio in ratios]
    np.testing.assert_allclose(affinities("ifd", model, heads, [corpus]), expected, rtol=1e-4)


def test_ifd_ranks_what_the_prompt_misleads_below_all_else():
    table = pa.table({"loss_with_prompt": [1.0, 0.1, 3.0], "loss_alone": [2.0, 2.0, 2.0]})
    (got,) = scorers.make("ifd", {}).affinity({}, [table])
    assert got.to_pylist() == pytest.approx([0.5, 0.05, -0.5])


@pytest.mark.parametrize("relative", [False, True])
def test_head_influence_is_the_rise_of_the_loss_without_the_heads_o_columns(model, heads, relative):
    corpus = samples(9)
    base = own_losses(model.model, model, corpus)
    without = copy.deepcopy(model.model)
    with torch.no_grad():
        for layer, head in heads.task_heads:
            piece = head_slices(model.layers[layer], head)["o"]
            without.get_submodule(piece.module).weight[:, piece.start : piece.stop] = 0
    rise = own_losses(without, model, corpus) - base
    assert np.abs(rise).max() > 0.01
    got = affinities("head-influence", model, heads, [corpus], relative=relative)
    np.testing.assert_allclose(got, rise / base if relative else rise, atol=1e-5)
    np.testing.assert_allclose(own_losses(model.model, model, corpus), base)
