"""Choosing the top tenth of ten million scores, against a bare quantile and filter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import duckdb

from benchmarks.figures import Figure, alternate, figure
from benchmarks.sizes import Size
from p2d_core.selection.script import Script
from p2d_core.selection.spec import SelectionSpec
from p2d_core.selection.subset import choose

SOURCES = 4
ROWS_A_GROUP = 2048
"""DuckDB's least; the pipeline writes a row group a shard, of 1,024 samples or so."""

SCORES = """
COPY (
    SELECT sha256(i::VARCHAR) AS sample_id, 'source-' || (i % $sources) AS source,
           ((hash(i, 7) % 1000003) / 1000003)::DOUBLE AS affinity,
           (60 + i % 200)::INTEGER AS n_tokens, (30 + i % 100)::INTEGER AS n_response_tokens,
           0::INTEGER AS gates_passed
    FROM range($rows) AS t(i)
) TO '{file}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {group})
"""
FILTER = """
CREATE OR REPLACE TEMP TABLE best AS
SELECT sample_id FROM read_parquet($scores) WHERE affinity >= $threshold
"""
QUANTILE = "SELECT quantile_disc(affinity, 0.9) FROM read_parquet($scores)"


def measure(size: Size) -> Iterator[Figure]:
    """`subset_vs_filter`."""
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.parquet"
        with duckdb.connect() as connection:
            statement = SCORES.format(file=scores, group=ROWS_A_GROUP)
            connection.execute(statement, {"rows": size.subset_rows, "sources": SOURCES})
        quotas = (("source-0", 0.4), ("source-1", 0.3))
        spec = SelectionSpec(fraction=0.1, quotas=quotas)

        def chosen() -> None:
            with _connection(folder) as connection:
                choose(Script(connection), scores, (), spec)

        def filtered() -> None:
            with _connection(folder) as connection:
                (threshold,) = connection.execute(QUANTILE, {"scores": str(scores)}).fetchall()[0]
                values = {"scores": str(scores), "threshold": threshold}
                connection.execute(FILTER, values)

        seconds = alternate(chosen, filtered)
        yield figure(
            "subset_vs_filter",
            f"top tenth of {size.subset_rows:,}, ties by id, quotas for 2 of {SOURCES} sources",
            "quantile_disc, then a table of the ids at or above it",
            (seconds[0], seconds[1]),
            goal=2.5,
            floor=1.0,
            floor_of="every affinity read twice, every id once, on both sides",
            note=f"1 GB of memory; {scores.stat().st_size / 2**20:.0f} MB of Parquet",
        )


def _connection(folder: str) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"memory_limit": "1GB", "temp_directory": folder, "threads": 2})
