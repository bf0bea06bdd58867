"""Scorers and metrics on conversations: they see what training sees."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from p2d_core.affinity import scorers
from p2d_core.affinity.in_context import draw_contexts
from p2d_core.affinity.measuring import measure_shard
from p2d_core.evaluation import EvaluationSpec
from p2d_core.evaluation.evaluate import evaluate
from p2d_core.models import CapturedModel
from p2d_core.samples.messages import MessageMap
from p2d_core.samples.schema import Sample
from p2d_core.samples.tokens import EncodedSample, TextFormat
from tests.chat_base import save_chat_base


def chat(i: int) -> Sample:
    """Of two questions."""
    said = [f"What is {i}?", f"It is {i}.", "And then?", f"{i + 1}, then {i + 2}."]
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    return MessageMap(("messages",)).sample_of({"messages": messages}, "chats", i)


CHATS = [chat(i) for i in range(6)]


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> CapturedModel:
    folder = save_chat_base(tmp_path_factory.mktemp("chat"), "llama3")
    return CapturedModel(folder, text=TextFormat(template="chat"))


def loss_on(model: CapturedModel, each: EncodedSample, places: list[tuple[int, int]]) -> float:
    """transformers' own."""
    labels = torch.full((1, len(each)), -100)
    for start, end in places:
        labels[0, start:end] = torch.tensor(each.input_ids[start:end])
    with torch.inference_mode():
        return float(model.model(torch.tensor([each.input_ids]), labels=labels).loss)


def test_the_loss_is_on_all_answers(chats):
    measured = measure_shard(scorers.make("loss", {}), chats, {}, CHATS)
    encoded = chats.encode(CHATS)
    expected = [loss_on(chats, e, [*e.earlier, (e.n_prompt, len(e))]) for e in encoded]
    np.testing.assert_allclose(measured["base_loss"], expected, rtol=1e-5)
    of_last = [loss_on(chats, e, [(e.n_prompt, len(e))]) for e in encoded]
    assert not np.allclose(expected, of_last, rtol=1e-3)
    assert measured["n_response_tokens"].to_pylist() == [e.n_learnt for e in encoded]
    assert all(e.n_learnt > e.n_response for e in encoded)


def test_difficulty_is_that_of_the_last_answer_with_and_without_what_came_before(chats):
    measured = scorers.make("ifd", {}).measure(chats, {}, CHATS)
    expected = [loss_on(chats, e, [(e.n_prompt, len(e))]) for e in chats.encode(CHATS)]
    np.testing.assert_allclose(measured["loss_with_prompt"], expected, rtol=1e-5)


def test_a_query_in_context_is_answered_with_its_last_answer(chats):
    encoded = chats.encode(CHATS)
    answers = {tuple(e.input_ids[e.n_prompt :]) for e in encoded[3:]}
    for context, candidate in zip(
        draw_contexts(chats, CHATS[:3], encoded[3:], demonstrations=3, draws=1, seed=0),
        encoded[:3],
        strict=True,
    ):
        whole = context.tokens
        assert tuple(whole.input_ids[whole.n_prompt :]) in answers
        assert whole.input_ids[context.start : context.stop] == candidate.input_ids
        assert whole.earlier == ()


def test_perplexity_is_of_the_tokens_of_all_answers(chats):
    encoded = chats.encode(CHATS)
    sums = [loss_on(chats, e, [*e.earlier, (e.n_prompt, len(e))]) * e.n_learnt for e in encoded]
    expected = math.exp(sum(sums) / sum(e.n_learnt for e in encoded))
    spec = EvaluationSpec("perplexity")
    found = evaluate(chats.model, chats.encoder, CHATS, spec, device=chats.device)
    assert found.metrics["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_a_choice_is_a_last_answer_without_its_end(chats):
    choices = ["yes", "no", "perhaps it is"]
    likelihoods = []
    for choice in choices:
        (each,) = chats.encoder.encode_all([replace(CHATS[0], response=choice)])
        assert chats.tokenizer.decode(each.input_ids[each.n_prompt :]) == f"{choice}<|eot_id|>"
        own = EncodedSample("", each.input_ids[:-1], each.n_prompt)
        likelihoods.append(-loss_on(chats, own, [(own.n_prompt, len(own))]) * own.n_response)
    best = likelihoods.index(max(likelihoods))
    messages = [
        {"role": "user", "content": f"What is {0}?"},
        {"role": "assistant", "content": "It is 0."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": choices[best]},
    ]
    row = {"messages": messages, "choices": choices}
    asked = MessageMap(("messages",)).sample_of(row, "chats", 0)
    spec = EvaluationSpec("accuracy", choices="choices")
    found = evaluate(chats.model, chats.encoder, [asked], spec, device=chats.device)
    assert found.samples["chosen"].to_pylist() == [best]
    assert found.metrics["accuracy"] == 1
