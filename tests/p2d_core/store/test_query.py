"""SQL reads the store's tables; it writes nothing, and reads nothing else."""

import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2d_core.errors import InputError
from p2d_core.store import ArtifactRef, Store
from p2d_core.store.manifest import MANIFEST, sealed
from p2d_core.store.query import Reader, open_reader
from p2d_core.store.recipe import hash_file
from tests.small_store import N_CHOSEN, N_SAMPLES, fill, keep_run, put, summary

SECRET = "not for you"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "artifacts")
    keep_run(store, summary(fill(store)))
    return store


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    file = tmp_path / "outside.csv"
    file.write_text(f"a\n{SECRET}\n")
    return file


def rows(reader: Reader, sql: str) -> list[tuple[object, ...]]:
    table = reader.run(sql).read_all()
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def test_each_stage_is_a_view_with_the_key_of_the_artifact(store: Store):
    with open_reader(store) as reader:
        counts = {
            view: rows(reader, f"FROM {view} SELECT count(*)")[0][0] for view in reader.columns
        }
        keys = rows(reader, "SELECT DISTINCT key FROM heads")
    assert counts == {
        "scores": N_SAMPLES,
        "heads": 4,
        "samples": N_SAMPLES,
        "subset": 4,
        "evaluation": 5,
        "measurements": N_SAMPLES,
        "runs": 1,
    }
    assert keys == [(next(store.refs("heads")).key,)]


def test_artifacts_with_other_columns_are_united_by_name(store: Store):
    table = pa.table({"sample_id": ["x"], "affinity": [2.0], "margin": [1.5]})
    put(store, "scores", {"scores.parquet": table}, other=True)
    with open_reader(store) as reader:
        found = rows(reader, "SELECT affinity, margin, source FROM scores WHERE affinity > 1")
    assert found == [(2.0, 1.5, None)]


def test_a_summary_whose_hash_is_lost_is_left_out(store: Store, caplog: pytest.LogCaptureFixture):
    (beside,) = (store.root / "runs").glob("*.sha256")
    beside.unlink()
    with open_reader(store) as reader:
        assert "runs" not in reader.columns
    assert f"has no {beside.name} beside it" in caplog.text


def test_runs_can_be_compared(store: Store):
    with open_reader(store) as reader:
        assert rows(reader, "SELECT run_id, quality_p2d, aer_cold FROM runs") == [
            ("run-1", 0.75, 0.21)
        ]


def test_joins_windows_describe_and_show_work(store: Store):
    with open_reader(store) as reader:
        joined = rows(
            reader,
            "SELECT count(*) FROM subset JOIN scores USING (sample_id) WHERE scores.affinity >= .9",
        )
        assert joined == [(4,)]
        assert ("affinity",) in [row[:1] for row in rows(reader, "DESCRIBE scores")]
        assert ("scores",) in rows(reader, "SHOW TABLES")


NOT_SELECT = [
    "COPY scores TO '{outside}'",
    "COPY (SELECT 1) TO '{store}/scores/new.csv'",
    "EXPORT DATABASE '{outside}.d'",
    "IMPORT DATABASE '{outside}.d'",
    "ATTACH '{outside}.db' AS other",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET allowed_paths = ['{outside}']",
    "RESET lock_configuration",
    "PRAGMA enable_profiling",
    "PRAGMA database_list",
    "CALL enable_logging()",
    "CREATE TABLE t AS SELECT 1",
    "CREATE SECRET s (TYPE http)",
    "INSERT INTO runs VALUES (1)",
    "UPDATE runs SET name = 'x'",
    "DELETE FROM runs",
    "DROP TABLE runs",
    "WITH x AS (SELECT 1 AS i) INSERT INTO runs SELECT * FROM x",
    "EXPLAIN ANALYZE SELECT 1",
    "PREPARE p AS SELECT 1",
    "BEGIN TRANSACTION",
    "CHECKPOINT",
    "VACUUM",
    "USE memory",
]


@pytest.mark.parametrize("sql", NOT_SELECT)
def test_only_select_is_run(store: Store, outside: Path, sql: str):
    before = sorted(store.root.rglob("*"))
    with (
        open_reader(store) as reader,
        pytest.raises(InputError, match="only a SELECT statement is allowed, this is"),
    ):
        reader.run(sql.format(outside=outside, store=store.root))
    assert outside.read_text() == f"a\n{SECRET}\n"
    assert sorted(store.root.rglob("*")) == before


OUTSIDE = [
    "SELECT * FROM read_csv('{outside}')",
    "SELECT * FROM '{outside}'",
    "SELECT * FROM read_text('{outside}')",
    "SELECT * FROM read_blob('{outside}')",
    "SELECT * FROM read_json('{outside}')",
    "SELECT * FROM read_parquet('{outside}')",
    "SELECT * FROM sniff_csv('{outside}')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM read_text('{store}/scores/../../outside.csv')",
    "SELECT * FROM read_text('{store}/**')",
    "SELECT * FROM read_text('{store}/mlflow/mlflow.db')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM read_csv('http://127.0.0.1:1/x.csv')",
    "SELECT * FROM read_csv('s3://bucket/x.csv')",
    "SELECT * FROM read_duckdb('{outside}')",
    "SELECT * FROM parquet_metadata('{outside}')",
    "SELECT * FROM query('SELECT * FROM read_text(''{outside}'')')",
    "SELECT * FROM query('COPY scores TO ''{outside}''')",
    "SELECT * FROM json_execute_serialized_sql("
    "json_serialize_sql('SELECT * FROM read_text(''{outside}'')'))",
    "WITH x AS (SELECT * FROM read_text('{outside}')) SELECT * FROM x",
    "SELECT (SELECT content FROM read_text('{outside}'))",
    "SELECT * FROM enable_logging('QueryLog', storage='file', "
    "storage_config={{'path': '{folder}'}})",
    "SELECT * FROM enable_profiling('json', save_location := '{outside}')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM table_of_the_caller",
    "SELECT getenv('HOME')",
]


@pytest.mark.parametrize("sql", OUTSIDE)
def test_nothing_outside_the_tables_is_read_or_written(
    store: Store, outside: Path, tmp_path: Path, sql: str
):
    table_of_the_caller = pa.table({"a": [SECRET]})
    assert table_of_the_caller.num_rows == 1
    before = sorted(tmp_path.rglob("*"))
    with open_reader(store) as reader, pytest.raises(InputError) as caught:
        reader.run(sql.format(outside=outside, store=store.root, folder=tmp_path)).read_all()
    assert SECRET not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_that_is_a_link_out_of_the_store_is_left_out(store: Store, tmp_path: Path, caplog):
    ref = next(store.refs("heads"))
    table = ref.path / "heads.parquet"
    elsewhere = tmp_path / "elsewhere.parquet"
    table.rename(elsewhere)
    table.symlink_to(elsewhere)
    with open_reader(store) as reader:
        assert "heads" not in reader.columns
    assert "heads.parquet is left out (damaged)" in caplog.text


def test_a_folder_without_a_manifest_is_not_read(store: Store):
    ref = next(store.refs("scores"))
    (ref.path / "manifest.json").unlink()
    with open_reader(store) as reader:
        assert "scores" not in reader.columns


def test_two_statements_are_refused(store: Store):
    with open_reader(store) as reader, pytest.raises(InputError, match="found 2"):
        reader.run("SELECT 1; DROP TABLE runs")
    with open_reader(store) as reader, pytest.raises(InputError, match="found 0"):
        reader.run("-- nothing")


def test_an_error_shows_the_line_and_what_can_be_asked_for(store: Store):
    with open_reader(store) as reader:
        with pytest.raises(InputError, match=r"(?s)LINE 2: +FORM scores.*  scores: sample_id, "):
            reader.run("SELECT *\n FORM scores x")
        with pytest.raises(InputError, match=r"(?s)\"nope\" not found.*  runs: run_id, name"):
            reader.run("SELECT nope FROM scores")
        with pytest.raises(InputError, match=r"(?s)Could not convert string.*What can be asked"):
            reader.run("SELECT prompt::INT FROM samples").read_all()


def test_an_empty_store_says_what_fills_it(tmp_path: Path):
    with (
        pytest.raises(InputError, match=r"holds nothing to ask for yet\. `p2d demo`"),
        open_reader(Store(tmp_path)),
    ):
        pass


def changed(ref: ArtifactRef, name: str) -> Path:
    """A table of the same size that can be read and has another number in it."""
    file = ref.path / name
    pq.write_table(pa.table({"affinity": [2.0]}), file, compression="none", use_dictionary=False)
    manifest = json.loads((ref.path / MANIFEST).read_text())
    manifest["files"][name] = {"size": file.stat().st_size, "sha256": hash_file(file)}
    (ref.path / MANIFEST).write_text(sealed(manifest))
    content = file.read_bytes()
    file.write_bytes(content.replace(struct.pack("<d", 2.0), struct.pack("<d", 2.5)))
    assert pq.read_table(file)["affinity"].to_pylist() == [2.5]
    return file


def test_a_table_that_changed_is_left_out_though_it_can_be_read(
    store: Store, caplog: pytest.LogCaptureFixture
):
    ref = put(store, "scores", {"scores.parquet": pa.table({"affinity": [2.0]})}, other=True)
    file = changed(ref, "scores.parquet")
    with open_reader(store) as reader:
        assert rows(reader, "FROM subset SELECT count(*)") == [(N_CHOSEN,)]
        assert caplog.text == "", "only what is asked for is looked at"
        assert rows(reader, "FROM scores SELECT count(*), max(affinity) < 2") == [(N_SAMPLES, True)]
    assert f"{file} is left out (damaged)" in caplog.text


def test_where_every_table_of_a_view_is_damaged_the_cure_is_named(store: Store):
    (ref,) = store.refs("scores")
    changed(ref, "scores.parquet")
    with (
        open_reader(store) as reader,
        pytest.raises(InputError, match=r"every table of scores is damaged.*artifacts verify"),
    ):
        reader.run("SELECT count(*) FROM scores")


def test_a_store_whose_name_needs_quoting_works(tmp_path: Path):
    store = Store(tmp_path / "it's [a] 100% store*")
    refs = fill(store)
    with open_reader(store) as reader:
        assert rows(reader, "SELECT DISTINCT key FROM scores") == [(refs["scores"].key,)]


def test_what_does_not_fit_in_memory_leaves_nothing_behind(store: Store):
    with open_reader(store) as reader:
        reader.run("SELECT * FROM range(100000) ORDER BY random()").read_all()
    assert json.dumps([str(file) for file in (store.root / ".scratch").rglob("*")]) == "[]"
