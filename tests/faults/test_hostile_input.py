"""Hostile input: exit code 2, a message that names place and cure, nothing started or left."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import flows.launch
from flows.cli import main
from flows.inputs import check_inputs
from flows.settings import load_settings
from p2d_core.errors import SettingsError
from p2d_core.samples.read import read_samples
from p2d_core.samples.source import SourceSpec
from p2d_core.selection.where import checked_condition
from p2d_core.store import Store
from tests.demo_run import P2D
from tests.faults.bad import Bad, Job, every_bad_input
from tests.faults.trials import trials
from tests.small_store import fill, keep_run, summary

CORPUS = every_bad_input()
OF_EVERY_COMMAND = [b for b in CORPUS if not b.name.startswith(("compare ", "head map"))]
"""A comparison takes no head map, and a grid is looked at by it alone."""
WORDS = [
    "affinity", "n_tokens", "source", "domain", "1", "0.5", "'a'", "NULL", "<", "=", ">=", "AND",
    "OR", "NOT", "IN", "LIKE", "(", ")", "IS", ",", "--", "/*", ";", "SELECT", "FROM", "UNION",
    "true", "BETWEEN", "abs(", "CASE", "WHEN", "THEN", "END", "GROUP BY", "LIMIT", "$1", "*",
]  # fmt: skip
CURES = re.compile(
    r"\b(give|save|mend|remove|set|use|writes?|name|rank|known|put|lower|cut|copy|flatten|fill|rename"
    r"|unpack|loosen|check|means|leave|lists|has to|turned into|raise|convert|near|holds|merge"
    r"|download|move|extra inputs|should be|exist either)\b",
    re.IGNORECASE,
)
MOST_CHARACTERS = 3000
MESSAGE = re.compile(r"(\d\d:\d\d:\d\d .*\n)*error: ")
"""On a slow machine lines on how far the check is stand before it."""


class Started(BaseException):
    """The run would have begun."""


def refused(job: Job, monkeypatch: Any, capfd: Any) -> str:
    """The message of the job's command, called as it calls itself; asserts its form."""

    def start() -> None:
        raise Started

    monkeypatch.setattr(flows.launch, "wait_for_server", start)
    file = job.save()
    before = everything_in(job.folder)
    words = ["p2d", job.command, str(file), "--store", str(job.store), *job.words]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.chdir(job.folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ending:
        main.run()
    shown = capfd.readouterr().err
    assert ending.value.code == 2, shown
    assert "Traceback" not in shown
    assert "\x1b" not in shown
    assert MESSAGE.match(shown)
    assert len(shown) < MOST_CHARACTERS
    assert CURES.search(shown), shown
    assert everything_in(job.folder) == before
    return shown


def everything_in(folder: Path) -> set[str]:
    """Every file; one that was set aside as damaged counts as where it was."""
    return {
        re.sub(r"\.damaged-\w+", "", str(file.relative_to(folder)))
        for file in folder.rglob("*")
        if not file.is_dir()
    } - {"run.yaml"}


def test_there_are_a_thousand_of_them():
    assert len({bad.name for bad in CORPUS}) == len(CORPUS)
    assert len(CORPUS) >= 1000


@pytest.mark.parametrize("bad", trials(CORPUS, quick=50), ids=str)
def test_a_bad_input_is_refused(bad: Bad, tmp_path, monkeypatch, capfd):
    job = Job(tmp_path)
    bad.breaks(job, random.Random(bad.name))
    assert bad.named in refused(job, monkeypatch, capfd)


@pytest.mark.parametrize("command", ["plan", "compare"])
@pytest.mark.parametrize("bad", trials(OF_EVERY_COMMAND[::10], quick=5), ids=str)
def test_a_plan_and_a_comparison_refuse_it_too(bad, command, tmp_path, monkeypatch, capfd):
    job = Job(tmp_path)
    bad.breaks(job, random.Random(bad.name))
    job.command = command
    assert bad.named in refused(job, monkeypatch, capfd)


BY_THE_COMMAND = [
    "jsonl, pool: lists in lists (0)", "jsonl, target: a lone high surrogate (0)",
    "parquet, test: a footer of random bytes (0)", "yaml: a bomb of anchors", "yaml: a call",
    "model: pickled weights only (0)", "model: NaN in a query (0)", "head map: a head twice (0)",
    "path of pool: a NUL", "where 28: ",
]  # fmt: skip


@pytest.mark.parametrize("name", trials(BY_THE_COMMAND, quick=1))
def test_the_command_itself_refuses_it(name: str, tmp_path):
    bad = next(bad for bad in CORPUS if bad.name.startswith(name))
    job = Job(tmp_path)
    bad.breaks(job, random.Random(bad.name))
    file = job.save()
    before = everything_in(tmp_path)
    command = [str(P2D), "adapt", str(file), "--store", str(job.store), *job.words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    shown = done.stderr.decode()
    assert done.returncode == 2, shown
    assert MESSAGE.match(shown)
    assert bad.named in shown
    assert "Traceback" not in shown
    assert everything_in(tmp_path) == before


def test_a_line_of_100_mb_is_refused_without_being_held(tmp_path, monkeypatch, capfd):
    job = Job(tmp_path)
    row = b'{"prompt": "a", "response": "' + b"x" * 100 * 2**20 + b'"}\n'
    job.write("pool.jsonl", json.dumps(job.rows["pool"][0]).encode() + b"\n" + row)
    assert "pool.jsonl, line 2: the line has 104" in refused(job, monkeypatch, capfd)


@pytest.mark.parametrize(
    "words",
    [
        ["artifacts", "show", "../../etc/passwd"],
        ["artifacts", "show", "/etc/passwd"],
        ["artifacts", "show", ""],
        ["artifacts", "verify", "heads/../../x"],
        ["artifacts", "ls", "--stage", "../.."],
        ["sql", "SELECT * FROM '../secret.csv'"],
        ["adapt", "../nope.yaml"],
        ["adapt", "/dev/null"],
        ["adapt", "/dev/zero"],
        ["adapt", "."],
        ["adapt", "run.yaml", "--summary", "no/such/folder.json"],
        ["adapt", "run.yaml", "--skip-bad-rows", "-1"],
        ["adapt", "run.yaml", "--skip-bad-rows", "all"],
        ["config", "-o", "run.yaml"],
        ["config", "-o", "no/such/folder.yaml"],
    ],
    ids=" ".join,
)
def test_a_name_that_leads_out_of_the_store_or_nowhere(words, tmp_path, monkeypatch, capfd):
    job = Job(tmp_path)
    job.save()
    keep_run(Store(job.store), summary(fill(Store(job.store))))
    (tmp_path / "secret.csv").write_text("a\nnot for you\n")
    before = everything_in(tmp_path)
    monkeypatch.chdir(job.store)
    job.write("artifacts/run.yaml", job.save().read_bytes())
    monkeypatch.setattr(sys, "argv", ["p2d", *words, *(["--store", "."] * (words[0] != "config"))])
    with pytest.raises(SystemExit) as ending:
        main.run()
    shown = capfd.readouterr()
    assert ending.value.code == 2, shown.err
    assert "Traceback" not in shown.err
    assert "not for you" not in shown.out + shown.err
    assert everything_in(tmp_path) - {"artifacts/run.yaml"} == before


def test_a_link_out_of_the_store_is_no_part_of_it(tmp_path):
    store = Store(tmp_path / "artifacts")
    refs = fill(store)
    outside = tmp_path / "outside"
    (refs["heads"].path / "heads.parquet").rename(outside)
    (refs["heads"].path / "heads.parquet").symlink_to(outside)
    assert store.faults(refs["heads"]) == ["heads.parquet lies outside the artifact"]
    assert store.find("heads", refs["heads"].key) is None
    assert outside.is_file()


# ---- what looks odd and is right


def corpus_of(job: Job) -> list[tuple[str, str]]:
    """Prompts and responses of the pool, after a check of everything that finds nothing wrong."""
    loaded = load_settings(job.save())
    check_inputs(loaded)
    source = loaded.corpus.sources[0]
    spec = SourceSpec(source.name, source.path, source.prompt, source.response)
    return [(sample.prompt, sample.response) for sample in read_samples(spec)]


def plain(job: Job) -> list[tuple[str, str]]:
    return [(row["prompt"], row["response"]) for row in job.rows["pool"]]


def lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    head = delimiter.join(["prompt", "response"])
    return "\n".join([head, *(delimiter.join(row.values()) for row in rows), ""])


LEGAL = {
    "a BOM before JSON Lines": ("x.jsonl", lambda rows: "\ufeff" + lines_of(rows)),
    "a BOM before an array": ("x.json", lambda rows: "\ufeff" + json.dumps(rows)),
    "a BOM before CSV": ("x.csv", lambda rows: "\ufeff" + as_csv(rows)),
    "line ends of Windows": ("x.jsonl", lambda rows: lines_of(rows).replace("\n", "\r\n")),
    "blank lines": ("x.jsonl", lambda rows: "\n \n" + lines_of(rows).replace("\n", "\n\n")),
    "no line end at the end": ("x.jsonl", lambda rows: lines_of(rows).rstrip()),
    "objects a line in .json": ("x.json", lambda rows: lines_of(rows)),
    "semicolons": ("x.csv", lambda rows: as_csv(rows, ";")),
    "tabs": ("x.tsv", lambda rows: as_csv(rows, "\t")),
    "an empty line in CSV": ("x.csv", lambda rows: as_csv(rows).replace("\n", "\n\n", 3)),
    "column names in capitals": (
        "x.jsonl", lambda rows: lines_of([{k.upper(): v for k, v in r.items()} for r in rows])
    ),
    "other names of columns": (
        "x.jsonl", lambda rows: lines_of(rows).replace("prompt", "question").replace(
            "response", "answer"
        )
    ),
    "NaN in a column that is not used": (
        "x.jsonl", lambda rows: lines_of([row | {"x": float("nan")} for row in rows])
    ),
    "columns that only some rows have": (
        "x.jsonl", lambda rows: lines_of([r | {f"x{i}": [i]} for i, r in enumerate(rows)])
    ),
    "a label of a few levels": (
        "x.jsonl", lambda rows: lines_of([row | {"x": {"y": [{"z": 1}]}} for row in rows])
    ),
    "a large dictionary in Parquet": (
        "x.parquet", lambda rows: pa.Table.from_pylist(rows).set_column(
            1, "response", pa.array([r["response"] for r in rows]).dictionary_encode()
        )
    ),
    "large strings in Parquet": (
        "x.parquet", lambda rows: pa.Table.from_pylist(rows).cast(
            pa.schema([("prompt", pa.large_string()), ("response", pa.large_string())])
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", trials(LEGAL, quick=5))
def test_an_odd_file_is_read_rightly(name: str, tmp_path):
    file, made = LEGAL[name]
    job = Job(tmp_path)
    content = made(job.rows["pool"])
    if isinstance(content, str):
        job.write(file, content)
    else:
        pq.write_table(content, tmp_path / file)
    job.point("pool", file)
    assert corpus_of(job) == plain(job)


def test_a_pair_of_surrogates_is_one_character(tmp_path):
    job = Job(tmp_path)
    job.write("pool.jsonl", '{"prompt": "\\ud83d\\ude00", "response": "\\u00e9"}\n')
    assert corpus_of(job) == [("\U0001f600", "é")]


def test_links_and_paths_out_of_the_folder_are_the_users_own(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "here").mkdir()
    job = Job(tmp_path / "here")
    (job.folder / "pool.jsonl").rename(elsewhere / "p.jsonl")
    for path in ("../elsewhere/p.jsonl", str(elsewhere / "p.jsonl"), "../elsewhere", "../e*/p*"):
        job.point("pool", path)
        job.set("corpus.include_target", True)
        assert corpus_of(job) == plain(job)
    (job.folder / "link.jsonl").symlink_to(elsewhere / "p.jsonl")
    job.point("pool", "link.jsonl")
    assert corpus_of(job) == plain(job)


def test_names_are_names_and_never_paths(tmp_path):
    job = Job(tmp_path)
    job.values |= {"name": "../../etc/passwd"}
    job.set("tracking.experiment", "../x")
    job.values["corpus"]["sources"][0]["name"] = "/etc/../passwd"
    assert corpus_of(job) == plain(job)
    assert not job.store.exists()


def test_a_model_folder_of_links_and_with_more_in_it_is_taken(tmp_path):
    """As the hub's cache has them: links to blobs, pickled weights beside the safetensors."""
    job = Job(tmp_path)
    base = job.own_base()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(base.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    save_file(
        tensors | {"more": torch.zeros(2)}, base / "model.safetensors", metadata={"format": "pt"}
    )
    assert corpus_of(job) == plain(job)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffbase: {base}\ntarget: {{path: target.jsonl}}\n",
        "base: {base}\r\ntarget: {{path: target.jsonl}}\r\n",
        "base: {base}\ntarget: {{path: &f target.jsonl}}\n"
        "corpus: {{sources: [{{path: *f, name: n}}]}}\n",
        "base: {base}\ntarget: &t {{path: target.jsonl}}\n"
        "evaluation: {{source: {{<<: *t, path: test.jsonl}}}}\n",
        '{{"base": "{base}", "target": {{"path": "target.jsonl"}}}}',
    ],
    ids=["BOM", "line ends of Windows", "anchors", "merge", "JSON"],
)
def test_odd_yaml_is_read_rightly(text: str, tmp_path):
    job = Job(tmp_path)
    job.text = text.format(base=job.base).encode()
    assert load_settings(job.save()).target.path == str(tmp_path / "target.jsonl")


@pytest.mark.parametrize(
    ("condition", "canonical"),
    [
        ("n_tokens < 200", "(n_tokens < 200)"),
        ("n_tokens < 200;", "(n_tokens < 200)"),
        ("N_TOKENS<200 -- short ones", "(N_TOKENS < 200)"),
        ("source IN ('a', 'b') AND domain > -1", "((source IN ('a', 'b')) AND (domain > -1))"),
        ("source NOT LIKE 'w%' OR affinity >= 0.5", None),
        ("consistency IS NOT NULL", "(consistency IS NOT NULL)"),
        ("source <> 'it''s; DROP TABLE x --'", "(source != 'it''s; DROP TABLE x --')"),
    ],
)
def test_conditions_that_are_taken(condition: str, canonical: str | None, tmp_path):
    job = Job(tmp_path)
    job.set("selection.where", condition)
    where = check_inputs(load_settings(job.save())).selection.where
    assert canonical is None or where.replace('"', "") == canonical
    assert checked_condition(where, ("domain", "consistency")) == where


@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
@settings(max_examples=40, deadline=None)
def test_a_condition_is_refused_or_answers_yes_or_no(condition: str):
    try:
        where = checked_condition(condition)
    except SettingsError:
        return
    with duckdb.connect() as connection:
        connection.execute(
            "CREATE TABLE scores AS SELECT 'a' AS source, 0.5::DOUBLE AS affinity, "
            "3::INTEGER AS n_tokens, 1::INTEGER AS n_response_tokens"
        )
        found = connection.execute(f"SELECT ({where}) FROM scores").fetchall()  # noqa: S608
    assert found in ([(True,)], [(False,)], [(None,)])
