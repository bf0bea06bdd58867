"""What an artifact is made from, and the key that follows from it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN is refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 (hex) over names and contents, in the order of the names; folders do not count."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        total.update(f"{file.name}:{hash_file(file)}\n".encode())
    return total.hexdigest()


def hash_file(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Recipe:
    """Everything that can change an artifact's content, and nothing else.

    ``inputs`` maps a name to the key of an artifact or the content hash of a file.
    """

    stage: str
    version: str
    """Of the stage's algorithm: raised when the same inputs give another result."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Artifacts that were looked at and cannot change the result: for lineage, not in the key."""

    @property
    def key(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the four fields."""
        fields = {
            "stage": self.stage,
            "version": self.version,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
        }
        return hashlib.sha256(canonical_json(fields).encode()).hexdigest()
