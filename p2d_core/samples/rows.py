"""A row of a data file, whatever its format, and how an error names its values."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """The columns of one row. ``place`` names file and line (JSON Lines, CSV) or row, from 1."""

    place: str
    columns: dict[str, Any]


@dataclass(slots=True)
class Position:
    """How far into a file its reader is."""

    share: float = 0.0
    """In [0, 1]."""


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row that cannot be read although those after it can."""

    place: str
    problem: str


def described(value: Any) -> str:
    """A value in the words of an error message, short whatever its size."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, (int, float)):
        digits = f"{value:.6g}" if isinstance(value, float) or abs(value) < 1e15 else "large"
        return f"a number ({digits})"
    if isinstance(value, str):
        return f"text ({value[:20]!r}{'...' if len(value) > 20 else ''})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return f"a value of type {type(value).__name__}"


def listed(names: Collection[str], most: int = 16) -> str:
    """Names in the words of an error message, cut where they are many or long."""
    if not names:
        return "none"
    shown = [name if len(name) <= 60 else f"{name[:60]}..." for name in list(names)[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown) + more
