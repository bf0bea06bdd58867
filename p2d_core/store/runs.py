"""Summaries of the runs over a store: a JSON file each, with its hash in a file beside it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from p2d_core.errors import ArtifactError
from p2d_core.store.store import Store

HASH = ".sha256"


def run_files(store: Store) -> list[Path]:
    """Summaries of runs, newest first."""
    files = (store.root / "runs").glob("*.json")
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)


def keep_summary(store: Path, run_id: str, text: str) -> None:
    """Writes ``runs/<run_id>.json``; it appears last, and whole."""
    file = store / "runs" / f"{run_id}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file.with_suffix(HASH).write_text(digest + "\n", encoding="utf-8")
    keep_file(file, text)


def keep_file(file: Path, text: str) -> None:
    """Writes a text that appears last, and whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def remove_unfinished(store: Path, run_id: str) -> None:
    """What `keep_summary` and `keep_file` leave when they are killed."""
    for folder in ("runs", "reports"):
        (store / folder / f"{run_id}.tmp").unlink(missing_ok=True)
    file = store / "runs" / f"{run_id}.json"
    if not file.exists():
        file.with_suffix(HASH).unlink(missing_ok=True)


def read_summary(file: Path) -> Any:
    """The values of a run's summary.

    Raises:
        ArtifactError: it is not JSON, or not as it was written.
    """
    content = file.read_bytes()
    beside = file.with_suffix(HASH)
    digest = hashlib.sha256(content).hexdigest() + "\n"
    if not beside.exists():
        raise ArtifactError(f"{file} has no {beside.name} beside it, which says what it held.")
    if beside.read_bytes() != digest.encode():
        raise ArtifactError(f"{file} has other content than when its run ended.")
    try:
        return json.loads(content)
    except ValueError as error:
        raise ArtifactError(f"{file} is not the summary of a run ({error!r}).") from error
