"""Bad data files: JSON lines and arrays, tables, Parquet, whole files."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.bad.job import DOORS, Bad, Job, deep

# ---- JSON Lines


def _with(row: dict[str, Any], **changes: Any) -> str:
    return json.dumps(row | changes)


BAD_LINES: dict[str, Callable[[dict[str, Any], random.Random], str | bytes]] = {
    "cut": lambda row, rng: (text := json.dumps(row))[: rng.randrange(1, len(text) - 1)],
    "something behind": lambda row, rng: json.dumps(row) + rng.choice([" x", "]", ",", " {}"]),
    "two objects": lambda row, rng: json.dumps(row) * 2,
    "single quotes": lambda row, rng: str(row),
    "bare words": lambda row, rng: "{prompt: a, response: b}",
    "a comment": lambda row, rng: json.dumps(row) + " // why",
    "a trailing comma": lambda row, rng: json.dumps(row)[:-1] + ",}",
    "a list": lambda row, rng: json.dumps(list(row.values())),
    "a number": lambda row, rng: str(rng.random()),
    "a text": lambda row, rng: json.dumps("prompt"),
    "null": lambda row, rng: "null",
    "true": lambda row, rng: "true",
    "no response": lambda row, rng: json.dumps({"prompt": row["prompt"]}),
    "no prompt": lambda row, rng: json.dumps({"response": row["response"]}),
    "a misspelt column": lambda row, rng: json.dumps({"prompt": "a", "reponse": "b"}),
    "no column at all": lambda row, rng: "{}",
    "a null response": lambda row, rng: _with(row, response=None),
    "a number for a text": lambda row, rng: _with(row, response=rng.randrange(10**9)),
    "a boolean for a text": lambda row, rng: _with(row, prompt=True),
    "a list for a text": lambda row, rng: _with(row, prompt=["a", "b"]),
    "an object for a text": lambda row, rng: _with(row, response={"text": "a"}),
    "NaN for a text": lambda row, rng: _with(row, response=float("nan")),
    "Infinity for a text": lambda row, rng: _with(row, prompt=float("-inf")),
    "an empty prompt": lambda row, rng: _with(row, prompt=""),
    "a blank response": lambda row, rng: _with(row, response=" \n\t "),
    "an escaped NUL": lambda row, rng: _with(row, response="a\0b"),
    "a NUL byte": lambda row, rng: json.dumps(row).encode() + b"\0",
    "a lone high surrogate": lambda row, rng: '{"prompt": "a\\ud83d", "response": "b"}',
    "a lone low surrogate": lambda row, rng: '{"prompt": "a", "response": "\\udc00b"}',
    "a surrogate in bytes": lambda row, rng: b'{"prompt": "a", "response": "\xed\xa0\x80"}',
    "latin-1": lambda row, rng: '{"prompt": "caf\xe9", "response": "b"}'.encode("latin-1"),
    "windows-1252": lambda row, rng: b'{"prompt": "\x93a\x94", "response": "b"}',
    "overlong UTF-8": lambda row, rng: b'{"prompt": "\xc0\xaf", "response": "b"}',
    "half a character": lambda row, rng: b'{"prompt": "\xe2\x82", "response": "b"}',
    "UTF-16 in the middle": lambda row, rng: json.dumps(row).encode("utf-16-le"),
    "a key twice": lambda row, rng: '{"prompt": "a", "response": "b", "response": "c"}',
    "a nested key twice": lambda row, rng: _with(row)[:-1] + ', "x": {"y": 1, "y": 2}}',
    "lists in lists": lambda row, rng: _with(row)[:-1] + f', "x": {deep(100_000)}}}',
    "objects in objects": lambda row, rng: _with(row)[:-1] + ', "x": ' + '{"a":' * 50_000,
    "a number of 5000 digits": lambda row, rng: _with(row)[:-1] + f', "x": {"9" * 5000}}}',
    "a raw line break": lambda row, rng: '{"prompt": "a\nb", "response": "c"}',
    "a raw control character": lambda row, rng: '{"prompt": "a\x01b", "response": "c"}',
}


def json_lines() -> Iterator[Bad]:
    for name, line in BAD_LINES.items():
        for door in DOORS:
            for draw in range(3):

                def breaks(
                    job: Job, rng: random.Random, line: Any = line, door: str = door
                ) -> None:
                    lines: list[str | bytes] = [json.dumps(row) for row in job.rows[door]]
                    place = rng.randrange(1, len(lines))
                    lines[place] = line(job.rows[door][place], rng)
                    job.write(f"{door}.jsonl", _joined(lines))

                yield Bad(f"jsonl, {door}: {name} ({draw})", breaks, f"{door}.jsonl, line ")


def _joined(lines: list[str | bytes]) -> bytes:
    return b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines)


# ---- JSON arrays


Texts = Callable[[list[str], random.Random], str | bytes]


def _array(rows: list[str]) -> str:
    return "[" + ", ".join(rows) + "]"


def _instead(rows: list[str], rng: random.Random, text: str) -> str:
    rows = list(rows)
    rows[rng.randrange(len(rows))] = text
    return _array(rows)


BAD_ARRAYS: dict[str, Texts] = {
    "cut": lambda rows, rng: (text := _array(rows))[: rng.randrange(2, len(text) - 1)],
    "no end": lambda rows, rng: _array(rows)[:-1],
    "only its beginning": lambda rows, rng: "[",
    "no rows": lambda rows, rng: "[]",
    "a comma too much": lambda rows, rng: _array(rows)[:-1] + ",]",
    "a comma too few": lambda rows, rng: _array(rows).replace("}, {", "} {", 1),
    "something behind": lambda rows, rng: _array(rows) + "]",
    "two arrays": lambda rows, rng: _array(rows) * 2,
    "a text": lambda rows, rng: '"prompt"',
    "a number": lambda rows, rng: "42",
    "null": lambda rows, rng: "null",
    "a page of HTML": lambda rows, rng: "<!DOCTYPE html><html></html>",
    "a number among the rows": lambda rows, rng: _instead(rows, rng, "7"),
    "a list among the rows": lambda rows, rng: _instead(rows, rng, '["a", "b"]'),
    "null among the rows": lambda rows, rng: _instead(rows, rng, "null"),
    "a bomb of lists": lambda rows, rng: deep(200_000),
    "a bomb in a row": lambda rows, rng: _instead(rows, rng, '{"x": ' + deep(100_000) + "}"),
    "a key twice": lambda rows, rng: _instead(rows, rng, '{"prompt": "a", "prompt": "b"}'),
    "a lone surrogate": lambda rows, rng: _instead(
        rows, rng, '{"prompt": "\\ud800", "response": "b"}'
    ),
    "a NUL byte": lambda rows, rng: _array(rows).replace("copy", "co\0py", 1),
    "latin-1": lambda rows, rng: _array(rows).replace("copy", "caf\xe9", 1).encode("latin-1"),
    "UTF-16": lambda rows, rng: _array(rows).encode("utf-16"),
    "an object over lines": lambda rows, rng: '{\n  "rows": ' + _array(rows) + "\n}",
    "only space": lambda rows, rng: " \n \n",
}


def json_arrays() -> Iterator[Bad]:
    for name, text in BAD_ARRAYS.items():
        for door in DOORS:
            for draw in range(2):

                def breaks(
                    job: Job, rng: random.Random, text: Any = text, door: str = door
                ) -> None:
                    job.write(f"{door}.json", text([json.dumps(r) for r in job.rows[door]], rng))
                    job.point(door, f"{door}.json")

                yield Bad(f"json, {door}: {name} ({draw})", breaks, f"{door}.json")


# ---- CSV and TSV


BAD_TABLES: dict[str, Callable[[list[list[str]], random.Random], list[list[str]] | bytes]] = {
    "a field too much": lambda rows, rng: _cell(rows, rng, lambda row: [*row, "x"]),
    "a field too few": lambda rows, rng: _cell(rows, rng, lambda row: row[:-1]),
    "an empty response": lambda rows, rng: _cell(rows, rng, lambda row: [row[0], ""]),
    "a blank prompt": lambda rows, rng: _cell(rows, rng, lambda row: ["  ", row[1]]),
    "a quote that never ends": lambda rows, rng: _cell(rows, rng, lambda r: ['"' + r[0], r[1]]),
    "text behind a quote": lambda rows, rng: _cell(rows, rng, lambda row: ['"a"b', row[1]]),
    "only its first line": lambda rows, rng: rows[:1],
    "no first line": lambda rows, rng: rows[1:],
    "a column twice": lambda rows, rng: [["prompt", "prompt"], *rows[1:]],
    "other columns": lambda rows, rng: [["left", "right"], *rows[1:]],
    "a NUL byte": lambda rows, rng: _cell(rows, rng, lambda row: ["a\0b", row[1]]),
    "latin-1": lambda rows, rng: _text(rows).replace("copy", "caf\xe9").encode("latin-1"),
    "half a character": lambda rows, rng: _text(rows).encode() + b"\xe2\x82,x\n",
    "UTF-16": lambda rows, rng: _text(rows).encode("utf-16"),
    "UTF-16 without a mark": lambda rows, rng: _text(rows).encode("utf-16-le"),
    "random bytes": lambda rows, rng: rng.randbytes(400),
}


def _cell(rows: list[list[str]], rng: random.Random, change: Any) -> list[list[str]]:
    place = rng.randrange(1, len(rows))
    return [change(row) if i == place else row for i, row in enumerate(rows)]


def _text(rows: list[list[str]], delimiter: str = ",") -> str:
    return "".join(delimiter.join(row) + "\n" for row in rows)


def tables() -> Iterator[Bad]:
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        for name, made in BAD_TABLES.items():
            for door in DOORS:

                def breaks(
                    job: Job, rng: random.Random, made: Any = made, door: str = door,
                    suffix: str = suffix, delimiter: str = delimiter,
                ) -> None:  # fmt: skip
                    rows = [["prompt", "response"], *(list(r.values()) for r in job.rows[door])]
                    content = made(rows, rng)
                    if not isinstance(content, bytes):
                        content = _text(content, delimiter).encode()
                    job.write(door + suffix, content)
                    job.point(door, door + suffix)

                yield Bad(f"{suffix[1:]}, {door}: {name}", breaks, door + suffix)


# ---- Parquet


BAD_PARQUET: dict[str, Callable[[list[dict[str, Any]], random.Random], bytes]] = {
    "cut": lambda rows, rng: (data := _parquet(rows))[: rng.randrange(5, len(data) - 8)],
    "cut by one byte": lambda rows, rng: _parquet(rows)[:-1],
    "only its mark": lambda rows, rng: b"PAR1",
    "only two marks": lambda rows, rng: b"PAR1" + bytes(4) + b"PAR1",
    "another file": lambda rows, rng: json.dumps(rows).encode(),
    "random bytes": lambda rows, rng: rng.randbytes(1000),
    "a footer of random bytes": lambda rows, rng: _footer(_parquet(rows), rng),
    "a footer longer than the file": lambda rows, rng: (
        _parquet(rows)[:-8] + b"\xff\xff\xff\x7fPAR1"
    ),
    "no rows": lambda rows, rng: _table(pa.schema([("prompt", "string"), ("response", "string")])),
    "no columns": lambda rows, rng: _table(pa.schema([])),
    "numbers for texts": lambda rows, rng: _parquet(
        [row | {"response": i} for i, row in enumerate(rows)]
    ),
    "lists for texts": lambda rows, rng: _parquet([row | {"response": ["a"]} for row in rows]),
    "objects for texts": lambda rows, rng: _parquet([row | {"prompt": {"a": 1}} for row in rows]),
    "a null": lambda rows, rng: _parquet(
        [row | ({"response": None} if i == 3 else {}) for i, row in enumerate(rows)]
    ),
    "an empty text": lambda rows, rng: _parquet(
        [row | ({"prompt": ""} if i == 2 else {}) for i, row in enumerate(rows)]
    ),
    "a NUL": lambda rows, rng: _parquet([row | {"prompt": "a\0"} for row in rows]),
    "bytes for texts": lambda rows, rng: _parquet([row | {"prompt": b"a"} for row in rows]),
    "text that is not UTF-8": lambda rows, rng: _not_utf8(rows),
    "other columns": lambda rows, rng: _parquet([{"left": "a", "right": "b"} for _ in rows]),
    "a column twice": lambda rows, rng: _twice(rows),
}


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def _table(schema: pa.Schema) -> bytes:
    stream = io.BytesIO()
    pq.write_table(schema.empty_table(), stream)
    return stream.getvalue()


def _footer(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - length] + rng.randbytes(length) + data[-8:]


def _not_utf8(rows: list[dict[str, Any]]) -> bytes:
    raw = pa.array([b"a", b"\xff\xfe", *[b"c"] * (len(rows) - 2)], pa.binary())
    text = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    stream = io.BytesIO()
    table = pa.table({"prompt": [f"p{i}" for i in range(len(rows))], "response": text})
    pq.write_table(table, stream)
    return stream.getvalue()


def _twice(rows: list[dict[str, Any]]) -> bytes:
    column = pa.array(["a"] * len(rows))
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([column, column], names=["prompt", "prompt"]), stream)
    return stream.getvalue()


def parquet() -> Iterator[Bad]:
    for name, made in BAD_PARQUET.items():
        for door in DOORS:
            for draw in range(3 if name in ("cut", "random bytes") else 1):

                def breaks(
                    job: Job, rng: random.Random, made: Any = made, door: str = door
                ) -> None:
                    job.write(f"{door}.parquet", made(job.rows[door], rng))
                    job.point(door, f"{door}.parquet")

                yield Bad(f"parquet, {door}: {name} ({draw})", breaks, f"{door}.parquet")


# ---- whole files


def _fifo(job: Job, name: str) -> None:
    os.mkfifo(job.folder / name)


BAD_FILES: dict[str, tuple[str, Callable[[Job, str], None]]] = {
    "is empty": ("x.jsonl", lambda job, name: job.write(name, "")),
    "is only blank lines": ("x.jsonl", lambda job, name: job.write(name, "\n \n")),
    "is not there": ("x.jsonl", lambda job, name: None),
    "is a folder without data": ("x.d", lambda job, name: (job.folder / name).mkdir()),
    "has no extension": ("x", lambda job, name: job.write(name, "{}")),
    "has another extension": ("x.docx", lambda job, name: job.write(name, "{}")),
    "is packed": ("x.jsonl.gz", lambda job, name: job.write(name, b"\x1f\x8b\x08")),
    "is pickled": ("x.pkl", lambda job, name: job.write(name, b"\x80\x04N.")),
    "is a pipe": ("x.jsonl", _fifo),
    "is a link to nowhere": ("x.jsonl", lambda job, name: (job.folder / name).symlink_to("y")),
    "is a link to itself": ("x.jsonl", lambda job, name: (job.folder / name).symlink_to(name)),
    "is a glob without matches": ("x*.jsonl", lambda job, name: None),
    "is UTF-16": ("x.jsonl", lambda job, name: job.write(name, "{}".encode("utf-16"))),
    "is an array": ("x.jsonl", lambda job, name: job.write(name, '[{"prompt": "a"}]')),
    "has its object over lines": ("x.jsonl", lambda job, name: job.write(name, '{\n"a": 1\n}')),
    "has other columns": ("x.jsonl", lambda job, name: job.write(name, '{"a": "b"}\n')),
    "has a line of 17 MB": ("x.jsonl", lambda job, name: job.write(name, "a" * 17 * 2**20)),
    "is a row of 17 MB in an array": (
        "x.json", lambda job, name: job.write(name, '["' + "a" * 17 * 2**20),
    ),
}  # fmt: skip


def files() -> Iterator[Bad]:
    for name, (file, made) in BAD_FILES.items():
        for door in DOORS:

            def breaks(
                job: Job, rng: random.Random, made: Any = made, door: str = door, file: str = file
            ) -> None:
                made(job, file)
                job.point(door, file)

            yield Bad(f"file, {door}: {name}", breaks, file)
