"""How commands lay text out: titles, indented lines and tables of at most 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

WIDEST = 100


def printable(text: str, keep: str = "") -> str:
    """Without the control characters of data or of a file's name, which a terminal would obey.

    Args:
        keep: those that stay.
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def plain(text: str, style: str = "") -> Text:
    """As it is written: brackets are no markup, and control characters are spelt out."""
    from rich.text import Text

    return Text(printable(text), style)


def narrowed(console: Console) -> Console:
    """The same, at most so wide as lines are easily read."""
    console.width = min(console.width, WIDEST)
    return console


def table_of(*columns: str) -> Table:
    """Columns whose name begins with > are numbers."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        number = name.startswith(">")
        made.add_column(
            name.removeprefix(">"), justify="right" if number else "left", no_wrap=number,
            overflow="fold",
        )  # fmt: skip
    return made


def title(console: Console, words: str) -> None:
    """Below an empty line."""
    from rich.text import Text

    console.print(Text(f"\n{words}", "bold"))


def indented(console: Console, what: Table | Text) -> None:
    """By two columns."""
    from rich.padding import Padding

    console.print(Padding(what, (0, 0, 0, 2)))


def say(console: Console, words: str, style: str = "") -> None:
    """An indented line, or several where it is long."""
    indented(console, plain(words, style))
