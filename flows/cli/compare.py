"""`p2d compare`: arms side by side, and a verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import (
    DEFAULT_STORE,
    StoreOption,
    SummaryOption,
    VerboseOption,
    check_summary_file,
)

if TYPE_CHECKING:
    from rich.console import Console

    from p2d_core.comparison.arms import ArmRun
    from p2d_core.comparison.statistics import Interval
    from p2d_core.store import ArtifactRef


def compare(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Settings as for `p2d adapt`, with `compare:`."),
    ],
    summary: SummaryOption = None,
    store: StoreOption = DEFAULT_STORE,
    verbose: VerboseOption = False,
) -> None:
    """Compare rankers, scorers and adaptations on your own model and data, over several seeds.

    Stages that arms share are computed once, and what an earlier run made is reused. Says in words
    whether choosing by heads and tuning heads is worth it there.

    Example: [bold]p2d compare my.yaml[/bold]
    """
    check_summary_file(summary)
    from flows.settings import load_settings

    settings = load_settings(file)
    from flows.environment import prepare_environment

    prepare_environment(store, verbose=verbose)
    from rich.console import Console

    from flows.cli.progress import listening
    from flows.compare import run_compare
    from p2d_core.comparison.arms import read

    with listening():
        made = run_compare(settings, store=store)
    if summary is not None:
        # first: whoever reads the screen may have closed it
        summary.write_text(_as_json(made), encoding="utf-8")
    show(made, Console())
    refuse_if_all_failed(read(made.path)[0])


def show(made: ArtifactRef, console: Console) -> None:
    """The table of arms, the verdict, and where the chart is."""
    import os

    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from p2d_core.comparison.arms import read
    from p2d_core.comparison.picture import PICTURE
    from p2d_core.comparison.verdict import ON_FRONT, answers, arm_lines, front, further_metrics

    runs, metric, higher_is_better = read(made.path)
    lines = arm_lines(runs, higher_is_better)
    more = further_metrics(lines, metric)
    console.rule(Text(str(made.manifest.facts["name"])), align="left")
    columns = ["arm", f">{metric}", ">over random data", ">AER", "note"]
    has_retention = any(line.retention for line in lines)
    if has_retention:
        columns.insert(2, ">retention")
    columns[-1:-1] = [f">{name}" for name in more]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in columns:
        table.add_column(title.lstrip(">"), justify="right" if title[0] == ">" else "left")
    for line in lines:
        notes = ["front"] if line.on_front else []
        if line.over_best is not None and line.over_best.shows == 0:
            notes.append("not shown to be worse than the best")
        if line.failed:
            notes.append(f"{line.failed} of {line.runs} failed")
        table.add_row(
            Text(line.arm.label),
            str(line.quality or ""),
            *([str(line.retention or "")] if has_retention else []),
            _gain(line.over_random),
            f"{line.aer:.2f}" if line.aer is not None else "",
            *(f"{line.metrics[name]:.3f}" if name in line.metrics else "" for name in more),
            ", ".join(notes),
        )
    console.print(table)
    better = "higher" if higher_is_better else "lower"
    console.print(
        Text(
            f"Mean and 95% interval over seeds, {better} is better. Gains above 0 are better, with "
            "a bootstrap over seeds and evaluation samples. front: no arm is as good for less.",
            "dim",
        )
    )
    for run in runs:
        if run.error is not None:
            console.print(Text(f"failed: {run.arm.label}, seed {run.seed}: {run.error}", "red"))
    console.print(Text("\nVerdict", "bold"))
    asked = ""
    for answer in answers(runs, higher_is_better):
        if answer.question != asked:
            asked = answer.question
            console.print(Text(f"  {asked}"))
        colour = {1: "green", 0: "yellow", -1: "red"}[answer.gain.shows]
        console.print(Padding(Text(answer.words, colour), (0, 0, 0, 4)))
    console.print(Text(f"  {ON_FRONT}"))
    console.print(Padding(Text(front(lines)), (0, 0, 0, 4)))
    if not asked:
        console.print("  No two arms answer a question: add a baseline such as `random`.")
    console.print(f"\n  picture: {os.path.relpath(made.path / PICTURE)}", soft_wrap=True)
    console.print('  p2d sql "SELECT label, seed, quality, aer FROM comparison"', soft_wrap=True)


def refuse_if_all_failed(runs: Sequence[ArmRun]) -> None:
    """So that a script that looks at the exit code learns of it.

    Raises:
        P2DError: no arm ran to its end on any seed; the base and everything are no arms.
    """
    from p2d_core.comparison.arms import BASE, EVERYTHING
    from p2d_core.errors import P2DError

    of_arms = [run for run in runs if run.arm.scorer not in (BASE, EVERYTHING)]
    if all(run.failed for run in of_arms):
        raise P2DError(
            f"all {len(of_arms)} runs of arms failed, for the reasons above: nothing was compared. "
            "Put them right and run the same command again; what was finished is reused."
        )


def _gain(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def _as_json(made: ArtifactRef) -> str:
    from dataclasses import asdict

    from p2d_core.comparison.arms import read
    from p2d_core.comparison.statistics import plain
    from p2d_core.comparison.verdict import answers, arm_lines

    runs, metric, higher_is_better = read(made.path)
    lines = [asdict(line) | {"label": line.arm.label} for line in arm_lines(runs, higher_is_better)]
    said = [asdict(each) | {"words": each.words} for each in answers(runs, higher_is_better)]
    return (
        json.dumps(
            {
                "name": made.manifest.facts["name"],
                "metric": metric,
                "higher_is_better": higher_is_better,
                "comparison": str(made.path),
                "arms": plain(lines),
                "verdict": plain(said),
            },
            indent=2,
            allow_nan=False,
        )
        + "\n"
    )
