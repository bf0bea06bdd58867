"""Bad settings: values, the file, paths in it, conditions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from flows.settings import RunSettings
from tests.faults.bad.job import DOORS, Bad, Job

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
        ("heads.options", {"tau": 1}, "ranker 'frobenius' has no setting tau"),
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
