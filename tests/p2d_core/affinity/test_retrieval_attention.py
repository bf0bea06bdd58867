"""Attention of the tuned task heads to where the response's tokens stand already."""

import copy

import numpy as np
import pyarrow as pa
import torch

from p2d_core.affinity import scorers
from p2d_core.affinity.measuring import measure_shard
from p2d_core.models import CapturedModel
from tests.small_scoring import TARGET, affinities, joined, sample_of

CORPUS = [
    sample_of("w1 w2 w3 w4", "w2 w3"),
    sample_of("w1 w2 w1 w4 w7", "w1"),
    sample_of("w5 w6 w7", "w8 w9"),
]


def by_hand(model: CapturedModel, heads) -> list[float]:
    """From the eager attentions of a model in which the tuned slices stand."""
    network = copy.deepcopy(model.model)
    model.tuned.apply_(network)
    network.set_attn_implementation("eager")
    found = []
    for each in model.encode(CORPUS):
        ids = torch.tensor(each.input_ids)
        attentions = network(input_ids=ids[None], output_attentions=True).attentions
        lifts = []
        for place in range(each.n_prompt, len(ids)):
            alike = ids[:place] == ids[place]
            for layer, head in heads.task_heads:
                there = attentions[layer][0, head, place - 1, :place][alike].sum()
                lifts.append(float(there) - float(alike.float().mean()))
        found.append(sum(lifts) / len(lifts))
    return found


def test_it_is_the_tuned_heads_attention_to_copies_beyond_chance(model, heads):
    got = affinities("retrieval-attention", model, heads, [CORPUS])
    np.testing.assert_allclose(got, by_hand(model, heads), atol=1e-6)
    assert got[0] != got[1]
    assert got[2] == 0  # its response stands nowhere before


def test_what_each_head_adds_is_the_whole(model, heads):
    scorer = scorers.make("retrieval-attention", {})
    state = scorer.prepare(model, heads, TARGET)
    table = joined(CORPUS, measure_shard(scorer, model, state, CORPUS))
    (affinity,) = scorer.affinity(state, [table])
    parts = scorer.head_parts(state, table)
    assert parts.shape == (3, len(heads.task_heads))
    np.testing.assert_allclose(parts.sum(1), np.asarray(affinity))


def test_a_gate_is_set_by_held_out_samples_as_if_they_stood_in_the_corpus(model, heads):
    scorer = scorers.make("retrieval-attention", {})
    state = scorer.prepare(model, heads, TARGET)
    held_out = list(TARGET.held_out)
    table: pa.Table = joined(held_out, measure_shard(scorer, model, state, held_out))
    (affinity,) = scorer.affinity(state, [table])
    np.testing.assert_allclose(scorer.own_affinity(state, [table]), np.asarray(affinity), atol=1e-6)
