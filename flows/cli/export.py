"""`p2d export`: an adapted model in a form that other tools load."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import DEFAULT_STORE, StoreOption, existing_store, size_text
from p2d_core.errors import InputError

if TYPE_CHECKING:
    from p2d_core.export.exporting import Exported

FOR = {
    "lora": "a PEFT adapter, loaded over the base",
    "merged": "a whole model, for whatever loads one",
    "delta": "bare numbers, to keep or to send",
}


class Form(StrEnum):
    """What an export is."""

    LORA = "lora"
    MERGED = "merged"
    DELTA = "delta"


class Precision(StrEnum):
    """What an export is loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run's id (run_id of its summary) or a model artifact's key, or the beginning "
            "of one.",
        ),
    ],
    form: Annotated[
        Form,
        typer.Option(
            "--as",
            help="lora: a plain PEFT adapter. merged: a whole model folder with its tokenizer. "
            "delta: the numbers that differ, in safetensors, and JSON that says where they go.",
        ),
    ],
    to: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where it goes; must be empty or not be there.")
    ],
    dtype: Annotated[
        Precision | None,
        typer.Option(
            help="What it will be loaded in. That of the base's files if empty, or of the run if "
            "that was lower.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the base model is, if it was moved since the run.",
            show_default=False,
        ),
    ] = None,
    base_name: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What whoever loads it finds the base by, such as its name on a hub. If empty "
            "that, where the run had it from there, or else its folder.",
            show_default=False,
        ),
    ] = "",
    license_id: Annotated[
        str,
        typer.Option(
            "--license",
            metavar="ID",
            help="For the model card, such as apache-2.0; that of the base's card if empty.",
            show_default=False,
        ),
    ] = "",
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Also commit it to that repository of the Hugging Face hub, which is made if it "
            "is not there. Takes the token of HF_TOKEN or `hf auth login`.",
            show_default=False,
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may read what is pushed.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log.")] = False,
) -> None:
    """Write an adapted model in a form that other tools load, with a model card.

    What is written is loaded again and compared, bit for bit, before the folder gets its name. The
    sizes of all forms are shown, and what rounding does where the model is exported for a lower
    precision than it was adapted in.

    Example: [bold]p2d export 20260131-0930 --as lora --to my-adapter[/bold]

    [bold]p2d export 3fa9 --as merged --dtype bfloat16 --to my-model[/bold]

    [bold]p2d export 3fa9 --as lora --to my-adapter --push me/my-adapter[/bold]
    """
    if public and push is None:
        raise InputError("--public says who may read what is pushed. Give --push OWNER/NAME, too.")
    here = existing_store(store)
    from p2d_core.export.folder import refuse_what_is_there

    refuse_what_is_there(to)
    if push is not None:
        from p2d_core.export.push import check_push

        check_push(push, public=public)
    from flows.environment import set_environment

    set_environment(store, verbose=verbose)
    from flows.cli.progress import listening
    from flows.export import export_run

    with listening():
        chosen, done = export_run(
            here,
            run,
            form.value,
            to,
            dtype=dtype.value if dtype is not None else None,
            base=base,
            base_name=base_name,
            license_id=license_id,
            for_hub=push is not None,
        )
    of = f" of run {chosen.summary.run_id}" if chosen.summary is not None else ""
    typer.echo(f"model {chosen.model.key[:12]}{of}, for {done.dtype}")
    show(done)
    from p2d_core.store.gc import bytes_of

    typer.echo(f"Wrote {to} ({size_text(bytes_of(to))}); its README.md says how it is loaded.")
    if push is not None:
        from p2d_core.export.push import push as push_folder

        message = f"{form.value} of model {chosen.model.key[:12]}, by P2D"
        pushed = push_folder(to, push, public=public, message=message)
        who = "only its owner and whom they let in" if pushed.private else "everybody"
        typer.echo(f"Pushed to {pushed.address}, which {who} may read.")


def show(done: Exported) -> None:
    """Prints the size of each form, what is advised, and what rounding does."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tasks.report.card import precision_words

    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    table.add_column("form", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("")
    for form, what in FOR.items():
        size = size_text(done.sizes[form]) if form in done.sizes else "none"
        table.add_row(Text(form, "bold" if form == done.form else ""), size, what)
    console.print(table)
    for sentence in [*advice(done), *precision_words(done)]:
        console.print(Text(sentence))


def advice(done: Exported) -> list[str]:
    """Which form to take, and what to know of the LoRA."""
    sizes, best = done.sizes, done.advised
    if best == "lora":
        share = sizes["lora"] / sizes["merged"]
        first = f"Advised: lora, {share:.1%} of the whole model; stock PEFT loads it over the base."
    elif done.no_lora:
        first = f"Advised: merged, because {done.no_lora}"
    else:
        first = "Advised: merged, because the LoRA is larger."
    share = sizes["delta"] / sizes[best]
    if share < 0.9:
        first += f" delta is {share:.0%} of it, but five lines of Python have to write it in."
    sentences = [first]
    if done.form == "lora" and done.rank:
        sentences.append(f"A server that limits the rank of adapters has to allow {done.rank}.")
    if done.form == "lora" and done.whole:
        sentences.append(
            f"{len(done.whole)} modules are replaced whole (modules_to_save), which not every "
            "server takes: what a LoRA does not say (biases, norms), or not exactly, or only at "
            "length."
        )
    return sentences
