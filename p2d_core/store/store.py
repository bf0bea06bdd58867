"""The store: artifacts under one folder, each made once and found again by its key."""

import fcntl
import logging
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from p2d_core.aer import Cost, measured
from p2d_core.errors import ArtifactError
from p2d_core.store.manifest import MANIFEST, Manifest, faults, read_manifest, write_manifest
from p2d_core.store.recipe import Recipe

log = logging.getLogger(__name__)

SET_ASIDE = ".damaged-"
STAGING = ".staging-"
NOT_STAGES = ("mlflow", "prefect", "runs", "reports", "demo")


class ArtifactRef(BaseModel):
    """All that passes between stages: which artifact, and where it lies."""

    model_config = ConfigDict(frozen=True)

    stage: str
    key: str
    location: str
    """Its folder."""

    @property
    def path(self) -> Path:
        """Its folder."""
        return Path(self.location)

    @property
    def manifest(self) -> Manifest:
        """What it is and what it cost; the files are not checked here."""
        return read_manifest(self.path)


@dataclass
class Making:
    """What a stage gets to work with while it makes its artifact."""

    folder: Path
    """For the files to keep; becomes the artifact when the stage is done."""
    scratch: Path
    """For what should survive a kill (checkpoints); removed when the stage is done."""
    facts: dict[str, Any] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    processes: int = 1
    """That worked on it together, each with a device of its own."""
    seconds_before: float = 0.0
    """Spent on it by runs that were stopped, as far as their work went into this one."""
    cost: Cost | None = None
    """As another process measured it that did the work; None: what it takes here."""


class Store:
    """Artifacts in ``root/<stage>/<key>/``. Safe for several processes on one local disk."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def path(self, stage: str, key: str) -> Path:
        """Where an artifact lies or would lie."""
        return self.root / stage / key

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """The artifact if it is there and every file is as it was made.

        One that is not is set aside under a name that says so, with a warning in the log.
        """
        with self._locked(stage, key):
            return self._find(stage, key)

    def _find(self, stage: str, key: str) -> ArtifactRef | None:
        folder = self.path(stage, key)
        if not (folder / MANIFEST).exists():
            return None
        found = faults(folder, key)
        if not found:
            return ArtifactRef(stage=stage, key=key, location=str(folder))
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        aside = folder.with_name(f"{key}{SET_ASIDE}{stamp}")
        folder.rename(aside)
        log.warning(
            "%s %s is damaged (%s): set aside as %s, made again",
            stage,
            key[:12],
            "; ".join(found),
            aside.name,
        )
        return None

    def produce(
        self, recipe: Recipe, build: Callable[[Making], None], *, run_id: str
    ) -> ArtifactRef:
        """The artifact of a recipe: found, or made by ``build`` and then kept.

        Of several processes that want it one makes it and the others wait. When ``build`` raises,
        nothing of the artifact stays but its scratch folder.
        """
        key = recipe.key
        folder = self.path(recipe.stage, key)
        scratch = self.root / ".scratch" / f"{recipe.stage}-{key}"
        with self._locked(recipe.stage, key):
            # who staged these held the lock, and was killed
            for left in folder.parent.glob(f"{key}{STAGING}*"):
                shutil.rmtree(left, ignore_errors=True)
            found = self._find(recipe.stage, key)
            if found is not None:
                shutil.rmtree(scratch, ignore_errors=True)
                return found
            with _staged(folder) as staging:
                scratch.mkdir(parents=True, exist_ok=True)
                making = Making(staging, scratch)
                with measured() as watch:
                    build(making)
                    watch.samples, watch.tokens = making.samples, making.tokens
                earlier = making.seconds_before
                before = Cost(earlier, earlier, seconds_before=earlier)
                cost = before + (making.cost or watch.cost)
                cost = replace(cost, device_seconds=cost.device_seconds * making.processes)
                write_manifest(staging, recipe, facts=making.facts, cost=cost, run_id=run_id)
            shutil.rmtree(scratch, ignore_errors=True)
            return ArtifactRef(stage=recipe.stage, key=key, location=str(folder))

    def refs(self, stage: str | None = None) -> Iterator[ArtifactRef]:
        """Every artifact that has a manifest, unchecked, by stage and key."""
        if not self.root.is_dir():
            return
        for stage_folder in sorted(self.root.iterdir()):
            name = stage_folder.name
            if name.startswith(".") or name in NOT_STAGES or (stage is not None and name != stage):
                continue
            if not stage_folder.is_dir():
                continue
            for folder in sorted(stage_folder.iterdir()):
                if "." not in folder.name and (folder / MANIFEST).exists():
                    yield ArtifactRef(stage=name, key=folder.name, location=str(folder))

    def resolve(self, prefix: str, stage: str | None = None) -> ArtifactRef:
        """The one artifact whose key, ``stage/key`` or folder begins so.

        Raises:
            ArtifactError: none or more than one does.
        """
        name = Path(prefix.rstrip("/")).name
        given_stage = Path(prefix).parent.name if "/" in prefix else ""
        matches = [
            ref
            for ref in self.refs(stage or given_stage or None)
            if ref.key.startswith(name) and name
        ]
        if len(matches) == 1:
            return matches[0]
        what = f"{stage} artifact" if stage else "artifact"
        shown = prefix if len(prefix) < 200 else f"{prefix[:200]}..."
        if not matches:
            raise ArtifactError(
                f"there is no {what} {shown!r} in {self.root}. `p2d artifacts ls` lists them."
            )
        listed = ", ".join(f"{ref.stage}/{ref.key[:12]}" for ref in matches[:5])
        raise ArtifactError(f"{len(matches)} artifacts begin with {shown!r}: {listed}. Give more.")

    def lineage(self, ref: ArtifactRef) -> list[ArtifactRef]:
        """The artifact and all that it was made from, as far as manifests can be read."""
        return lineage_among({other.key: other for other in self.refs() if readable(other)}, ref)

    def faults(self, ref: ArtifactRef) -> list[str]:
        """What is wrong with an artifact, a line each; empty when nothing is."""
        return faults(ref.path, ref.key)

    def leftovers(self) -> list[Path]:
        """Folders that no artifact needs: set aside as damaged, or staged by a killed process."""
        return [
            folder
            for marker in (SET_ASIDE, STAGING)
            for folder in sorted(self.root.glob(f"*/*{marker}*"))
        ]

    def in_use(self, stage: str, key: str) -> bool:
        """Whether a process is making or looking up that artifact right now."""
        try:
            with (self.root / ".locks" / f"{stage}-{key}").open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    @contextmanager
    def _locked(self, stage: str, key: str) -> Iterator[None]:
        # flock dies with its process, so a killed run never blocks the next one
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / f"{stage}-{key}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s %s is being made by another process: waiting", stage, key[:12])
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def readable(ref: ArtifactRef) -> bool:
    """Whether its manifest can be read; the files are not looked at."""
    try:
        return ref.manifest.key == ref.key
    except ArtifactError:
        return False


def lineage_among(by_key: Mapping[str, ArtifactRef], ref: ArtifactRef) -> list[ArtifactRef]:
    """The artifact and all of the given ones that it was made from, itself first."""
    found: dict[str, ArtifactRef] = {}
    waiting = deque([ref])
    while waiting:
        here = waiting.popleft()
        if here.key in found:
            continue
        found[here.key] = here
        keys = strings_in({**here.manifest.inputs, **here.manifest.beside})
        waiting.extend(by_key[key] for key in keys if key in by_key and key not in found)
    return list(found.values())


@contextmanager
def _staged(dest: Path) -> Iterator[Path]:
    dest.parent.mkdir(parents=True, exist_ok=True)
    staging = dest.with_name(f"{dest.name}{STAGING}{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    try:
        yield staging
        # a folder without a manifest is what a killed process left: not an artifact
        shutil.rmtree(dest, ignore_errors=True)
        staging.rename(dest)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def strings_in(value: Any) -> Iterator[str]:
    """Every string in nested values: the keys among a manifest's inputs, for one."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings_in(part)
