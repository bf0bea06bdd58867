"""Metrics held against values worked by hand, and against plain loops over single samples."""

import json
import math
from itertools import pairwise

import pytest
import torch

from p2d_core.errors import DataError, SettingsError, UnknownNameError
from p2d_core.evaluation import EvaluationSpec, metrics
from p2d_core.evaluation.accuracy import choices_of
from p2d_core.evaluation.evaluate import check_sample, evaluate
from p2d_core.evaluation.evidence import Evidence
from p2d_core.samples.schema import Sample, sample_id_of
from p2d_core.samples.tokens import Encoder, TextFormat
from tests.tiny import tiny, tiny_llama
from tests.tiny_task import as_samples, documents, word_tokenizer
from tests.tiny_tokenizer import tiny_bpe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """8 query heads in 4 KV groups."""
    return tiny_llama(seed=3)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(word_tokenizer(), TextFormat())


def sample(prompt: str, response: str, **extra) -> Sample:
    return Sample(sample_id_of(prompt, response), "s", prompt, response, 0, json.dumps(extra))


def log_probabilities(model, prompt: list[int], response: list[int]) -> list[float]:
    """Of each response token, one sample and one token at a time."""
    found = []
    for i, token in enumerate(response):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + response[:i]])).logits[0, -1]
        found.append(float(logits.double().log_softmax(-1)[token]))
    return found


def test_rouge_l_worked_by_hand(model, encoder):
    # Lin 2004: of 4 words on both sides 2 are a common subsequence, precision = recall = 1/2
    # "runs" and "run" are one stem, so 2 of 2 in 2 of 3: F1 = 2 * 1 * 2/3 / (1 + 2/3)
    wanted = [
        ("police killed the gunman", "The gunman killed police.", 1 / 2),
        ("a dog runs", "dog run", 4 / 5),
        ("yes", "no", 0.0),
    ]
    samples = [sample("p", response) for response, _, _ in wanted]
    seen = Evidence(model, encoder, samples, EvaluationSpec("rouge_l"), device=CPU)
    seen.answers = [answer for _, answer, _ in wanted]
    measured = metrics.get("rouge_l")().measure(seen)
    assert measured.values == pytest.approx([value for _, _, value in wanted])
    assert measured.value == pytest.approx((1 / 2 + 4 / 5) / 3)


def test_perplexity_counts_every_response_token_the_same(model, encoder):
    samples = as_samples(documents(9))
    result = evaluate(model, encoder, samples, EvaluationSpec("perplexity"), device=CPU)
    tokens = []
    for one, own in zip(samples, result.samples["perplexity"].to_pylist(), strict=True):
        encoded = encoder.encode(one)
        prompt, response = (encoded.input_ids[: encoded.n_prompt], one.response.split())
        ids = [*encoder.tokenizer.convert_tokens_to_ids(response), encoder.end_id]
        tokens.append(log_probabilities(model, prompt, ids))
        assert own == pytest.approx(math.exp(-sum(tokens[-1]) / len(ids)), rel=1e-4)
    every = [each for of_sample in tokens for each in of_sample]
    assert result.metrics["perplexity"] == pytest.approx(
        math.exp(-sum(every) / len(every)), rel=1e-4
    )
    assert result.metrics["perplexity"] != pytest.approx(math.exp(result.metrics["loss"]), rel=1e-2)


def test_accuracy_is_over_the_likelihoods_of_choices_one_by_one(model, encoder):
    rows = documents(30)
    samples = as_samples(rows)
    chosen = {}
    for normalise in ("none", "tokens", "bytes"):
        spec = EvaluationSpec("accuracy", choices="options", normalise=normalise)
        result = evaluate(model, encoder, samples, spec, device=CPU, tokens_per_batch=50)
        by_hand = []
        for row in rows:
            prompt = encoder.tokenizer.convert_tokens_to_ids(row["prompt"].split())
            scores = []
            for option in row["options"]:
                ids = encoder.tokenizer.convert_tokens_to_ids(option.split())
                length = {"none": 1, "tokens": len(ids), "bytes": len(option)}[normalise]
                scores.append(sum(log_probabilities(model, prompt, ids)) / length)
            by_hand.append(scores.index(max(scores)))
        chosen[normalise] = result.samples["chosen"].to_pylist()
        assert chosen[normalise] == by_hand
        right = [row["options"][i] == row["response"] for row, i in zip(rows, by_hand, strict=True)]
        assert result.samples["accuracy"].to_pylist() == right
        assert result.metrics["accuracy"] == sum(right) / 30
    assert all(one != other for one, other in pairwise(chosen.values()))


@pytest.mark.parametrize(
    ("response", "extra", "answer"),
    [
        ("blue", {"options": ["red", "blue "]}, None),
        ("B", {"options": ["red", "blue"]}, None),
        ("1", {"options": ["red", "blue"]}, None),
        ("1", {"options": ["0", "1"]}, None),
        ("1", {"options": ["3", "1", "2"]}, None),
        ("see there", {"options": ["red", "blue"], "label": 1}, "label"),
        ("see there", {"options": ["red", "blue"], "label": "B"}, "label"),
        ("2", {"options": {"text": ["red", "blue"], "label": ["1", "2"]}}, None),
        ("blue", {"options": '["red", "blue"]'}, None),
        # a number is a position, and a label comes before a text that looks like one
        ("see there", {"options": ["4", "0", "1"], "label": 1}, "label"),
        ("see there", {"options": {"text": ["a", "b"], "label": [1, 2]}, "label": 2}, "label"),
        ("2", {"options": {"text": ["2", "4"], "label": ["1", "2"]}}, None),
        ("B", {"options": {"text": ["B", "A"], "label": ["A", "B"]}}, None),
    ],
)
def test_the_right_choice_may_be_said_in_many_ways(response, extra, answer):
    spec = EvaluationSpec("accuracy", choices="options", answer=answer)
    assert choices_of(sample("p", response, **extra), spec)[1] == 1


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"choices": None}, {}, "the metric accuracy needs evaluation.choices"),
        ({}, {"label": 1}, "no column 'options', which evaluation.choices names.*found: label"),
        ({}, {"options": ["only"]}, r'holds \["only"\], not two texts or more'),
        ({}, {"options": ["a", 3]}, "not two texts or more"),
        ({}, {"options": ["red", "blue"]}, "its response is 'green', which is none of its 2"),
        (
            {"answer": "label"},
            {"options": ["red", "blue"], "label": 2},
            r"column 'label' \(evaluation.answer\) is '2', which is none of its 2 choices",
        ),
    ],
)
def test_what_has_no_choices_is_refused_with_its_row(changes, extra, message):
    spec = EvaluationSpec(**{"metric": "accuracy", "choices": "options"} | changes)
    with pytest.raises((DataError, SettingsError), match=message):
        check_sample(sample("p", "green", **extra), spec)


def test_rouge_l_refuses_letters_that_it_does_not_see():
    with pytest.raises(DataError, match="compares words of a-z and 0-9, and its response 'да'"):
        check_sample(sample("p", "да"), EvaluationSpec("loss", also=("rouge_l",)))


def test_an_unknown_metric_names_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"no metric 'bleu'. Known: accuracy, exact_match,"):
        check_sample(sample("p", "r"), EvaluationSpec(also=("bleu",)))


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 8192])
def test_answers_are_those_of_one_prompt_at_a_time_without_padding(
    model, encoder, tokens_per_batch
):
    samples = as_samples(documents(12))
    spec = EvaluationSpec("exact_match", max_new_tokens=8)
    result = evaluate(model, encoder, samples, spec, device=CPU, tokens_per_batch=tokens_per_batch)
    expected = []
    for one in samples:
        ids = encoder.tokenizer.convert_tokens_to_ids(one.prompt.split())
        new: list[int] = []
        while len(new) < 8 and (not new or new[-1] != encoder.end_id):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1]
            new.append(int(logits.argmax()))
        expected.append(encoder.tokenizer.decode(new, skip_special_tokens=True))
    assert result.samples["answer"].to_pylist() == expected
    assert len({*expected}) > 6


def test_a_prompt_leaves_room_for_the_answer_within_the_models_positions():
    """Learned positions have no more: without the room, the answer would run out of them."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=300, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    encoder = Encoder(tiny_bpe(), TextFormat(max_tokens=24))
    samples = [sample("clips to " * 20, "friends"), sample("clips", "in April")]
    spec = EvaluationSpec("exact_match", max_new_tokens=20)
    result = evaluate(tiny(config), encoder, samples, spec, device=CPU)
    assert all(result.samples["answer"].to_pylist())


def test_a_long_reference_answer_takes_nothing_from_other_samples():
    """Nor does it make the model run out of learned positions."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=300, n_positions=48, n_embd=16, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model, encoder = tiny(config), Encoder(tiny_bpe(), TextFormat(max_tokens=48))
    short = [sample("clips to many of her friends in April", "48"), sample("clips", "in April")]
    spec = EvaluationSpec("exact_match")
    # the limit on answers that the long one sets, and no other sample of its length
    longest = sample("clips", "to her friends " * 12)
    n = max(each.n_response for each in encoder.encode_all([longest]))
    assert n > 30
    limit = EvaluationSpec("exact_match", max_new_tokens=n + n // 4 + 1)
    alone = [evaluate(model, encoder, [one], limit, device=CPU) for one in short]
    beside = evaluate(model, encoder, [*short, longest], spec, device=CPU)
    expected = [one.samples["answer"][0].as_py() for one in alone]
    assert beside.samples["answer"].to_pylist()[:2] == expected
    prompt = next(iter(encoder.encode_all(short[:1])))
    ids = torch.tensor([prompt.input_ids[: prompt.n_prompt]])
    with torch.inference_mode():
        first = int(model(input_ids=ids).logits[0, -1].argmax())
    assert expected[0].startswith(encoder.tokenizer.decode([first], skip_special_tokens=True))


@pytest.mark.parametrize("wrapped", [False, True])
def test_settings_that_a_model_brings_do_not_change_what_is_likeliest(encoder, wrapped):
    """Instruct models ship a repetition penalty; what they ship is theirs again afterwards."""
    from peft import LoraConfig, get_peft_model

    samples, spec = as_samples(documents(12)), EvaluationSpec("exact_match", max_new_tokens=8)
    model = tiny_llama(seed=3)
    greedy = evaluate(model, encoder, samples, spec, device=CPU).samples["answer"]
    model.generation_config.repetition_penalty = 1.5
    asked = model
    if wrapped:
        asked = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert evaluate(asked, encoder, samples, spec, device=CPU).samples["answer"] == greedy
    assert model.generation_config.repetition_penalty == 1.5
    assert asked.generation_config.repetition_penalty == 1.5


def test_what_was_measured_before_keeps_its_key():
    plain = {"metric": "loss", "answer_pattern": None, "max_new_tokens": None}
    assert EvaluationSpec().identity == plain
    unused = EvaluationSpec(also=("loss",), choices="options", answer="a", normalise="bytes")
    assert unused.identity == plain
    spec = EvaluationSpec("accuracy", choices="options", also=("rouge_l", "perplexity"))
    assert spec.identity == plain | {
        "metric": "accuracy", "choices": "options", "answer": None, "normalise": "none",
        "version": "2", "also": {"perplexity": {}, "rouge_l": {"version": "2"}},
    }  # fmt: skip
