"""`p2d artifacts` and `p2d sql` over a small real store."""

import json
from pathlib import Path

import pytest

from p2d_core.store import Store
from tests.small_store import fill, keep_run, put, summary


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


@pytest.fixture
def refs(store):
    return fill(store)


@pytest.fixture
def p2d(monkeypatch, command, store):
    """Runs a command over the store; gives its exit code and what it said."""
    monkeypatch.setenv("P2D_STORE", str(store.root))
    monkeypatch.setenv("COLUMNS", "200")
    return command


def test_ls_lists_every_artifact_and_what_it_was_made_from(p2d, refs):
    code, out, _ = p2d("artifacts", "ls")
    assert code == 0
    for ref in refs.values():
        assert ref.key[:12] in out
    line = next(line for line in out.splitlines() if line.startswith("model"))
    assert f"heads {refs['heads'].key[:6]}, subset {refs['subset'].key[:6]}" in line
    assert "8 artifacts" in out


def test_ls_of_a_stage_shows_only_that_and_knows_the_others(p2d, refs):
    out = p2d("artifacts", "ls", "--stage", "heads")[1]
    assert refs["heads"].key[:12] in out
    assert refs["model"].key[:12] not in out
    code, _, err = p2d("artifacts", "ls", "--stage", "head")
    assert code == 2
    assert "Stages here: evaluation, heads, measurements" in err


def test_the_option_wins_over_the_environment(p2d, refs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    code, out, _ = p2d("artifacts", "ls", "--store", str(empty))
    assert (code, "holds no artifact yet" in out) == (0, True)
    code, _, err = p2d("artifacts", "ls", "--store", str(tmp_path / "none"))
    assert (code, "there is no store at" in err) == (2, True)


def test_show_walks_the_lineage(p2d, refs):
    code, out, _ = p2d("artifacts", "show", refs["model"].key[:10])
    assert code == 0
    assert f"heads: heads {refs['heads'].key[:12]}" in out
    assert f"corpus: samples {refs['samples'].key[:12]} (above)" in out
    assert "adapter/adapter_model.safetensors" in out
    assert "by run run-1" in out


def test_verify_is_content_with_a_sound_store(p2d, refs):
    code, out, _ = p2d("artifacts", "verify")
    assert (code, out) == (0, "8 artifacts checked: every file is as it was made.\n")


def test_verify_names_the_file_and_what_to_do(p2d, refs):
    (refs["scores"].path / "scores.parquet").write_bytes(b"x")
    code, _, err = p2d("artifacts", "verify")
    assert code == 1
    assert f"{refs['scores'].location}: scores.parquet has 1 bytes, not" in err
    assert "made again by the next run" in err
    assert p2d("artifacts", "verify", refs["heads"].key)[0] == 0
    assert p2d("artifacts", "verify", refs["scores"].key)[0] == 1


def test_a_broken_manifest_spoils_no_listing(p2d, refs):
    (refs["heads"].path / "manifest.json").write_text("{")
    code, out, _ = p2d("artifacts", "ls")
    assert (code, "manifest damaged: p2d artifacts verify" in out) == (0, True)
    assert p2d("artifacts", "show", refs["model"].key)[0] == 0
    code, _, err = p2d("artifacts", "verify")
    assert (code, "is not a manifest" in err) == (1, True)


def test_gc_says_what_it_frees_and_a_dry_run_frees_nothing(p2d, store, refs):
    keep_run(store, summary(refs))
    other = put(store, "heads", {"f": "x" * 2000}, run_id="gone", other=True)
    older = keep_run(store, summary({"heads": other}, "gone"))
    import os

    os.utime(older, (1, 1))
    code, out, _ = p2d("artifacts", "gc", "--keep-runs", "1", "--dry-run")
    assert code == 0
    why = "no part of the 1 runs to be kept, nor of a registered model or a head map in use"
    assert f"would remove heads/{other.key}: {why}" in out
    assert "would be freed" in out
    assert other.path.exists()
    out = p2d("artifacts", "gc", "--keep-runs", "1")[1]
    assert f"removed heads/{other.key}" in out
    assert not other.path.exists()
    assert p2d("artifacts", "verify")[0] == 0


def test_gc_explains_why_it_keeps_a_store_without_runs(p2d, refs):
    code, out, _ = p2d("artifacts", "gc")
    assert (code, "No run has ended in this store yet" in out) == (0, True)


def test_sql_answers_as_a_table_as_csv_and_as_json(p2d, refs):
    query = "SELECT source, count(*) AS n FROM samples GROUP BY source ORDER BY source"
    assert [line.split() for line in p2d("sql", query)[1].splitlines()] == [
        ["source", "n"],
        ["sums", "30"],
        ["talk", "10"],
    ]
    assert p2d("sql", query, "--csv")[1] == "source,n\nsums,30\ntalk,10\n"
    lines = p2d("sql", "SELECT 1 / 0 AS x, 'ü' AS y", "--json")[1].splitlines()
    assert [json.loads(line) for line in lines] == [{"x": None, "y": "ü"}]


def test_sql_shows_the_first_rows_and_how_many_are_left(p2d, refs):
    out = p2d("sql", "SELECT range FROM range(20000)")[1]
    assert "... and 19,950 rows more." in out


def test_sql_keeps_control_characters_from_the_terminal(p2d, refs):
    out = p2d("sql", "SELECT chr(27) || '[31mred' AS x")[1]
    assert "\x1b" not in out
    assert "\\x1b[31mred" in out


def test_sql_that_is_wrong_or_writes_is_refused(p2d, refs):
    code, _, err = p2d("sql", "SELECT nope FROM scores")
    assert code == 2
    assert "LINE 1: SELECT nope" in err
    assert "  scores: sample_id, source, affinity" in err
    code, _, err = p2d("sql", "COPY scores TO 'x.csv'")
    assert (code, "this is COPY" in err) == (2, True)
    assert p2d("sql", "SELECT 1", "--csv", "--json")[0] == 2
    code, _, err = p2d("sql", "SELECT 1 AS a, 2 AS a", "--json")
    assert code == 2
    assert "two columns are called 'a', of which JSON could show one alone" in err
