"""What a run leaves when nothing happens to it, and how another store is held against that."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from p2d_core.store import Store
from p2d_core.store.recipe import hash_file
from tests.faults.warm import Warm

OTHERS = ("mlflow", "prefect", "runs", "reports")
"""Folders of a store that name runs; not compared."""


@dataclass(frozen=True)
class Undisturbed:
    """One run from nothing."""

    seconds: float
    events: list[str]
    """Everything that it did to the files of its store, in order."""
    store: Path
    """A copy of what it left."""
    contents: dict[str, str]
    files: set[str]
    temporary: set[str]
    results: dict
    """What its summary says, but for seconds, run ids and what was reused."""
    said: str

    @staticmethod
    def summary_in(file: Path) -> dict:
        """The results in the summary of another run."""
        summary = json.loads(file.read_text())
        heads = {k: v for k, v in summary["heads"].items() if k != "picture"}
        return {
            "heads": heads,
            "selection": summary["selection"],
            "quality": summary["quality"],
            "trainable": summary["trainable"],
            "artifacts": {k: Path(v).name for k, v in summary["artifacts"].items()},
        }


def run_undisturbed(warm: Warm) -> Undisturbed:
    """Runs the job from nothing."""
    shutil.rmtree(warm.store, ignore_errors=True)
    start = time.perf_counter()
    code, said = warm.run(
        "adapt", "run.yaml", "--summary", "summary.json", events=str(warm.folder / "events.json")
    )
    assert code == 0, said
    seconds = time.perf_counter() - start
    copy = warm.folder / "undisturbed"
    shutil.copytree(warm.store, copy)
    return Undisturbed(
        seconds,
        json.loads((warm.folder / "events.json").read_text()),
        copy,
        contents(warm.store),
        files(warm.store),
        names(warm.temporary),
        Undisturbed.summary_in(warm.folder / "summary.json"),
        said,
    )


def contents(store: Path) -> dict[str, str]:
    """Hashes of every file of every artifact, by ``stage/key/name``; but of what a clock said."""
    return {
        f"{ref.stage}/{ref.key}/{name}": hash_file(ref.path / name)
        for ref in Store(store).refs()
        for name in ref.manifest.files
        if ref.stage != "reference"
    }


def files(store: Path) -> set[str]:
    """Every file and folder, but those that name runs."""
    return {name for name in names(store) if name.split("/")[0] not in OTHERS}


def names(folder: Path) -> set[str]:
    """Every file and folder below it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def left_by_runs(store: Path) -> set[str]:
    """What of the other folders only a killed run leaves: drafts, and notes of it."""
    left = {
        str(path.relative_to(store))
        for pattern in ("mlflow/.mlflow-*", "runs/*.tmp", "reports/*.tmp", "prefect/running/[!.]*")
        for path in store.glob(pattern)
    }
    hashes = store.glob("runs/*.sha256")
    return left | {hash.name for hash in hashes if not hash.with_suffix(".json").exists()}
