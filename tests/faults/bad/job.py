"""A job that would run, and how a case breaks one thing of it.

All draws are seeded by the case's own name, so that a case is the same in every run.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from p2d_core.synthetic.world import BASE_FOLDER

DOORS = {"target": 20, "pool": 30, "test": 6}
"""Data file of the job -> its rows."""


@dataclass
class Job:
    """A job that would run; a case breaks one thing of it."""

    folder: Path
    base: Path = BASE_FOLDER
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    command: str = "adapt"
    words: list[str] = field(default_factory=list)
    """Of the command, behind the settings file."""
    text: bytes | None = None
    """The settings file, where it is not just the values."""

    def __post_init__(self) -> None:
        first = 0
        for door, n_rows in DOORS.items():
            self.rows[door] = [
                {"prompt": f"copy {i}", "response": f"word {i}"}
                for i in range(first, first + n_rows)
            ]
            first += n_rows
            self.write(f"{door}.jsonl", "".join(json.dumps(r) + "\n" for r in self.rows[door]))
        self.values = {
            "base": str(self.base),
            "target": {"path": "target.jsonl"},
            "corpus": {"sources": [{"path": "pool.jsonl"}]},
            "evaluation": {"source": {"path": "test.jsonl"}},
            "proxy": {"samples": 5, "held_out": 2},
        }

    @property
    def store(self) -> Path:
        return self.folder / "artifacts"

    def write(self, name: str, content: str | bytes) -> None:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (self.folder / name).write_bytes(data)

    def point(self, door: str, path: str) -> None:
        """Lets a door read another file."""
        place = {
            "target": self.values["target"],
            "pool": self.values["corpus"]["sources"][0],
            "test": self.values["evaluation"]["source"],
        }[door]
        place["path"] = path

    def set(self, dotted: str, value: Any) -> None:
        place = self.values
        *sections, last = dotted.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value

    def own_base(self) -> Path:
        """A copy of the base model that a case may break."""
        base = self.folder / "base"
        shutil.copytree(BASE_FOLDER, base)
        self.values["base"] = "base"
        return base

    def save(self) -> Path:
        file = self.folder / "run.yaml"
        text = self.text if self.text is not None else yaml.safe_dump(self.values).encode()
        file.write_bytes(text)
        return file


@dataclass(frozen=True)
class Bad:
    """A bad input; ``named`` is what the message has to name: a file, a key or a value."""

    name: str
    breaks: Callable[[Job, random.Random], None]
    named: str

    def __str__(self) -> str:
        return self.name


def deep(n: int, inner: str = "1") -> str:
    """JSON of lists in lists."""
    return "[" * n + inner + "]" * n
