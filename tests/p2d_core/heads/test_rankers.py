import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax
from scipy.stats import wasserstein_distance

from p2d_core.adaptation.slices import TunedSlices
from p2d_core.attention.layout import (
    all_heads,
    attention_layers,
    head_slices,
    projection_weights,
    slices_of,
)
from p2d_core.errors import HeadMapError, InputError, SettingsError, UnknownNameError
from p2d_core.heads.head_map import HeadMap
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.heads.spad import Spad, head_matrices, spad
from p2d_core.samples.tokens import EncodedSample
from tests.tiny import tiny_llama

NAMES = ["ablation", "bottom", "frobenius", "gradient", "layer", "random", "spad", "taylor"]


def samples(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def one(row):
        ids = torch.randint(3, 50, (6 + row % 4,), generator=generator).tolist()
        return EncodedSample(str(row), ids, n_prompt=2 + row % 3)

    return [one(row) for row in range(n)]


def moved_heads(model, heads, by=0.05):
    """The whole attention as a proxy run leaves it, with noise on these heads' q and o alone."""
    tuned_model = copy.deepcopy(model)
    layers = attention_layers(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer, head in heads:
            for role in "qo":
                piece = head_slices(layers[layer], head)[role]
                weight = tuned_model.get_submodule(piece.module).weight
                part = weight.narrow(piece.dim, piece.start, piece.stop - piece.start)
                part.add_(by * torch.randn(part.shape, generator=generator))
    return TunedSlices.from_model(tuned_model, slices_of(layers, all_heads(layers)))


@cache
def model():
    return tiny_llama()


def evidence(proxy=None, **changes):
    layers = attention_layers(model())
    if proxy is None:
        proxy = moved_heads(model(), all_heads(layers))
    given_samples = changes.pop("samples", samples())
    return RankingEvidence(model(), layers, proxy, given_samples, batch_size=4, **changes)


def is_as_before(before):
    return all(
        torch.equal(weight, before[name]) and weight.requires_grad and weight.grad is None
        for name, weight in model().named_parameters()
    )


# -- what holds for all ------------------------------------------------------------------------


def test_all_rankers_are_registered_when_the_package_is_imported():
    assert list(rankers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_ranker_scores_every_head_reports_progress_and_leaves_the_model_as_it_was(name):
    before = {key: weight.detach().clone() for key, weight in model().named_parameters()}
    seen = []
    ranker = rankers.make(name, {})
    scores = ranker.rank(evidence(progress=lambda done, total: seen.append((done, total))))
    assert scores.shape == (3, 8)
    assert scores.dtype == torch.float64
    HeadMap.from_scores(scores, 4)  # all finite
    assert scores.std() > 0
    assert ranker.version
    assert is_as_before(before)
    assert not model().training
    if name not in ("random", "layer"):  # these have nothing to wait for
        assert seen[-1][0] == seen[-1][1] == len(seen)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_a_ranking_does_not_depend_on_chance(name):
    first, second = (rankers.make(name, {}).rank(evidence()) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_whoever_says_so_needs_a_proxy_run_and_nobody_else(name):
    ranker = rankers.make(name, {})
    without = replace(evidence(), proxy=None)
    if ranker.needs_proxy_run:
        with pytest.raises(InputError, match="proxy run, and there was none"):
            ranker.rank(without)
    else:
        assert ranker.rank(without).shape == (3, 8)


@pytest.mark.parametrize("name", ["ablation", "gradient", "taylor"])
def test_without_samples_there_is_no_loss(name):
    with pytest.raises(InputError, match="there are none"):
        rankers.make(name, {}).rank(evidence(samples=[]))


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(UnknownNameError, match=r"no ranker 'spat'. Known: ablation, bottom, frob"):
        rankers.make("spat", {})
    with pytest.raises(SettingsError, match=r"'spad' has no setting temp. Known: temperature, sup"):
        rankers.make("spad", {"temp": 1})
    with pytest.raises(SettingsError, match=r"temperature is 0\.0; it has to be above 0"):
        rankers.make("spad", {"temperature": 0})
    with pytest.raises(SettingsError, match=r"`support` was 'places'"):
        rankers.make("spad", {"support": "places"})
    with pytest.raises(SettingsError, match=r"support is 'places'; it has to be 'positions' or"):
        Spad(support="places")


# -- sPAD --------------------------------------------------------------------------------------


def test_spad_over_positions_worked_by_hand():
    # softmax of ln 3 and 0 is 3/4 and 1/4; the other way round moves half the mass by one place
    base = torch.tensor([[[np.log(3.0)], [0.0]]])
    assert spad(base, base.flip(1)).tolist() == pytest.approx([0.5])
    # the same mass over two places
    base = torch.tensor([[[np.log(3.0), -1e9, 0.0]]])
    assert spad(base, base.flip(2)).tolist() == pytest.approx([1.0])


def test_spad_over_values_worked_by_hand():
    # {3/4, 1/4} against {1/2, 1/2}; the order does not count
    base, proxy = torch.tensor([[[np.log(3.0), 0.0]]]), torch.zeros(1, 1, 2)
    assert spad(base, proxy, support="values").tolist() == pytest.approx([0.25])
    assert spad(base, base.flip(2), support="values").tolist() == pytest.approx([0.0])


head_arrays = arrays("float32", (2, 3, 4), elements=st.floats(-5, 5, width=32))


@settings(max_examples=50, deadline=None)
@given(head_arrays, head_arrays, st.sampled_from([0.5, 1.0, 3.0]))
def test_spad_equals_scipys_distance(base, proxy, temperature):
    for support in ("positions", "values"):
        got = spad(
            torch.from_numpy(base),
            torch.from_numpy(proxy),
            temperature=temperature,
            support=support,
        )
        for head in range(2):
            p = softmax(base[head].astype("float64").ravel() / temperature)
            q = softmax(proxy[head].astype("float64").ravel() / temperature)
            places = np.arange(12)
            expected = (
                wasserstein_distance(places, places, p, q)
                if support == "positions"
                else wasserstein_distance(p, q)
            )
            assert float(got[head]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(head_arrays, head_arrays)
def test_spad_is_a_distance(base, proxy):
    base, proxy = torch.from_numpy(base), torch.from_numpy(proxy)
    for support in ("positions", "values"):
        assert spad(base, base, support=support).tolist() == [0, 0]
        there = spad(base, proxy, support=support)
        assert bool((there >= 0).all())
        torch.testing.assert_close(there, spad(proxy, base, support=support))
        # a softmax does not see a constant
        torch.testing.assert_close(
            there, spad(base + 1, proxy + 1, support=support), rtol=1e-4, atol=1e-5
        )


def test_spad_sees_changes_that_float32_would_round_away():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 512, 64, generator=generator) * 1e-4
    proxy = base + torch.randn(base.shape, generator=generator) * 1e-7
    p, q = (softmax(m.double().numpy().ravel()) for m in (base, proxy))
    exact = np.abs(np.cumsum(p - q)).sum()
    assert float(spad(base, proxy)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("support", ["positions", "values"])
def test_spad_of_entries_whose_exponentials_no_number_holds(support):
    """One head is far above 0, one far below, one near it; each is as if it were alone."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 16, 8, generator=generator, dtype=torch.float64)
    proxy = base + 0.1 * torch.randn(base.shape, generator=generator, dtype=torch.float64)
    far = torch.tensor([2000.0, -2000.0, 0.0], dtype=torch.float64).view(3, 1, 1)
    expected = spad(base, proxy, support=support)
    got = spad(base + far, proxy + far, support=support)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    got = spad(base + far, proxy, support=support)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


def test_matrices_can_be_written_over_those_of_another_group():
    weights = projection_weights(model(), attention_layers(model())[1])
    q, k, v = (weights[role].detach() for role in "qkv")
    first = head_matrices(q, k, v, 0, 8)
    again = head_matrices(q, k, v, 1, 8, out=first)
    assert again is first
    assert torch.equal(again, head_matrices(q, k, v, 1, 8))


def test_spad_of_two_shapes_is_refused():
    with pytest.raises(HeadMapError, match=r"base's heads are \[1, 2, 3\], the proxy run's \[1, 3"):
        spad(torch.zeros(1, 2, 3), torch.zeros(1, 3, 2))


def test_a_head_matrix_is_the_whole_product_with_its_groups_keys_and_values():
    layer = attention_layers(model())[1]
    weights = projection_weights(model(), layer)
    got = torch.cat(
        [head_matrices(weights["q"], weights["k"], weights["v"], g, 8) for g in range(4)]
    )
    for head in range(8):
        group = head // 2
        q = weights["q"][head * 8 : head * 8 + 8]
        k = weights["k"][group * 8 : group * 8 + 8]
        v = weights["v"][group * 8 : group * 8 + 8]
        torch.testing.assert_close(got[head], (q.T @ k) @ v.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["spad", "frobenius"])
@pytest.mark.parametrize("settings_", [{}, {"support": "values"}])
def test_heads_that_did_not_move_score_zero_and_those_that_did_score_highest(name, settings_):
    if name == "frobenius":
        settings_ = {}
    heads = [(0, 3), (2, 6)]
    scores = rankers.make(name, settings_).rank(evidence(moved_heads(model(), heads)))
    assert {(layer, head) for layer, head in (scores > 0).nonzero().tolist()} == set(heads)
    head_map = HeadMap.from_scores(scores, 4, 2 / 24)
    assert set(head_map.task_heads) == set(heads)


# -- the others --------------------------------------------------------------------------------


def test_frobenius_worked_from_the_heads_own_slices():
    given_ = evidence(moved_heads(model(), [(1, 5)], by=0.2))
    tuned = copy.deepcopy(model())
    given_.proxy.apply_(tuned)
    change, size = 0.0, 0.0
    for piece in head_slices(given_.layers[1], 5).values():
        place = (piece.dim, piece.start, piece.stop - piece.start)
        old = model().get_submodule(piece.module).weight.detach().narrow(*place)
        new = tuned.get_submodule(piece.module).weight.detach().narrow(*place)
        change += float((new - old).double().square().sum())
        size += float(old.double().square().sum())
    got = rankers.make("frobenius", {}).rank(given_)
    assert float(got[1, 5]) == pytest.approx((change / size) ** 0.5, rel=1e-5)


def test_frobenius_of_a_shared_group_counts_for_each_of_its_heads():
    layers = attention_layers(model())
    tuned = TunedSlices.from_model(model(), [head_slices(layers[0], 4)["k"]])
    tuned.blocks[layers[0].k].values.add_(0.1)
    got = rankers.make("frobenius", {}).rank(evidence(tuned))
    assert (got > 0).nonzero().tolist() == [[0, 4], [0, 5]]


def response_loss_by_hand(a_model, given_samples):
    """Sample by sample, without padding."""
    losses = []
    for sample in given_samples:
        ids = torch.tensor([sample.input_ids])
        log_probabilities = a_model(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(sample.n_prompt, len(sample.input_ids)):
            losses.append(-log_probabilities[place - 1, sample.input_ids[place]])
    return torch.stack(losses).mean()


def test_ablation_is_the_rise_of_the_loss_without_the_heads_o_columns():
    given_ = evidence()
    scores = rankers.make("ablation", {}).rank(given_)
    tuned = copy.deepcopy(model())
    given_.proxy.apply_(tuned)
    with torch.no_grad():
        before = response_loss_by_hand(tuned, given_.samples)
        piece = head_slices(given_.layers[1], 3)["o"]
        tuned.get_submodule(piece.module).weight[:, piece.start : piece.stop] = 0
        after = response_loss_by_hand(tuned, given_.samples)
    assert float(scores[1, 3]) == pytest.approx(float(after - before), abs=1e-5)
    assert abs(float(after - before)) > 1e-3


def test_gradient_is_the_rms_over_the_heads_own_slices():
    given_ = evidence()
    scores = rankers.make("gradient", {}).rank(given_)
    free = copy.deepcopy(model())
    response_loss_by_hand(free, given_.samples).backward()
    for layer, head in [(0, 0), (1, 3), (2, 7)]:
        parts = [
            free.get_submodule(piece.module)
            .weight.grad.narrow(piece.dim, piece.start, piece.stop - piece.start)
            .flatten()
            for piece in head_slices(given_.layers[layer], head).values()
        ]
        rms = torch.cat(parts).square().mean().sqrt()
        assert float(scores[layer, head]) == pytest.approx(float(rms), rel=1e-4)


@pytest.mark.parametrize("name", ["ablation", "gradient", "taylor"])
def test_losses_do_not_depend_on_the_batches(name):
    one = rankers.make(name, {}).rank(replace(evidence(), batch_size=1))
    all_at_once = rankers.make(name, {}).rank(replace(evidence(), batch_size=99))
    torch.testing.assert_close(one, all_at_once, atol=1e-5, rtol=1e-4)


def test_taylor_is_the_change_of_the_loss_when_a_head_is_turned_down_a_little():
    """Per sample, by a finite difference: the head's o columns times 1 - epsilon.

    Norms compute in float32 even so, and a smaller epsilon would show their rounding.
    """
    given_ = evidence()
    scores = rankers.make("taylor", {}).rank(given_)
    for layer, head in [(0, 0), (1, 3), (2, 7)]:
        changes = []
        piece = head_slices(given_.layers[layer], head)["o"]
        for sample in given_.samples:
            losses = []
            for factor in (1.01, 0.99):
                changed = copy.deepcopy(model()).double()
                with torch.no_grad():
                    weight = changed.get_submodule(piece.module).weight
                    weight[:, piece.start : piece.stop] *= factor
                    losses.append(float(response_loss_by_hand(changed, [sample])))
            changes.append(abs(losses[0] - losses[1]) / 0.02)
        assert float(scores[layer, head]) == pytest.approx(np.mean(changes), rel=5e-3)


def test_taylor_normalised_gives_every_layer_the_length_1():
    plain = rankers.make("taylor", {}).rank(evidence())
    normalised = rankers.make("taylor", {"normalise_layers": True}).rank(evidence())
    torch.testing.assert_close(normalised.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(normalised, plain / plain.norm(dim=1, keepdim=True))


def test_the_bottom_of_a_ranking_is_its_worst_heads():
    given_ = evidence(moved_heads(model(), [(0, 3), (2, 6)]))
    best = HeadMap.from_scores(rankers.make("frobenius", {}).rank(given_), 4, 2 / 24)
    worst = HeadMap.from_scores(rankers.make("bottom", {}).rank(given_), 4, 22 / 24)
    assert set(best.task_heads).isdisjoint(worst.task_heads)
    random = rankers.make("random", {"seed": 3}).rank(given_)
    of_random = rankers.make("bottom", {"of": "random", "options": {"seed": 3}})
    assert torch.equal(of_random.rank(given_), -random)
    assert not of_random.needs_proxy_run
    assert rankers.make("bottom", {}).needs_proxy_run


def test_a_layer_s_heads_are_all_of_the_task_heads_or_none():
    scores = rankers.make("layer", {"layer": 1}).rank(evidence())
    task_heads = HeadMap.from_scores(scores, 4, 1 / 3).task_heads
    assert sorted(task_heads) == [(1, head) for head in range(8)]
    with pytest.raises(SettingsError, match="`layer` is 3; the base has layers 0 to 2"):
        rankers.make("layer", {"layer": 3}).rank(evidence())
    with pytest.raises(SettingsError, match=r"setting `layer` was -1"):
        rankers.make("layer", {"layer": -1})


def test_the_bottom_of_what_is_not_there_is_refused():
    with pytest.raises(UnknownNameError, match="there is no ranker 'top'"):
        rankers.make("bottom", {"of": "top"})
    with pytest.raises(SettingsError, match="`of` is bottom itself"):
        rankers.make("bottom", {"of": "bottom"})
    with pytest.raises(SettingsError, match="'frobenius' has no setting seed"):
        rankers.make("bottom", {"options": {"seed": 1}})


def test_random_heads_differ_by_seed_alone():
    first = rankers.make("random", {"seed": 1}).rank(evidence())
    assert torch.equal(first, rankers.make("random", {"seed": 1}).rank(evidence()))
    assert not torch.equal(first, rankers.make("random", {"seed": 2}).rank(evidence()))
