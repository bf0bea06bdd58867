"""The manifest: what an artifact is, what it was made from, and what its files must be."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from p2d_core.aer import Cost
from p2d_core.errors import ArtifactError
from p2d_core.store.recipe import Recipe, hash_file

MANIFEST = "manifest.json"
UNKNOWN = "0" * 64
"""Stands for the manifest's own hash while that is computed."""
LIBRARIES = ("p2d", "torch", "transformers", "peft", "pyarrow", "duckdb", "scikit-learn")


@dataclass(frozen=True)
class Manifest:
    """Written last: an artifact exists when its manifest does."""

    key: str
    stage: str
    version: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]
    beside: Mapping[str, Any]
    """Artifacts that were looked at, but are not in the key."""
    files: Mapping[str, Mapping[str, Any]]
    """Relative name -> {"size": bytes, "sha256": hex}."""
    facts: Mapping[str, Any]
    """Small counts and names that later stages and people read without opening the files."""
    cost: Mapping[str, Any]
    libraries: Mapping[str, str]
    made_at: str
    run_id: str
    """The run that computed it; every later run reuses it."""
    own_sha256: str
    """Of the manifest's text with zeros in this place: a changed count is damage as well."""
    format: int = 2

    @property
    def total_bytes(self) -> int:
        """Size of all files, the manifest not counted."""
        return sum(int(entry["size"]) for entry in self.files.values())


def write_manifest(
    folder: Path, recipe: Recipe, *, facts: Mapping[str, Any], cost: Cost, run_id: str
) -> None:
    """Describes every file that lies in the folder now."""
    manifest = Manifest(
        key=recipe.key,
        stage=recipe.stage,
        version=recipe.version,
        settings=dict(recipe.settings),
        inputs=dict(recipe.inputs),
        beside=dict(recipe.beside),
        files={
            str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": hash_file(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
        facts=dict(facts),
        cost=cost.as_dict(),
        libraries=library_versions(),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        run_id=run_id,
        own_sha256=UNKNOWN,
    )
    (folder / MANIFEST).write_text(sealed(asdict(manifest)), encoding="utf-8")


def sealed(values: Mapping[str, Any]) -> str:
    """A manifest's values as the text that is kept, with its own hash in it."""
    unsealed = {**values, "own_sha256": UNKNOWN}
    text = json.dumps(unsealed, indent=2, sort_keys=True, allow_nan=False) + "\n"
    return text.replace(UNKNOWN, hashlib.sha256(text.encode()).hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """Reads without checking the files.

    Raises:
        ArtifactError: there is none, it is not one of ours, or not as it was written.
    """
    file = folder / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
        manifest = Manifest(**json.loads(text))
        unsealed = text.replace(str(manifest.own_sha256), UNKNOWN)
        if hashlib.sha256(unsealed.encode()).hexdigest() != manifest.own_sha256:
            raise ArtifactError(f"{file} has other content than when it was written.")
        return manifest
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}.") from None
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{file} is not a manifest: {error}.") from error


def faults(folder: Path, key: str) -> list[str]:
    """What is wrong with an artifact's folder, a line each; empty when it is as it was made."""
    try:
        manifest = read_manifest(folder)
        recipe = Recipe(manifest.stage, manifest.version, manifest.settings, manifest.inputs)
        if not manifest.key == recipe.key == key:
            return [f"{MANIFEST} tells of another artifact than {key[:12]}"]
        there = {str(f.relative_to(folder)) for f in folder.rglob("*") if not f.is_dir()}
        strange = sorted(there - {MANIFEST, *manifest.files})
        found = [f"{name} is none of its files" for name in strange]
        for name, entry in manifest.files.items():
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()):
                found.append(f"{name} lies outside the artifact")
            elif not file.is_file():
                found.append(f"{name} is missing")
            elif file.stat().st_size != entry["size"]:
                found.append(f"{name} has {file.stat().st_size} bytes, not {entry['size']}")
            elif hash_file(file) != entry["sha256"]:
                found.append(f"{name} has other content than when it was made")
        return found
    except ArtifactError as error:
        return [str(error)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"{MANIFEST} is damaged ({error!r})"]


def library_versions() -> dict[str, str]:
    """Of those of `LIBRARIES` that are installed."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
