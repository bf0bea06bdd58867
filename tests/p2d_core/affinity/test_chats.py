"""Scorers and rankers on conversations: they see what training sees."""

import numpy as np
import pytest
import torch

from p2d_core.affinity import scorers
from p2d_core.affinity.in_context import draw_contexts
from p2d_core.affinity.measuring import measure_shard
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
