"""What of a row is kept beside prompt and response: its other columns, and turns, as JSON."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from p2d_core.samples.json_rows import TOO_DEEP
from p2d_core.samples.texts import RowProblem

TURNS = "__turns__"
"""The key of the turns that stand before the response, in a sample that is a conversation."""


def extra_of(
    row: Mapping[str, Any], used: Collection[str], turns: Sequence[Mapping[str, str]] | None = None
) -> str:
    """JSON of the columns not used, keys sorted; what JSON cannot say becomes null or text.

    Raises:
        RowProblem: they are nested too deeply, or one is called as turns are.
    """
    others: dict[str, Any] = {str(name): row[name] for name in row if name not in used}
    if TURNS in others:
        raise RowProblem(f"a column is called {TURNS!r}, which is kept for turns. Rename it.")
    if turns is not None:
        others[TURNS] = turns
    if not others:
        return "{}"
    try:
        try:
            text = _dumped(others)
        except ValueError:
            text = _dumped(_without_nan(others))
    except RecursionError:
        raise RowProblem(f"{TOO_DEEP}. Flatten or remove it.") from None
    return text.encode(errors="replace").decode()


def other_columns(extra: str) -> str:
    """The same JSON without turns."""
    if TURNS not in extra:
        return extra
    return _dumped({name: value for name, value in json.loads(extra).items() if name != TURNS})


def _dumped(columns: Mapping[str, Any]) -> str:
    return json.dumps(
        columns, ensure_ascii=False, sort_keys=True, allow_nan=False, default=_in_words
    )


def _in_words(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return value
