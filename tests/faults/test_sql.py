"""SQL reads the store's views and nothing else, and no longer or larger than it may."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa
import pytest

from p2d_core.errors import InputError
from p2d_core.store import Store
from p2d_core.store.bounded_query import Bounds, bounded_query
from p2d_core.store.query import NOT_ASKED, TABLE_FUNCTIONS, Reader, open_reader
from tests.demo_run import P2D
from tests.faults.test_hostile_input import everything_in
from tests.faults.trials import trials
from tests.small_store import N_SAMPLES, fill, keep_run, summary

SECRET = "not for you"
SECRETS = {
    "secret.csv": f"a\n{SECRET}\n",
    "secret.json": f'{{"a": "{SECRET}"}}\n',
    "secret.txt": SECRET,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("sql")
    store = Store(folder / "artifacts")
    keep_run(store, summary(fill(store)))
    for name, text in SECRETS.items():
        (folder / name).write_text(text)
        (store.root / name).write_text(text)
    with duckdb.connect(str(folder / "secret.db")) as connection:
        connection.execute(f"CREATE TABLE t AS SELECT '{SECRET}' AS a")
    return store


WRITES = [
    "INSERT INTO runs SELECT * FROM runs",
    "UPDATE runs SET name = 'x'",
    "DELETE FROM runs",
    "TRUNCATE runs",
    "DROP VIEW scores",
    "DROP TABLE runs",
    "ALTER TABLE runs ADD COLUMN x INT",
    "CREATE TABLE t AS SELECT 1",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE OR REPLACE VIEW scores AS SELECT 1",
    "CREATE MACRO f(x) AS x",
    "CREATE SCHEMA s",
    "CREATE SEQUENCE s",
    "CREATE TYPE t AS INT",
    "CREATE SECRET s (TYPE http)",
    "MERGE INTO runs USING runs AS r ON false WHEN NOT MATCHED THEN INSERT",
    "WITH x AS (SELECT 1) DELETE FROM runs",
    "COMMENT ON TABLE runs IS 'x'",
]
COPIES = [
    "COPY scores TO '{outside}/x.csv'",
    "COPY scores TO '{store}/x.csv'",
    "COPY scores TO '{store}/scores/x.parquet' (FORMAT parquet)",
    "COPY (SELECT 1) TO '/dev/stdout'",
    "COPY (SELECT 1) TO 'x.csv'",
    "COPY runs FROM '{outside}/secret.csv'",
    "COPY FROM DATABASE memory TO memory",
    "EXPORT DATABASE '{outside}/x'",
    "EXPORT DATABASE '{store}/x'",
    "IMPORT DATABASE '{outside}/x'",
]
OTHERS = [
    "ATTACH '{outside}/secret.db'",
    "ATTACH '{outside}/new.db' AS x",
    "ATTACH ':memory:' AS x",
    "DETACH memory",
    "USE temp",
    "INSTALL httpfs",
    "INSTALL 'x' FROM 'http://127.0.0.1:1'",
    "FORCE INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{outside}/x.duckdb_extension'",
    "UPDATE EXTENSIONS",
    "SET threads = 1",
    "SET memory_limit = '100GB'",
    "SET enable_external_access = true",
    "SET allowed_directories = ['/']",
    "SET lock_configuration = false",
    "SET GLOBAL temp_directory = '/tmp'",
    "SET VARIABLE x = 1",
    "RESET memory_limit",
    "PRAGMA database_list",
    "PRAGMA version",
    "PRAGMA enable_profiling",
    "PRAGMA memory_limit = '100GB'",
    "PRAGMA show_tables",
    "CALL enable_logging()",
    "CALL pragma_version()",
    "CALL checkpoint()",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "EXPLAIN ANALYZE SELECT 1",
    "BEGIN",
    "COMMIT",
    "CHECKPOINT",
    "VACUUM",
    "ANALYZE",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE runs",
    "SELECT 1; COPY scores TO '{outside}/x.csv'",
    "",
    ";",
    "-- SELECT 1",
    "SELECT",
    "PIVOT scores ON source USING count(*)",
]
READS = [
    "SELECT * FROM read_csv('{outside}/secret.csv')",
    "SELECT * FROM read_csv_auto('{outside}/secret.csv')",
    "SELECT * FROM read_csv('{store}/secret.csv')",
    "SELECT * FROM '{outside}/secret.csv'",
    "SELECT * FROM '{store}/secret.csv'",
    "SELECT * FROM 'secret.csv'",
    'SELECT * FROM "{outside}/secret.csv"',
    "SELECT * FROM '{outside}/*.csv'",
    "FROM '{outside}/secret.json'",
    "TABLE '{outside}/secret.csv'",
    "DESCRIBE '{outside}/secret.csv'",
    "DESCRIBE TABLE '{outside}/secret.csv'",
    "SUMMARIZE '{outside}/secret.csv'",
    "DESCRIBE SELECT * FROM read_csv('{outside}/secret.csv')",
    "SELECT * FROM read_text('{outside}/secret.txt')",
    "SELECT * FROM read_text('{store}/**')",
    "SELECT * FROM read_text(['{store}/secret.txt'])",
    "SELECT * FROM read_blob('{outside}/secret.txt')",
    "SELECT * FROM read_json('{outside}/secret.json')",
    "SELECT * FROM read_json_auto('{outside}/secret.json')",
    "SELECT * FROM read_json_objects('{outside}/secret.json')",
    "SELECT * FROM read_ndjson('{outside}/secret.json')",
    "SELECT * FROM read_parquet('{table}')",
    "SELECT * FROM parquet_scan('{table}')",
    "SELECT * FROM parquet_metadata('{table}')",
    "SELECT * FROM parquet_schema('{table}')",
    "SELECT * FROM parquet_kv_metadata('{table}')",
    "SELECT * FROM read_blob('{table}')",
    "SELECT * FROM '{table}'",
    "SELECT * FROM read_duckdb('{outside}/secret.db')",
    "SELECT * FROM sniff_csv('{outside}/secret.csv')",
    "SELECT * FROM glob('{outside}/*')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM read_text('{store}/../secret.txt')",
    "SELECT * FROM read_csv('http://127.0.0.1:1/x.csv')",
    "SELECT * FROM read_csv('s3://bucket/x.csv')",
    "SELECT * FROM read_csv('hf://datasets/x/y/z.csv')",
    "SELECT (SELECT content FROM read_text('{outside}/secret.txt'))",
    "SELECT 1 WHERE EXISTS (FROM read_text('{outside}/secret.txt'))",
    "WITH x AS (FROM read_text('{outside}/secret.txt')) FROM x",
    "WITH x AS MATERIALIZED (FROM '{outside}/secret.csv') FROM x",
    "SELECT 1 UNION ALL SELECT 2 FROM read_text('{outside}/secret.txt')",
    "SELECT * FROM scores, LATERAL (FROM read_text('{outside}/secret.txt'))",
    "SELECT * FROM scores JOIN '{outside}/secret.csv' ON true",
    "SELECT * FROM scores ORDER BY (SELECT content FROM read_text('{outside}/secret.txt'))",
    "SELECT * FROM scores LIMIT (SELECT size FROM read_text('{outside}/secret.txt'))",
    "SELECT list_transform([1], x -> (SELECT content FROM read_text('{outside}/secret.txt')))",
    "SELECT * FROM query('FROM read_text(''{outside}/secret.txt'')')",
    "SELECT * FROM query_table('{outside}/secret.csv')",
    "SELECT * FROM query_table(['scores'])",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "SELECT * FROM caller",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM arrow_scan(1, 2, 3)",
]
SYSTEM = [
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM duckdb_databases()",
    "SELECT * FROM duckdb_views()",
    "SELECT * FROM duckdb_functions()",
    "SELECT * FROM duckdb_temporary_files()",
    "SELECT * FROM duckdb_logs()",
    "SELECT * FROM duckdb_variables()",
    "SELECT * FROM pragma_version()",
    "SELECT * FROM pragma_database_size()",
    "SELECT * FROM pragma_table_info('scores')",
    "SELECT * FROM enable_logging('QueryLog')",
    "SELECT * FROM enable_profiling()",
    "SELECT * FROM checkpoint()",
    "SELECT * FROM which_secret('s3://x', 's3')",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM pg_catalog.pg_tables",
    "SELECT * FROM sqlite_master",
    "SELECT * FROM memory.main.runs",
    "SELECT current_setting('allowed_paths')",
    "SELECT current_setting('temp_directory') FROM scores",
    "SELECT getvariable('x')",
    "SELECT getenv('HOME')",
    "SELECT nextval('s')",
    "SELECT write_log('x')",
    "SELECT sleep_ms(100000)",
    "SELECT system.main.current_setting('threads')",
    "SHOW DATABASES",
    "SHOW VARIABLES",
    "SHOW TABLES FROM memory",
]
ATTEMPTS = [*WRITES, *COPIES, *OTHERS, *READS, *SYSTEM]


def filled_in(sql: str, store: Store) -> str:
    table = next(iter(store.refs("scores"))).path / "scores.parquet"
    return sql.format(outside=store.root.parent, store=store.root, table=table)


def test_there_are_sixty_and_more():
    assert len(set(ATTEMPTS)) == len(ATTEMPTS) >= 60


@pytest.mark.parametrize("attempt", trials(ATTEMPTS, quick=60))
def test_nothing_but_the_views_is_read_and_nothing_written(
    attempt: str, store: Store, monkeypatch, tmp_path
):
    monkeypatch.chdir(store.root.parent)
    caller = pa.table({"a": [SECRET]})
    before = everything_in(store.root.parent)
    with open_reader(store) as reader:
        with pytest.raises(InputError) as refused:
            reader.run(filled_in(attempt, store)).read_all()
        assert whole(reader)
    assert caller.num_rows == 1
    assert SECRET not in str(refused.value)
    assert everything_in(store.root.parent) == before


def whole(reader: Reader) -> bool:
    """The views are as they were."""
    rows = reader.run("SELECT count(*), (SELECT count(*) FROM runs) FROM scores").read_all()
    return [column.to_pylist() for column in rows.columns] == [[N_SAMPLES], [1]]


def test_without_the_look_at_the_statement_files_still_cannot_be_read(store: Store, monkeypatch):
    """DuckDB's own lock stands behind it."""
    monkeypatch.setattr(Reader, "_check", lambda self, sql: set())
    with open_reader(store) as reader:
        for attempt in READS[:45]:
            sql = filled_in(attempt, store)
            if "{table}" not in attempt and "LIMIT" not in attempt:
                with pytest.raises(InputError):
                    assert SECRET not in str(reader.run(sql).read_all())


@pytest.mark.faults
def test_no_function_of_duckdb_is_asked_for_that_nobody_has_looked_at(store: Store):
    """A new release may bring functions that read: table functions have to be on the list."""
    with duckdb.connect() as connection:
        found = connection.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() "
            "WHERE function_type IN ('table', 'table_macro')"
        ).fetchall()
    with open_reader(store) as reader:
        for (name,) in found:
            if name not in TABLE_FUNCTIONS:
                with pytest.raises(InputError):
                    reader.run(f'FROM "{name}"()')
        for name in NOT_ASKED:
            with pytest.raises(InputError, match="cannot be asked for"):
                reader.run(f"SELECT {name}('a')")


@pytest.mark.parametrize(
    "sql",
    [
        "SHOW TABLES",
        "SHOW ALL TABLES",
        "DESCRIBE scores",
        "SUMMARIZE scores",
        "SHOW scores",
        "FROM scores",
        "TABLE scores",
        "VALUES (1), (2)",
        "SELECT * EXCLUDE (key) FROM SCORES s",
        'SELECT count(*) FROM "scores"',
        "WITH Top AS (FROM scores LIMIT 3) SELECT * FROM top JOIN samples USING (sample_id)",
        "WITH RECURSIVE t AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM t WHERE x < 5) FROM t",
        "SELECT unnest([1, 2]), range FROM range(3)",
        "SELECT source, quantile_cont(affinity, 0.5) FROM scores GROUP BY ALL",
        "SELECT row_number() OVER (ORDER BY affinity) FROM scores QUALIFY row_number() OVER () < 3",
        "SELECT json_extract_string(extra, '$.label') FROM samples",
        "PIVOT scores ON source IN ('sums', 'talk') USING count(*)",
        "SELECT * FROM scores USING SAMPLE 5",
        "(SELECT 1) UNION (SELECT 2)",
        "SELECT 1;",
    ],
)
def test_what_people_ask_is_answered(sql: str, store: Store):
    with open_reader(store) as reader:
        reader.run(sql).read_all()


ENDLESS = {
    "a count without end": "SELECT count(*) FROM range(1000000000000)",
    "a product": "SELECT count(*) FROM range(1000000) a, range(1000000) b",
    "recursion": "WITH RECURSIVE t AS (SELECT 1 x UNION ALL SELECT x + 1 FROM t) FROM t",
    "rows without end": "SELECT * FROM range(100000000000)",
    "one call that heeds nothing": (
        "SELECT levenshtein(repeat('a', 200000), repeat('b', 200000) || max(source)) FROM scores"
    ),
    "one constant": "SELECT levenshtein(repeat('a', 200000), repeat('b', 200000))",
}
GREEDY = {
    "one text": "SELECT repeat('x', 3000000000)",
    "many texts": "SELECT repeat(repeat('x', 1000000), 2000)",
    "one list": "SELECT range(1000000000)",
    "a list of a list": "SELECT list_transform(range(100000000), lambda x: x + 1)",
    "an aggregate": "SELECT list(range) FROM range(1000000000)",
    "a sort beyond the disk": "SELECT * FROM range(2000000000) ORDER BY hash(range)",
    "a group for each row": "SELECT range, count(*) FROM range(2000000000) GROUP BY 1",
    "a table held": "WITH t AS MATERIALIZED (FROM range(5000000000)) SELECT 1 FROM t, t u",
}


@pytest.mark.parametrize("name", trials(ENDLESS, quick=2))
def test_a_statement_that_takes_too_long_is_stopped(name: str, store: Store):
    start = time.monotonic()
    with (
        pytest.raises(InputError, match=r"more than 2 seconds. Ask for less .*--seconds"),
        bounded_query(store, ENDLESS[name], Bounds(2.0, 4 * 10**9)) as rows,
    ):
        for _ in rows:
            pass
    assert time.monotonic() - start < 10
    assert not list((store.root / ".scratch").glob("sql-*"))


def test_the_process_of_a_query_ends_with_who_asked(store: Store):
    """Else what is stopped at no bound any more would go on for ever."""
    asking = (
        "import sys; from pathlib import Path; from p2d_core.store import Store; "
        "from p2d_core.store.bounded_query import bounded_query; "
        "list(bounded_query(Store(Path(sys.argv[1])), sys.argv[2]).__enter__())"
    )
    command = [sys.executable, "-c", asking, str(store.root), ENDLESS["a product"]]
    with subprocess.Popen(command) as process:
        until = time.monotonic() + 60
        asked: list[psutil.Process] = []
        while not asked or asked[0].cpu_times().user < 3:
            assert time.monotonic() < until
            time.sleep(0.05)
            asked = psutil.Process(process.pid).children()
        process.kill()
    gone, alive = psutil.wait_procs(asked, timeout=5)
    assert (len(gone), alive) == (1, [])
    assert not list((store.root / ".scratch").glob("sql-*"))


@pytest.mark.parametrize("name", trials(GREEDY, quick=1))
def test_a_statement_that_takes_too_much_memory_is_stopped(name: str, store: Store):
    with (
        pytest.raises(InputError, match=r"(memory|Memory|temp|stopped).*") as stopped,
        bounded_query(store, GREEDY[name], Bounds(120.0, 600 * 10**6)) as rows,
    ):
        for _ in rows:
            pass
    assert "more than 120 seconds" not in str(stopped.value)
    assert not list((store.root / ".scratch").glob("sql-*"))


@pytest.mark.faults
def test_rows_that_are_read_slowly_do_not_count(store: Store):
    read = 0
    sql = "SELECT range AS x FROM range(100000)"
    with bounded_query(store, sql, Bounds(seconds=4.0)) as rows:
        for batch in rows:
            read += batch.num_rows
            time.sleep(0.5)
    assert read == 100_000


def test_the_command_says_it_and_leaves_with_2(store: Store, tmp_path: Path):
    def asked(sql: str, *words: str) -> Any:
        command = [str(P2D), "sql", sql, "--store", str(store.root), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
        )

    slow = asked(ENDLESS["one constant"], "--seconds", "1.5")
    assert slow.returncode == 2
    assert re.fullmatch(r"error: the query was stopped: it took more than 1.5 s.*\n", slow.stderr)
    large = asked(GREEDY["one list"], "--memory", "0.5")
    assert large.returncode == 2
    assert "it took more than 0.5 GB of memory" in large.stderr
    (tmp_path / "json.py").write_text("raise SystemExit('code of the folder ran')")
    answer = asked("SELECT count(*) AS n FROM scores", "--csv")
    assert (answer.returncode, answer.stdout) == (0, f"n\n{N_SAMPLES}\n"), answer.stderr
