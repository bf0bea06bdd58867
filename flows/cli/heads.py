"""`p2d heads`: how much a head ranking can be relied on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import DEFAULT_STORE, StoreOption, VerboseOption, check_summary_file

if TYPE_CHECKING:
    from rich.table import Table

    from flows.stability import Stability
    from p2d_core.heads.draws import Agreement

app = typer.Typer(
    no_args_is_help=True,
    help="Look into head rankings.\n\nExample: [bold]p2d heads stability my.yaml --draws 3[/bold]",
)


@app.command()
def stability(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Settings in YAML; `p2d config` writes a first one."),
    ],
    draws: Annotated[
        int, typer.Option(min=2, metavar="K", help="How many proxy sets are drawn.")
    ] = 3,
    ranker: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Compare this ranker; may be given several times."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the JSON goes.")
    ] = Path("heads_stability.json"),
    store: StoreOption = DEFAULT_STORE,
    verbose: VerboseOption = False,
) -> None:
    """Rank the heads on several draws of the proxy set, and see how far the rankings agree.

    Each draw has its own proxy run where the ranker needs one; all of them are kept and reused.

    Example: [bold]p2d heads stability my.yaml --draws 3 --ranker spad --ranker gradient[/bold]
    """
    check_summary_file(output, "--output")
    from flows.settings import load_settings

    settings = load_settings(file)
    from flows.environment import prepare_environment

    prepare_environment(store, verbose=verbose)
    from flows.cli.progress import listening
    from flows.stability import run_stability

    with listening():
        done = run_stability(settings, store=store, draws=draws, names=ranker or ())
    import json

    output.write_text(json.dumps(done.as_json(), indent=1) + "\n", encoding="utf-8")
    show(done)
    typer.echo(f"\nWrote {output}.")


@app.command()
def refresh(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Settings in YAML; `p2d config` writes a first one."),
    ],
    margin: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=0.999,
            help="By how much rank correlation and overlap have to lie below those between today's "
            "own draws for the map to be replaced.",
        ),
    ] = 0.1,
    draws: Annotated[
        int, typer.Option(min=2, max=10, metavar="K", help="How many fresh proxy sets are drawn.")
    ] = 2,
    store: StoreOption = DEFAULT_STORE,
    verbose: VerboseOption = False,
) -> None:
    """See whether the head map in use still holds for today's target data, and replace it if not.

    The first time, it puts a head map to use. `p2d adapt FILE --head-map in-use` takes it.

    Example: [bold]p2d heads refresh my.yaml --margin 0.2[/bold]
    """
    from flows.settings import load_settings

    settings = load_settings(file)
    from flows.environment import prepare_environment

    prepare_environment(store, verbose=verbose)
    from flows.cli.progress import listening
    from flows.refresh import run_refresh

    with listening():
        done = run_refresh(settings, store=store, margin=margin, draws=draws)
    typer.echo(done.sentence)


def show(done: Stability) -> None:
    """Prints a table: a row for each ranker and number of best heads that is compared."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(
        Text(
            f"{done.draws} draws of {done.proxy_samples} proxy samples; two of them share "
            f"{done.shared_samples:.0%} of the samples. {done.total_heads} heads, of which "
            f"{done.task_heads} become task heads.\n"
        )
    )
    for name, found in done.rankers.items():
        console.print(Text(name, "bold"))
        console.print(
            f"  rank correlation (Spearman) of two draws: {found.spearman:.2f}, at least "
            f"{found.lowest_spearman:.2f}; by chance 0, above {found.spearman_by_luck:.2f} in one "
            "case of twenty"
        )
        console.print(_tops(found, done.total_heads))


def _tops(found: Agreement, total: int) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    for column in ("best heads", "Jaccard", "lowest", "by chance", "1 in 20 by luck", "in all"):
        table.add_column(column, justify="right", no_wrap=True)
    for place, top in enumerate(found.top):
        share = "task heads" if place == 0 else f"{top.heads / total:.0%}"
        table.add_row(
            f"{share}: {top.heads}",
            f"{top.jaccard:.2f}",
            f"{top.lowest:.2f}",
            f"{top.by_chance:.2f}",
            f"{top.by_luck:.2f}",
            str(top.in_all),
        )
    return table
