"""`p2d demo`: the whole job on the embedded example."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.options import (
    DEFAULT_STORE,
    StoreOption,
    SummaryOption,
    VerboseOption,
    check_summary_file,
)


def demo(
    summary: SummaryOption = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the world, every draw and training.")
    ] = 0,
    store: StoreOption = DEFAULT_STORE,
    verbose: VerboseOption = False,
) -> None:
    """Run the whole job on a small example that ships with P2D: minutes, no network.

    A second run reuses what the first one made.

    Example: [bold]p2d demo --summary demo.json[/bold]
    """
    check_summary_file(summary)
    from flows.environment import prepare_environment, start_server

    prepare_environment(store, verbose=verbose)
    start_server()
    from flows.cli.finish import finish
    from flows.cli.progress import listening
    from flows.demo import run_demo

    with listening():
        done = run_demo(store, seed)
    finish(done, summary)
