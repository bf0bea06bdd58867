"""The user's condition on the scores: one SQL expression over their columns, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import duckdb

from p2d_core.errors import SettingsError
from p2d_core.sql_tree import NoSelect, nodes, text_of, tree_of, without_places

COLUMNS = {
    "source": "VARCHAR",
    "affinity": "DOUBLE",
    "n_tokens": "INTEGER",
    "n_response_tokens": "INTEGER",
}
"""Of every scorer's scores; each gate adds one of its own, a DOUBLE."""

LONGEST = 10_000
"""Characters; a longer condition is refused."""

_ALLOWED = {
    "BETWEEN",
    "CASE",
    "COLUMN_REF",
    "COMPARISON",
    "CONJUNCTION",
    "CONSTANT",
    "FUNCTION",
    "OPERATOR",
}
"""Kinds of expression. Among those missing: subqueries, parameters, windows, lambdas, casts."""

# no roots and logarithms: of a negative number they are NaN, which DuckDB has above all others
_FUNCTIONS = {
    *("+", "-", "*", "/", "//", "%", "**", "^", "||"),
    *("~~", "!~~", "~~*", "!~~*", "like_escape", "not_like_escape"),
    *("ilike_escape", "not_ilike_escape", "regexp_matches", "regexp_full_match"),
    *("abs", "ceil", "floor", "round", "exp"),
    *("greatest", "least", "isnan", "isinf", "isfinite"),
    *("lower", "upper", "trim", "length", "contains", "starts_with", "ends_with"),
    *("prefix", "suffix"),
}

_HEAD = "SELECT 1 FROM scores WHERE "


def checked_condition(where: str, parts: tuple[str, ...] = ()) -> str:
    """The condition in one canonical way of writing, safe to stand in a statement.

    Args:
        parts: columns of the scores beside `COLUMNS`: the gates' names.

    Raises:
        SettingsError: it is not one yes-or-no expression over these columns.
    """
    columns = COLUMNS | dict.fromkeys(parts, "DOUBLE")
    shown = where if len(where) <= 200 else f"{where[:200]}..."

    def refused(why: str) -> SettingsError:
        return SettingsError(
            f"`selection.where` was {shown!r}: {why}. It has to be one SQL condition over the "
            f"columns {', '.join(columns)}, such as \"n_tokens < 200 AND source <> 'web'\"."
        )

    if len(where) > LONGEST or "\0" in where or not where.strip():
        raise refused("it is empty, holds a NUL character, or is too long")
    try:
        # the line break ends a comment; what is behind it would change the tree around
        tree = tree_of(f"{_HEAD}{where}\n")
        plain = tree_of(f"{_HEAD}true")
    except (NoSelect, duckdb.Error, UnicodeEncodeError) as error:
        raise refused(_first_line(error)) from error
    node, plain_node = tree["statements"][0]["node"], plain["statements"][0]["node"]
    condition = node.get("where_clause")
    if without_places({**node, "where_clause": None}) != without_places(
        {**plain_node, "where_clause": None}
    ):
        raise refused("it is more than a condition")
    known = {name.lower() for name in columns}
    for part in nodes(condition):
        kind = part.get("class")
        if kind is None:
            continue
        if kind not in _ALLOWED:
            raise refused(f"it has a {kind.lower().replace('_', ' ')}, which is not allowed here")
        if kind == "FUNCTION" and str(part.get("function_name")).lower() not in _FUNCTIONS:
            raise refused(f"the function {part.get('function_name')} is not allowed here")
        if kind == "COLUMN_REF":
            name = ".".join(part["column_names"])
            if name.lower() not in known:
                raise refused(f"there is no column {name}")
    text = text_of(tree)
    _check_types(text, columns, refused)
    return text.removeprefix(_HEAD).rstrip().rstrip(";")


def _check_types(
    text: str, columns: Mapping[str, str], refused: Callable[[str], SettingsError]
) -> None:
    """Tries it on a row, so that a constant which is no number shows here and not after hours."""
    of_types = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
    row = ["a" if kind == "VARCHAR" else 1 for kind in columns.values()]
    with duckdb.connect(":memory:") as connection:
        connection.execute(f"CREATE TABLE scores ({of_types})")
        places = ", ".join("?" for _ in row)
        connection.execute(f"INSERT INTO scores VALUES ({places})", row)  # noqa: S608
        condition = text.removeprefix(_HEAD).rstrip(";")
        try:
            # the condition is an expression over columns by now: nothing else can be in it
            kind = connection.sql(f"SELECT ({condition}) FROM scores").types[0]  # noqa: S608
            connection.sql(text).fetchall()
        except duckdb.Error as error:
            raise refused(_first_line(error)) from error
    if kind != "BOOLEAN":
        raise refused(f"it is of type {kind}, not true or false")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
