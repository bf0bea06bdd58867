"""Rows that are no samples are refused with their place, or left out and told."""

import json
import re

import pytest

from p2d_core.samples import text_stream
from p2d_core.samples.read import BadRow, SourceSpec, read_samples
from tests.p2d_core.samples.data_files import QA, jsonl, refused, write


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "q"}, r"no response: there is no column 'answer' \(found: question\)"),
        ({"question": "q", "answer": None}, r"no response: column 'answer' is null"),
        ({"question": "q", "answer": " \n"}, r"the response \(column 'answer'\) is empty"),
        ({"question": "", "answer": "a"}, r"the prompt \(column 'question'\) is empty"),
        (
            {"question": "q", "answer": 5},
            r"column 'answer' holds a number \(5\) where text is due; put it in quotes, "
            r"or write `\"\{answer\}\"` in place of 'answer'",
        ),
        ({"question": "q", "answer": float("nan")}, r"holds a number \(nan\) where text is due"),
        ({"question": ["q"], "answer": "a"}, r"'question' holds a list of 1 where text is due"),
        ({"question": {"q": 1}, "answer": "a"}, r"'question' holds an object where text is due"),
        ({"question": True, "answer": "a"}, r"holds a boolean \(true\) where text is due"),
        ({"question": "q\0", "answer": "a"}, r"the prompt .* holds a NUL character"),
        ({"question": "q", "answer": "\ud800"}, r"the response .* surrogate pair \(\\ud800\)"),
        ([1, 2], r"a list of 2 where an object is due"),
        ("text", r"text \('text'\) where an object is due"),
        (None, r"null where an object is due"),
    ],
)
def test_a_row_that_is_no_sample_is_refused_with_its_place(tmp_path, bad, message):
    lines = jsonl(tmp_path / "a.jsonl", [QA[0], bad])
    assert re.search(rf"a\.jsonl, line 2: .*{message}", refused(lines))
    array = write(tmp_path / "a.json", json.dumps([QA[0], bad], indent=1))
    assert re.search(rf"a\.json, row 2: .*{message}", refused(array))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "q", "answer": }', r"broken JSON at column 29: Expecting value"),
        (b'{"question": "q", "ans', r"broken JSON at column 19: Unterminated string"),
        (b'{"question": "q", "answer": "a"} {}', r"broken JSON at column 34: Extra data"),
        (b'{"question": "q", "question": "r"}', r"the key 'question' stands twice"),
        (b'{"question": "caf\xe9"}', r"not UTF-8 \(byte 0xe9 at offset \d+ of the file\)"),
        (b'{"question": "\x00"}', r"a NUL byte at offset \d+ of the file"),
        (b"[" * 100_000, r"nested too deeply"),
        (b'{"question": ' + b"1" * 5000 + b"}", r"Exceeds the limit"),
    ],
)
def test_a_broken_line_is_refused_with_its_number(tmp_path, line, message):
    first = json.dumps(QA[0]).encode() + b"\n\n"
    path = write(tmp_path / "a.jsonl", first + line + b"\n" + first)
    assert re.search(rf"a\.jsonl, line 3: .*{message}", refused(path))


def test_the_offset_of_a_wrong_byte_is_that_in_the_file(tmp_path):
    content = b"\xef\xbb\xbf" + json.dumps(QA[0]).encode() + b'\n{"question": "caf\xe9"}\n'
    message = refused(write(tmp_path / "a.jsonl", content))
    assert f"offset {content.index(0xE9)} of" in message
    array = b"\xef\xbb\xbf[" + json.dumps(QA[0]).encode() + b',\n{"question": "caf\xe9"}]'
    message = refused(write(tmp_path / "a.json", array))
    assert f"a.json, line 2: not UTF-8 (byte 0xe9 at offset {array.index(0xE9)} of" in message


def test_a_line_too_long_for_a_sample_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "MAX_ROW_BYTES", 1000)
    path = jsonl(tmp_path / "a.jsonl", [QA[0], {"prompt": "x" * 2000, "response": "r"}, QA[1]])
    assert re.search(r"line 2: the line has 20\d\d bytes; a row may have 1000", refused(path))


def test_bad_rows_can_be_left_out_and_told(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        json.dumps(QA[0]) + "\nbroken\n" + json.dumps({"question": "q"}) + "\n" + json.dumps(QA[1]),
    )
    bad: list[BadRow] = []
    samples = list(read_samples(SourceSpec("mine", path), on_bad_row=bad.append))
    assert [sample.row for sample in samples] == [0, 3]
    assert [(each.row, each.place.rsplit(", ")[-1]) for each in bad] == [
        (1, "line 2"),
        (2, "line 3"),
    ]
    assert "no response" in bad[1].problem
