"""The inputs of a stage on their way to a worker, which need not see the store, and what it made.

Artifacts and shards travel as the bytes of their files; the base model is where it is on every
machine. All bytes are Arrow buffers: processes on one machine share them without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from p2d_core.aer import Cost
from p2d_core.errors import ArtifactError
from p2d_core.store import ArtifactRef, Making
from p2d_core.store.manifest import faults
from tasks.stage import ShardRef

Files = dict[str, pa.Buffer]
"""Relative name -> content."""


@dataclass
class Made:
    """What a worker hands back of a stage: its files, and what stands in the manifest."""

    files: Files
    facts: dict[str, Any]
    samples: int
    tokens: int
    seconds_before: float
    cost: Cost
    said: list[tuple[str, int, str]] = field(default_factory=list)
    """Warnings in its log: logger, level, text."""

    def put_into(self, making: Making) -> None:
        """As if the stage had been made here."""
        write_files(self.files, making.folder)
        making.facts |= self.facts
        making.samples, making.tokens = self.samples, self.tokens
        making.seconds_before, making.cost = self.seconds_before, self.cost


def travelling(inputs: Mapping[str, Any]) -> Iterator[ArtifactRef | ShardRef]:
    """What of a stage's inputs lies in the store."""
    for value in inputs.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, ArtifactRef | ShardRef):
                yield part


def place_of(ref: ArtifactRef | ShardRef) -> str:
    """Its folder or file here."""
    return ref.location if isinstance(ref, ArtifactRef) else ref.file


def files_of(ref: ArtifactRef | ShardRef) -> Files:
    """The bytes of an artifact, its manifest included, or of a shard."""
    if isinstance(ref, ShardRef):
        return {Path(ref.file).name: _content(Path(ref.file))}
    return read_files(ref.path)


def unpacked(
    inputs: Mapping[str, Any], content_of: Callable[[str], Files], folder: Path
) -> dict[str, Any]:
    """The same inputs, with all that travelled below ``folder``.

    Args:
        content_of: given a `place_of`, what was sent of it.

    Raises:
        ArtifactError: an artifact did not arrive as its manifest says.
    """
    there: dict[str, ArtifactRef | ShardRef] = {}
    for number, ref in enumerate(travelling(inputs)):
        if place_of(ref) in there:
            continue
        place = folder / str(number)
        files = content_of(place_of(ref))
        write_files(files, place)
        if isinstance(ref, ShardRef):
            there[ref.file] = replace(ref, file=str(place / Path(ref.file).name))
            continue
        if found := faults(place, ref.key):
            raise ArtifactError(
                f"{ref.stage} {ref.key[:12]} did not reach the worker as it is in the store: "
                f"{'; '.join(found)}. `p2d artifacts verify` looks at the store."
            )
        there[ref.location] = ref.model_copy(update={"location": str(place)})

    def moved(value: Any) -> Any:
        if isinstance(value, ArtifactRef | ShardRef):
            return there[place_of(value)]
        if isinstance(value, list):
            return [moved(part) for part in value]
        return value

    return {name: moved(value) for name, value in inputs.items()}


def read_files(folder: Path) -> Files:
    """Every file below the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): _content(file) for file in files}


def write_files(files: Files, folder: Path) -> None:
    """The inverse of `read_files`."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            stream.write(content)


def _content(file: Path) -> pa.Buffer:
    # mapped: the bytes are copied once, into what sends them
    return pa.memory_map(str(file)).read_buffer() if file.stat().st_size else pa.py_buffer(b"")
