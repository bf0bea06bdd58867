"""What of a store nobody needs any more: leftovers, and artifacts of runs long past."""

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from p2d_core.errors import ArtifactError
from p2d_core.store.in_use import keys_in_use
from p2d_core.store.manifest import MANIFEST
from p2d_core.store.runs import read_summary, run_files
from p2d_core.store.store import ArtifactRef, Store, lineage_among, readable, strings_in

DAY = 24 * 3600.0
COMPARISON = "comparison"
"""Stage whose artifact is what a comparison says of itself; it has no summary among the runs."""
UNENDED = DAY
"""Seconds for which the artifacts of a run without a summary count as needed."""
ABANDONED = 7 * DAY
"""Seconds after which the checkpoints of a killed stage count as given up."""


@dataclass(frozen=True, slots=True)
class Removal:
    """One folder or file to remove, why, and what that frees."""

    path: Path
    why: str
    bytes: int


def unneeded(
    store: Store,
    *,
    keep_runs: int = 10,
    keep_days: float = 0.0,
    registered: Collection[str] = (),
) -> list[Removal]:
    """What `remove` may take away; nothing is touched here.

    Kept is every artifact that a run to be kept made, or names with all that it was made from;
    every registered one and every head map in use, with all that they were made from; and what a
    run that has not ended made within the last day. A comparison counts as a run. In a store in
    which no run has ended no whole artifact is removed: nothing says what is needed.

    Args:
        keep_runs: the newest so many runs are kept,
        keep_days: and those that ended within so many days.
        registered: keys of artifacts that somebody needs whatever run made them, such as those of
            registered models; one that is not in this store is passed over.

    Raises:
        ArtifactError: the summary of a run to be kept cannot be read, or which head maps are in
            use.
    """
    removals = [
        Removal(folder, "left over: damaged, or its maker was killed", bytes_of(folder))
        for folder in store.leftovers()
        if not store.in_use(folder.parent.name, folder.name.split(".")[0])
    ]
    removals += [
        Removal(folder, "checkpoints that nothing goes on from", bytes_of(folder))
        for folder in _stale_scratch(store)
    ]
    whole: list[ArtifactRef] = []
    damaged: list[ArtifactRef] = []
    for ref in store.refs():
        (whole if readable(ref) else damaged).append(ref)
    runs = _runs(store, whole)
    if not runs:
        return removals
    removals += [
        Removal(ref.path, "its manifest is damaged", bytes_of(ref.path)) for ref in damaged
    ]
    kept_runs = [
        run
        for place, run in enumerate(runs)
        if place < keep_runs or _age(run.file) < keep_days * DAY
    ]
    named_by_runs = {key for run in kept_runs for key in run.named()}
    refs = {ref.key: ref for ref in whole}
    needed = _with_lineage(refs, {*registered, *keys_in_use(store.root), *named_by_runs})
    kept = {run.id for run in kept_runs}
    ended = {run.id for run in runs}

    def is_needed(ref: ArtifactRef) -> bool:
        maker = ref.manifest.run_id
        unended = maker not in ended and _age(ref.path) < UNENDED
        return ref.key in needed or maker in kept or unended

    why = (
        f"no part of the {len(kept_runs)} runs to be kept, nor of a registered model or a head map "
        "in use"
    )
    return removals + [
        Removal(ref.path, why, bytes_of(ref.path)) for ref in whole if not is_needed(ref)
    ]


def remove(removals: Iterable[Removal]) -> Iterator[Removal]:
    """Removes one after the other and gives back each that is gone."""
    for removal in removals:
        if removal.path.is_dir():
            # without its manifest it is no artifact, even when a kill leaves the rest
            (removal.path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(removal.path, ignore_errors=True)
        else:
            removal.path.unlink(missing_ok=True)
        if not removal.path.exists():
            yield removal


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


@dataclass(frozen=True, slots=True)
class _Run:
    """One that has ended."""

    id: str
    file: Path
    """Written when it ended."""
    named: Callable[[], list[str]]
    """Keys of the artifacts that it names."""


def _runs(store: Store, refs: Iterable[ArtifactRef]) -> list[_Run]:
    """Newest first."""
    runs = [_Run(file.stem, file, partial(_keys_named, file)) for file in run_files(store)]
    runs += [
        _Run(ref.manifest.run_id, ref.path / MANIFEST, partial(_keys_compared, ref))
        for ref in refs
        if ref.stage == COMPARISON
    ]
    return sorted(runs, key=lambda run: run.file.stat().st_mtime_ns, reverse=True)


def _keys_compared(ref: ArtifactRef) -> list[str]:
    """A comparison and the artifacts of its arms, which stand in its settings."""
    return [ref.key, *strings_in(ref.manifest.settings)]


def _with_lineage(refs: Mapping[str, ArtifactRef], keys: Iterable[str]) -> set[str]:
    """Those of the keys that are among the artifacts, with all that they were made from."""
    needed: set[str] = set()
    for key in keys:
        if key in refs and key not in needed:
            needed.update(ref.key for ref in lineage_among(refs, refs[key]))
    return needed


def _keys_named(file: Path) -> list[str]:
    try:
        return [Path(folder).name for folder in read_summary(file)["artifacts"].values()]
    except (ArtifactError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{file} is not the summary of a run ({error!r}), so what it needs is not known and "
            "nothing was removed. Delete that file if you do not need the run, and try again."
        ) from error


def _stale_scratch(store: Store) -> Iterator[Path]:
    scratch = store.root / ".scratch"
    if not scratch.is_dir():
        return
    for folder in sorted(scratch.iterdir()):
        stage, _, key = folder.name.rpartition("-")
        finished = (store.path(stage, key) / MANIFEST).exists()
        if not store.in_use(stage, key) and (finished or _age(folder) > ABANDONED):
            yield folder


def _age(path: Path) -> float:
    """Seconds since a file was written, or something was last put into a folder."""
    return time.time() - path.stat().st_mtime
