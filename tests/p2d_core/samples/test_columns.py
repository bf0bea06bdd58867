"""Which columns are prompt and response: found, named, or written as templates."""

import json
import re

import pytest

from tests.p2d_core.samples.data_files import QA, jsonl, read, refused, write


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "p", "response": "r"}, "p", "r"),
        ({"question": "p", "answer": "r"}, "p", "r"),
        ({"Question": "p", "Answer": "r"}, "p", "r"),
        ({"query": "p", "response": "r"}, "p", "r"),
        ({"input": "p", "output": "r"}, "p", "r"),
        ({"problem": "p", "solution": "r"}, "p", "r"),
        ({"source": "p", "target": "r"}, "p", "r"),
        ({"instruction": "p", "output": "r"}, "p", "r"),
        ({"instruction": "p", "input": "", "output": "r"}, "p", "r"),
        ({"instruction": "p", "input": None, "output": "r"}, "p", "r"),
        ({"instruction": "p", "input": "i", "output": "r"}, "p\n\ni", "r"),
        ({"instruction": "p", "input": "i", "response": "r", "output": "r"}, "p\n\ni", "r"),
        ({"instruction": "p", "context": "i", "response": "r"}, "p\n\ni", "r"),
        ({"instruction": "p", "input": "i", "context": "c", "response": "r"}, "p\n\ni", "r"),
    ],
)
def test_common_columns_are_recognised(tmp_path, row, prompt, response):
    (sample,) = read(jsonl(tmp_path / "a.jsonl", [row]))
    assert (sample.prompt, sample.response) == (prompt, response)


@pytest.mark.parametrize("written", [str.lower, str.capitalize, str.upper])
def test_an_input_that_comes_after_the_first_row_counts(tmp_path, written):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
    rows = [{written(name): text for name, text in row.items()} for row in rows]
    assert read(jsonl(tmp_path / "a.jsonl", rows))[1].prompt == "c\n\nd"


def test_columns_can_be_named_or_written_as_templates(tmp_path):
    rows = [{"title": "T", "body": "B", "note": None, "label": 7, "id": 1}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    (sample,) = read(path, prompt="{title}: {body} {{x}}{note}", response="{label}")
    assert (sample.prompt, sample.response) == ("T: B {x}", "7")
    assert sample.extra == '{"id": 1}'


def test_one_column_can_be_named_and_the_other_recognised(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{**QA[0], "rationale": "because"}])
    (sample,) = read(path, response="rationale")
    assert (sample.prompt, sample.response) == ("What is 0?", "because")


def test_unknown_columns_are_listed_with_the_keys_that_name_them(tmp_path):
    message = refused(jsonl(tmp_path / "a.jsonl", [{"head": "p", "tail": "r"}]))
    assert re.search(
        r"a\.jsonl, line 1: no columns are recognised as prompt and response\. "
        r"Columns found: head, tail\. .*`prompt:` and `response:` of source 'mine'",
        message,
    )


def test_rows_within_one_object_are_to_be_written_alone(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"version": "1", "data": QA}))
    assert "If the rows are what stands under 'data', write that array alone." in refused(path)


def test_a_misspelt_column_gets_a_suggestion(tmp_path):
    message = refused(jsonl(tmp_path / "a.jsonl", QA), prompt="qestion")
    assert "there is no column 'qestion', which `prompt:` of source 'mine' names" in message
    assert "Columns found: question, answer. Did you mean 'question'?" in message


@pytest.mark.parametrize("template", ["{question!r}", "{question:>9}", "{}"])
def test_templates_hold_columns_only(tmp_path, template):
    message = refused(jsonl(tmp_path / "a.jsonl", QA), prompt=template)
    assert "may hold names of columns in braces and nothing else" in message


def test_a_template_does_not_reach_into_objects(tmp_path):
    message = refused(jsonl(tmp_path / "a.jsonl", QA), prompt="{question.__class__}")
    assert "there is no column 'question.__class__'" in message


def test_a_template_with_an_open_brace_is_refused(tmp_path):
    message = refused(jsonl(tmp_path / "a.jsonl", QA), prompt="{question")
    assert "`prompt:` of source 'mine' is not a template" in message
