"""What travels to a worker and back: every byte, checked on arrival."""

from pathlib import Path

import pytest

from p2d_core.aer import Cost
from p2d_core.errors import ArtifactError
from p2d_core.store import Making, Recipe, Store
from p2d_core.store.manifest import MANIFEST
from tasks.parcels import Made, files_of, place_of, read_files, travelling, unpacked, write_files
from tasks.stage import ShardRef


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, words: str):
    def write(making: Making) -> None:
        (making.folder / "deep").mkdir()
        (making.folder / "deep/words.txt").write_text(words)
        (making.folder / "empty").touch()

    return store.produce(Recipe("notes", "1", {"words": words}, {}), write, run_id="one")


def test_inputs_are_below_the_given_folder_with_what_they_had(store, tmp_path):
    one, other = put(store, "one"), put(store, "other")
    shard = ShardRef(str(tmp_path / "shard.parquet"), 3, "sha")
    Path(shard.file).write_bytes(b"rows")
    inputs = {"runtime": "as it is", "first": one, "rest": [other, one], "shard": shard}
    sent = {place_of(ref): files_of(ref) for ref in travelling(inputs)}
    there = unpacked(inputs, sent.__getitem__, tmp_path / "there")
    assert there["runtime"] == "as it is"
    refs = [there["first"], *there["rest"]]
    assert [ref.key for ref in refs] == [one.key, other.key, one.key]
    assert [(ref.path / "deep/words.txt").read_text() for ref in refs] == ["one", "other", "one"]
    assert (there["first"].path / "empty").read_bytes() == b""
    assert (there["shard"].index, Path(there["shard"].file).read_bytes()) == (3, b"rows")
    moved = [*(ref.location for ref in refs), there["shard"].file]
    assert all(Path(place).is_relative_to(tmp_path / "there") for place in moved)


@pytest.mark.parametrize("name", ["deep/words.txt", MANIFEST])
def test_an_artifact_that_arrives_otherwise_than_it_was_sent_is_refused(store, tmp_path, name):
    one = put(store, "one")
    files = files_of(one)
    files[name] = files["empty"]
    with pytest.raises(ArtifactError, match=r"notes \w{12} did not reach the worker as it is"):
        unpacked({"first": one}, lambda place: files, tmp_path / "there")


def test_what_a_worker_made_becomes_the_artifact_at_the_workers_cost(store, tmp_path):
    write_files(files_of(put(store, "one")), tmp_path / "made")
    made = Made(
        read_files(tmp_path / "made"), {"n": 1}, 2, 7, 100.0, Cost(wall_seconds=40, machine="far")
    )
    ref = store.produce(Recipe("notes", "1", {}, {}), made.put_into, run_id="one")
    assert (ref.path / "deep/words.txt").read_text() == "one"
    assert ref.manifest.facts == {"n": 1}
    # what runs before it spent on it counts, and the seconds here do not
    assert (ref.manifest.cost["wall_seconds"], ref.manifest.cost["machine"]) == (140, "far")
