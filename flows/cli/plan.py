"""`p2d plan`: what a run would take and reuse, before it is run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import (
    DEFAULT_STORE,
    StoreOption,
    VerboseOption,
    artifact,
    check_summary_file,
    existing_store,
)
from p2d_core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tasks.planned import Plan


def plan(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Settings in YAML, as `p2d adapt` takes them."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Plan `p2d demo` instead.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the demo.")] = 0,
    seconds: Annotated[
        float,
        typer.Option(
            min=1, help="About what it may take; more only where checking the input takes that."
        ),
    ] = 60,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the plan as JSON.")
    ] = None,
    head_map: Annotated[
        str | None, typer.Option(metavar="KEY|FOLDER|in-use", help="As of `p2d adapt`.")
    ] = None,
    skip_bad_rows: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="As of `p2d adapt`.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    verbose: VerboseOption = False,
) -> None:
    """Say what a run would take: seconds of each stage, AER, memory, disk, and what it reuses.

    Nothing is made. A few training steps and scoring batches are timed; the plan is kept in the
    store, and `p2d adapt` then shows beside what it took what was planned.

    Example: [bold]p2d plan my.yaml[/bold]
    """
    check_summary_file(json, "--json")
    if (file is None) != demo:
        raise InputError("`p2d plan` takes a settings file, or --demo, and not both.")
    if head_map not in (None, "in-use"):
        head_map = str(artifact(existing_store(store), head_map, "heads").path)
    from flows.environment import set_environment

    with tempfile.TemporaryDirectory(prefix="p2d-plan-") as folder:
        # tasks are Prefect's, but none is run: its home may go with the folder
        os.environ.setdefault("PREFECT_HOME", folder)
        set_environment(store, verbose=verbose)
        from flows.settings import load_settings

        if file is None:
            from flows.demo import demo_settings

            settings = demo_settings(Path(folder), seed)
        else:
            settings = load_settings(file)
        if skip_bad_rows is not None:
            settings = settings.model_copy(update={"skip_bad_rows": skip_bad_rows})
        from flows.cli.progress import listening
        from flows.plan import run_plan

        with listening():
            made = run_plan(settings, store=store, head_map=head_map, seconds=seconds)
    if json is not None:
        json.write_text(made.model_dump_json(indent=2) + "\n", encoding="utf-8")
    from rich.console import Console

    show_plan(made, Console())


def show_plan(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from flows.cli.options import size_text

    def section(title: str, table: Table) -> None:
        console.print(Text(f"\n{title}", "bold"))
        console.print(Padding(table, (0, 0, 0, 2)))

    def columns(*names: str) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in names:
            table.add_column(name.removeprefix(">"), justify="right" if ">" in name else "left")
        return table

    stages = columns("stage", ">seconds", ">±", "", ">if all were made")
    for stage in plan.stages:
        stages.add_row(
            Text(stage.name),
            f"{stage.seconds:,.1f}",
            Text(f"{stage.spread_seconds:,.1f}" if stage.seconds else "", "dim"),
            Text(stage.state, "dim" if stage.state == "reused" else "green"),
            Text(f"{stage.cold_seconds:,.1f}", "dim"),
        )
    if plan.starting_seconds is not None:
        stages.add_row(Text("starting, looking up", "dim"), f"{plan.starting_seconds:,.1f}")
    whole = f"{plan.seconds:,.1f}"
    stages.add_row(Text("whole run", "bold"), Text(whole, "bold"), f"{plan.spread_seconds:,.1f}")
    section(f"Plan of {plan.name}: seconds of each stage", stages)
    if plan.starting_seconds is None:
        note = "Starting and looking up are not in it: the store has no run to learn them from."
        console.print(Padding(Text(note, "dim"), (0, 0, 0, 2)))

    aer = columns("", ">cold", ">this run")
    spread = f" ± {plan.aer.full_spread_seconds:,.1f}" if plan.aer.full_spread_seconds else ""
    full = f"{plan.aer.full_seconds:,.1f}{spread}"
    aer.add_row("full fine-tuning, seconds", full, full)
    aer.add_row("AER", f"{plan.aer.cold:.3f}", f"{plan.aer.this_run:.3f}")
    now = f"{1 / plan.aer.this_run:.1f}x" if plan.aer.this_run else "nothing to make"
    aer.add_row("speedup", f"{plan.aer.speedup:.1f}x", now)
    section("Alignment Efficiency Ratio (lower is better)", aer)

    needs = columns("", "")
    about = "about " if plan.corpus_is_estimated else ""
    tokens = f", {plan.tokens_in_sample:.0f} tokens each" if plan.tokens_in_sample else ""
    needs.add_row("corpus", f"{about}{plan.corpus:,} samples{tokens}")
    memory = f"about {size_text(plan.memory_bytes)}" if plan.memory_bytes else "nothing was timed"
    needs.add_row("memory", memory)
    needs.add_row(
        "disk", f"about {size_text(plan.disk_bytes)}, free are {size_text(plan.free_bytes)}"
    )
    section("Needs", needs)
    took = f"Planned in {plan.seconds_to_plan:.0f} s on {plan.machine}; nothing was made."
    console.print(Padding(Text(took, "dim"), (1, 0, 0, 2)))
