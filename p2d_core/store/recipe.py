"""What an artifact is made from, and the key that follows from it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2d_core.progress import Progress, no_progress

CHUNK_BYTES = 8 * 2**20


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN is refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def hash_files(files: Iterable[Path], progress: Progress = no_progress) -> str:
    """SHA-256 (hex) over names and contents, in the order of the names; folders do not count.

    ``progress`` is told of megabytes.
    """
    ordered = sorted(files, key=lambda f: f.name)
    digests = hashes_of(ordered, progress)
    total = hashlib.sha256()
    for file, digest in zip(ordered, digests, strict=True):
        total.update(f"{file.name}:{digest}\n".encode())
    return total.hexdigest()


def hashes_of(files: Sequence[Path], progress: Progress = no_progress) -> list[str]:
    """`hash_file` of each; ``progress`` is told of megabytes."""
    total = sum(file.stat().st_size for file in files)
    passed = 0

    def told(n_bytes: int) -> None:
        nonlocal passed
        passed += n_bytes
        progress(passed // 10**6, total // 10**6)

    return [hash_file(file, told) for file in files]


def hash_file(file: Path, told: Callable[[int], None] = lambda n_bytes: None) -> str:
    """SHA-256 (hex) of a file's bytes; ``told`` is given the bytes of every chunk."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            told(len(chunk))
    return digest.hexdigest()


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
