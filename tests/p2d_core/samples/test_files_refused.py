"""Files that cannot be read are refused with what to do."""

import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d_core.errors import DataError, SettingsError
from p2d_core.samples import text_stream
from p2d_core.samples.read import SourceSpec, read_samples
from p2d_core.samples.source import FORMATS
from tests.p2d_core.samples.data_files import QA, formats_of_qa, jsonl, read, refused, write


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
