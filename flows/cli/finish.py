"""How `p2d demo` and `p2d adapt` end: the screen, and the summary as a file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from flows.cli.screen import show_summary
from tasks.report.page import head_map_text
from tasks.summary import Summary


def finish(done: Summary, file: Path | None) -> None:
    """Writes what came of a run to ``file`` if there is one, and shows it."""
    if file is not None:
        # first: whoever reads the screen may have closed it
        file.write_text(done.to_json(), encoding="utf-8")
    folder = done.artifacts.get("heads")
    picture = head_map_text(Path(folder)) if folder is not None else None
    show_summary(done, picture, Console())
