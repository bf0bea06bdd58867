"""The script that trains the larger base, with a small model and a few steps on the CPU."""

import json
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2d_core.samples.tokens import IGNORED_LABEL, Encoder, TextFormat
from p2d_core.synthetic.skills import SKILLS, TARGET_SKILL
from tests.examples.test_tiny_base import data  # noqa: F401


@pytest.fixture(scope="module")
def script(example):
    return example("larger_base")


@pytest.fixture(scope="module")
def trained(script, data, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("trained") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "SHAPE", {"hidden": 32, "feed_forward": 64, "layers": 1})
        patch.setattr(script, "STEP_TOKENS", 512)
        script.main(data, out, steps=8, drawn=400, seed=0, minutes=1)
    return out


def test_the_base_loads_and_says_what_it_can_do(trained):
    record = json.loads((trained / "training.json").read_text())
    assert set(record["exact_match"]) == {*SKILLS, TARGET_SKILL, "four in a row"}
    assert set(record["held_out_loss"]) == {"gsm8k_train.jsonl", "codealpaca.json"}
    assert record["steps"] == 8
    assert all(record["passes"][kind] > 0 for kind in ("skills", "in a row", "repeated", "text"))
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.config.num_key_value_heads == 4


def test_the_target_has_a_word_that_no_exercise_has(script, trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    rng = Random(0)
    assert all(TARGET_SKILL not in script.exercise_of(rng).prompt for _ in range(2000))
    assert tokenizer.decode(tokenizer(TARGET_SKILL)["input_ids"]) == TARGET_SKILL


def test_of_exercises_in_a_row_the_first_answer_is_not_learnt(script, trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    encoder = Encoder(tokenizer, TextFormat(max_tokens=512))
    ids, labels = script.Drawn(encoder)(("in a row", 5, 0))
    for row, learnt in zip(ids, labels, strict=True):
        ends = np.flatnonzero(row == tokenizer.eos_token_id)
        assert len(ends) == 5
        assert (learnt[: ends[0] + 1] == IGNORED_LABEL).all()
        assert (learnt[ends[1:]] == tokenizer.eos_token_id).all()
        said = learnt != IGNORED_LABEL
        assert (learnt[said] == row[said]).all()


def test_exact_match_is_of_whole_answers(script, trained):
    """One wrong token, last or before it, makes an answer wrong."""
    model = AutoModelForCausalLM.from_pretrained(trained)
    ids = np.array([[5, 6, 7], [5, 6, 8]], dtype=np.int16)
    first, said = model(input_ids=torch.from_numpy(ids).long()).logits[0, :2].argmax(-1).tolist()
    labels = np.full((2, 3), IGNORED_LABEL, dtype=np.int16)
    labels[:, 2] = said
    assert script.exact_match(model, (ids, labels)) == 1.0
    labels[1, 2] = said + 1
    assert script.exact_match(model, (ids, labels)) == 0.5
    labels[0, 1] = first + 1
    assert script.exact_match(model, (ids, labels)) == 0.0
