"""Read-only SQL over what a store holds; a query reads nothing but the artifacts' own tables."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from p2d_core.errors import ArtifactError, InputError
from p2d_core.samples.rejected import REJECTED
from p2d_core.sql_tree import NoSelect, nodes, tree_of
from p2d_core.store.recipe import hash_file
from p2d_core.store.runs import read_summary, run_files
from p2d_core.store.store import Store

log = logging.getLogger(__name__)

MEMORY_BYTES = 10**9

VIEWS = {
    "scores": ("scores", "scores.parquet"),
    "heads": ("heads", "heads.parquet"),
    "samples": ("samples", "*.parquet"),
    "rejected": ("samples", REJECTED),
    "subset": ("subset", "subset.parquet"),
    "evaluation": ("evaluation", "samples.parquet"),
    "measurements": ("measurements", "measured.parquet"),
    "comparison": ("comparison", "comparison.parquet"),
    "comparison_samples": ("comparison", "samples.parquet"),
}
"""View -> the stage it unites and the name of that stage's tables."""

TABLE_FUNCTIONS = {"range", "generate_series", "unnest", "repeat", "json_each", "json_tree"}
"""Those that read nothing."""

NOT_ASKED = {
    *("current_setting", "getvariable", "getenv", "write_log", "sleep_ms"),
    *("nextval", "currval", "setval", "setseed"),
}
"""Functions that look at settings or change something."""

SHOWN = {"tables", "__show_tables_expanded"}
"""What SHOW TABLES and SHOW ALL TABLES are to the parser."""

RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("name", pa.string()),
        ("base", pa.string()),
        ("target", pa.string()),
        ("metric", pa.string()),
        ("quality_base", pa.float64()),
        ("quality_p2d", pa.float64()),
        ("quality_random", pa.float64()),
        ("quality_full", pa.float64()),
        ("heads_selected", pa.int64()),
        ("samples_selected", pa.int64()),
        ("corpus", pa.int64()),
        ("aer_cold", pa.float64()),
        ("aer_this_run", pa.float64()),
        ("speedup", pa.float64()),
        ("seconds", pa.float64()),
    ]
)


@dataclass
class Reader:
    """A connection on which nothing can be written and nothing else be read."""

    connection: duckdb.DuckDBPyConnection
    depth: int
    """Parts of the path of a stage's folder."""
    columns: dict[str, list[str]] = field(default_factory=dict)
    """Of each view that has something in it."""
    unread: dict[str, dict[Path, str]] = field(default_factory=dict)
    """Of each view that was not asked for yet, the files and the SHA-256 that they should have."""

    def run(self, sql: str) -> pa.RecordBatchReader:
        """The rows of one SELECT, streamed.

        Raises:
            InputError: it is not one SELECT statement, or DuckDB refuses it.
        """
        try:
            statements = self.connection.extract_statements(sql)
        except duckdb.Error as error:
            raise InputError(self._explain(error)) from error
        if len(statements) != 1:
            raise InputError(
                f"one SELECT statement is wanted, found {len(statements)}. "
                "`p2d sql` runs one at a time."
            )
        name = _kind(statements[0])
        if name != "SELECT":
            raise InputError(
                f"only a SELECT statement is allowed, this is {name}: `p2d sql` reads the store "
                "and changes nothing. Use --csv or --json to keep the result."
            )
        for view in self._check(sql) & self.unread.keys():
            self._leave_out_damaged(view)
        try:
            rows = self.connection.sql(statements[0]).to_arrow_reader(10_000)
        except duckdb.Error as error:
            raise InputError(self._explain(self._with_its_line(statements[0], error))) from error
        return pa.RecordBatchReader.from_batches(rows.schema, self._streamed(rows))

    def _check(self, sql: str) -> set[str]:
        """That it names nothing but the views, which are returned, and what it makes of them.

        Raises:
            InputError: it names something else.
        """
        try:
            tree = list(nodes(tree_of(sql)))
        except NoSelect as error:
            raise InputError(f"this cannot be asked here: {error}") from error
        made = {e["key"].lower() for n in tree if "cte_map" in n for e in n["cte_map"]["map"]}
        known = {name.lower() for name in self.columns} | made
        asked = set()
        for node in tree:
            if "class" in node:
                name = str(node.get("function_name", "")).lower()
                if name in NOT_ASKED:
                    raise self._refused(f"the function {name}")
            elif node.get("type") == "BASE_TABLE":
                path = node["qualified_name"]["path"]
                if len(path) != 1 or path[0].lower() not in known:
                    raise self._refused(f"the table {'.'.join(path)}")
                asked.add(path[0].lower())
            elif node.get("type") == "TABLE_FUNCTION":
                name = str(node["function"].get("function_name")).lower()
                if name not in TABLE_FUNCTIONS:
                    raise self._refused(f"the table function {name}")
            elif (
                node.get("type") == "SHOW_REF"
                and node["query"] is None
                and node["table_name"].strip('"').lower() not in known | SHOWN
            ):
                raise self._refused(f"SHOW {node['table_name'] or node['schema_name']}")
        return asked

    def _leave_out_damaged(self, view: str) -> None:
        """Tables are read whole once, as a bit that changed need not make one unreadable.

        Raises:
            InputError: none is left.
        """
        files = self.unread.pop(view)
        whole = [file for file, sha256 in files.items() if hash_file(file) == sha256]
        for file in files.keys() - set(whole):
            log.warning("%s is left out (damaged)", file)
        if not whole:
            raise InputError(
                f"every table of {view} is damaged: `p2d artifacts verify` says which, and a run "
                "makes them again."
            )
        if len(whole) < len(files):
            _unite(self.connection, view, whole, self.depth)

    def _refused(self, what: str) -> InputError:
        return InputError(
            f"{what} cannot be asked for: `p2d sql` reads the store's tables and nothing else."
            f"\n\nWhat can be asked for here:\n{self.tables()}"
        )

    def _streamed(self, rows: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        try:
            yield from rows
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            # a cast that fails, for instance, shows only when its row is reached
            raise InputError(self._explain(error)) from error

    def _with_its_line(self, statement: duckdb.Statement, error: duckdb.Error) -> duckdb.Error:
        # a relation streams, but its errors do not say where in the query they are
        try:
            self.connection.execute(statement)
        except duckdb.Error as told_again:
            return told_again
        return error

    def tables(self) -> str:
        """The views and their columns, a line each."""
        return "\n".join(f"  {name}: {', '.join(cols)}" for name, cols in self.columns.items())

    def _explain(self, error: Exception) -> str:
        return f"{str(error).strip()}\n\nWhat can be asked for here:\n{self.tables()}"


@contextmanager
def open_reader(
    store: Store, spill: Path | None = None, memory_bytes: int = MEMORY_BYTES
) -> Iterator[Reader]:
    """Views over every artifact of a stage, with its ``key`` as a column, and ``runs``.

    Args:
        spill: folder for what does not fit into memory; it is removed.
        memory_bytes: what DuckDB counts of its memory; as much goes to the disk.

    Raises:
        InputError: the store holds nothing yet, or a table in it cannot be read.
    """
    spill = spill or store.root / ".scratch" / f"sql-{uuid.uuid4().hex[:8]}"
    with duckdb.connect(":memory:") as connection:
        files = {view: _tables(store, *where) for view, where in VIEWS.items()}
        reader = Reader(connection, depth=len(store.root.parts) + 1)
        try:
            for view, found in files.items():
                if found:
                    _unite(connection, view, list(found), reader.depth)
                    reader.columns[view] = _columns(connection, view)
                    reader.unread[view] = found
        except duckdb.Error as error:
            raise InputError(
                f"{store.root}: a table cannot be read ({error}). "
                "`p2d artifacts verify` says which artifact is damaged."
            ) from error
        runs = _runs(store)
        if runs.num_rows:
            connection.register("run_summaries", runs)
            connection.execute("CREATE TABLE runs AS FROM run_summaries")
            connection.unregister("run_summaries")
            reader.columns["runs"] = _columns(connection, "runs")
        if not reader.columns:
            raise InputError(
                f"{store.root} holds nothing to ask for yet. `p2d demo` or `p2d adapt FILE` fills "
                "it; --store FOLDER or P2D_STORE names another one."
            )
        readable = [str(file) for found in files.values() for file in found]
        _lock(connection, readable, spill, memory_bytes)
        try:
            yield reader
        finally:
            shutil.rmtree(spill, ignore_errors=True)


def _kind(statement: duckdb.Statement) -> str:
    try:
        return str(statement.type).rpartition(".")[2].replace("_", " ")
    except ValueError:
        # DuckDB's parser knows more kinds than its Python module has names for
        return "of another kind"


def _tables(store: Store, stage: str, pattern: str) -> dict[Path, str]:
    """Tables that a manifest names and that lie in the store with the size they should have, and
    the SHA-256 that they should have."""
    found = {}
    for ref in store.refs(stage):
        for name, entry in ref.manifest.files.items():
            file = ref.path / name
            if not Path(name).match(pattern) or (name == REJECTED) != (pattern == REJECTED):
                continue
            # a link could lead out of the store
            inside = file.resolve() == file and file.is_file()
            if inside and file.stat().st_size == entry["size"]:
                found[file] = entry["sha256"]
            else:
                log.warning("%s %s: %s is left out (damaged)", stage, ref.key[:12], name)
    return found


def _unite(connection: duckdb.DuckDBPyConnection, view: str, files: list[Path], depth: int) -> None:
    rows = connection.read_parquet([str(f) for f in files], union_by_name=True, filename=True)
    key = f"split_part(filename, '/', {depth + 1}) AS key"
    rows.project(f"* EXCLUDE (filename), {key}").create_view(view)


def _columns(connection: duckdb.DuckDBPyConnection, view: str) -> list[str]:
    return list(connection.table(view).columns)


def _lock(
    connection: duckdb.DuckDBPyConnection, readable: list[str], spill: Path, memory_bytes: int
) -> None:
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET autoload_known_extensions = false")
    connection.execute("SET python_enable_replacements = false")
    connection.execute("SET temp_directory = $folder", {"folder": str(spill)})
    connection.execute("SET memory_limit = $bytes", {"bytes": f"{memory_bytes}B"})
    connection.execute("SET max_temp_directory_size = $bytes", {"bytes": f"{memory_bytes}B"})
    connection.execute("SET allowed_paths = $files", {"files": readable})
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _runs(store: Store) -> pa.Table:
    rows = []
    for file in run_files(store):
        try:
            rows.append(_run_row(read_summary(file)))
        except (ArtifactError, KeyError, TypeError) as error:
            log.warning("%s is left out: not the summary of a run (%r)", file, error)
    return pa.Table.from_pylist(rows, schema=RUNS)


def _run_row(summary: dict[str, Any]) -> dict[str, Any]:
    quality, aer = summary["quality"], summary["aer"]
    return {
        "run_id": summary["run_id"],
        "name": summary["name"],
        "base": summary.get("base"),
        "target": summary.get("target"),
        "metric": quality["metric"],
        **{f"quality_{arm}": quality.get(arm) for arm in ("base", "p2d", "random", "full")},
        "heads_selected": summary["heads"]["selected"],
        "samples_selected": summary["selection"]["selected"],
        "corpus": summary["selection"]["corpus"],
        "aer_cold": aer["cold"],
        "aer_this_run": aer["this_run"],
        "speedup": aer["speedup"],
        "seconds": summary.get("seconds"),
    }
