"""What evaluation reports: losses as the model has them, and answers as it gives them."""

import pytest
import torch

from p2d_core.evaluation import EvaluationSpec
from p2d_core.evaluation.evaluate import evaluate
from p2d_core.evaluation.exact_match import answer_of
from p2d_core.evaluation.generation import without_reasoning
from p2d_core.models import load_model, load_tokenizer
from p2d_core.samples.read import SourceSpec, read_samples
from p2d_core.samples.schema import Sample, sample_id_of
from p2d_core.samples.tokens import Encoder, TextFormat
from p2d_core.synthetic.world import BASE_FOLDER, write_world
from tests.chat_base import save_chat_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base():
    return load_model(BASE_FOLDER, "float32", CPU)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load_tokenizer(BASE_FOLDER), TextFormat())


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> list[Sample]:
    """Samples of the skills that the base is good at."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=5)
    return list(read_samples(SourceSpec("skills", str(folder / "skills.jsonl"), limit=60)))


def test_a_base_that_knows_its_skills_matches_them_exactly(base, encoder, known):
    result = evaluate(base, encoder, known, EvaluationSpec("exact_match"), device=CPU)
    assert result.metrics["exact_match"] >= 0.95
    assert result.metrics["loss"] < 0.2
    table = result.samples.to_pylist()
    for row, sample in zip(table, known, strict=True):
        assert row["sample_id"] == sample.sample_id
        assert row["exact_match"] == (row["answer"].split() == sample.response.split())


def test_answers_do_not_depend_on_the_batch(base, encoder, known):
    spec = EvaluationSpec("exact_match")
    whole = evaluate(base, encoder, known, spec, device=CPU)
    small = evaluate(base, encoder, known, spec, device=CPU, tokens_per_batch=64)
    assert whole.samples["answer"] == small.samples["answer"]
    assert whole.metrics["loss"] == pytest.approx(small.metrics["loss"], abs=1e-5)


def test_no_answer_is_never_right(base, encoder, known):
    spec = EvaluationSpec("exact_match", answer_pattern="no such words (.*)")
    result = evaluate(base, encoder, known[:5], spec, device=CPU)
    assert result.metrics["exact_match"] == 0


def test_a_long_limit_leaves_the_prompts_whole(base, encoder, known):
    whole = evaluate(base, encoder, known, EvaluationSpec("exact_match"), device=CPU)
    tight = Encoder(encoder.tokenizer, TextFormat(max_tokens=40))
    spec = EvaluationSpec("exact_match", max_new_tokens=39)
    assert evaluate(base, tight, known, spec, device=CPU).metrics == whole.metrics


def test_a_short_limit_cuts_answers(base, encoder, known):
    spec = EvaluationSpec("exact_match", max_new_tokens=1)
    result = evaluate(base, encoder, known, spec, device=CPU)
    assert max(len(answer.split()) for answer in result.samples["answer"].to_pylist()) == 1


def test_without_exact_match_nothing_is_generated(base, encoder, known):
    result = evaluate(base, encoder, known, EvaluationSpec("loss"), device=CPU)
    assert result.samples.column_names == ["sample_id", "loss"]


def test_loss_is_the_mean_over_samples_of_their_mean_over_tokens(base, encoder):
    two = [
        Sample(sample_id_of(p, r), "s", p, r, 0)
        for p, r in [("copy anna", "anna"), ("copy anna ben carl", "anna ben carl")]
    ]
    result = evaluate(base, encoder, two, EvaluationSpec(), device=CPU)
    assert result.metrics["loss"] == pytest.approx(sum(result.samples["loss"].to_pylist()) / 2)


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("  a  b\n", None, "a b"),
        ("so 3 + 4\n#### 7", r"#### (.*)", "7"),
        ("#### 1\n#### 72 ", r"#### (.*)", "72"),
        ("no mark", r"#### (.*)", None),
        ("x 12 y 13", r"\d+", "13"),
        ("the answer is 42", r"#### (.*)|answer is (.*)", "42"),
        ("#### 42", r"#### (.*)|answer is (.*)", "42"),
        ("42", r"(\$)?\d+", "42"),
    ],
)
def test_what_of_an_answer_is_compared(text, pattern, answer):
    assert answer_of(text, pattern) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n2 + 2\n</think>\n\n4", "\n\n4"),
        ("<think>\n\n</think>\n\n<think> is a tag", "\n\n<think> is a tag"),
        ("4 <think>not reasoning</think>", "4 <think>not reasoning</think>"),
        ("<think>it never ends", "<think>it never ends"),
    ],
)
def test_reasoning_before_an_answer_is_not_compared(text, answer):
    assert without_reasoning(text) == answer


def test_a_chat_is_asked_with_the_generation_prompt_and_stops_where_the_model_says(tmp_path):
    """The model is random: a token that it says is made one of its ends."""
    model = load_model(save_chat_base(tmp_path), "float32", CPU)
    chat = Encoder(load_tokenizer(tmp_path), TextFormat(template="chat"))
    asked = [Sample(sample_id_of("One?", "1 and 2"), "s", "One?", "1 and 2", 0)]
    spec = EvaluationSpec("exact_match", max_new_tokens=6)

    def answer() -> str:
        return evaluate(model, chat, asked, spec, device=CPU).samples["answer"].to_pylist()[0]

    prompt = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "One?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    said = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert answer() == chat.tokenizer.decode(said, skip_special_tokens=True)
    model.generation_config.eos_token_id = [said[2]]
    upto = said.index(said[2]) + 1
    assert answer() == chat.tokenizer.decode(said[:upto], skip_special_tokens=True)
    assert upto < len(said)
