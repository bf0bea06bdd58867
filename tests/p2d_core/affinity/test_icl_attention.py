"""Attention in context: what is measured, and what of it is length and place."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from p2d_core.affinity import scorers
from p2d_core.affinity.in_context import draw_contexts, kept_samples, samples_kept
from p2d_core.affinity.measuring import measure_shard
from p2d_core.samples.tokens import EncodedSample
from tests.small_scoring import TARGET, affinities, samples


def contexts_of(model, corpus, demonstrations=3, draws=2, seed=0):
    target = samples_kept(kept_samples(model, TARGET.proxy))
    return draw_contexts(model, corpus, target, demonstrations, draws, seed)


def test_the_candidate_stands_among_demonstrations_before_a_query_with_its_answer(model):
    corpus = samples(20)
    proxies = {tuple(each.input_ids): each for each in model.encode(TARGET.proxy)}
    places = set()
    for sample, context in zip(
        [each for each in model.encode(corpus) for _ in range(2)],
        contexts_of(model, corpus),
        strict=True,
    ):
        ids = context.tokens.input_ids
        assert ids[context.start : context.stop] == sample.input_ids
        assert ids[: context.start] + ids[context.stop :] == context.without.input_ids
        after, own, others, query = context.circumstances
        asked = proxies[tuple(ids[-query:])]
        assert ids[context.tokens.n_prompt :] == asked.input_ids[asked.n_prompt :]
        assert context.without.n_response == context.tokens.n_response
        assert (own, own + others + query) == (len(sample), len(ids))
        places.add(after)
    assert places == {0, 1, 2}


def test_contexts_are_drawn_from_the_samples_id_alone(model):
    corpus = samples(9)
    whole = contexts_of(model, corpus)
    assert contexts_of(model, corpus[4:5]) == whole[8:10]
    assert contexts_of(model, corpus, seed=1) != whole
    assert whole[0] != whole[1]


@pytest.mark.parametrize("most", [30, 22, 12])
def test_what_the_model_has_no_positions_for_is_left_out(model, monkeypatch, most):
    monkeypatch.setattr("p2d_core.affinity.in_context.most_tokens", lambda folder: most)
    for context in contexts_of(model, samples(20)):
        assert len(context.tokens) <= most
        assert context.stop > context.start
        assert context.tokens.n_response >= 1
        assert context.circumstances[1] == context.stop - context.start


def test_attention_is_the_share_that_the_answers_tokens_pay(model, heads):
    """Against transformers' own eager attention, a context at a time."""
    corpus = samples(4)
    scorer = scorers.make("icl-attention", {"draws": 2})
    measured = measure_shard(scorer, model, scorer.prepare(model, heads, TARGET), corpus)
    got = np.array(measured["attention"].to_pylist()).reshape(8, 3)
    model.model.set_attn_implementation("eager")
    try:
        for context, paid in zip(contexts_of(model, corpus), got, strict=True):
            ids = torch.tensor([context.tokens.input_ids])
            with torch.inference_mode():
                attention = model.model(ids, output_attentions=True).attentions
            for (layer, head), share in zip(heads.task_heads, paid, strict=True):
                rows = attention[layer][0, head, context.tokens.n_prompt :]
                expected = rows[:, context.start : context.stop].sum(dim=1).mean()
                assert share == pytest.approx(float(expected), abs=1e-5)
    finally:
        model.model.set_attn_implementation("sdpa")


def planted(n: int, draws: int, n_heads: int, signal: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """Attention made of place, lengths and a sample's own; and the candidates' lengths."""
    rng = np.random.default_rng(0)
    place = rng.integers(0, 3, (n, draws))
    own = np.repeat(rng.integers(4, 200, n)[:, None], draws, axis=1)
    others, query = rng.integers(20, 300, (2, n, draws))
    usual = np.array([0.3, -0.2, 0.5])[place] + 0.7 * np.log1p(own) - 0.6 * np.log1p(others)
    logs = usual[..., None] * np.arange(1, n_heads + 1) * 0.5 + signal[:, None, None] - 7
    circumstances = np.stack([place, own, others, query], axis=-1).astype(np.float32)

    def lists(values):
        flat = pa.array(values.reshape(-1).astype(np.float32))
        return pa.FixedSizeListArray.from_arrays(flat, values.size // n)

    columns = {"attention": lists(np.exp(logs)), "circumstances": lists(circumstances)}
    return pa.table(columns), own[:, 0]


def test_length_and_place_are_measured_and_taken_off():
    rng = np.random.default_rng(1)
    signal = rng.normal(size=400) * 0.1
    table, lengths = planted(400, 2, 3, signal)
    state = {"heads": torch.zeros(3, 2)}
    (got,) = scorers.make("icl-attention", {}).affinity(state, [table])
    assert np.corrcoef(got, signal)[0, 1] > 0.99
    assert abs(np.corrcoef(got, np.log(lengths))[0, 1]) < 0.02
    assert np.mean(got) == pytest.approx(0, abs=1e-6)
    cut = [table.slice(0, 150), table.slice(150)]
    np.testing.assert_allclose(
        np.concatenate(list(scorers.make("icl-attention", {}).affinity(state, cut))), got, atol=1e-9
    )
    (per_token,) = scorers.make("icl-attention", {"bias": "per-token"}).affinity(state, [table])
    assert abs(np.corrcoef(per_token, np.log(lengths))[0, 1]) > 0.2


def test_per_token_is_attention_over_length(model, heads):
    corpus = samples(5)
    scorer = scorers.make("icl-attention", {"draws": 2})
    measured = measure_shard(scorer, model, scorer.prepare(model, heads, TARGET), corpus)
    paid = np.array(measured["attention"].to_pylist()).reshape(5, 2, 3)
    lengths = np.array([len(each) for each in model.encode(corpus)])
    got = affinities("icl-attention", model, heads, [corpus], bias="per-token")
    np.testing.assert_allclose(got, paid.mean(axis=(1, 2)) / lengths, rtol=1e-5)


def test_a_draw_weighs_by_how_much_the_candidate_lowers_the_answers_loss(model, heads):
    corpus = samples(4)
    options = {"draws": 1, "weigh_by_gain": True, "bias": "per-token"}
    gains = []
    for context in contexts_of(model, corpus, draws=1):
        losses = []
        for each in (context.without, context.tokens):
            assert isinstance(each, EncodedSample)
            labels = torch.tensor([each.input_ids])
            labels[:, : each.n_prompt] = -100
            with torch.inference_mode():
                losses.append(
                    float(model.model(torch.tensor([each.input_ids]), labels=labels).loss)
                )
        gains.append(losses[0] - losses[1])
    assert min(gains) < 0 < max(gains)
    plain = affinities("icl-attention", model, heads, [corpus], draws=1, bias="per-token")
    weighed = affinities("icl-attention", model, heads, [corpus], **options)
    np.testing.assert_allclose(weighed / plain, [math.exp(gain) for gain in gains], rtol=1e-4)


def words_in_common(one: list[str], other: list[str]) -> int:
    """Length of their longest common subsequence."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + words_in_common(one[1:], other[1:])
    return max(words_in_common(one[1:], other), words_in_common(one, other[1:]))


def rouge_l_of_greedy_answer(model, context) -> float:
    """The likeliest token a pass, each pass from the beginning, until the end or the length."""
    n_prompt, right = context.tokens.n_prompt, context.tokens.input_ids
    ids = right[:n_prompt]
    while len(ids) < len(right):
        with torch.inference_mode():
            ids = [*ids, int(model.model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == model.encoder.end_id:
            break
    answer, wanted = (
        model.tokenizer.decode(each[n_prompt:], skip_special_tokens=True).split()
        for each in (ids, right)
    )
    return 2 * words_in_common(answer, wanted) / max(1, len(answer) + len(wanted))


def likelihood(model, context) -> float:
    labels = torch.tensor([context.tokens.input_ids])
    labels[:, : context.tokens.n_prompt] = -100
    with torch.inference_mode():
        return math.exp(-model.model(torch.tensor([context.tokens.input_ids]), labels=labels).loss)


@pytest.mark.parametrize(
    ("judged_by", "answered"),
    [("generation", rouge_l_of_greedy_answer), ("likelihood", likelihood)],
)
def test_data_whisperer_is_how_well_is_answered_times_attention_a_token(
    model, heads, judged_by, answered
):
    """Against transformers' own loss, logits and eager attention, a context at a time."""
    corpus = samples(12)
    expected = []
    model.model.set_attn_implementation("eager")
    try:
        for context in contexts_of(model, corpus):
            ids = torch.tensor([context.tokens.input_ids])
            with torch.inference_mode():
                output = model.model(ids, output_attentions=True)
            # the second of three layers, all 8 heads
            rows = output.attentions[1][0, :, context.tokens.n_prompt :]
            paid = rows[..., context.start : context.stop].sum(dim=-1).mean(dim=-1).sum()
            length = context.stop - context.start
            expected.append(answered(model, context) * float(paid) / length)
    finally:
        model.model.set_attn_implementation("sdpa")
    assert len(set(expected)) > 4
    got = affinities("data-whisperer", model, heads, [corpus], judged_by=judged_by)
    np.testing.assert_allclose(got, np.reshape(expected, (12, 2)).mean(axis=1), rtol=1e-4)
