"""Generated bad inputs: each breaks one thing of a job that would run, and says what is named.

All draws are seeded by the case's own name, so that a case is the same in every run.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from flows.settings import RunSettings
from p2d_core.store import Store
from p2d_core.synthetic.world import BASE_FOLDER
from tests.small_store import put

DOORS = {"target": 20, "pool": 30, "test": 6}
"""Data file of the job -> its rows."""


@dataclass
class Job:
    """A job that would run; a case breaks one thing of it."""

    folder: Path
    base: Path = BASE_FOLDER
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    """Of the command, behind the settings file."""
    text: bytes | None = None
    """The settings file, where it is not just the values."""

    def __post_init__(self) -> None:
        first = 0
        for door, n_rows in DOORS.items():
            self.rows[door] = [
                {"prompt": f"copy {i}", "response": f"word {i}"}
                for i in range(first, first + n_rows)
            ]
            first += n_rows
            self.write(f"{door}.jsonl", "".join(json.dumps(r) + "\n" for r in self.rows[door]))
        self.values = {
            "base": str(self.base),
            "target": {"path": "target.jsonl"},
            "corpus": {"sources": [{"path": "pool.jsonl"}]},
            "evaluation": {"source": {"path": "test.jsonl"}},
            "proxy": {"samples": 5, "held_out": 2},
        }

    @property
    def store(self) -> Path:
        return self.folder / "artifacts"

    def write(self, name: str, content: str | bytes) -> None:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (self.folder / name).write_bytes(data)

    def point(self, door: str, path: str) -> None:
        """Lets a door read another file."""
        place = {
            "target": self.values["target"],
            "pool": self.values["corpus"]["sources"][0],
            "test": self.values["evaluation"]["source"],
        }[door]
        place["path"] = path

    def set(self, dotted: str, value: Any) -> None:
        place = self.values
        *sections, last = dotted.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value

    def own_base(self) -> Path:
        """A copy of the base model that a case may break."""
        base = self.folder / "base"
        shutil.copytree(BASE_FOLDER, base)
        self.values["base"] = "base"
        return base

    def save(self) -> Path:
        file = self.folder / "run.yaml"
        text = self.text if self.text is not None else yaml.safe_dump(self.values).encode()
        file.write_bytes(text)
        return file


@dataclass(frozen=True)
class Bad:
    """A bad input; ``named`` is what the message has to name: a file, a key or a value."""

    name: str
    breaks: Callable[[Job, random.Random], None]
    named: str

    def __str__(self) -> str:
        return self.name


def every_bad_input() -> list[Bad]:
    """All of them; their names are different."""
    return [
        *json_lines(), *json_arrays(), *tables(), *parquet(), *files(), *settings(), *yaml_texts(),
        *paths(), *conditions(), *models(), *head_maps(),
    ]  # fmt: skip


# ---- JSON Lines


def _with(row: dict[str, Any], **changes: Any) -> str:
    return json.dumps(row | changes)


def _deep(n: int, inner: str = "1") -> str:
    return "[" * n + inner + "]" * n


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
    "lists in lists": lambda row, rng: _with(row)[:-1] + f', "x": {_deep(100_000)}}}',
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
    "a bomb of lists": lambda rows, rng: _deep(200_000),
    "a bomb in a row": lambda rows, rng: _instead(rows, rng, '{"x": ' + _deep(100_000) + "}"),
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


# ---- settings: values


def leaves(model: type[BaseModel] = RunSettings, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its annotation; those of one source stand for those of all."""
    for name, given in model.model_fields.items():
        inner = given.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", inner


def _wrong_for(kind: Any) -> dict[str, Any]:
    kinds = {kind, get_origin(kind), *get_args(kind)}
    if dict in kinds:
        return {"a text": "x", "a list": [1, 2], "a number": 3}
    if tuple in kinds:
        return {"a text": "x", "a number": 3, "a mapping": {"a": 1}}
    wrong: dict[str, Any] = {"a list": [1, 2], "a mapping": {"a": 1}}
    if bool in kinds:
        return wrong | {"a text": "perhaps", "a number": 7}
    if any(k in (int, float) for k in kinds | {get_args(k)[0] for k in kinds if get_args(k)}):
        return wrong | {
            "a text": "many",
            "below 0": -1,
            "NaN": float("nan"),
            "a boolean list": [True],
        }
    if any(isinstance(k, str) for k in kinds):  # a choice
        return wrong | {"another": "other", "a number": 5, "empty": ""}
    return wrong | {"a number": 5, "a boolean": True}


def settings() -> Iterator[Bad]:
    for dotted, kind in leaves():
        for name, value in _wrong_for(kind).items():

            def breaks(
                job: Job, rng: random.Random, dotted: str = dotted, value: Any = value
            ) -> None:
                if isinstance(job.values.get(dotted.split(".")[0]), str):
                    job.values.pop(dotted.split(".")[0])
                job.set(dotted, value)

            yield Bad(f"settings, {dotted}: {name}", breaks, dotted)
    for section in ["", *sorted({d.rpartition(".")[0] for d, _ in leaves()} - {""})]:
        for typo in ("fractoin", "__class__", "Base", "options2"):
            key = f"{section}.{typo}".strip(".")

            def unknown(job: Job, rng: random.Random, key: str = key) -> None:
                job.set(key, 1)

            yield Bad(f"settings: unknown {key}", unknown, f"unknown key `{key}`")
    for key in ("base", "target"):

        def missing(job: Job, rng: random.Random, key: str = key) -> None:
            del job.values[key]

        yield Bad(f"settings: no {key}", missing, f"`{key}` is missing")
    for dotted, value, named in (
        ("heads.ranker", "spda", "there is no ranker 'spda'"),
        ("scoring.scorer", "../../evil", "there is no scorer '../../evil'"),
        ("training.adaptation", "os.system", "there is no adaptation 'os.system'"),
        ("heads.options", {"tau": 1}, "ranker 'spad' has no setting tau"),
        ("scoring.options", {"domain_quantile": "x"}, "domain_quantile"),
        ("scoring.options", {"__class__": "x"}, "__class__"),
        ("training.options", {"rank": 2}, "rank"),
        ("device", "cuda:99", "device 'cuda:99'"),
        ("device", "abacus", "device 'abacus'"),
        ("device", "", "device ''"),
        ("evaluation.answer_pattern", "(", "evaluation.answer_pattern"),
        ("evaluation.answer_pattern", "[z-a]", "evaluation.answer_pattern"),
        ("selection.quotas", {"pool": 0}, "selection.quotas.pool"),
        ("selection.quotas", {"pool": 0.7, "target": 0.7}, "selection.quotas"),
        ("proxy.samples", 10**9, "proxy.samples 1000000000"),
        ("proxy.samples", 10**30, "proxy.samples"),
        ("format.max_tokens", 3, "format.max_tokens"),
        ("target.skip", 10**6, "skip is 1000000"),
        ("target.prompt", "{", "`prompt:`"),
        ("target.prompt", "{0.__class__}", "__class__"),
        ("target.prompt", "{prompt.__class__}", "__class__"),
        ("target.prompt", "{prompt!r}", "`prompt:`"),
        ("target.response", "nope", "'nope'"),
        ("seed", -1, "seed"),
        ("skip_bad_rows", -1, "skip_bad_rows"),
    ):

        def chosen(job: Job, rng: random.Random, dotted: str = dotted, value: Any = value) -> None:
            job.set(dotted, value)

        yield Bad(f"settings, {dotted}: {str(value)[:40]}", chosen, named)


# ---- settings: the file


def _bomb(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join([*lines, "base: *a1", ""])


def _merge_bomb(levels: int, width: int) -> str:
    lines = ["m0: &m0 {k: 1}"]
    lines += [
        f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * width)}]}}" for i in range(1, levels)
    ]
    return "\n".join([*lines, f"target: *m{levels - 1}", ""])


BAD_YAML: dict[str, str | bytes] = {
    "a bomb of anchors": _bomb(12, 9),
    "a wide bomb of anchors": _bomb(4, 60),
    "a bomb of merges": _merge_bomb(12, 9),
    "an anchor in itself": "base: &a [*a]\n",
    "an anchor in its own mapping": "target: &a {path: *a}\n",
    "an alias of nothing": "base: *nothing\n",
    "lists in lists": "base: " + "[" * 5000 + "]" * 5000,
    "lists that never end": "base: " + "[" * 100_000,
    "mappings in mappings": "\n".join(" " * i + "a:" for i in range(300)),
    "a call": "base: !!python/object/apply:os.system ['touch ran']\n",
    "a new object": "base: !!python/object/new:os.system ['touch ran']\n",
    "an object": "base: !!python/object:flows.settings.RunSettings {}\n",
    "a name of Python": "base: !!python/name:os.system\n",
    "a module of Python": "base: !!python/module:os\n",
    "a tuple of Python": "base: !!python/tuple [a]\n",
    "a tag of one's own": "base: !include /etc/passwd\n",
    "an environment tag": "base: !ENV ${HOME}\n",
    "broken binary": "base: !!binary '===='\n",
    "a date that is none": "name: 2026-99-99\n",
    "a number that is none": "seed: !!int x\n",
    "a number of 5000 digits": f"seed: {'9' * 5000}\n",
    "a list as a key": "? [a, b]\n: 1\n",
    "a number as a key": "1: 2\nbase: a\n",
    "null as a key": "~: 2\nbase: a\n",
    "a key twice": "base: a\nbase: b\n",
    "a nested key twice": "target: {path: a, path: b}\n",
    "a tab": "target:\n\tpath: a\n",
    "an open list": "base: [a\n",
    "an open quote": 'base: "a\n',
    "two documents": "base: a\n---\nbase: b\n",
    "a list": "- base\n- target\n",
    "a text": "just words\n",
    "a number": "42\n",
    "nothing": "",
    "only a comment": "# base: a\n",
    "a NUL": b"base: a\0b\n",
    "an escaped NUL": 'base: "a\\0b"\ntarget: {path: t.jsonl}\n',
    "a lone surrogate": 'base: "\\ud800"\ntarget: {path: t.jsonl}\n',
    "a control character": b"base: \x07\n",
    "latin-1": "name: caf\xe9\n".encode("latin-1"),
    "UTF-16": "base: a\n".encode("utf-16"),
    "random bytes": random.Random(0).randbytes(300),
    "2 MB": b"# " + b"x" * 2 * 2**20,
    "JSON with a comma too much": '{"base": "a",, }',
    "a page of HTML": "<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n",
    "50,000 keys": "".join(f"k{i}: 1\n" for i in range(50_000)),
}


def yaml_texts() -> Iterator[Bad]:
    for name, text in BAD_YAML.items():

        def breaks(job: Job, rng: random.Random, text: Any = text) -> None:
            job.text = text if isinstance(text, bytes) else text.encode()

        yield Bad(f"yaml: {name}", breaks, "run.yaml")


# ---- paths

BAD_PATHS = {
    "a NUL": ("a\0b", "a"),
    "a lone surrogate": ("a\ud800b", "a"),
    "5000 characters": ("x" * 5000, "xxx"),
    "5000 folders": ("x/" * 5000, "x"),
    "the home of nobody": ("~no_such_user_here/a", "no_such_user_here"),
    "out of the folder": ("../" * 40 + "etc/passwd", "passwd"),
    "absolute": ("/etc/passwd", "passwd"),
    "a device": ("/dev/zero", "zero"),
    "a secret of the system": ("/proc/self/environ", "environ"),
    "a link to itself": ("loop", "loop"),
    "a folder in a file": ("target.jsonl/a", "target.jsonl"),
    "an address": ("http://127.0.0.1:1/a.jsonl", "127.0.0.1"),
    "a file address": ("file:///etc/passwd", "passwd"),
    "a bucket": ("s3://bucket/a.jsonl", "bucket"),
    "empty": ("", ""),
    "a line break": ("a\nb", "a"),
    "escape characters": ("\x1b[31mred", "red"),
}


def paths() -> Iterator[Bad]:
    for name, (path, named) in BAD_PATHS.items():
        for door in ("base", *DOORS):

            def breaks(job: Job, rng: random.Random, path: str = path, door: str = door) -> None:
                (job.folder / "loop").symlink_to("loop")
                if door == "base":
                    job.values["base"] = path
                else:
                    job.point(door, path)
                # JSON is YAML, and can say every character
                job.text = json.dumps(job.values).encode()

            yield Bad(f"path of {door}: {name}", breaks, named)


# ---- selection.where

BAD_CONDITIONS = [
    "", " ", "-- nothing", "n_tokens <", "n_tokens < 5; DROP TABLE scores",
    "nope > 1", "prompt LIKE 'a%'", "sample_id = 'x'", "rowid < 5", "scores.affinity > 1",
    "n_tokens", "1", "'a'", "NULL", "affinity > 'many'", "source > 5", "source",
    "true) OR (true) GROUP BY (source", "true GROUP BY source", "true ORDER BY 1", "true LIMIT 1",
    "true UNION SELECT 1", "true QUALIFY true", "true HAVING true", "true USING SAMPLE 1",
    "(SELECT true)", "EXISTS (SELECT 1)", "source IN (SELECT source FROM scores)",
    "source IN (FROM read_text('/etc/passwd'))", "affinity = ANY (SELECT 1.0)",
    "source = (SELECT content FROM read_text('/etc/passwd'))", "read_text('/etc/passwd')",
    "source IN (SELECT file FROM glob('/*'))", "getenv('HOME') <> ''", "sleep_ms(100000) IS NULL",
    "current_setting('threads') = 1", "avg(affinity) > 1", "row_number() OVER () < 3",
    "repeat('x', 2000000000) = source", "list_contains(range(1000000000), n_tokens)",
    "random() < 0.5", "nextval('a') = 1", "$x > 1", "? > 1", "COLUMNS(*) > 1", "* > 1",
    "list_any_value([x -> x])", "[n_tokens][1] > 1", "{'a': n_tokens}.a > 1",
    "affinity::VARCHAR = '1'", "CAST(source AS JSON) IS NOT NULL", "true /*", "true' OR 'a'='a",
    "source = 'a\0b'", "x" * 20_000, "(" * 5000 + "true" + ")" * 5000,
    " AND ".join(["affinity > 0"] * 2000), "affinity > 0 WINDOW w AS (PARTITION BY source",
    "domain > 0 AND consistent > 0",
]  # fmt: skip


def conditions() -> Iterator[Bad]:
    for number, condition in enumerate(BAD_CONDITIONS):

        def breaks(job: Job, rng: random.Random, condition: str = condition) -> None:
            job.set("selection.where", condition)
            job.text = json.dumps(job.values).encode()

        yield Bad(f"where {number}: {condition[:40]!r}", breaks, "selection.where")


# ---- model folders


def _config(**changes: Any) -> Callable[[Path, random.Random], None]:
    def breaks(base: Path, rng: random.Random) -> None:
        file = base / "config.json"
        values = json.loads(file.read_text()) | changes
        values = {key: value for key, value in values.items() if value != "gone"}
        file.write_text(json.dumps(values))

    return breaks


def _text_of(name: str, text: str | bytes) -> Callable[[Path, random.Random], None]:
    def breaks(base: Path, rng: random.Random) -> None:
        (base / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return breaks


def _cut(name: str) -> Callable[[Path, random.Random], None]:
    def breaks(base: Path, rng: random.Random) -> None:
        data = (base / name).read_bytes()
        (base / name).write_bytes(data[: rng.randrange(1, len(data) - 1)])

    return breaks


def _removed(name: str) -> Callable[[Path, random.Random], None]:
    return lambda base, rng: (base / name).unlink()


def _weights(change: Callable[[dict[str, torch.Tensor], str], None], part: str) -> Any:
    def breaks(base: Path, rng: random.Random) -> None:
        weights = load_file(base / "model.safetensors")
        change(weights, rng.choice(sorted(name for name in weights if part in name)))
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    return breaks


def _put(value: float) -> Callable[[dict[str, torch.Tensor], str], None]:
    def change(weights: dict[str, torch.Tensor], name: str) -> None:
        weights[name].view(-1)[-1] = value

    return change


def _shaped(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = torch.zeros(3, 5)


def _sharded(*names: str) -> Callable[[Path, random.Random], None]:
    def breaks(base: Path, rng: random.Random) -> None:
        (base / "model.safetensors").rename(base / "model-00001.safetensors")
        tensors = load_file(base / "model-00001.safetensors")
        placed = {tensor: names[i % len(names)] for i, tensor in enumerate(tensors)}
        text = json.dumps({"metadata": {}, "weight_map": placed})
        (base / "model.safetensors.index.json").write_text(text)

    return breaks


def _only_pickled(name: str) -> Callable[[Path, random.Random], None]:
    return lambda base, rng: (base / "model.safetensors").rename(base / name) and None


def _index(text: str) -> Callable[[Path, random.Random], None]:
    def breaks(base: Path, rng: random.Random) -> None:
        (base / "model.safetensors").rename(base / "model-1.safetensors")
        (base / "model.safetensors.index.json").write_text(text)

    return breaks


REMOTE = {"AutoModelForCausalLM": "modeling_evil.Evil"}
BAD_MODELS: dict[str, tuple[Callable[[Path, random.Random], None], str]] = {
    "no config": (_removed("config.json"), "config.json"),
    "an empty config": (_text_of("config.json", ""), "config.json"),
    "a cut config": (_cut("config.json"), "config.json"),
    "a config that is a list": (_text_of("config.json", "[]"), "config.json"),
    "a config of random bytes": (_text_of("config.json", b"\xff\xfe\x00{"), "config.json"),
    "a config nested too deeply": (_text_of("config.json", _deep(100_000)), "config.json"),
    "no model type": (_config(model_type="gone"), "model_type"),
    "a model type that nobody knows": (_config(model_type="evil"), "evil"),
    "a model type that is a number": (_config(model_type=7), "model_type"),
    "a model type with a path": (_config(model_type="../../evil"), "evil"),
    "a model that is no language model": (_config(model_type="vit"), "base"),
    "an encoder and decoder": (_config(model_type="t5"), "base"),
    "remote code": (_config(auto_map=REMOTE), "auto_map"),
    "remote code on a hub": (_config(auto_map={"AutoConfig": "evil/repo--m.C"}), "auto_map"),
    "remote code in a part": (_config(text_config={"auto_map": REMOTE}), "auto_map"),
    "remote attention": (_config(attn_implementation="evil/kernel"), "attn_implementation"),
    "remote attention, inside": (
        _config(x={"_attn_implementation": "evil/kernel:run"}), "attn_implementation"
    ),
    "remote code of the tokenizer": (
        _text_of("tokenizer_config.json", json.dumps({"auto_map": REMOTE})), "tokenizer_config.json"
    ),
    "remote code of generating": (
        _text_of("generation_config.json", json.dumps({"auto_map": REMOTE})), "generation_config",
    ),
    "an adapter": (
        _text_of("adapter_config.json", json.dumps({"base_model_name_or_path": "/other"})),
        "adapter_config.json",
    ),
    "more layers than weights": (_config(num_hidden_layers=5), "config.json"),
    "a billion layers": (_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "minus one layer": (_config(num_hidden_layers=-1), "base"),
    "no layers": (_config(num_hidden_layers=0), "base"),
    "layers as text": (_config(num_hidden_layers="four"), "base"),
    "another width": (_config(hidden_size=64), "config.json"),
    "no width": (_config(hidden_size=0), "base"),
    "a width below zero": (_config(hidden_size=-128), "base"),
    "a width that heads do not divide": (_config(hidden_size=130, head_dim="gone"), "base"),
    "heads of another number": (_config(num_attention_heads=16), "base"),
    "no heads": (_config(num_attention_heads=0), "base"),
    "more groups than heads": (_config(num_key_value_heads=64), "base"),
    "groups that do not divide": (_config(num_key_value_heads=3), "base"),
    "another vocabulary": (_config(vocab_size=7), "base"),
    "positions below zero": (_config(max_position_embeddings=-5), "max_position_embeddings"),
    "positions as text": (_config(max_position_embeddings="many"), "max_position_embeddings"),
    "positions as a list": (_config(max_position_embeddings=[1]), "max_position_embeddings"),
    "another activation": (_config(hidden_act="evil"), "base"),
    "NaN in the config": (_config(rms_norm_eps="x"), "base"),
    "no weights": (_removed("model.safetensors"), "safetensors"),
    "empty weights": (_text_of("model.safetensors", b""), "model.safetensors"),
    "cut weights": (_cut("model.safetensors"), "model.safetensors"),
    "weights of random bytes": (
        _text_of("model.safetensors", random.Random(1).randbytes(5000)), "model.safetensors"
    ),
    "weights with a header beyond the file": (
        _text_of("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"), "model.safetensors"
    ),
    "weights that are pickled": (
        _text_of("model.safetensors", b"\x80\x04\x8c\x02os\x8c\x06system\x93."), "model.safetensors"
    ),
    "pickled weights only": (_only_pickled("pytorch_model.bin"), "pytorch_model.bin"),
    "a checkpoint only": (_only_pickled("model.ckpt"), "model.ckpt"),
    "weights of torch only": (_only_pickled("model.pt"), "model.pt"),
    "weights under another name": (_only_pickled("weights.safetensors"), "model.safetensors"),
    "a query of another shape": (_weights(_shaped, "q_proj"), "q_proj"),
    "a norm of another shape": (_weights(_shaped, "norm"), "norm"),
    "an embedding of another shape": (_weights(_shaped, "embed_tokens"), "embed_tokens"),
    "NaN in a query": (_weights(_put(float("nan")), "q_proj"), "q_proj"),
    "NaN in an embedding": (_weights(_put(float("nan")), "embed_tokens"), "embed_tokens"),
    "an infinite norm": (_weights(_put(float("inf")), "norm"), "norm"),
    "a key that is infinite": (_weights(_put(float("-inf")), "k_proj"), "k_proj"),
    "no query": (_weights(lambda weights, name: weights.pop(name), "q_proj"), "q_proj"),
    "no mlp": (_weights(lambda weights, name: weights.pop(name), "mlp"), "mlp"),
    "no weights of layer 3": (
        _weights(
            lambda weights, _: [weights.pop(n) for n in list(weights) if ".3." in n] and None, "q"
        ),
        "layers.3",
    ),
    "an index that is no JSON": (
        _index("{"),
        "model.safetensors.index.json",
    ),
    "an index without files": (
        _index("{}"),
        "weight_map",
    ),
    "a shard that is not there": (
        _sharded("model-00001.safetensors", "model-00002.safetensors"), "model-00002.safetensors"
    ),
    "a shard out of the folder": (
        _sharded("model-00001.safetensors", "../other.safetensors"), "../other.safetensors"
    ),
    "an absolute shard": (
        _sharded("model-00001.safetensors", "/etc/other.safetensors"), "/etc/other.safetensors"
    ),
    "a pickled shard": (
        _sharded("model-00001.safetensors", "model-00002.bin"), "model-00002.bin"
    ),
    "no tokenizer": (
        lambda base, rng: [f.unlink() for f in base.glob("tokenizer*")] and None, "tokenizer"
    ),
    "a cut tokenizer": (_cut("tokenizer.json"), "tokenizer"),
    "an empty tokenizer": (_text_of("tokenizer.json", ""), "tokenizer"),
    "a tokenizer that is a list": (_text_of("tokenizer.json", "[]"), "tokenizer"),
    "a tokenizer of random bytes": (_text_of("tokenizer.json", b"\xff\x00\x80"), "tokenizer"),
}  # fmt: skip


def models() -> Iterator[Bad]:
    for name, (change, named) in BAD_MODELS.items():
        for draw in range(3 if "cut" in name else 1):

            def breaks(job: Job, rng: random.Random, change: Any = change) -> None:
                change(job.own_base(), rng)

            yield Bad(f"model: {name} ({draw})", breaks, named)


# ---- head maps


def head_rows() -> list[dict[str, Any]]:
    """A right head map of the demo's base: 4 layers of 8 heads."""
    config = json.loads((BASE_FOLDER / "config.json").read_text())
    n_layers, n_heads = config["num_hidden_layers"], config["num_attention_heads"]
    n_groups = config["num_key_value_heads"]
    count = n_layers * n_heads
    return [
        {
            "layer": i // n_heads,
            "head": i % n_heads,
            "kv_group": i % n_heads // (n_heads // n_groups),
            "score": float(count - i),
            "rank": i + 1,
            "is_task_head": i < 3,
        }
        for i in range(count)
    ]


def _rows(change: Callable[[list[dict[str, Any]], random.Random], Any]) -> Any:
    def made(rng: random.Random) -> pa.Table:
        rows = head_rows()
        return pa.Table.from_pylist(change(rows, rng) or rows)

    return made


def _one(**values: Any) -> Any:
    def change(rows: list[dict[str, Any]], rng: random.Random) -> None:
        rows[rng.randrange(len(rows))].update(values)

    return _rows(change)


def _all(**values: Any) -> Any:
    return _rows(lambda rows, rng: [row | values for row in rows])


BAD_MAPS: dict[str, Callable[[random.Random], pa.Table | str]] = {
    "a head twice": _rows(lambda rows, rng: [*rows, rng.choice(rows)]),
    "all heads twice": _rows(lambda rows, rng: rows * 2),
    "a head missing": _rows(lambda rows, rng: rows.pop(rng.randrange(len(rows))) and None),
    "a layer missing": _rows(lambda rows, rng: [row for row in rows if row["layer"] != 1]),
    "a layer too much": _rows(
        lambda rows, rng: rows
        + [
            {**row, "layer": 99, "rank": 99 + i, "score": -float(i), "is_task_head": False}
            for i, row in enumerate(rows[:4])
        ]
    ),
    "a layer out of range": _one(layer=10**6),
    "a head out of range": _one(head=2**31 - 1),
    "a layer below zero": _one(layer=-1),
    "a head below zero": _one(head=-7),
    "a group below zero": _one(kv_group=-1),
    "a group of others": _one(kv_group=77),
    "a layer beyond 32 bits": _one(layer=2**40),
    "a score that is NaN": _one(score=float("nan")),
    "an infinite score": _one(score=float("inf")),
    "a score that is null": _one(score=None),
    "a score that is a text": _all(score="high"),
    "a rank twice": _all(rank=1),
    "a rank of zero": _one(rank=0),
    "no task head": _all(is_task_head=False),
    "task heads that are null": _all(is_task_head=None),
    "task heads as numbers": _all(is_task_head=7.5),
    "no rows": lambda rng: pa.Table.from_pylist(head_rows()).slice(0, 0),
    "no columns of heads": lambda rng: pa.table({"a": [1]}),
    "no scores": _rows(lambda rows, rng: [row.pop("score") and None for row in rows] and rows),
    "no Parquet": lambda rng: "layer,head\n0,1\n",
    "an empty file": lambda rng: "",
    "half the layers": _rows(lambda rows, rng: rows[: len(rows) // 2]),
    "half the heads": _rows(
        lambda rows, rng: [
            {**row, "rank": i + 1}
            for i, row in enumerate(r for r in rows if r["head"] < 4 and r["kv_group"] < 2)
        ]
    ),
    "another number of groups": _rows(
        lambda rows, rng: [{**row, "kv_group": 0} for row in rows]
    ),
}  # fmt: skip


def base_hash() -> str:
    from p2d_core.models import model_hash

    return model_hash(BASE_FOLDER)


def put_map(job: Job, table: pa.Table | str, base: Any = None) -> Any:
    """An artifact that is whole, whatever the map in it."""
    inputs = {"base": {"sha256": base_hash()}} if base is None else base
    return put(Store(job.store), "heads", {"heads.parquet": table}, inputs=inputs)


def _damage(change: Callable[[Any], None]) -> Callable[[Job, random.Random], None]:
    def breaks(job: Job, rng: random.Random) -> None:
        ref = put_map(job, pa.Table.from_pylist(head_rows()))
        change(ref)
        job.words = ["--head-map", ref.key[:16]]

    return breaks


def _linked(ref: Any) -> None:
    outside = ref.path.parents[2] / "outside.parquet"
    (ref.path / "heads.parquet").rename(outside)
    (ref.path / "heads.parquet").symlink_to(outside)


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    def damage(ref: Any) -> None:
        values = json.loads((ref.path / "manifest.json").read_text())
        (ref.path / "manifest.json").write_text(json.dumps(change(values) or values))

    return damage


def head_maps() -> Iterator[Bad]:
    for name, made in BAD_MAPS.items():
        for draw in range(2):

            def breaks(job: Job, rng: random.Random, made: Any = made) -> None:
                ref = put_map(job, made(rng))
                job.words = ["--head-map", str(ref.path)]

            yield Bad(f"head map: {name} ({draw})", breaks, "head")
    for name, base in {
        "of another model": {"base": {"sha256": "f" * 64}},
        "of no model": {"proxy": "f" * 64},
        "of a model without a hash": {"base": {}},
        "of a model that is a list": {"base": ["f" * 64]},
    }.items():

        def other(job: Job, rng: random.Random, base: Any = base) -> None:
            ref = put_map(job, pa.Table.from_pylist(head_rows()), base)
            job.words = ["--head-map", ref.key]

        yield Bad(f"head map: {name}", other, "head map")
    for name, change in {
        "cut": lambda ref: (ref.path / "heads.parquet").write_bytes(b"PAR1"),
        "gone": lambda ref: (ref.path / "heads.parquet").unlink(),
        "a link out of the store": _linked,
        "its manifest is a list": lambda ref: (ref.path / "manifest.json").write_text("[]"),
        "its manifest is cut": lambda ref: (ref.path / "manifest.json").write_text('{"key": "'),
        "its manifest has no files": _manifest(lambda values: values.pop("files") and None),
        "its manifest names files outside": _manifest(
            lambda values: values["files"].update({"../../x": {"size": 1, "sha256": "0"}})
        ),
        "its manifest names an absolute file": _manifest(
            lambda values: values["files"].update({"/etc/passwd": {"size": 1, "sha256": "0"}})
        ),
        "its manifest has another key": _manifest(lambda values: values.update(key="0" * 64)),
    }.items():
        yield Bad(f"head map: {name}", _damage(change), "head map")
    for given in (
        "nope", "../../../etc/passwd", "/etc/passwd", "/", ".", "..", "", "heads", "heads/",
        "*", "heads/../../x", "a" * 5000, "0" * 64, "\x1b[31m", "~nobody/x", "a\nb", "%s", "{}",
    ):  # fmt: skip

        def named(job: Job, rng: random.Random, given: str = given) -> None:
            put_map(job, pa.Table.from_pylist(head_rows()))
            put_map(job, pa.Table.from_pylist(head_rows()), {"base": {"sha256": "0"}})
            job.words = ["--head-map", given]

        yield Bad(f"head map: called {given[:30]!r}", named, "artifact")
