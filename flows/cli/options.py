"""Options that every command has, and what they are read into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2d_core.errors import InputError

if TYPE_CHECKING:
    from p2d_core.store import ArtifactRef, Store

StoreOption = Annotated[
    Path,
    typer.Option(
        "--store",
        envvar="P2D_STORE",
        metavar="FOLDER",
        file_okay=False,
        show_default="./artifacts",
        help="Where artifacts live.",
    ),
]
DEFAULT_STORE = Path("artifacts")

SummaryOption = Annotated[
    Path | None,
    typer.Option("--summary", metavar="FILE", help="Also write what came of it as JSON."),
]

VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the log of every stage.")
]


def existing_store(folder: Path) -> Store:
    """The store in a folder.

    Raises:
        InputError: there is no such folder.
    """
    from p2d_core.store import Store

    if not folder.is_dir():
        raise InputError(
            f"there is no store at {folder.resolve()}. `p2d demo` or `p2d adapt FILE` makes one; "
            "--store FOLDER or P2D_STORE names another."
        )
    return Store(folder)


def artifact(store: Store, key: str, stage: str | None = None) -> ArtifactRef:
    """The artifact that a person means by a key, the beginning of one, or a folder.

    Raises:
        InputError: none or more than one is meant.
    """
    from p2d_core.errors import ArtifactError

    try:
        return store.resolve(key, stage)
    except ArtifactError as error:
        raise InputError(str(error)) from error


def check_summary_file(file: Path | None, option: str = "--summary") -> None:
    """That the summary can be written, before anything is started.

    Raises:
        InputError: its folder is not there, it is a folder itself, or may not be written.
    """
    if file is None:
        return
    if file.is_dir():
        raise InputError(f"{option} {file} is a folder. Give a file, such as {file}/summary.json.")
    if not file.resolve().parent.is_dir():
        raise InputError(f"{option} {file}: there is no folder {file.parent}. Make it first.")
    if not os.access(file if file.exists() else file.resolve().parent, os.W_OK):
        raise InputError(f"{option} {file} may not be written by this user. Give another file.")


def size_text(n_bytes: float) -> str:
    """Bytes as a person reads them, such as 3.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
