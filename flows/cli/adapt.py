"""`p2d adapt`: the whole job on a person's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import (
    DEFAULT_STORE,
    StoreOption,
    SummaryOption,
    VerboseOption,
    artifact,
    check_summary_file,
    existing_store,
)


def adapt(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Settings in YAML; `p2d config` writes a first one."),
    ],
    summary: SummaryOption = None,
    head_map: Annotated[
        str | None,
        typer.Option(
            metavar="KEY|FOLDER|in-use",
            help="Take this head map, such as artifacts/heads/<key>: no proxy run, no ranking. "
            "in-use: the one that `p2d heads refresh` keeps.",
        ),
    ] = None,
    skip_bad_rows: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Leave out up to N rows that are no samples; the samples artifact keeps which, "
            "and why.",
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    verbose: VerboseOption = False,
) -> None:
    """Adapt a base model to a target: heads, data, training, and what it all cost.

    What an earlier run made from the same input is reused; after a kill the same command goes on.

    Example: [bold]p2d adapt my.yaml --summary my.json[/bold]
    """
    check_summary_file(summary)
    from flows.settings import load_settings

    settings = load_settings(file)
    if skip_bad_rows is not None:
        settings = settings.model_copy(update={"skip_bad_rows": skip_bad_rows})
    if head_map not in (None, "in-use"):
        head_map = str(artifact(existing_store(store), head_map, "heads").path)
    from flows.environment import prepare_environment

    prepare_environment(store, verbose=verbose)
    from flows.adapt import run_adapt
    from flows.cli.finish import finish
    from flows.cli.progress import listening

    with listening():
        done = run_adapt(settings, store=store, head_map=head_map)
    finish(done, summary)
