"""Data files become samples, the same whatever their format."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d_core.samples import text_stream
from p2d_core.samples.schema import Sample, sample_id_of
from p2d_core.samples.texts import canonical_text
from tests.p2d_core.samples.data_files import QA, formats_of_qa, jsonl, read, refused, write


def test_jsonl_rows_become_samples_with_ids_rows_and_extra(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{**QA[0], "level": 3, "by": "Å"}, QA[1]])
    first, second = read(path)
    assert first == Sample(
        sample_id=sample_id_of("What is 0?", "It is 0."),
        source="mine",
        prompt="What is 0?",
        response="It is 0.",
        row=0,
        extra='{"by": "Å", "level": 3}',
    )
    assert (second.row, second.extra) == (1, "{}")


def test_every_format_gives_the_same_samples(tmp_path):
    expected = read(jsonl(tmp_path / "reference.jsonl", QA))
    for name, path in formats_of_qa(tmp_path).items():
        assert read(path) == expected, name


@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_skip_and_limit_choose_rows_that_keep_their_numbers(tmp_path, name):
    samples = read(formats_of_qa(tmp_path)[name], skip=1, limit=2)
    assert [sample.row for sample in samples] == [1, 2]
    assert [sample.response for sample in samples] == ["It is 1.", "It is 2."]


def test_reading_stops_at_the_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps(QA[0]) + "\nthis is never looked at\n")
    assert len(read(path, limit=1)) == 1


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_json_array_is_the_same_whatever_the_chunks(tmp_path, monkeypatch, chunk):
    rows = [{"prompt": "é\n]" * n, "response": '{,\\"', "n": 10**n} for n in range(1, 9)]
    path = write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False, indent=1))
    expected = read(path)
    monkeypatch.setattr(text_stream, "CHUNK_BYTES", chunk)
    assert read(path) == expected
    assert [json.loads(sample.extra)["n"] for sample in expected] == [10**n for n in range(1, 9)]


def test_a_quoted_csv_field_may_span_lines(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,response\r\n"a ""b""\r\nc","d, e"\r\nf,g\r\n')
    assert [(s.prompt, s.response) for s in read(path)] == [('a "b"\nc', "d, e"), ("f", "g")]


def test_a_folder_is_read_in_name_order_and_rows_count_on(tmp_path):
    jsonl(tmp_path / "b.jsonl", QA[2:])
    jsonl(tmp_path / "a.jsonl", QA[:2])
    write(tmp_path / "README.md", "no data")
    jsonl(tmp_path / ".hidden.jsonl", ["not a row"])
    samples = read(str(tmp_path))
    assert [sample.response for sample in samples] == [row["answer"] for row in QA]
    assert [sample.row for sample in samples] == [0, 1, 2, 3, 4]
    assert read(str(tmp_path / "*.jsonl")) == samples


def test_files_of_one_source_may_name_their_columns_differently(tmp_path):
    jsonl(tmp_path / "a.jsonl", QA[:1])
    jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "response": "r"}])
    assert [sample.prompt for sample in read(str(tmp_path))] == ["What is 0?", "p"]


def test_text_is_kept_but_for_line_breaks_and_its_edges():
    assert canonical_text("\n \n    def f():\r\n\treturn 1  \r\n\n") == "    def f():\n\treturn 1"


@given(st.text())
def test_canonical_text_is_canonical(text):
    once = canonical_text(text)
    assert canonical_text(once) == once
    assert "\r\n" not in once


def test_extra_holds_what_json_cannot_say_as_null_or_text(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"prompt": "p", "response": "r", "x": NaN, "y": ["\\ud800", 1e999]}'
    )
    (sample,) = read(path)
    assert json.loads(sample.extra) == {"x": None, "y": ["?", None]}


def test_a_column_that_is_nested_too_deeply_is_refused(tmp_path):
    deep = "[" * 900 + "NaN" + "]" * 900
    row = f'{{"prompt": "p", "response": "r", "deep": {deep}}}\n'
    assert "nested too deeply" in refused(write(tmp_path / "a.jsonl", row))


def test_extra_of_parquet_columns(tmp_path):
    table = pa.table(
        {
            "prompt": ["p"],
            "response": ["r"],
            "raw": [b"\xff\xfe"],
            "day": pa.array([0], pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (sample,) = read(str(tmp_path / "a.parquet"))
    assert json.loads(sample.extra) == {"raw": "<2 bytes>", "day": "1970-01-01"}
