import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d_core.errors import DataError, SettingsError
from p2d_core.samples import text_stream
from p2d_core.samples.read import BadRow, SourceSpec, read_samples
from p2d_core.samples.schema import Sample, sample_id_of
from p2d_core.samples.source import FORMATS
from p2d_core.samples.texts import canonical_text

QA = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(5)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(path: Path, rows: list[Any]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(path: str, **settings: Any) -> list[Sample]:
    return list(read_samples(SourceSpec("mine", path, **settings)))


def refused(path: str, **settings: Any) -> str:
    with pytest.raises(DataError) as error:
        read(path, **settings)
    return str(error.value)


# ---- the same samples, whatever the format


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


def formats_of_qa(folder: Path) -> dict[str, str]:
    csv_text = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in QA)
    paths = {
        "jsonl": jsonl(folder / "a.jsonl", QA),
        "json": write(folder / "a.json", json.dumps(QA, indent=2)),
        "lines named json": jsonl(folder / "lines.json", QA),
        "csv": write(folder / "a.csv", csv_text),
        "semicolons": write(folder / "b.csv", csv_text.replace(",", ";")),
        "tsv": write(folder / "a.tsv", csv_text.replace(",", "\t")),
        "parquet": str(folder / "a.parquet"),
        "BOM, CRLF, blank lines": write(
            folder / "bom.jsonl",
            b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in QA),
        ),
        "BOM in an array": write(folder / "bom.json", b"\xef\xbb\xbf" + json.dumps(QA).encode()),
        "BOM in CSV": write(folder / "bom.csv", "\ufeff" + csv_text),
    }
    pq.write_table(pa.Table.from_pylist(QA), paths["parquet"], row_group_size=2)
    return paths


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


# ---- columns


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


# ---- text


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


# ---- rows that are no samples


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


# ---- files that cannot be read


def test_a_missing_file_is_met_with_near_names_before_the_first_sample(tmp_path):
    jsonl(tmp_path / "gsm8k_train.jsonl", QA)
    with pytest.raises(DataError, match=r"there is no .*gsm8k_tran\.jsonl\. Near names in .*: gsm"):
        read_samples(SourceSpec("mine", str(tmp_path / "gsm8k_tran.jsonl")))


def test_a_missing_file_without_near_names_lists_the_folder(tmp_path):
    write(tmp_path / "x.md", "-")
    assert re.search(r"The folder .* holds: x\.md\.", refused(str(tmp_path / "data.jsonl")))


def test_a_missing_folder_is_named(tmp_path):
    message = refused(str(tmp_path / "no" / "where" / "data.jsonl"))
    assert re.search(r"The folder .*no/where does not exist either \(.* does\)", message)


def test_a_glob_that_matches_nothing_is_refused(tmp_path):
    assert re.search(r"no file matches .*\*\.jsonl", refused(str(tmp_path / "*.jsonl")))


def test_a_folder_without_data_lists_what_it_holds(tmp_path):
    write(tmp_path / "notes.md", "-")
    message = refused(str(tmp_path))
    assert re.search(r"no file that can be read as samples\. It holds: notes\.md\.", message)
    assert "**/*.parquet" in message


@pytest.mark.parametrize("suffix", [".txt", ""])
def test_an_unknown_extension_is_refused_unless_the_format_is_said(tmp_path, suffix):
    path = jsonl(tmp_path / f"data{suffix}", QA)
    message = refused(path)
    assert f"the extension '{suffix}' is unknown. Known: .jsonl" in message
    assert "`format:` of source 'mine'" in message
    assert len(read(path, format="jsonl")) == len(QA)


def test_a_packed_file_is_to_be_unpacked(tmp_path):
    assert "Unpack it first." in refused(write(tmp_path / "data.jsonl.gz", b"\x1f\x8b"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    assert f"{name}: the file is empty" in refused(write(tmp_path / name, ""))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "prompt,response\n")],
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    assert f"{name}: the file has no rows" in refused(write(tmp_path / name, content))


def test_a_file_of_white_space_named_json_is_empty(tmp_path):
    assert "the file is empty" in refused(write(tmp_path / "a.json", " \n "))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"question": "q",\n "answer": }]', r"row 1 \(line 2, column 12\): .*Expecting value"),
        (
            '[{"question": "q", "answer": "a"},\n{"que',
            r"row 2 \(line 2, column 2\): .*Unterminated",
        ),
        ('[{"question": "q", "answer": "a"}\n{}]', r"row 1 \(line 2, column 1\): .*'\{' where ','"),
        ('[{"question": "q", "answer": "a"}', r"row 1 .*: the file ends"),
        ('[{"question": "q", "answer": "a"},\n]', r"row 2 \(line 2, column 1\): .*Expecting value"),
        ('[{"question": "q", "answer": "a"},', r"row 2 .*the file ends inside the array"),
        ('[{"question": "q", "answer": "a"}] x', r"row 1 .*'x' after the end of the array"),
        ('"text"', r"row 1 \(line 1, column 1\): .*'\"' where '\[' is due"),
        ("[" * 100_000, r"nested too deeply"),
        ('[{"a": 1, "a": 2}]', r"the key 'a' stands twice"),
        ('[{"question": "a\0"}]', r"line 1: a NUL byte at offset 16"),
    ],
)
@pytest.mark.parametrize("chunk", [5, 2**20])
def test_a_broken_json_array_is_refused_with_its_place(
    tmp_path, monkeypatch, content, message, chunk
):
    if len(content) < 1000:
        monkeypatch.setattr(text_stream, "CHUNK_BYTES", chunk)
    assert re.search(rf"a\.json.*{message}", refused(write(tmp_path / "a.json", content)))


def test_a_json_array_named_jsonl_says_what_to_do(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps(QA))
    assert re.search(r"line 1: the file begins with '\['.*set `format: json`", refused(path))
    assert len(read(path, format="json")) == len(QA)


def test_one_json_object_over_many_lines_says_what_is_due(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"data": QA}, indent=1))
    assert "the file is one JSON object over several lines" in refused(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_utf16_is_refused(tmp_path, name):
    assert "is UTF-16. Save it as UTF-8" in refused(
        write(tmp_path / name, "a,b\n".encode("utf-16"))
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,response\na,b\nc\n", r"line 3: 1 fields, but the first line names 2 columns"),
        (b"prompt,response\na,b,c\n", r"line 2: 3 fields, but the first line names 2 columns"),
        (b'prompt,response\na,"b\nc\n', r"line 2: broken CSV: unexpected end of data"),
        (b'prompt,response\n"a" b,c\n', r"line 2: broken CSV: ',' expected after '\"'"),
        (b"prompt,prompt\na,b\n", r"line 1: the first line names the column 'prompt' twice"),
        (b'prompt,response\n"a\nb",c\nd,\n', r"line 4: the response .* is empty"),
        (b"prompt,response\na,\xe9\n", r"line 2: not UTF-8 \(byte 0xe9 at offset 18"),
        (b"prompt,response\na,b\x00\n", r"line 2: a NUL byte at offset 19"),
        (b"prompt,response\ra,b\r", r"line 1: broken CSV: .* lines have to end with LF or CRLF"),
    ],
)
def test_broken_csv_is_refused_with_its_line(tmp_path, content, message):
    assert re.search(rf"a\.csv, {message}", refused(write(tmp_path / "a.csv", content)))


def test_a_cut_parquet_file_is_refused(tmp_path):
    path = formats_of_qa(tmp_path)["parquet"]
    whole = Path(path).read_bytes()
    assert "not a whole Parquet file" in refused(write(Path(path), whole[: len(whole) // 2]))
    assert "not a whole Parquet file" in refused(write(Path(path), b"question,answer\n"))


def test_a_parquet_row_is_named_by_its_number(tmp_path):
    pq.write_table(
        pa.table({"prompt": ["a", "b"], "response": ["c", None]}), tmp_path / "a.parquet"
    )
    message = refused(str(tmp_path / "a.parquet"))
    assert "a.parquet, row 2: no response: column 'response' is null" in message


def test_a_parquet_value_that_cannot_be_read_is_refused_with_its_row(tmp_path):
    raw = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": raw, "response": ["c", "d"]}), tmp_path / "a.parquet")
    assert "a.parquet, row 2: a value cannot be read ('utf-8' codec" in refused(
        str(tmp_path / "a.parquet")
    )


def test_a_time_zone_that_is_not_known_is_refused_with_its_row(tmp_path):
    times = pa.array([0], pa.timestamp("s", "Mars/Phobos"))
    table = pa.table({"prompt": ["a"], "response": ["b"], "time": times})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet, row 1: a value cannot be read" in refused(str(tmp_path / "a.parquet"))


def test_parquet_numbers_are_no_text(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "response": [3]}), tmp_path / "a.parquet")
    assert "row 1: no response: column 'response' holds a number (3)" in refused(
        str(tmp_path / "a.parquet")
    )


def test_skipping_everything_is_refused(tmp_path):
    message = refused(jsonl(tmp_path / "a.jsonl", QA), skip=5)
    assert re.search(r"source 'mine': skip is 5, but .* has 5 rows", message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", QA)
    Path(path).chmod(0)
    assert "no permission to read it" in refused(path)


def test_a_path_that_is_too_long_is_refused():
    assert "cannot be looked up (File name too long)" in refused("a" * 5000 + ".jsonl")


def test_what_is_no_plain_file_is_refused():
    assert "/dev/zero is not a plain file" in refused("/dev/zero", format="jsonl")


def test_a_path_with_a_nul_character_is_refused():
    assert "holds a NUL character" in refused("a\0b.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": -1}, r"skip is -1; it has to be >= 0"),
        ({"limit": 0}, r"limit is 0; it has to be >= 1"),
        ({"format": "xml"}, r"format is 'xml'; known: csv, json, jsonl, parquet, tsv"),
        ({"split": "test"}, r"split are of datasets on the hub, and a.jsonl is no hf://datasets/"),
        ({"config": "main", "revision": "v1"}, r"config and revision are of datasets on the hub"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        SourceSpec("mine", "a.jsonl", **settings)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["prompt", "response", "x"]), json_values) | json_values,
        max_size=4,
    )
)
def test_whatever_json_a_file_holds_it_is_read_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    try:
        samples = read(jsonl(path, rows))
    except DataError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert len(samples) == len(rows)
    assert not refusal or str(path) in refusal


@given(st.binary(max_size=60), st.sampled_from(FORMATS))
def test_whatever_bytes_a_file_holds_it_is_read_or_refused(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / "any.bytes"
    with pytest.raises(DataError, match=re.escape(str(path))):
        read(write(path, content), format=name)


def test_a_message_stays_short_whatever_the_file_holds(tmp_path):
    row = {"x" * 10_000: "y" * 10_000, **{f"c{n}": n for n in range(1000)}}
    message = refused(jsonl(tmp_path / "a.jsonl", [row]))
    assert "xxx..., c0, c1" in message
    assert "and 985 more" in message
    assert len(message) < 1000
