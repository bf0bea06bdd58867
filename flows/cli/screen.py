"""The last screen of a run: what was done, what came of it, what it cost, and what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flows.cli.progress import duration
from flows.cli.text import indented, narrowed, plain, say, table_of, title
from tasks.report.further import further
from tasks.summary import RejectedSummary, SelectionSummary, Summary, TrainableSummary
from tasks.tracking.database import mlflow_uri
from tasks.verdict import ARM_NAMES, TERM_NAMES, percent, times, trained_on, verdict

SHORT = 30
"""Characters of a command that others' explanations are aligned with."""
MOST_LABELS = 12
"""Lines of labels; the rest stand in one."""


def show_summary(summary: Summary, head_map_text: Text | None, console: Console) -> None:
    """Prints the screen; at most 100 columns wide."""
    narrowed(console)
    console.print()
    console.rule(plain(summary.name, "bold"), align="left", style="dim")
    if summary.base and summary.target:
        say(console, f"{summary.base} adapted to {summary.target}", style="dim")
    _stages(summary, console)
    _heads(summary, head_map_text, console)
    _selection(summary.selection, console)
    _rejected(summary.rejected, console)
    _quality(summary, console)
    _aer(summary, console)
    _kept(summary, console)
    _next(summary, console)


def _stages(summary: Summary, console: Console) -> None:
    planned = summary.planned_seconds
    columns = ["stage", ">seconds", "", ">when first made"]
    table = table_of(*columns, *([">planned"] if planned else []))
    for line in summary.stages:
        table.add_row(
            Text(line.name),
            _seconds(line.seconds),
            Text("reused", "dim") if line.reused else Text("computed", "green"),
            Text(_seconds(line.cold_seconds), "dim"),
            *([_seconds(planned[line.name])] if line.name in planned else []),
        )
    if summary.seconds:
        rest = summary.seconds - sum(line.seconds for line in summary.stages)
        if rest > 0.05:
            table.add_row(Text("starting, looking up", "dim"), _seconds(rest), "", "")
        table.add_row(Text("whole run", "bold"), Text(_seconds(summary.seconds), "bold"), "", "")
    _section(console, "Stages", table)
    if summary.seconds:
        say(console, "Starting Prefect, and the record in MLflow, come on top.", style="dim")
    if planned:
        say(console, f"Planned: {summary.planned_text}.", style="dim")


def _heads(summary: Summary, picture: Text | None, console: Console) -> None:
    heads, moving = summary.heads, summary.trainable
    if heads is None:
        title(console, "What moves")
        say(
            console,
            f"{moving.parameters:,} parameters, {moving.share_of_model:.1%} of the model, by "
            f"{moving.adaptation}. No heads were ranked: neither it nor {summary.selection.scorer} "
            "looks at any.",
        )
        _rate(moving, console)
        return
    title(console, "Task heads")
    say(
        console,
        f"{heads.selected} of {heads.total} query heads ({percent(heads.selected, heads.total)}) "
        f"by {heads.ranker}: {moving.parameters:,} parameters move, {moving.share_of_model:.1%} of "
        "the model.",
    )
    _rate(moving, console)
    for text in heads.texts:
        say(console, text)
    if picture is not None:
        widest = max((len(line) for line in picture.plain.splitlines()), default=0)
        if widest <= console.width - 4:
            console.print(Padding(picture, (0, 0, 0, 2)), soft_wrap=True)
    if heads.picture:
        # not wrapped: a path is there to be copied
        console.print(Text(f"  picture: {heads.picture}", "dim"), soft_wrap=True)


def _rate(moving: TrainableSummary, console: Console) -> None:
    if moving.rates_tried:
        say(console, f"Learning rate {moving.rate_text}.")


def _selection(selection: SelectionSummary, console: Console) -> None:
    title(console, "Samples chosen")
    say(
        console,
        f"{selection.selected:,} of {selection.corpus:,} "
        f"({percent(selection.selected, selection.corpus)}) by {selection.scorer}"
        f"{selection.boundary_text}.",
    )
    if selection.corpus_by_source:
        table = table_of("source", ">chosen", ">in corpus", ">of source", ">of chosen")
        for source, available in selection.corpus_by_source.items():
            chosen = selection.by_source.get(source, 0)
            table.add_row(
                plain(source),
                f"{chosen:,}",
                f"{available:,}",
                percent(chosen, available),
                percent(chosen, selection.selected),
            )
        indented(console, table)
    if selection.by_label:
        table = table_of("label (no stage reads it)", ">chosen", ">of chosen")
        counted = list(selection.by_label.items())
        if len(counted) > MOST_LABELS:
            rest = counted[MOST_LABELS - 1 :]
            counted[MOST_LABELS - 1 :] = [(f"{len(rest)} others", sum(n for _, n in rest))]
        for label, chosen in counted:
            table.add_row(plain(label), f"{chosen:,}", percent(chosen, selection.selected))
        indented(console, table)
    for note in selection.notes:
        say(console, f"note: {note}", style="yellow")


def _rejected(rejected: list[RejectedSummary], console: Console) -> None:
    if not rejected:
        return
    title(console, "Rows left out")
    for one in rejected:
        say(console, f"{one.rows:,} rows of {one.source} are no samples; why, in", style="yellow")
        console.print(Text(f"  {one.file}", "dim"), soft_wrap=True)


def _quality(summary: Summary, console: Console) -> None:
    quality, selection = summary.quality, summary.selection
    share = percent(selection.selected, selection.corpus)
    better = "higher" if quality.higher_is_better else "lower"
    columns = ["", "trained", f">{quality.metric.replace('_', ' ')}"]
    if quality.retention:
        columns.append(">retention")
    table = table_of(*columns)
    for arm, name in ARM_NAMES.items():
        value = getattr(quality, arm)
        if value is None:
            continue
        style = "bold" if arm == "p2d" else ""
        trained = trained_on(arm, share, summary.trainable.adaptation)
        row = [Text(name, style), Text(trained, "dim"), Text(f"{value:.3f}", style)]
        if quality.retention:
            kept = quality.retention.get(arm)
            row.append(Text("" if kept is None else f"{kept:.3f}", style))
        table.add_row(*row)
    retained = "; retention: the same on what the base could do" if quality.retention else ""
    _section(console, f"Quality ({better} is better{retained})", table)
    for sentence, style in verdict(summary):
        say(console, sentence, style=style)
    for one in further(summary):
        table = table_of(one.title, *(f">{name}" for name in one.columns))
        for row in one.rows:
            table.add_row(*map(Text, row))
        console.print(Padding(table, (1, 0, 0, 2)))


def _aer(summary: Summary, console: Console) -> None:
    aer = summary.aer
    table = table_of("", ">cold", ">this run")
    for term, seconds in aer.stages.items():
        now = aer.stages_this_run.get(term, 0.0)
        table.add_row(TERM_NAMES.get(term, term), _seconds(seconds), _seconds(now))
    table.add_row(
        Text("P2D in all", "bold"),
        Text(_seconds(sum(aer.stages.values())), "bold"),
        Text(_seconds(sum(aer.stages_this_run.values())), "bold"),
    )
    spread = f" ± {_seconds(aer.full_spread_seconds)}" if aer.full_spread_seconds else ""
    full = f"{_seconds(aer.full_seconds)}{spread}"
    table.add_row(f"full fine-tuning ({aer.reference})", full, full)
    table.add_row(
        Text("AER", "bold"), Text(f"{aer.cold:.3f}", "bold"), Text(f"{aer.this_run:.3f}", "bold")
    )
    table.add_row(
        Text("speedup", "bold"),
        Text(times(aer.speedup), "bold"),
        Text(times(1 / aer.this_run if aer.this_run > 0 else 0.0), "bold"),
    )
    _section(console, "Alignment Efficiency Ratio (seconds; lower AER is better)", table)
    if aer.caveat:
        say(console, aer.caveat, style="yellow")
    if aer.cold >= 1:
        say(
            console,
            "Cold, P2D took LONGER than full fine-tuning here: selecting costs more than it saves. "
            "A larger corpus, or another target on the same corpus, changes that.",
            style="yellow",
        )


def _kept(summary: Summary, console: Console) -> None:
    version = summary.registered
    if version is None and not summary.report:
        return
    title(console, "Kept")
    if version is not None:
        alias = "champion" if version.champion else "not champion"
        say(console, f"{version.name}, version {version.version}: {alias}, {version.why}.")
    if summary.report:
        console.print(Text(f"  report: {summary.report}", "dim"), soft_wrap=True)


def _next(summary: Summary, console: Console) -> None:
    store = ""
    model = summary.artifacts.get("model")
    folder = Path(model).parent.parent if model else Path("artifacts")
    if folder != Path("artifacts"):
        store = f" --store {shlex.quote(str(folder))}"
    query = "SELECT left(key, 8) AS artifact, source, avg(affinity) FROM scores GROUP BY ALL"
    server = summary.mlflow.get("tracking_uri", "")
    is_local = server in ("", mlflow_uri(folder))
    what = "charts, pictures and the adapter, in MLflow"
    commands = {f"p2d ui{store}": what} if is_local else {}
    form = "lora" if summary.trainable.adaptation in ("heads", "lora") else "merged"
    commands |= {
        f"p2d explain 3{store}": "why the best three samples were chosen",
        f"p2d export {summary.run_id} --as {form} --to adapted{store}": "the model, to take away",
    }
    if summary.name == "demo":
        commands |= {
            "p2d config -o my.yaml": "settings to fill in with your own files",
            f"p2d adapt my.yaml{store}": "the same job on them",
        }
    commands |= {
        f"p2d artifacts ls{store}": "what was kept, and what from",
        f'p2d sql "{query}"{store}': "ask the data",
    }
    title(console, "Next")
    if not is_local:
        say(console, f"{what} at {server}")
    column = max((len(each) for each in commands if len(each) <= SHORT), default=0) + 2
    for command, what in commands.items():
        line = Text("  ").append(command, "bold cyan")
        place = max(column, len(command) + 2)
        if place + len(what) + 2 <= console.width:
            line.append(" " * (place - len(command)) + what, "dim")
        # not wrapped: a command is there to be copied
        console.print(line, soft_wrap=True)
    console.print()


def _section(console: Console, words: str, lines: Table) -> None:
    title(console, words)
    indented(console, lines)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f}" if seconds < 9_999 else duration(seconds)
