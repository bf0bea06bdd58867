"""Damage to any file of a store is found before the file is used, said, and made good.

A flipped bit, a file cut short, an emptied one, one swapped with another's: in artifacts and their
manifests, in checkpoints, in summaries of runs, in the note of head maps in use, and in what
Prefect keeps of results. Prefect's and MLflow's databases are those programs' own and are not
covered.
"""

import logging
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli.artifacts import verify
from p2d_core.errors import ArtifactError
from p2d_core.store import Store
from p2d_core.store.gc import unneeded
from p2d_core.store.in_use import FILE, InUse, head_map_in_use, put_in_use
from p2d_core.store.manifest import MANIFEST
from p2d_core.store.query import open_reader
from tests.faults.trials import trials
from tests.faults.undisturbed import Undisturbed, contents
from tests.faults.warm import Warm
from tests.small_store import fill, keep_run, summary

OF_A_STORE = 164
OF_RUN_SUMMARIES = 12
OF_A_WHOLE_RUN = 36
OF_CHECKPOINTS = 10
OF_PREFECT = 12


def flip(file: Path, chance: random.Random, _: list[Path]) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut(file: Path, chance: random.Random, _: list[Path]) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(1, len(content))])


def empty_out(file: Path, chance: random.Random, _: list[Path]) -> None:
    file.write_bytes(b"")


def swap(file: Path, chance: random.Random, others: list[Path]) -> None:
    """With a file of the same name if there is one: it looks the most like what belongs there."""
    content = file.read_bytes()
    others = [other for other in others if other.read_bytes() != content]
    alike = [other for other in others if other.name == file.name] or others
    other = chance.choice(sorted(alike))
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES: list[Callable[[Path, random.Random, list[Path]], None]] = [flip, cut, empty_out, swap]


def damage(number: int, files: list[Path]) -> set[Path]:
    """Damages one of the files; gives those whose content is another now, two if it was a swap."""
    chance = random.Random(f"damage {number}")
    before = {file: file.read_bytes() for file in sorted(files)}
    file = chance.choice([file for file, content in before.items() if len(content) > 1])
    DAMAGES[number % len(DAMAGES)](file, chance, [other for other in files if other != file])
    return {file for file, content in before.items() if file.read_bytes() != content}


def artifact_files(store: Store) -> list[Path]:
    return [path for ref in store.refs() for path in ref.path.rglob("*") if path.is_file()]


def artifacts_of(store: Store, files: set[Path]) -> set[str]:
    """Keys of the artifacts that the files belong to."""
    return {file.relative_to(store.root).parts[1] for file in files}


@pytest.mark.parametrize("number", trials(range(OF_A_STORE), quick=12))
def test_a_damaged_artifact_is_found_set_aside_and_made_again(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "artifacts")
    refs = fill(store)
    whole = contents(store.root)
    damaged = damage(number, artifact_files(store))
    assert damaged
    keys = artifacts_of(store, damaged)

    with pytest.raises(ArtifactError) as found:
        verify(None, store.root)
    assert all(any(key in line for line in str(found.value).splitlines()) for key in keys)
    with caplog.at_level(logging.WARNING):
        fill(store, run_id="again")

    assert contents(store.root) == whole
    assert {ref.key for ref in refs.values() if ref.manifest.run_id == "again"} == keys
    lines = [line.getMessage() for line in caplog.records if "is damaged" in line.getMessage()]
    assert len(lines) == len(keys)
    assert all("\n" not in line and "set aside as" in line for line in lines)
    assert {folder.name.split(".")[0] for folder in store.leftovers()} == keys
    verify(None, store.root)


@pytest.mark.parametrize("number", trials(range(OF_RUN_SUMMARIES), quick=4))
def test_a_damaged_summary_of_a_run_is_not_believed(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "artifacts")
    refs = fill(store)
    for run_id in ("run-1", "run-2"):
        keep_run(store, summary(refs, run_id))
    damaged = damage(number, list((store.root / "runs").glob("*.json")))
    with pytest.raises(ArtifactError) as found:
        verify(None, store.root)
    assert all(str(file) in str(found.value) for file in damaged)
    with pytest.raises(ArtifactError, match="nothing was removed"):
        unneeded(store)
    with open_reader(store) as reader:
        if len(damaged) == 1:
            assert reader.run("SELECT count(*) FROM runs").read_all()[0][0].as_py() == 1
        else:
            assert "runs" not in reader.columns
    assert caplog.text.count("is left out") == len(damaged)


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_a_damaged_note_of_the_map_in_use_is_not_believed(number: int, tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    refs = fill(store)
    keep_run(store, summary(refs))
    put_in_use(store.root, "b" * 64, "math", InUse(refs["heads"].key, "2026-01-01", "first", 1))
    verify(None, store.root)
    note = store.root / FILE
    DAMAGES[number](note, random.Random(f"note {number}"), [refs["heads"].path / MANIFEST])
    for ask in (
        lambda: verify(None, store.root),
        lambda: unneeded(store),
        lambda: head_map_in_use(store.root, "b" * 64, "math"),
    ):
        with pytest.raises(ArtifactError, match=r"heads_in_use\.json .* Delete it"):
            ask()


@pytest.fixture
def store(empty: Path, undisturbed: Undisturbed) -> Store:
    """As the undisturbed run left it, without what Prefect remembers: every stage looks itself."""
    shutil.copytree(undisturbed.store, empty)
    return Store(empty)


@pytest.mark.parametrize("number", trials(range(OF_A_WHOLE_RUN), quick=1))
def test_a_run_over_a_damaged_store_uses_none_of_the_damage(
    number: int, warm: Warm, undisturbed: Undisturbed, store: Store
) -> None:
    # the reference is seconds: made again it is another, and its maker's only
    files = [file for file in artifact_files(store) if "/reference/" not in str(file)]
    made = {ref.key: (ref.path / MANIFEST).read_bytes() for ref in store.refs()}
    keys = artifacts_of(store, damage(1000 + number, files))
    code, said = warm.run("artifacts", "verify")
    assert code == 1
    assert all(key in said for key in keys)

    code, said = warm.run("adapt", "run.yaml")

    assert code == 0, said
    assert contents(store.root) == undisturbed.contents
    for key in keys:
        assert len(re.findall(rf"{key[:12]} is damaged .*: set aside as {key}", said)) == 1
    now = {ref.key: (ref.path / MANIFEST).read_bytes() for ref in store.refs()}
    assert {key for key in made if now[key] != made[key]} == keys
    assert warm.run("artifacts", "verify")[0] == 0


@pytest.mark.parametrize("number", trials(range(OF_CHECKPOINTS), quick=0))
def test_training_does_not_go_on_from_a_damaged_checkpoint(
    number: int, warm: Warm, undisturbed: Undisturbed, empty: Path
) -> None:
    stage, last = ("proxy", 5), ("model", 9)
    name, step = (stage, last)[number % 2]
    sealing = rf"^open w /\.scratch/{name}-.*/checkpoint-{step}/seal.json$"
    (place,) = [i for i, event in enumerate(undisturbed.events) if re.search(sealing, event)]
    assert warm.run("adapt", "run.yaml", end_at=place + 1)[0] == -signal.SIGKILL
    (newest,) = empty.glob(f".scratch/{name}-*/checkpoint-{step}")
    damage(2000 + number, [file for file in newest.rglob("*") if file.is_file()])
    code, said = warm.run("adapt", "run.yaml")
    assert code == 0, said
    assert f"checkpoint-{step} of {newest.parent.name} is not gone on from" in said
    assert f"training goes on from checkpoint-{step - 1} of {newest.parent.name}" in said
    assert contents(empty) == undisturbed.contents


@pytest.mark.parametrize("number", trials(range(OF_PREFECT), quick=1))
def test_a_damaged_record_of_prefect_gives_no_stage_another_result(
    number: int, warm: Warm, undisturbed: Undisturbed, store: Store
) -> None:
    records = [path for path in (store.root / "prefect/results").iterdir() if path.is_file()]
    stages = {path.name.split("-")[0] for path in records}
    assert {"evaluation", "samples", "measurements"} <= stages
    damage(3003 + number, records)
    shutil.rmtree(store.root / "runs")
    code, said = warm.run("adapt", "run.yaml", "--summary", "again.json")
    assert code == 0, said
    again = undisturbed.summary_in(warm.folder / "again.json")
    assert again == undisturbed.results
    assert contents(store.root) == undisturbed.contents
