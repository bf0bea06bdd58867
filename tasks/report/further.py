"""Tables beside the quality of the arms: further metrics, and tasks of lm-eval."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.summary import ARMS, Summary
from tasks.verdict import ARM_NAMES

MOST_TASKS = 20
"""Rows of lm-eval's results."""


@dataclass(frozen=True, slots=True)
class Further:
    """A table: what its rows are, its columns of numbers, its rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def further(summary: Summary) -> list[Further]:
    """Those that the run has."""
    tables = []
    if also := summary.quality.also:
        rows = [
            [ARM_NAMES[arm], *(f"{values[arm]:.3f}" for values in also.values())]
            for arm in ARMS
            if all(arm in values for values in also.values())
        ]
        names = [name.replace("_", " ") for name in also]
        tables.append(Further("further metrics", names, rows))
    if lines := summary.harness:
        arms = [arm for arm in ARMS if any(arm in line.value for line in lines)]
        rows = [
            [f"{line.task} {line.metric}", f"{line.samples:,}", *map(line.text, arms)]
            for line in lines[:MOST_TASKS]
        ]
        if len(lines) > MOST_TASKS:
            left_out = f"{len(lines) - MOST_TASKS} more in the summary"
            rows.append([left_out, "", *("" for _ in arms)])
        columns = ["samples", *(ARM_NAMES[arm] for arm in arms)]
        tables.append(Further("lm-eval, ± standard error", columns, rows))
    return tables
