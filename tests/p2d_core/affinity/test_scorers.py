"""What each scorer's numbers mean, and that they depend on nothing else."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from p2d_core.aer import Cost, measured
from p2d_core.affinity import Scorer, Target, less, scorers, steps_of
from p2d_core.affinity.head_activation import HeadActivation
from p2d_core.affinity.measuring import measure_shard
from p2d_core.attention.capture import capture_head_outputs
from p2d_core.errors import InputError, SettingsError, UnknownNameError
from p2d_core.heads.ranking import rankers
from p2d_core.models import CapturedModel, parameter_counts
from p2d_core.samples.schema import Sample, sample_id_of
from tests.small_scoring import NEEDED, TARGET, affinities, joined, samples

SINGLE = [
    *("head-activation", "head-gradient", "head-influence", "head-proxy-loss", "loss-shift"),
    *("icl-attention", "bm25", "tfidf", "rds-plus", "less", "ifd", "loss", "mid-perplexity"),
    *("data-whisperer", "length", "random", "retrieval-attention", "sum"),
]
RUNNING_NO_MODEL = {"bm25", "length", "tfidf", "random"}
MODEL_RUN_BY = sorted({*SINGLE} - RUNNING_NO_MODEL)


def test_no_scorer_is_left_out_of_these_tests():
    chains = {"head-filter", "loss-filter"}
    assert {*SINGLE} | chains == {*scorers}


@pytest.mark.parametrize("name", MODEL_RUN_BY)
def test_threads_that_share_a_model_measure_what_one_does(name, model, heads):
    """Some have tuned slices, silenced heads or hooks in the model for half of the time."""
    scorer = scorers.make(name, NEEDED.get(name, {}))
    state = scorer.prepare(model, heads, TARGET if scorer.measures_target else Target((), ()))
    shards = [samples(20, seed) for seed in range(6)]
    beside = scorers.make("loss", {})

    def base_loss(shard: list[Sample]) -> pa.Table:
        return measure_shard(beside, model, {}, shard)

    alone_loss = [base_loss(shard) for shard in shards]

    def measured(shard: list[Sample]) -> pa.Table:
        return measure_shard(scorer, model, state, shard)

    alone = [measured(shard) for shard in shards]
    with ThreadPoolExecutor(3) as threads:
        losses = threads.map(base_loss, shards)
        together = list(threads.map(measured, shards))
        assert list(losses) == alone_loss
    assert together == alone


@pytest.mark.parametrize("name", SINGLE)
def test_an_affinity_does_not_depend_on_shards_order_or_batches(name, model, heads):
    corpus = samples(30)
    whole = affinities(name, model, heads, [corpus])
    assert len(whole) == 30
    assert np.isfinite(whole).all()
    cut = affinities(name, model, heads, [corpus[:7], corpus[7:8], corpus[8:]])
    # a difference of two losses of about 5 rounds in their sixth digit, not in its own
    np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-5)
    backwards = affinities(name, model, heads, [corpus[::-1]])
    np.testing.assert_allclose(backwards[::-1], whole, rtol=1e-5, atol=1e-5)
    model.tokens_per_batch = 24
    try:
        small = affinities(name, model, heads, [corpus])
    finally:
        model.tokens_per_batch = 8192
    np.testing.assert_allclose(small, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SINGLE)
def test_a_measurement_takes_no_more_than_is_looked_for_on_the_disk(name, model, heads):
    scorer = scorers.make(name, NEEDED.get(name, {}))
    counts = parameter_counts(model.folder)
    said = scorer.bytes_a_sample(counts, heads if scorer.needs_heads else None)
    state = scorer.prepare(model, heads, TARGET if scorer.measures_target else Target((), ()))
    columns = scorer.measure(model, state, samples(20)) if scorer.runs_model else {}
    taken = sum(pa.array(column).nbytes for column in columns.values()) / 20
    assert taken <= said
    if name in ("less", "head-gradient", "rds-plus"):
        assert said <= 1.5 * taken


def test_who_waits_for_another_shards_warm_up_does_not_pay_for_it(model, heads):
    held, free = threading.Event(), threading.Event()

    def warm_up():
        with less._preparing:
            held.set()
            free.wait(10)

    def wait() -> Cost:
        held.wait(10)
        threading.Timer(1.0, free.set).start()
        with measured() as watch:
            scorers.make("less", {"epochs": 1}).prepare(model, None, Target(TARGET.proxy[:2], ()))
        return watch.cost

    scorers.make("less", {"epochs": 1}).prepare(model, None, Target(TARGET.proxy[:2], ()))
    with ThreadPoolExecutor(2) as threads:
        threads.submit(warm_up)
        assert threads.submit(wait).result().wall_seconds < 0.5


def test_head_activation_equals_whitening_by_hand(model, heads):
    """Whiten each head with the corpus' moments, put heads side by side, mean of best cosines."""
    corpus = samples(30)
    scorer = HeadActivation(neighbours=2, shrinkage=0.2)

    def means(chosen):
        rows = []
        for sample in model.encode(chosen):
            ids = torch.tensor([sample.input_ids])
            out = capture_head_outputs(
                model.model, model.layers, heads.task_heads, ids, torch.ones_like(ids)
            )
            rows.append(out[0].mean(dim=0).double().numpy())
        return np.stack(rows)

    pool, proxies = means(corpus), means(TARGET.proxy)
    parts = []
    for head in range(3):
        covariance = np.cov(pool[:, head].T, bias=True)
        size = len(covariance)
        shrunk = 0.8 * covariance + 0.2 * np.trace(covariance) / size * np.eye(size)
        values, vectors = np.linalg.eigh(shrunk)
        parts.append((pool[:, head].mean(axis=0), vectors / np.sqrt(values)))

    def whitened(x):
        flat = np.concatenate([(x[:, h] - mean) @ w for h, (mean, w) in enumerate(parts)], axis=1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    similarity = whitened(pool) @ whitened(proxies).T
    expected = np.sort(similarity, axis=1)[:, -2:].mean(axis=1)
    got = affinities("head-activation", model, heads, [corpus], neighbours=2, shrinkage=0.2)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    tables = [
        joined(
            corpus,
            measure_shard(scorer, model, scorer.prepare(model, heads, Target((), ())), corpus),
        )
    ]
    own = scorer.own_affinity(scorer.prepare(model, heads, TARGET), tables)
    among = whitened(proxies) @ whitened(proxies).T
    np.fill_diagonal(among, -np.inf)
    np.testing.assert_allclose(own, np.sort(among, axis=1)[:, -2:].mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_head_activation_unwhitened_against_the_proxies_mean_worked_from_outputs(
    model, heads, tokens
):
    def units(chosen):
        rows = []
        for sample in model.encode(chosen):
            ids = torch.tensor([sample.input_ids])
            out = capture_head_outputs(
                model.model, model.layers, heads.task_heads, ids, torch.ones_like(ids)
            )[0]
            seen = out if tokens == "all" else out[sample.n_prompt :]
            flat = seen.mean(dim=0).flatten().double().numpy()
            rows.append(flat / np.linalg.norm(flat))
        return np.stack(rows)

    corpus, proxies = samples(12), units(TARGET.proxy)
    options = {"tokens": tokens, "compare": "mean", "whiten": False}
    mean = proxies.mean(axis=0) / np.linalg.norm(proxies.mean(axis=0))
    got = affinities("head-activation", model, heads, [corpus[:5], corpus[5:]], **options)
    np.testing.assert_allclose(got, units(corpus) @ mean, atol=1e-6)
    scorer = HeadActivation(**options)
    state = scorer.fit(scorer.prepare(model, heads, TARGET), [])
    others = [np.delete(proxies, i, axis=0).mean(axis=0) for i in range(len(proxies))]
    expected = [p @ o / np.linalg.norm(o) for p, o in zip(proxies, others, strict=True)]
    np.testing.assert_allclose(scorer.own_affinity(state, []), expected, atol=1e-6)


@pytest.mark.parametrize("compare", ["nearest", "mean"])
def test_one_proxy_sample_alone_has_no_own_affinity(model, heads, compare):
    scorer = HeadActivation(compare=compare, whiten=False)
    state = scorer.prepare(model, heads, Target(TARGET.proxy[:1], ()))
    with pytest.raises(
        InputError, match=r"head-activation: .* but there is 1 in all\. Give at least 2, or set no"
    ):
        scorer.own_affinity(state, [])


def test_a_sample_that_is_a_proxy_is_nearest(model, heads):
    corpus = [*samples(30), TARGET.proxy[0]]
    got = affinities("head-activation", model, heads, [corpus], neighbours=1)
    assert got.argmax() == 30
    assert got[30] == pytest.approx(1, abs=1e-5)


def test_samples_all_alike_have_a_defined_affinity(model, heads):
    got = affinities("head-activation", model, heads, [samples(1) * 6])
    assert np.isfinite(got).all()
    assert np.ptp(got) == pytest.approx(0, abs=1e-6)


def test_loss_shift_is_what_tuning_took_off_the_loss(model, heads):
    corpus = samples(6)
    encoded = model.encode(corpus)
    before = model.response_losses(encoded)
    with model.looking_through(tuned=True):
        after = model.response_losses(encoded)
    assert not torch.allclose(before, after)
    got = affinities("loss-shift", model, heads, [corpus])
    np.testing.assert_allclose(got, (before - after).double(), atol=1e-6)
    np.testing.assert_allclose(
        affinities("head-proxy-loss", model, heads, [corpus]), -after.double(), atol=1e-6
    )


def test_loss_shift_takes_over_tuned_losses_that_the_step_before_measured(model, heads):
    corpus = samples(6)
    shift, state = scorers.make("loss-shift", {}), {}
    before = measure_shard(scorers.make("head-proxy-loss", {}), model, {}, corpus)
    doubled = before.set_column(3, "tuned_loss", pc.multiply(before["tuned_loss"], 2.0))
    some = [corpus[4], corpus[1]]
    taken = measure_shard(shift, model, state, some, doubled)
    assert taken["tuned_loss"].to_pylist() == doubled["tuned_loss"].take([4, 1]).to_pylist()
    # not all are there, or the step before measured something else: it measures them itself
    activations = measure_shard(scorers.make("loss", {}), model, {}, corpus)
    for lacking in (doubled.slice(2), activations, None):
        measured = measure_shard(shift, model, state, some, lacking)
        np.testing.assert_allclose(measured["tuned_loss"], before["tuned_loss"].take([4, 1]), 1e-5)
        np.testing.assert_allclose(measured["base_loss"], taken["base_loss"], 1e-5)


def test_response_losses_equal_the_models_own(model):
    """The loss that transformers computes for one sample at a time."""
    for sample in model.encode(samples(4)):
        ids = torch.tensor([sample.input_ids])
        labels = ids.clone()
        labels[:, : sample.n_prompt] = -100
        with torch.inference_mode():
            expected = model.model(input_ids=ids, labels=labels).loss
        assert model.response_losses([sample])[0] == pytest.approx(float(expected), abs=1e-5)


def test_tfidf_prefers_words_in_common(model, heads):
    same = TARGET.proxy[0]
    strange = Sample(sample_id_of("x", "y"), "s", "x", "y", 0)
    shard = [same, strange]
    scorer = scorers.make("tfidf", {"neighbours": 1})
    state = scorer.prepare(model, heads, TARGET)
    table = pa.table({name: [getattr(s, name) for s in shard] for name in ("prompt", "response")})
    (got,) = scorer.affinity(state, [table])
    assert got[0].as_py() == pytest.approx(1)
    assert got[1].as_py() == 0


def test_length_is_the_number_of_response_tokens_with_the_end(model, heads):
    """Responses of two words, of one word and of seven, each with its end of sequence."""
    texts = [("w1 w2", "w3 w4"), ("w1 w2 w3 w4", "w5"), ("w1", "w2 w3 w4 w5 w6 w7 w8")]
    shard = [Sample(sample_id_of(*text), "s", *text, row) for row, text in enumerate(texts)]
    assert affinities("length", model, heads, [shard]).tolist() == [3, 2, 8]


@pytest.mark.parametrize("name", SINGLE)
def test_a_scorer_says_whether_it_runs_a_model(name, model, heads, tmp_path):
    """One that says no counts the tokens of a folder that holds a tokenizer and no weights."""
    scorer = scorers.make(name, NEEDED.get(name, {}))
    assert scorer.runs_model == (name not in RUNNING_NO_MODEL)
    if scorer.runs_model:
        return
    model.tokenizer.save_pretrained(tmp_path)
    without_weights = CapturedModel(tmp_path)
    measured = measure_shard(scorers.make(name, {}), without_weights, {}, samples(3))
    assert measured.column_names == ["sample_id", "n_tokens", "n_response_tokens"]


def test_random_depends_on_id_and_seed_alone(model, heads):
    one = affinities("random", model, heads, [samples(20)])
    other = affinities("random", model, heads, [samples(20)], seed=1)
    assert 0 <= one.min() < one.max() < 1
    assert not np.allclose(one, other)


def test_head_filter_is_a_chain_of_three_gated_steps_or_two():
    options = {"domain_quantile": 0.2, "shift_quantile": 0.3}
    first, second, third = steps_of(scorers.make("head-filter", options))
    assert (first.name, first.gate) == ("domain", 0.2)
    assert (second.name, second.gate) == ("consistency", 0.1)
    assert (third.name, third.gate) == ("shift", 0.3)
    assert second.scorer.needs_head_proxy
    without = steps_of(scorers.make("head-filter", {"shift_quantile": None}))
    assert [step.name for step in without] == ["domain", "consistency"]


def test_loss_filter_gates_by_the_tuned_loss_and_by_what_tuning_took_off():
    options = {"consistency_quantile": 0.2, "shift_quantile": 0.3}
    first, second = steps_of(scorers.make("loss-filter", options))
    assert (first.name, first.gate) == ("consistency", 0.2)
    assert (second.name, second.gate) == ("shift", 0.3)
    assert not any(step.scorer.needs_heads for step in (first, second))


def test_the_shift_of_held_out_target_samples_is_what_they_would_have_in_the_corpus(model, heads):
    scorer = scorers.make("loss-shift", {})
    own = scorer.own_affinity(scorer.prepare(model, heads, TARGET), [])
    in_corpus = affinities("loss-shift", model, heads, [list(TARGET.held_out)])
    np.testing.assert_allclose(own, in_corpus, atol=1e-6)


def test_an_unknown_scorer_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"no scorer 'guess'. Known: bm25, .*head-a"):
        scorers.make("guess", {})


def test_an_unknown_or_wrong_setting_of_a_scorer_is_refused():
    with pytest.raises(SettingsError, match=r"has no setting neighbors. Known: neighbours"):
        scorers.make("head-activation", {"neighbors": 3})
    with pytest.raises(SettingsError, match="setting `neighbours` was 'many'"):
        scorers.make("head-activation", {"neighbours": "many"})


def test_with_a_depth_deeper_task_heads_are_not_looked_at(model, heads):
    scorer = HeadActivation(depth=0.6)  # 2 of 3 layers
    assert scorer.looked_at(heads) == ((1, 3), (1, 6))
    assert scorer.score_kept(heads) == pytest.approx(5 / 6)
    corpus = samples(4)
    measured = measure_shard(scorer, model, scorer.prepare(model, heads, TARGET), corpus)
    whole = HeadActivation()
    of_all = measure_shard(whole, model, whole.prepare(model, heads, TARGET), corpus)
    vectors, all_vectors = (
        np.array(each["head_outputs"].to_pylist()) for each in (measured, of_all)
    )
    np.testing.assert_array_equal(vectors, all_vectors[:, : vectors.shape[1]])
    assert vectors.shape[1] * 3 == all_vectors.shape[1] * 2


def test_a_depth_above_all_task_heads_is_that_of_the_first_layer_with_any(heads):
    """A ranking may put none so low; what a run has done until then is not lost for it."""
    assert HeadActivation(depth=0.2).looked_at(heads) == ((1, 3), (1, 6))
    with pytest.raises(SettingsError, match=r"depth is 1\.5"):
        scorers.make("head-filter", {"depth": 1.5})


@pytest.mark.parametrize(
    ("registry", "name"), [(each, name) for each in (scorers, rankers) for name in each]
)
def test_every_scorer_and_ranker_says_where_it_is_from_and_what_it_costs(registry, name):
    told = registry.get(name).__doc__
    assert "Source: " in told
    assert "Costs " in told or "Runs no model" in told


OTHERS = {
    "bm25": {"neighbours": 1, "k1": 2.0, "b": 0.9, "features": 16},
    "data-whisperer": {
        "demonstrations": 2, "draws": 1, "layer": 1.0, "judged_by": "likelihood", "seed": 1,
    },
    "head-activation": {
        "neighbours": 1, "shrinkage": 0.9, "depth": 0.5, "tokens": "response", "compare": "mean",
        "whiten": False,
    },
    "head-gradient": {"dimensions": 8, "slices": ("q",), "seed": 1},
    "head-influence": {"relative": True},
    "icl-attention": {
        "demonstrations": 2, "draws": 1, "bias": "per-token", "weigh_by_gain": True, "seed": 1,
    },
    "less": {
        "rank": 2, "alpha": 4, "epochs": 1, "learning_rate": 1e-2, "batch_size": 2,
        "dimensions": 8, "seed": 1,
    },
    "loss": {"prefer": "high"},
    "mid-perplexity": {"middle": 0.1},
    "random": {"seed": 1},
    "rds-plus": {"choose": "mean"},
    "tfidf": {"neighbours": 1, "features": 16},
}  # fmt: skip
"""Of each scorer every setting, with another value than its default; sums and chains apart."""


@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name in OTHERS for setting in OTHERS[name]]
)
def test_every_setting_of_a_scorer_is_read(name, setting, model, heads):
    corpus = samples(20)
    # so few parameters are not projected, and nothing is drawn
    beside = {"dimensions": 8} if (name, setting) == ("head-gradient", "seed") else {}
    usual = affinities(name, model, heads, [corpus], **beside)
    changed = {setting: OTHERS[name][setting]}
    other = affinities(name, model, heads, [corpus], **beside, **changed)
    assert not np.allclose(usual, other, atol=1e-9)


def test_no_setting_of_a_scorer_is_left_out():
    for name in SINGLE:
        if name != "sum":
            settings = {each.name for each in fields(scorers.get(name)) if each.init}
            assert settings == set(OTHERS.get(name, {})), name


COMPARED_BY = [
    (name, setting)
    for name in OTHERS
    for setting in OTHERS[name]
    if name in MODEL_RUN_BY and setting not in scorers.make(name, {}).measured_by
]


@pytest.mark.parametrize(("name", "setting"), COMPARED_BY)
def test_what_it_is_not_measured_by_leaves_a_measurement_as_it_is(name, setting, model, heads):
    """Were it read there, other values of it would take measurements that are not theirs."""
    changed = {setting: OTHERS[name][setting]}
    usual, other = (
        measured_by(scorers.make(name, options), model, heads) for options in ({}, changed)
    )
    assert usual.equals(other)


def measured_by(scorer, model, heads) -> pa.Table:
    known = TARGET if scorer.measures_target else Target((), ())
    given = heads if scorer.needs_heads else None
    state = scorer.prepare(model, given, known)
    return pa.table(scorer.measure(model, state, samples(6)))


def test_a_scorer_that_says_nothing_is_measured_by_all_that_there_is():
    @dataclass(frozen=True)
    class Plain(Scorer):
        first: int = 1
        second: float = 2.0

    assert Plain().measured_by == ("first", "second")
    assert Plain().measures_target
    assert Plain().runs_model
    assert not Plain().needs_heads
    assert not Plain().needs_head_proxy
