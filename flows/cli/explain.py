"""`p2d explain`: why samples were chosen, or not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import DEFAULT_STORE, StoreOption, artifact, existing_store
from flows.cli.text import indented, narrowed, printable, say, table_of, title
from p2d_core.samples.extra import other_columns

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flows.explain import Explained, Explanation, Part, SeenHead, StepLook
    from p2d_core.affinity.explain import Standing

TEXT_SHOWN = 280
"""Characters of a prompt or response; --json has all."""
PROXY_SHOWN = 140
HEADS_SHOWN = 6
PROXIES_SHOWN = 3
NOTHING = 1e-9
"""What the heads may leave over by rounding."""

MEASURED = {
    "base_loss": "loss of the response under the base model",
    "tuned_loss": "loss of the response with the task heads tuned on the proxy set",
    "silenced_loss": "loss of the response with the task heads silenced",
    "loss_with_prompt": "loss of the response after its prompt",
    "loss_alone": "loss of the response without its prompt",
}
"""Losses, in nats a response token."""


def explain(
    sample: Annotated[
        str,
        typer.Argument(
            metavar="SAMPLE_ID|TOP_N",
            help="A sample's id or the beginning of one; or a number up to 1000: so many of the "
            "best chosen ones. Five digits and more are the beginning of an id.",
        ),
    ],
    subset: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="The subset whose choice is explained, by its key or the beginning of one; that "
            "of the newest run if empty.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with whole texts and all heads.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Say why a sample was chosen for training, or was not.

    Shows which step of the scorer let it through or stopped it; its affinity
    and every named part of it, each with its rank in the corpus; what each
    task head adds to the affinity; the proxy samples that it is most like; and
    the losses behind the numbers. Everything is read from what the run kept:
    no model is run.

    Example: [bold]p2d explain 3[/bold] explains the three best samples that
    were chosen. Why was another one left out? Look for its id, and give the
    beginning of it:

    [bold]p2d sql "SELECT DISTINCT sample_id FROM scores WHERE gates_passed=0 LIMIT 3"[/bold]

    [bold]p2d explain 3fa9c21b[/bold]
    """
    here = existing_store(store)
    named = artifact(here, subset, "subset") if subset is not None else None
    from flows.explain import explain as explained

    found = explained(here, sample, named)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
        return
    from rich.console import Console

    show(found, Console())


def show(found: Explanation, console: Console) -> None:
    """Prints every sample, one under the other."""
    narrowed(console)
    run = f"run {found.run_id}, " if found.run_id else ""
    console.print()
    say(
        console,
        f"{run}subset {found.subset[:12]}: {found.chosen:,} of {found.corpus:,} samples, "
        f"scored by {found.scorer}",
        "dim",
    )
    for one in found.samples:
        _sample(one, console)
    console.print()


def _sample(one: Explained, console: Console) -> None:
    from rich.text import Text

    sample = one.sample
    console.print()
    console.rule(Text(sample.sample_id, "bold"), align="left", style="dim")
    say(console, f"row {sample.row + 1:,} of {sample.source} (rows count from 1)", "dim")
    texts = _grid()
    texts.add_row(Text("prompt", "dim"), _shortened(sample.prompt, TEXT_SHOWN))
    texts.add_row(Text("response", "dim"), _shortened(sample.response, TEXT_SHOWN))
    also = other_columns(sample.extra)
    if also != "{}":
        texts.add_row(Text("also", "dim"), _shortened(also, TEXT_SHOWN, "dim"))
    indented(console, texts)
    title(console, "Chosen" if one.reason.chosen else "Not chosen")
    say(console, one.reason.words, "green" if one.reason.chosen else "yellow")
    if any(step.threshold is not None for step in one.steps):
        title(console, "Steps")
        indented(console, _steps(one))
        say(
            console,
            "margin: above what is wanted, in standard deviations of the target's own. The "
            "smallest of a sample's margins is its affinity.",
            "dim",
        )
    title(console, "Affinity and its parts")
    indented(console, _parts(one))
    place = one.in_source
    gated = any(step.threshold is not None for step in one.steps)
    order = " What passed more gates comes first." if gated else ""
    say(
        console,
        f"Within {sample.source} its affinity is {_rank(place)}, higher than {place.lower:.1%}."
        + order,
    )
    for look in one.looks:
        _look(look, console)
    for note in one.notes:
        say(console, f"note: {note}", "yellow")


def _steps(one: Explained) -> Table:
    from rich.text import Text

    table = table_of("step", ">affinity", ">wanted", "", ">margin", ">of the target's own")
    for step in one.steps:
        passed = {
            True: Text("let through", "green"),
            False: Text("stopped", "yellow"),
            None: Text("not reached" if step.affinity is None else "no gate", "dim"),
        }[step.passed]
        table.add_row(
            Text(step.step),
            _number(step.affinity),
            _number(step.threshold),
            passed,
            "" if step.margin is None else f"{step.margin:+.2f}",
            "" if step.target_lower is None else f"above {step.target_lower:.0%}",
        )
    return table


def _parts(one: Explained) -> Table:
    from rich.text import Text

    weighted = any(part.weight is not None for part in one.parts)
    columns = ["", ">value", ">rank", ">higher than", ">cut-off", ">above it"]
    table = table_of(*columns, *([">weight", ">adds"] if weighted else []))
    for part in one.parts:
        row = [Text(part.name, "bold" if part.name == "affinity" else ""), *_standing(part)]
        if weighted:
            row += _weight(part)
        table.add_row(*row)
    return table


def _standing(part: Part) -> list[str]:
    standing = part.standing
    if standing is None:
        return ["not measured", "", "", _number(part.cut_off), ""]
    above = standing.value - part.cut_off if part.cut_off is not None else None
    return [
        _number(standing.value),
        _rank(standing),
        f"{standing.lower:.1%}",
        _number(part.cut_off),
        "" if above is None else f"{above:+.4g}",
    ]


def _weight(part: Part) -> list[str]:
    if part.weight is None or part.standing is None:
        return ["", ""]
    return [f"{part.weight:g}", f"{part.weight * part.standing.value:+.4g}"]


def _look(look: StepLook, console: Console) -> None:
    from rich.text import Text

    at = f"{look.step}: {look.scorer}" if look.step != "affinity" else look.scorer
    if look.heads is not None:
        title(console, f"Task heads ({at} {_number(look.affinity)})")
        table = table_of(">layer", ">head", ">rank", ">adds", "")
        widest = max((abs(head.adds) for head in look.heads), default=0.0) or 1.0
        for head in _weightiest(look.heads):
            colour = "cyan" if head.adds > 0 else "red"
            bar = Text("█" * round(20 * abs(head.adds) / widest), colour)
            rank = "" if head.rank is None else str(head.rank)
            table.add_row(str(head.layer), str(head.head), rank, f"{head.adds:+.4f}", bar)
        indented(console, table)
        say(console, _sum_of(look), "dim")
    if look.proxies is not None:
        title(console, f"Nearest proxy samples ({at})")
        table = table_of(">cosine", "prompt", "response")
        for proxy in look.proxies[:PROXIES_SHOWN]:
            texts = (
                ("(gone)", "")
                if proxy.sample is None
                else (proxy.sample.prompt, proxy.sample.response)
            )
            table.add_row(f"{proxy.cosine:.3f}", *(_shortened(t, PROXY_SHOWN) for t in texts))
        indented(console, table)
    if look.measured:
        title(console, f"Measured ({at})")
        table = _grid()
        for name, value in look.measured.items():
            unit = f"{MEASURED[name]}, nats a token" if name in MEASURED else name
            table.add_row(f"{value:.4f}", Text(unit))
        indented(console, table)


def _weightiest(heads: list[SeenHead]) -> list[SeenHead]:
    """Those that add or take away most, in their order."""
    least = sorted((abs(head.adds) for head in heads), reverse=True)[:HEADS_SHOWN][-1]
    return [head for head in heads if abs(head.adds) >= least]


def _sum_of(look: StepLook) -> str:
    heads = look.heads or []
    hidden = [head.adds for head in heads if head not in _weightiest(heads)]
    more = f"{len(hidden)} more add {sum(hidden):+.4f}; " if hidden else ""
    rest = "nothing is left over"
    if abs(look.left_over) > NOTHING:
        rest = f"{look.left_over:+.3g} of the affinity is left over"
    total = sum(head.adds for head in heads)
    return f"{more}all {len(heads)} add up to {total:.4f}, {rest}. rank: in the head map."


def _rank(standing: Standing) -> str:
    return f"{standing.rank:,} of {standing.of:,}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _shortened(text: str, most: int, style: str = "") -> Text:
    """On one line."""
    from rich.text import Text

    line = " ".join(text.split())
    shown = printable(line[:most])
    if len(line) > most:
        shown += f" ... ({len(line) - most:,} characters more)"
    return Text(shown, style)


def _grid() -> Table:
    made = table_of("", "")
    made.show_header = False
    return made
