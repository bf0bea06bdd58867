"""Which head map is in use for a base model and target: one small file in the store."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p2d_core.errors import ArtifactError

FILE = "heads_in_use.json"
OWN_HASH = "sha256"
"""Beside the maps: a changed letter of a key would let `gc` remove the map that is in use."""


@dataclass(frozen=True, slots=True)
class InUse:
    """The head map that runs take which ask for the one in use."""

    key: str
    """Of the `heads` artifact."""
    since: str
    """Date on which it was put to use."""
    why: str
    refreshes: int = 0
    """How often it was looked whether a map of this base and target still holds."""


def head_map_in_use(store: Path, base: str, target: str) -> InUse | None:
    """The head map in use, None if none was put to use yet.

    Args:
        base: hash of the base model.
        target: name of the target.

    Raises:
        ArtifactError: the file cannot be read.
    """
    found = _read(store).get(_name(base, target))
    return InUse(**found) if found is not None else None


def put_in_use(store: Path, base: str, target: str, in_use: InUse) -> None:
    """From now on this map is in use; the file appears whole."""
    with _alone(store):
        every = _read(store) | {_name(base, target): asdict(in_use)}
        draft = store / f"{FILE}.tmp"
        text = json.dumps(every | {OWN_HASH: _hash_of(every)}, indent=1, sort_keys=True)
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(store / FILE)


def keys_in_use(store: Path) -> set[str]:
    """Of every head map that is in use.

    Raises:
        ArtifactError: the file cannot be read.
    """
    return {str(each["key"]) for each in _read(store).values()}


def _name(base: str, target: str) -> str:
    return f"{base[:16]} {target}"


def _read(store: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads((store / FILE).read_text(encoding="utf-8"))
        # none in the notes of earlier versions
        if (digest := found.pop(OWN_HASH, None)) is not None and digest != _hash_of(found):
            raise ValueError("it has other content than was written")
        return {name: asdict(InUse(**one)) for name, one in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{store / FILE} does not say which head maps are in use ({error}). Delete it: the "
            "next run that asks for the map in use ranks anew."
        ) from error


def _hash_of(every: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    locks = store / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / "heads_in_use").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
