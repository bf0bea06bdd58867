"""Numbers that are none, corpora in which nothing differs: a clear error, or a stated result."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from p2d_core.adaptation.spec import TrainingSpec
from p2d_core.adaptation.training import train
from p2d_core.affinity import Target, scorers
from p2d_core.affinity.head_activation import HeadActivation
from p2d_core.affinity.measuring import MEASURED, MeasuredCorpus, measure_shard
from p2d_core.affinity.protocol import Step, steps_of
from p2d_core.affinity.scoring import score_corpus
from p2d_core.errors import HeadMapError, ModelError, NumericalError, P2DError, TrainingError
from p2d_core.evaluation import EvaluationSpec
from p2d_core.evaluation.evaluate import evaluate
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from p2d_core.samples.schema import Sample, sample_id_of, to_table
from p2d_core.samples.tokens import Encoder, TextFormat
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.subset import SUBSET, select_subset
from p2d_core.store import Store
from p2d_core.synthetic.world import BASE_FOLDER
from tests.faults.small_job import SmallJob
from tests.faults.trials import trials
from tests.tiny import tiny_llama
from tests.tiny_tokenizer import tiny_bpe, tiny_word_level

WORDS = [f"w{i}" for i in range(40)]
SCORERS = ["head-filter", "head-activation", "loss-shift", "icl-attention", "tfidf", "length"]
RUNNING_A_MODEL = ["head-activation", "head-proxy-loss", "loss-shift", "icl-attention"]
NOT_NUMBERS = [math.nan, math.inf, -math.inf]
POISON = "w39"
"""A word whose embedding a test makes no number: samples without it are not touched."""


def sample(prompt: str, response: str, row: int = 0) -> Sample:
    return Sample(sample_id_of(prompt, response), "s", prompt, response, row)


def samples(n: int, seed: int = 0, words: list[str] = WORDS[:39]) -> list[Sample]:
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(words, rng.integers(4, 12)).tolist() for _ in range(n)]
    return [sample(" ".join(x[:-2]), " ".join(x[-2:]), i) for i, x in enumerate(drawn)]


TARGET = Target(samples(8, seed=1), samples(5, seed=2))


@pytest.fixture(scope="module")
def heads() -> HeadMap:
    scores = torch.zeros(3, 8, dtype=torch.float64)
    scores[1, 3], scores[1, 6], scores[2, 0] = 3, 2, 1
    return HeadMap.from_scores(scores, n_kv_groups=4, fraction=0.1)


def captured(folder: Path, **settings: int) -> CapturedModel:
    """A tiny model in a folder, its task heads tuned to nothing in particular."""
    from p2d_core.adaptation.slices import TunedSlices
    from p2d_core.attention.layout import slices_of

    tiny_llama(**settings).save_pretrained(folder)
    tiny_word_level(WORDS).save_pretrained(folder)
    model = CapturedModel(folder)
    pieces = slices_of(model.layers, [(1, 3), (1, 6), (2, 0)])
    model.tuned = TunedSlices.from_model(model.model, pieces)
    return model


@pytest.fixture
def model(tmp_path: Path) -> CapturedModel:
    return captured(tmp_path)


def poison(model: CapturedModel, value: float) -> None:
    """From now on a sample with the word gives no number."""
    token = model.tokenizer.convert_tokens_to_ids(POISON)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[token] = value


# training


def training(model: torch.nn.Module, scratch: Path, learning_rate: float, n: int = 12) -> None:
    encoded = list(Encoder(tiny_word_level(WORDS)).encode_all(samples(n)))
    spec = TrainingSpec(epochs=1, learning_rate=learning_rate, batch_size=4, warmup=0.0)
    train(model, encoded, spec, pad_id=0, scratch=scratch)


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_a_loss_that_is_no_number_ends_training_and_says_at_which_step(value, tmp_path):
    network = tiny_llama()
    with torch.no_grad():
        network.model.norm.weight[0] = value
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1 of 3\. Lower the learning"):
        training(network, tmp_path, 1e-3)


def test_a_loss_beyond_the_largest_number_ends_training_too(tmp_path):
    """Logits that are numbers, of which the sum of losses is none."""
    network = tiny_llama()
    encoded = list(Encoder(tiny_word_level(WORDS)).encode_all(samples(12)))
    with torch.no_grad():
        logits = torch.cat(
            [network(torch.tensor([each.input_ids])).logits.flatten() for each in encoded]
        )
        network.model.norm.weight *= 1e19
        network.lm_head.weight *= 3e19 / float(logits.abs().max())
        assert bool(network(torch.tensor([encoded[0].input_ids])).logits.isfinite().all())
    with pytest.raises(TrainingError, match=r"the loss is inf at step 1 of 3\. Lower the learning"):
        training(network, tmp_path, 1e-3)


@pytest.mark.parametrize("learning_rate", trials([1e6, 1e20, 1e38], quick=2))
def test_training_that_runs_away_gives_no_model(learning_rate, tmp_path):
    """A loss that is no number, or, after the last step, a weight that is none; or finite weights,
    which are then what was asked for, however bad."""
    network = tiny_llama()
    told = ""
    try:
        training(network, tmp_path, learning_rate)
    except TrainingError as error:
        told = str(error)
    finite = all(bool(p.isfinite().all()) for p in network.parameters())
    assert "Lower the learning rate" in told if told else finite


def test_a_last_step_that_breaks_the_weights_is_seen(tmp_path):
    """Its loss was taken before it; no further step shows what it did."""
    network = tiny_llama()
    network.requires_grad_(False)
    broken = network.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    broken.register_hook(lambda grad: torch.full_like(grad, math.nan))
    with pytest.raises(TrainingError, match=r"after the last step .*q_proj.weight has values that"):
        training(network, tmp_path, 1e-3, n=4)


# heads


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_a_head_score_that_is_no_number_names_the_head(value):
    scores = torch.zeros(3, 8)
    scores[2, 5] = value
    with pytest.raises(HeadMapError, match=r"score of head \(2, 5\) is -?(nan|inf).*proxy run"):
        HeadMap.from_scores(scores, 4)


# scoring


@pytest.mark.parametrize("name", RUNNING_A_MODEL)
@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_one_sample_that_gives_no_number_is_named_and_not_spread_over_the_corpus(
    name, value, model, heads
):
    scorer = scorers.make(name, {})
    state = scorer.prepare(model, heads, TARGET)
    bad = sample("w1 w2 w3", f"{POISON} w4", 7)
    poison(model, value)
    with pytest.raises(NumericalError, match=f"of sample {bad.sample_id[:12]}"):
        measure_shard(scorer, model, state, [*samples(5), bad])
    assert len(measure_shard(scorer, model, state, samples(5))) == 5


def test_a_target_that_gives_no_number_is_told_apart_from_the_corpus(model, heads, tmp_path):
    scorer = HeadActivation()
    parts = measured(scorer, model, heads, samples(9), tmp_path)
    state = scorer.prepare(model, heads, TARGET)
    state["proxy"][0, 0, 0] = math.nan
    with pytest.raises(NumericalError, match=r"what the target's own samples gave \(proxy\)"):
        score_corpus(Step("domain", scorer, 0.1), state, parts, tmp_path / "scores.parquet")


def test_an_evaluation_loss_that_is_no_number_is_named(model):
    bad = sample("w1 w2", f"{POISON} w3", 3)
    poison(model, math.nan)
    with pytest.raises(
        NumericalError, match=f"1 of 4 responses is no number.*{bad.sample_id[:12]}"
    ):
        evaluate(
            model.model, model.encoder, [*samples(3), bad], EvaluationSpec(), device=model.device
        )


def measured(
    scorer, model: CapturedModel, heads: HeadMap, corpus: list[Sample], folder: Path
) -> MeasuredCorpus:
    """In two shards where there are two samples."""
    known = TARGET if scorer.measures_target else Target((), ())
    state = scorer.prepare(model, heads, known)
    parts = []
    for index, shard in enumerate((corpus[:1], corpus[1:])):
        if shard:
            files = folder / f"shard-{index}.parquet", folder / f"{index}-{MEASURED}"
            pq.write_table(to_table(shard), files[0])
            pq.write_table(measure_shard(scorer, model, state, shard), files[1])
            parts.append(files)
    return MeasuredCorpus(parts)


def affinities(scorer, model, heads, corpus: list[Sample], folder: Path) -> np.ndarray:
    parts = measured(scorer, model, heads, corpus, folder)
    state = scorer.prepare(model, heads, TARGET)
    score_corpus(Step("affinity", scorer), state, parts, folder / "scores.parquet")
    return pq.read_table(folder / "scores.parquet")["affinity"].to_numpy()


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_covariance_without_rank_gives_affinities_in_their_bounds(
    shrinkage, n, model, heads, tmp_path
):
    """Fewer samples than a head has dimensions: 8."""
    got = affinities(HeadActivation(shrinkage=shrinkage), model, heads, samples(n), tmp_path)
    assert len(got) == n
    assert (np.abs(got) <= 1 + 1e-9).all()


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_a_corpus_of_one_sample_is_its_own_mean_and_has_affinity_0(
    shrinkage, model, heads, tmp_path
):
    got = affinities(HeadActivation(shrinkage=shrinkage), model, heads, samples(1), tmp_path)
    assert got.tolist() == [0.0]


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [2, 3, 7, 30])
def test_samples_all_alike_have_the_same_affinity(shrinkage, n, model, heads, tmp_path):
    """To the model: one text under several ids, as two sources may have it."""
    one = samples(1)[0]
    alike = [replace(one, sample_id=f"{i:064x}", row=i) for i in range(n)]
    got = affinities(HeadActivation(shrinkage=shrinkage), model, heads, alike, tmp_path)
    np.testing.assert_allclose(got, got[0], atol=1e-6)
    assert abs(got[0]) < 1e-3


@pytest.mark.parametrize("name", sorted(set(scorers) - {"sum"}))
def test_every_scorer_has_the_same_number_for_samples_all_alike(name, model, heads, tmp_path):
    """But one that draws by the sample's id."""
    one = samples(1)[0]
    alike = [replace(one, sample_id=f"{i:064x}", row=i) for i in range(4)]
    (step, *_) = steps_of(scorers.make(name, {}))
    got = affinities(step.scorer, model, heads, alike, tmp_path)
    assert np.isfinite(got).all()
    if name not in ("random", "icl-attention", "data-whisperer"):
        np.testing.assert_allclose(got, got[0], atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(scorers) - {"sum"}))
def test_every_scorer_has_a_number_for_a_corpus_of_one(name, model, heads, tmp_path):
    (step, *_) = steps_of(scorers.make(name, {}))
    (got,) = affinities(step.scorer, model, heads, samples(1), tmp_path)
    assert math.isfinite(got)


def test_words_that_no_proxy_has_and_no_words_at_all_have_affinity_0(heads, tmp_path):
    """`w38` is in no proxy sample; `. .` has no words, and its vector no length."""
    tiny_bpe().save_pretrained(tmp_path / "tokenizer")
    strange = [sample("zzz", "yyy"), sample(". .", "!")]
    without_weights = CapturedModel(tmp_path / "tokenizer")
    got = affinities(scorers.make("tfidf", {}), without_weights, heads, strange, tmp_path)
    assert got.tolist() == [0.0, 0.0]


def test_demonstrations_beyond_the_models_positions_are_left_out(heads, tmp_path):
    model = captured(tmp_path, max_position_embeddings=32)
    scorer = scorers.make("icl-attention", {"demonstrations": 5})
    state = scorer.prepare(model, heads, TARGET)
    measured = measure_shard(scorer, model, state, samples(6))
    assert len(measured) == 6
    assert np.isfinite(np.array(measured["attention"].to_pylist())).all()


# selection


@given(
    n=st.integers(1, 60),
    affinity=st.sampled_from([0.0, -1.5, 1e300, 5e-324]),
    fraction=st.floats(0.001, 1),
    pool=st.sampled_from([1.0, 3.0]),
)
@settings(max_examples=40, deadline=None)
def test_where_all_affinities_are_the_same_the_subset_has_its_size_and_is_drawn_by_id(
    n, affinity, fraction, pool, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("alike")
    corpus = samples(n)
    ids = [each.sample_id for each in corpus]
    corpus = [each for i, each in enumerate(corpus) if each.sample_id not in ids[:i]]
    pq.write_table(to_table(corpus), folder / "corpus.parquet")
    counts = pa.array([2] * len(corpus), pa.int32())
    scores = pa.table(
        {
            "sample_id": [each.sample_id for each in corpus],
            "source": ["s"] * len(corpus),
            "affinity": [affinity] * len(corpus),
            "n_tokens": counts,
            "n_response_tokens": counts,
            "gates_passed": pa.array([0] * len(corpus), pa.int32()),
        }
    )
    chosen = []
    for run in ("one", "two"):
        (folder / run).mkdir()
        order = np.random.default_rng(len(run)).permutation(len(corpus))
        pq.write_table(scores.take(order), folder / "scores.parquet")
        select_subset(
            folder / "scores.parquet", [folder / "corpus.parquet"], [2, 3, 9],
            SelectionSpec(fraction=fraction, pool=pool), folder / run,
        )  # fmt: skip
        chosen.append(pq.read_table(folder / run / SUBSET)["sample_id"].to_pylist())
    assert len(set(chosen[0])) == len(chosen[0]) == max(1, round(fraction * len(corpus)))
    assert chosen[0] == chosen[1]


# token counts


@given(
    prompt=st.text(min_size=1, max_size=80).filter(str.strip),
    response=st.text(min_size=1, max_size=80).filter(str.strip),
    most=st.integers(4, 40),
    bos=st.sampled_from([None, "<s>"]),
)
@settings(max_examples=150, deadline=None)
def test_truncation_never_leaves_a_response_or_a_prompt_without_a_token(
    prompt, response, most, bos
):
    encoder = Encoder(_bpe(bos), TextFormat("\n", most))
    encoded = encoder.encode(sample(prompt, response))
    assert len(encoded) <= most
    assert encoded.n_prompt >= 1
    assert encoded.n_response >= 1


_TOKENIZERS: dict[str | None, object] = {}


def _bpe(bos: str | None):
    if bos not in _TOKENIZERS:
        _TOKENIZERS[bos] = tiny_bpe(bos=bos)
    return _TOKENIZERS[bos]


# the whole run


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    return SmallJob(tmp_path_factory.mktemp("numbers"))


def corpus_of(job: SmallJob, rows: list[tuple[str, str]], name: str) -> dict:
    file = job.folder / f"{name}.jsonl"
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in rows]
    file.write_text("\n".join(lines) + "\n")
    return {"sources": [{"path": str(file)}], "include_target": False}


@pytest.mark.parametrize("scorer", trials(["head-filter", *SCORERS[1:3], *SCORERS[4:]], quick=1))
def test_a_corpus_of_one_sample_is_chosen_whole(scorer, job, tmp_path):
    rows = [("ledger anna nine ben four ask ben anna gives", "four nine")] * 3
    changes = {"corpus": corpus_of(job, rows, "one"), "scoring": {"scorer": scorer}}
    done = job.here(tmp_path / "store", **changes)
    assert (done.selection.corpus, done.selection.selected) == (1, 1)
    assert math.isfinite(done.quality.p2d)


@pytest.mark.parametrize("scorer", trials(["loss-shift", *SCORERS[:2], *SCORERS[4:]], quick=0))
def test_samples_all_longer_than_the_context_are_cut_and_trained_on(scorer, job, tmp_path):
    """The base reaches 64 tokens. A prompt loses its beginning, a response its end."""
    long = " ".join(["anna nine ben four"] * 40)
    rows = [(f"copy {i} {long} gives".replace(str(i), "star " * i), long) for i in range(1, 13)]
    changes = {"corpus": corpus_of(job, rows, "long"), "scoring": {"scorer": scorer}}
    done = job.here(tmp_path / "store", **changes)
    assert done.selection.corpus == 12
    scores = Store(tmp_path / "store").resolve(Path(done.artifacts["scores"]).name)
    table = pq.read_table(scores.path / "scores.parquet")
    assert table["n_tokens"].to_pylist() == [64] * 12
    assert table["n_response_tokens"].to_pylist() == [63] * 12
    assert math.isfinite(done.quality.p2d)


def test_a_base_with_weights_that_are_no_numbers_is_refused_before_the_start(job, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in BASE_FOLDER.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name][0, 0] = math.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"down_proj.* has values that are not numbers"):
        job.here(tmp_path / "store", base=str(base))
    assert not list((tmp_path / "store").glob("*/*/manifest.json"))


@pytest.mark.parametrize("stage", trials(["proxy", "heads", "training"], quick=0))
def test_a_learning_rate_far_too_high_ends_in_a_clear_error_or_a_finite_model(stage, job, tmp_path):
    key = "proxy_learning_rate" if stage == "heads" else "learning_rate"
    changes = {stage: {key: 1e30}}
    told, quality = "", math.nan
    try:
        quality = job.here(tmp_path / "store", **changes).quality.p2d
    except P2DError as error:
        told = str(error)
    assert "earning rate" in told or "proxy run" in told if told else math.isfinite(quality)
