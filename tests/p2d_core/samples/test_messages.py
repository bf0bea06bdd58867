"""Which rows are conversations, what becomes of them, and which are refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2d_core.errors import DataError, SettingsError
from p2d_core.samples.conversation import Turn, is_conversation, turns_of
from p2d_core.samples.extra import other_columns
from p2d_core.samples.read import SourceSpec, read_samples
from p2d_core.samples.schema import Sample, from_table, sample_id_of, to_table

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


def openai(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    names = {SYSTEM: "system", USER: "human", ASSISTANT: "gpt"}
    return [{"from": names[role], "value": content} for role, content in turns]


def read(folder: Path, *rows: dict[str, Any], **settings: Any) -> list[Sample]:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_samples(SourceSpec("chats", str(file), **settings)))


def problem(folder: Path, row: dict[str, Any], **settings: Any) -> str:
    """Of a row behind a sound one."""
    sound = {name: openai((USER, "q"), (ASSISTANT, "a")) for name in row if name != "tools"}
    with pytest.raises(DataError) as caught:
        read(folder, sound, row, **settings)
    return str(caught.value)


TWO_QUESTIONS = ((SYSTEM, "Be brief."), (USER, "One?"), (ASSISTANT, "1"), (USER, "Two?"),
                 (ASSISTANT, "2"))  # fmt: skip
SHAPES = {
    "messages": {"messages": openai(*TWO_QUESTIONS)},
    "ShareGPT": {"conversations": sharegpt(*TWO_QUESTIONS)},
    "a system column": {"system": "Be brief.", "conversations": sharegpt(*TWO_QUESTIONS[1:])},
    "prompt and completion": {
        "prompt": openai(*TWO_QUESTIONS[:4]), "completion": openai(*TWO_QUESTIONS[4:]),
    },
    "text parts": {
        "messages": openai(
            (SYSTEM, [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]),
            *TWO_QUESTIONS[1:],
        )
    },
    "more after the last answer": {"messages": openai(*TWO_QUESTIONS, (USER, "Three?"))},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_one_conversation_is_one_sample_in_every_shape(tmp_path, shape):
    (sample,) = read(tmp_path, SHAPES[shape])
    assert sample.prompt == "System: Be brief.\n\nUser: One?\n\nAssistant: 1\n\nUser: Two?"
    assert sample.response == "2"
    assert turns_of(sample) == [Turn(role, content) for role, content in TWO_QUESTIONS]
    assert sample.sample_id == read(tmp_path, SHAPES["messages"])[0].sample_id
    assert from_table(to_table([sample])) == [sample]


def test_parquet_has_lists_of_structs_with_nulls(tmp_path):
    rows = [m | {"tool_calls": None} for m in openai(*TWO_QUESTIONS)]
    pq.write_table(pa.Table.from_pylist([{"messages": rows}]), tmp_path / "chats.parquet")
    (sample,) = read_samples(SourceSpec("chats", str(tmp_path / "chats.parquet")))
    assert turns_of(sample) == [Turn(role, content) for role, content in TWO_QUESTIONS]


def test_a_single_question_is_the_same_sample_as_its_texts(tmp_path):
    (chat,) = read(tmp_path, {"messages": openai((USER, "One?"), (ASSISTANT, "1"))})
    (texts,) = read(tmp_path, {"question": "One?", "answer": "1"})
    assert (chat.sample_id, chat.prompt, chat.response) == (
        texts.sample_id, "One?", "1",
    )  # fmt: skip
    assert turns_of(chat) == turns_of(texts)
    assert is_conversation(chat)
    assert not is_conversation(texts)


def test_who_said_what_is_in_the_id(tmp_path):
    """The same prompt as a text has another id: the model does not read the same."""
    (chat,) = read(tmp_path, {"messages": openai(*TWO_QUESTIONS)})
    assert chat.sample_id != sample_id_of(chat.prompt, chat.response)


def test_other_columns_are_kept_apart_from_the_turns(tmp_path):
    row = {"messages": openai((USER, "One?"), (ASSISTANT, "1")), "label": "x", "tools": None}
    (sample,) = read(tmp_path, row)
    assert json.loads(other_columns(sample.extra)) == {"label": "x"}


def test_prompt_and_response_come_first_and_messages_may_be_named(tmp_path):
    row = {
        "prompt": "Text?", "response": "text", "messages": openai((USER, "One?"), (ASSISTANT, "1")),
        "other": openai((USER, "Other?"), (ASSISTANT, "2")),
    }  # fmt: skip
    assert [s.prompt for s in read(tmp_path, row)] == ["Text?"]
    assert [s.prompt for s in read(tmp_path, row, messages="messages")] == ["One?"]
    assert [s.prompt for s in read(tmp_path, row, messages="other")] == ["Other?"]
    with pytest.raises(DataError, match=r"no column 'othr', which `messages:`.*mean 'other'\?"):
        read(tmp_path, row, messages="othr")
    with pytest.raises(SettingsError, match="both messages and prompt or response are named"):
        read(tmp_path, row, messages="other", prompt="prompt")


IMAGE = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "x"}}]
REFUSED = {
    "a tool call": (
        [*openai((USER, "q")), {"role": ASSISTANT, "content": None, "tool_calls": [{"id": "1"}]}],
        "message 2 of 'messages' holds `tool_calls`: conversations are text",
    ),
    "what a tool said": (openai((USER, "q"), ("tool", "4")), "message 2 of 'messages' holds tools"),
    "an image": (openai((USER, IMAGE)), "holds a part of type 'image_url': conversations are text"),
    "reasoning apart": (
        [*openai((USER, "q")), {"role": ASSISTANT, "content": "a", "reasoning_content": "hm"}],
        "message 2 of 'messages' holds `reasoning_content`",
    ),
    "an unknown role": (openai(("critic", "q")), "the role 'critic' is unknown. Known: system, "),
    "no role": ([{"content": "q"}], "neither `role` nor `from` (it has: content)"),
    "no message": (["q"], "message 1 of 'messages' is text ('q') where an object is due"),
    "no list": ("q", "holds text ('q') where a list of messages is due"),
    "nothing": ([], "holds an empty list where a list of messages is due"),
    "nothing said": (openai((USER, "q"), (ASSISTANT, " ")), "message 2 of 'messages' is empty"),
    "null": (openai((USER, None)), "`content` holds null where text or a list of text parts"),
    "no answer": (openai((USER, "q")), "'messages' has no assistant turn to learn"),
    "no question": (openai((SYSTEM, "s"), (ASSISTANT, "a")), "has no user turn before its last"),
    "a late system turn": (
        openai((USER, "q"), (SYSTEM, "s"), (ASSISTANT, "a")), "a system turn that is not the first",
    ),
    "an answer not to learn": (
        [*openai((USER, "q")), {"role": ASSISTANT, "content": "a", "weight": 0}],
        "message 2 of 'messages' has weight 0; every assistant turn is learnt",
    ),
    "a NUL": (openai((USER, "q\0")), "message 1 of 'messages' holds a NUL character"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_conversation_is_refused_with_its_file_and_line(tmp_path, name):
    messages, words = REFUSED[name]
    said = problem(tmp_path, {"messages": messages})
    assert f"{tmp_path / 'chats.jsonl'}, line 2: " in said
    assert words in said


def test_tools_beside_the_messages_are_refused(tmp_path):
    row = {"messages": openai((USER, "q"), (ASSISTANT, "a")), "tools": [{"name": "f"}]}
    assert "column 'tools' holds tools" in problem(tmp_path, row)


@pytest.mark.parametrize("nothing", [None, "[]", " {} ", "null", "", [], {"name": None}])
def test_what_exporters_write_for_no_tools_is_none(tmp_path, nothing):
    answer = {"role": ASSISTANT, "content": "a", "function_call": nothing}
    row = {"messages": [*openai((USER, "q")), answer], "tools": nothing}
    assert [sample.response for sample in read(tmp_path, row)] == ["a"]


@pytest.mark.parametrize("column", ["system", "System"])
def test_a_system_text_counts_whichever_row_is_the_first_to_have_one(tmp_path, column):
    plain = {"conversations": sharegpt((USER, "q"), (ASSISTANT, "a"))}
    told = plain | {column: "Be brief."}
    (one, other), (first, second) = read(tmp_path, plain, told), read(tmp_path, told, plain)
    assert (one.prompt, other.prompt) == (second.prompt, first.prompt)
    assert "Be brief." in other.prompt
    assert column not in json.loads(other.extra)


def test_a_column_cannot_pass_for_turns(tmp_path):
    row = {"prompt": "p", "response": "r", "__turns__": openai((USER, "another question"))}
    with pytest.raises(DataError, match="a column is called '__turns__', which is kept for turns"):
        read(tmp_path, row)
