"""Entry point of the `p2d` command: its commands, and what errors look like to a person."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flows.cli import (
    adapt,
    artifacts,
    compare,
    config,
    demo,
    doctor,
    explain,
    export,
    heads,
    plan,
    sql,
    ui,
    worker,
)
from flows.cli.text import printable
from flows.services import leave
from p2d_core.errors import InputError, P2DError
from p2d_core.processes import dismiss, join

HELP = """Adapts a language model to a domain: finds the attention heads that the domain moves,
lets them choose the training data, and trains only those heads.

Start with [bold]p2d demo[/bold]; then [bold]p2d config -o my.yaml[/bold], fill in your files, and
[bold]p2d adapt my.yaml[/bold]. What was computed is kept in the store and reused."""

INTERRUPTED = 130
FIRST_LOOK = 50_000
"""New objects after which Python looks for garbage; by default so few that it goes through all
that is imported again and again before a run has begun."""
GO_ON = "\nstopped. What was finished is kept: the same command goes on from there."

app = typer.Typer(
    name="p2d",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(adapt.adapt)
app.command()(plan.plan)
app.command()(compare.compare)
app.command()(config.config)
app.command()(ui.ui)
app.command()(worker.worker)
app.add_typer(heads.app, name="heads")
app.add_typer(artifacts.app, name="artifacts")
app.command()(explain.explain)
app.command()(export.export)
app.command()(sql.sql)
app.command()(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"p2d {version('p2d')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version.")
    ] = False,
) -> None:
    pass


def run() -> None:
    """Runs a command and leaves with its exit code: 0 done, 2 wrong input, 1 failed, 130 Ctrl-C.

    Of several processes that torchrun or accelerate launch started, the first runs it.
    """
    gc.set_threshold(FIRST_LOOK, *gc.get_threshold()[1:])
    if not join().first:
        _help_the_first()
        return
    try:
        _run()
    finally:
        dismiss()


def _help_the_first() -> None:
    """Without a word: the first process says what there is to say."""
    import os
    import tempfile
    import warnings

    from flows.environment import set_environment

    with tempfile.TemporaryDirectory(prefix="p2d-") as nowhere, open(os.devnull, "w") as nothing:
        sys.stdout = nothing
        set_environment(Path(nowhere))
        warnings.simplefilter("ignore")
        from tasks.together import serve

        serve()


def _run() -> None:
    try:
        app()
    except P2DError as error:
        _tell(error)
    except SystemExit as ending:
        if ending.code == INTERRUPTED:
            print(GO_ON, file=sys.stderr)
        if ending.code in (0, None):
            leave(0)
        raise
    except BrokenPipeError:
        # whoever read our output (head, less) has had enough
        sys.stderr.close()
        sys.exit(0)
    except BaseException as error:
        # Ctrl-C reaches Prefect's server too, and what comes up here is then that it is gone
        if not _was_stopped(error):
            from p2d_core.store.room import storage_error

            told = storage_error(error, Path.cwd(), "p2d")
            if told is None:
                raise
            _tell(told)
        print(GO_ON, file=sys.stderr)
        sys.exit(INTERRUPTED)


def _tell(error: P2DError) -> NoReturn:
    sys.stdout.flush()
    said = printable(str(error), keep="\n")
    print(f"error: {said}", file=sys.stderr)
    leave(2 if isinstance(error, InputError) else 1)


def _was_stopped(error: BaseException | None) -> bool:
    """Whether the error came up while a signal to stop was handled."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "TerminationSignal":
            return True
        error = error.__cause__ or error.__context__
    return False
