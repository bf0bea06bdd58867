"""A tiny real job for `p2d adapt`: all stages, several shards, checkpoints after every step."""

from pathlib import Path
from typing import Any

import yaml

from tests.job import SETTINGS, changed, write_files

TINY = changed(
    SETTINGS,
    {
        "name": "tiny",
        "proxy": {"epochs": 2},
        "heads": {"proxy_epochs": 2},
        "training": {"checkpoint_seconds": 0},
        "threads": 1,
    },
)


def write_job(folder: Path) -> Path:
    """Writes data and ``run.yaml``; the same bytes every time."""
    write_files(folder)
    return write_settings(folder, "run.yaml")


def write_settings(folder: Path, name: str, **changes: Any) -> Path:
    """A settings file beside the job's data; a mapping changes only the keys that it has."""
    file = folder / name
    file.write_text(yaml.safe_dump(changed(TINY, changes)), encoding="utf-8")
    return file
