"""The syntax tree of a SELECT statement, to be looked at before the statement is run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import duckdb


class NoSelect(Exception):
    """It is not one SELECT statement; says why, in DuckDB's words."""


def tree_of(sql: str) -> dict[str, Any]:
    """The one SELECT statement in ``sql`` as DuckDB's own parser has it; nothing is run.

    Raises:
        NoSelect: it is something else, more than one, or no SQL.
    """
    with duckdb.connect(":memory:") as connection:
        query = "SELECT json_serialize_sql(?::VARCHAR)"
        tree = json.loads(connection.execute(query, [sql]).fetchall()[0][0])
    if tree["error"]:
        raise NoSelect(str(tree["error_message"]))
    if len(tree["statements"]) != 1:
        raise NoSelect(f"one SELECT statement is wanted, found {len(tree['statements'])}")
    return dict(tree)


def text_of(tree: dict[str, Any]) -> str:
    """The statement as SQL again: one way of writing for all that mean the same."""
    with duckdb.connect(":memory:") as connection:
        query = "SELECT json_deserialize_sql(?::JSON)"
        return str(connection.execute(query, [json.dumps(tree)]).fetchall()[0][0])


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every node of the tree, in no order to count on."""
    waiting = [tree]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            yield here
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here


def without_places(tree: Any) -> Any:
    """The tree without where in the text its nodes stood."""
    if isinstance(tree, dict):
        return {
            key: without_places(value)
            for key, value in tree.items()
            if not key.startswith("query_location")
        }
    if isinstance(tree, list):
        return [without_places(value) for value in tree]
    return tree
