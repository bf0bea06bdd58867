"""The figures as a table on the screen, as JSON and as markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from benchmarks.figures import Figure

JSON, MARKDOWN = "results.json", "results.md"


def merged(before: Path | None, figures: Iterable[Figure]) -> list[Figure]:
    """The figures of an earlier run, with these instead of those of the same name and model."""
    known = {(each.name, each.model): each for each in (_read(before) if before else [])}
    known |= {(each.name, each.model): each for each in figures}
    return list(known.values())


def write(figures: list[Figure], folder: Path) -> None:
    """``results.json`` and ``results.md``."""
    text = json.dumps([each.as_dict() for each in figures], indent=1)
    (folder / JSON).write_text(text + "\n", encoding="utf-8")
    (folder / MARKDOWN).write_text(_markdown(figures), encoding="utf-8")


def show(figures: list[Figure]) -> None:
    """A table on the screen."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"P2D benchmarks, {figures[0].machine}" if figures else None)
    for column in ("figure", "a, s", "b, s", "a/b", "spread", "goal", "floor", "met"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for each in figures:
        table.add_row(
            f"{each.name}\n[dim]{each.a}\nagainst {each.b}[/dim]",
            f"{each.a_seconds:.3g}",
            f"{each.b_seconds:.3g}",
            f"{each.ratio:.3f}",
            f"{each.ratio_min:.3f} to {each.ratio_max:.3f}",
            f"{each.goal:.3g}",
            _number(each.floor),
            "[green]yes[/green]" if each.met else "[red]no[/red]",
        )
    Console().print(table)


def _read(file: Path) -> list[Figure]:
    if not file.exists():
        return []
    names = {field.name for field in fields(Figure)}
    listed = json.loads(file.read_text(encoding="utf-8"))
    return [Figure(**each) for each in listed if set(each) == names]


def _markdown(figures: list[Figure]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. Each ratio is of two things run in turn in one process: the",
        "median over pairs of neighbouring runs, with the lowest and the highest. The floor is the",
        "ratio of what was counted, operations or bytes, on both sides. What was not counted (such",
        "as AdamW) costs b too, and can put a ratio below it.",
        "",
        "| figure | model | a, s | b, s | a/b | spread | runs | goal | met | floor |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    lines += [
        f"| {each.name} | {each.model} | {each.a_seconds:.3g} | {each.b_seconds:.3g} "
        f"| {each.ratio:.3f} | {each.ratio_min:.3f} to {each.ratio_max:.3f} | {each.runs} "
        f"| {each.goal:.3g} | {'yes' if each.met else '**no**'} | {_number(each.floor)} |"
        for each in figures
    ]
    lines += ["", "What stands against what:", ""]
    for each in figures:
        lines.append(f"- **{each.name}**: {each.a}, against {each.b}.")
        if each.floor_of:
            lines.append(f"  Floor: {each.floor_of}.")
        if each.note:
            lines.append(f"  {each.note}.")
    machines = sorted({each.machine for each in figures})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}.", ""])


def _number(floor: float | None) -> str:
    return "" if floor is None else f"{floor:.3f}"
