"""How `p2d demo` and `p2d adapt` end: the screen, and the summary as a file."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.text import Text

from flows.cli.screen import show_summary
from p2d_core.errors import P2DError
from tasks.summary import Summary

log = logging.getLogger(__name__)


def finish(done: Summary, file: Path | None) -> None:
    """Shows what came of a run and writes it to ``file`` if there is one."""
    if file is not None:
        file.write_text(done.to_json(), encoding="utf-8")
    show_summary(done, head_map_text(done), Console())


def head_map_text(done: Summary) -> Text | None:
    """The run's head map as characters; None, with a line in the log, if it is gone."""
    folder = done.artifacts.get("heads")
    if folder is None:
        return None
    from p2d_core.heads.head_map import read_head_map
    from p2d_core.heads.picture import as_text

    try:
        return as_text(read_head_map(Path(folder) / "heads.parquet"))
    except (P2DError, OSError) as error:
        log.warning("the head map cannot be shown: %s", error)
        return None
