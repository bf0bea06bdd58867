"""SQL statements that are run, and kept as one text that says what was done."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import duckdb

from p2d_core.progress import Progress

STATEMENTS = 4
"""That a selection with replay takes: pool, draw, replay, result."""
SECONDS_BETWEEN_LOOKS = 0.5
PLACES = ("scores", "corpus", "file")
"""Parameters that name files."""


class Script:
    """Runs statements with bound parameters and remembers them, with the values, as SQL."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.connection = connection
        self.done: list[str] = []

    def __call__(self, statement: str, **parameters: Any) -> None:
        self.remember(statement, **parameters)
        self.connection.execute(statement, parameters or None)

    def remember(self, statement: str, **parameters: Any) -> None:
        """Notes a statement without running it."""
        # file names are this machine's: the inputs stand in the manifest
        shown = {k: v for k, v in parameters.items() if k not in PLACES}
        values = ", ".join(f"${name} = {value!r}" for name, value in shown.items())
        self.done.append((f"-- {values}\n" if values else "") + statement.strip() + ";\n")

    @contextmanager
    def telling(self, progress: Progress) -> Iterator[None]:
        """Tells how far the statements are, from a thread of its own, as long as its block runs."""
        for setting in ("enable_progress_bar = true", "enable_progress_bar_print = false"):
            self.connection.execute(f"SET {setting}")
        over = threading.Event()

        def tell() -> None:
            percent = 0
            while not over.wait(SECONDS_BETWEEN_LOOKS):
                before = max(0, min(len(self.done), STATEMENTS) - 1)
                # -1 between two statements
                of_this = max(0.0, self.connection.query_progress())
                percent = max(percent, min(100, round((100 * before + of_this) / STATEMENTS)))
                progress(percent, 100)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def text(self) -> str:
        return "\n".join(self.done)
