"""YAML that explains itself: keys with their values, and a comment to each."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from flows.cli.text import WIDEST

BESIDE = 34
"""Where a comment begins that has room behind its key."""


def entry(name: str, value: str, meaning: str, indent: str) -> list[str]:
    """A key with its value, and what it means behind it, or above it where that is too long."""
    line = f"{indent}{name}: {value}".rstrip()
    beside = f"{line:<{BESIDE}}  # {meaning}"
    if meaning and len(beside) <= WIDEST:
        return [beside]
    return [*comment(meaning, indent), line]


def comment(text: str, indent: str) -> list[str]:
    """Lines of a comment; none of an empty text."""
    start = f"{indent}# "
    return textwrap.wrap(text, WIDEST, initial_indent=start, subsequent_indent=start)


def yaml_value(value: Any) -> str:
    """As it stands behind a key; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        # as YAML reads it: quoted where it would be taken for something else
        return value if value.replace("-", "").replace("_", "").isalnum() else json.dumps(value)
    if isinstance(value, float) and value < 0.001:
        # YAML 1.1 reads 1e-4 as text
        return f"{value:.10f}".rstrip("0") if value else "0.0"
    return json.dumps(value) if isinstance(value, bool | tuple | list | dict) else str(value)
