"""A weighted sum of scorers, against its parts one by one."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from p2d_core.affinity import Step, scorers
from p2d_core.affinity.measuring import MeasuredCorpus, measure_shard
from p2d_core.affinity.scoring import score_corpus
from p2d_core.errors import SettingsError, UnknownNameError
from p2d_core.samples.schema import to_table
from tests.small_scoring import NO_TARGET, TARGET, affinities, samples

PARTS = {"head-activation": 1.0, "loss-shift": -0.5, "tfidf": 2.0}
OPTIONS = {"head-activation": {"neighbours": 2}}


def standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def parts_alone(model, heads, corpus) -> dict[str, np.ndarray]:
    return {
        name: standardised(affinities(name, model, heads, [corpus], **OPTIONS.get(name, {})))
        for name in PARTS
    }


def test_a_sum_adds_its_standardised_parts(model, heads):
    corpus = samples(30)
    alone = parts_alone(model, heads, corpus)
    got = affinities("sum", model, heads, [corpus[:11], corpus[11:]], parts=PARTS, options=OPTIONS)
    expected = sum(weight * alone[name] for name, weight in PARTS.items())
    np.testing.assert_allclose(got, expected, atol=1e-4)


def measured_files(scorer, model, heads, shards, folder):
    files = []
    for number, shard in enumerate(shards):
        measured = measure_shard(scorer, model, scorer.prepare(model, heads, NO_TARGET), shard)
        files.append((folder / f"shard-{number}", folder / f"measured-{number}"))
        pq.write_table(to_table(shard), files[-1][0])
        pq.write_table(measured, files[-1][1])
    return files


class WatchedCorpus(MeasuredCorpus):
    """Notes what is read each time that it is gone through."""

    read: list = []  # noqa: RUF012

    def by_shard(self):
        self.read.append(self.columns)
        return super().by_shard()


def test_each_part_reads_its_own_columns_alone(model, heads, tmp_path, monkeypatch):
    monkeypatch.setattr(WatchedCorpus, "read", [])
    own = {
        "head-activation": ("head_outputs",),
        "loss-shift": ("base_loss", "tuned_loss"),
        "head-proxy-loss": ("tuned_loss",),
        "length": ("n_response_tokens",),
        "tfidf": ("prompt", "response"),
        "bm25": ("prompt", "response"),
        "random": ("sample_id",),
    }
    of_samples = {"n_response_tokens", "prompt", "response", "sample_id"}
    expected = {
        tuple(name if name in of_samples else f"{part}/{name}" for name in columns)
        for part, columns in own.items()
    }
    scorer = scorers.make("sum", {"parts": dict.fromkeys(own, 1.0)})
    corpus = samples(12)
    shards = [corpus[:7], [], corpus[7:]]
    files = measured_files(scorer, model, heads, shards, tmp_path)
    got = list(scorer.affinity(scorer.prepare(model, heads, TARGET), WatchedCorpus(files)))
    assert set(WatchedCorpus.read) == expected
    whole = affinities("sum", model, heads, [corpus], parts=dict.fromkeys(own, 1.0))
    np.testing.assert_allclose(np.concatenate(got), whole, atol=1e-4)


def test_each_part_is_a_column_of_the_scores(model, heads, tmp_path):
    corpus = samples(30)
    scorer = scorers.make("sum", {"parts": PARTS, "options": OPTIONS})
    assert scorer.needs_heads
    assert scorer.needs_head_proxy
    assert not scorer.measures_target
    files = measured_files(scorer, model, heads, [corpus[:20], [], corpus[20:]], tmp_path)
    state = scorer.prepare(model, heads, TARGET)
    step = Step("affinity", scorer)
    outcome = score_corpus(step, state, MeasuredCorpus(files), tmp_path / "scores.parquet")
    assert outcome.rows == 30
    scores = pq.read_table(tmp_path / "scores.parquet")
    assert scores.column_names[-3:] == ["head_activation", "loss_shift", "tfidf"]
    for name, values in parts_alone(model, heads, corpus).items():
        np.testing.assert_allclose(scores[name.replace("-", "_")], values, atol=1e-4)
    total = sum(w * np.asarray(scores[n.replace("-", "_")]) for n, w in PARTS.items())
    np.testing.assert_allclose(scores["affinity"], total)


def test_a_part_that_says_nothing_counts_nothing(model, heads):
    twice = samples(1) * 6
    got = affinities("sum", model, heads, [twice], parts={"loss": 1.0})
    assert got.tolist() == [0] * 6


def test_other_weights_measure_nothing_again():
    def read(**weights: float) -> tuple:
        scorer = scorers.make("sum", {"parts": weights})
        return tuple(getattr(scorer, name) for name in scorer.measured_by)

    assert read(loss=1, ifd=2) == read(ifd=0.5, loss=3)
    assert read(loss=1) != read(ifd=1)


def test_the_version_of_a_part_is_in_the_sums(monkeypatch):
    before = scorers.make("sum", {"parts": {"loss": 1}}).version
    monkeypatch.setattr(scorers.get("loss"), "version", "new")
    assert scorers.make("sum", {"parts": {"loss": 1}}).version != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": {}}, "`parts` is empty"),
        ({"parts": {"loss": 1}, "options": {"tfidf": {}}}, "settings of tfidf, which is no part"),
        ({"parts": {"loss": float("nan")}}, "the weight of loss is nan"),
        ({"parts": {"head-filter": 1}}, "head-filter is itself made of scorers"),
        ({"parts": {"sum": 1}}, "sum is itself made of scorers"),
        ({"parts": {"loss": 1}, "options": {"loss": {"prefer": "some"}}}, "`prefer` was 'some'"),
        ({}, "`parts`"),
    ],
)
def test_a_sum_that_cannot_be_is_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        scorers.make("sum", options)
    with pytest.raises(UnknownNameError, match="there is no scorer 'lose'"):
        scorers.make("sum", {"parts": {"lose": 1}})


def test_parts_that_draw_take_the_seed_of_the_sum_unless_they_have_their_own(model, heads):
    corpus = samples(30)

    def drawn(**options):
        return affinities("sum", model, heads, [corpus], parts={"random": 1.0}, **options)

    np.testing.assert_allclose(
        drawn(seed=3), standardised(affinities("random", model, heads, [corpus], seed=3)), atol=1e-4
    )
    assert not np.allclose(drawn(seed=3), drawn(seed=4))
    own = {"random": {"seed": 5}}
    np.testing.assert_array_equal(drawn(seed=3, options=own), drawn(seed=4, options=own))
