"""`p2d sql`: questions to everything that the store holds."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import DEFAULT_STORE, StoreOption, existing_store
from flows.cli.text import printable
from p2d_core.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_SHOWN = 50


def sql(
    query: Annotated[
        str, typer.Argument(metavar='"SELECT ..."', help="One SELECT statement, as DuckDB has it.")
    ],
    csv: Annotated[bool, typer.Option("--csv", help="All rows as CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All rows as JSON, one a line.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="The query is stopped after that.")] = 60,
    memory: Annotated[
        float, typer.Option(min=0.1, metavar="GB", help="The query is stopped beyond that.")
    ] = 2,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Ask the store in SQL. Reads only: nothing is changed, nothing else is read.

    Tables: scores, heads, samples, rejected, subset, evaluation, measurements, comparison,
    comparison_samples (each with the artifact's key) and runs. [bold]p2d sql "SHOW TABLES"[/bold]
    and [bold]p2d sql "DESCRIBE scores"[/bold] say which are there and what is in them.

    Example: [bold]p2d sql "SELECT source, avg(affinity) FROM subset GROUP BY source"[/bold]
    """
    if csv and as_json:
        raise InputError("--csv and --json exclude each other. Give one of them.")
    from p2d_core.store.bounded_query import Bounds, bounded_query

    bounds = Bounds(seconds, int(memory * 10**9))
    with bounded_query(existing_store(store), query, bounds) as rows:
        if csv:
            _print_csv(rows)
        elif as_json:
            _print_json(rows)
        else:
            _print_table(rows)


def _print_table(rows: pa.RecordBatchReader) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = rows.schema.names
    shown: list[list[Any]] = []
    more = 0
    for batch in rows:
        room = ROWS_SHOWN - len(shown)
        head = batch.slice(0, room)
        shown += zip(*(column.to_pylist() for column in head.columns), strict=True)
        more += batch.num_rows - head.num_rows
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    numbers = [_is_number(field.type) for field in rows.schema]
    for name, number in zip(columns, numbers, strict=True):
        table.add_column(Text(name), justify="right" if number else "left", overflow="ellipsis")
    for row in shown:
        table.add_row(*(Text(_cell(value)) for value in row))
    console = Console()
    console.print(table)
    if more:
        console.print(f"... and {more:,} rows more. --csv or --json prints all.", style="dim")
    elif not shown:
        console.print("no rows", style="dim")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(str(value)[:200])


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def _print_csv(rows: pa.RecordBatchReader) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(rows.schema.names)
    for batch in rows:
        writer.writerows(zip(*(column.to_pylist() for column in batch.columns), strict=True))


def _print_json(rows: pa.RecordBatchReader) -> None:
    import json

    names = rows.schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"two columns are called {twice[0]!r}, of which JSON could show one alone. Name one of "
            f"them anew in the query, such as `b.{twice[0]} AS other`."
        )
    for batch in rows:
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            values = (None if _is_no_number(value) else value for value in row)
            print(
                json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False, default=str)
            )


def _is_no_number(value: Any) -> bool:
    """NaN and infinities, which JSON does not have."""
    return isinstance(value, float) and not math.isfinite(value)
