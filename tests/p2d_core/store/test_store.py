"""Artifacts are made once, found by what they are made from, and never trusted unread."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from p2d_core.errors import ArtifactError
from p2d_core.store import Making, Recipe, Store
from p2d_core.store.manifest import MANIFEST, read_manifest, sealed
from p2d_core.store.recipe import canonical_json, hash_files
from tests.small_store import fill, put

RECIPE = Recipe("heads", "1", {"ranker": "spad"}, {"base": "a" * 64})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def never(making: Making) -> None:
    raise AssertionError("was made again")


def hello(making: Making) -> None:
    (making.folder / "hello.txt").write_text("hello")
    making.facts["words"] = 1
    making.samples, making.tokens = 2, 7


def test_equal_recipes_have_equal_keys_whatever_the_order_of_their_settings():
    one = Recipe("heads", "1", {"a": 1, "b": 2}, {})
    other = Recipe("heads", "1", {"b": 2, "a": 1}, {})
    assert one.key == other.key
    assert len(one.key) == 64


@pytest.mark.parametrize(
    "other",
    [
        Recipe("scores", "1", {"ranker": "spad"}, {"base": "a" * 64}),
        Recipe("heads", "2", {"ranker": "spad"}, {"base": "a" * 64}),
        Recipe("heads", "1", {"ranker": "random"}, {"base": "a" * 64}),
        Recipe("heads", "1", {"ranker": "spad"}, {"base": "b" * 64}),
    ],
    ids=["stage", "version", "settings", "inputs"],
)
def test_whatever_can_change_the_result_changes_the_key(other: Recipe):
    assert other.key != RECIPE.key


def test_a_key_is_the_same_on_every_machine_and_day():
    # by an independent implementation
    text = '{"inputs":{},"settings":{},"stage":"s","version":"1"}'
    done = subprocess.run(["sha256sum"], input=text.encode(), capture_output=True, check=True)
    key = done.stdout.split()[0].decode()
    assert Recipe("s", "1").key == key


def test_a_number_that_is_none_has_no_key():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"rate": float("nan")})


def test_the_hash_of_files_is_of_names_and_contents_not_of_their_folder(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("a")
    one, two = tmp_path / "one" / "a.txt", tmp_path / "two" / "a.txt"
    assert hash_files([one]) == hash_files([two])
    two.write_text("b")
    assert hash_files([one]) != hash_files([two])


def test_what_is_made_is_found_and_says_what_it_is(store: Store):
    ref = store.produce(RECIPE, hello, run_id="run-1")
    assert store.find("heads", RECIPE.key) == ref
    manifest = ref.manifest
    assert (manifest.stage, manifest.settings, manifest.run_id) == (
        "heads",
        RECIPE.settings,
        "run-1",
    )
    assert manifest.facts == {"words": 1}
    assert manifest.files["hello.txt"]["size"] == 5
    assert (manifest.cost["samples"], manifest.cost["tokens"]) == (2, 7)
    assert manifest.cost["wall_seconds"] > 0


def test_the_second_time_it_is_reused_and_keeps_the_run_that_made_it(store: Store):
    store.produce(RECIPE, hello, run_id="run-1")
    again = store.produce(RECIPE, never, run_id="run-2")
    assert again.manifest.run_id == "run-1"


def test_when_making_fails_nothing_is_left_but_the_scratch_folder(store: Store):
    def fails(making: Making) -> None:
        (making.folder / "half").write_text("half")
        (making.scratch / "checkpoint").write_text("step 5")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        store.produce(RECIPE, fails, run_id="run-1")
    assert list((store.root / "heads").iterdir()) == []

    def goes_on(making: Making) -> None:
        assert (making.scratch / "checkpoint").read_text() == "step 5"
        hello(making)

    ref = store.produce(RECIPE, goes_on, run_id="run-2")
    assert list((store.root / ".scratch").iterdir()) == []
    assert set(ref.manifest.files) == {"hello.txt"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "hello.txt").write_text("hellO"), "hello.txt has other content"),
        (lambda f: (f / "hello.txt").write_text("hell"), "hello.txt has 4 bytes, not 5"),
        (lambda f: (f / "hello.txt").unlink(), "hello.txt is missing"),
        (lambda f: (f / "hello.bin").write_text("x"), "hello.bin is none of its files"),
        (lambda f: (f / MANIFEST).write_text("{"), "is not a manifest"),
        (lambda f: (f / MANIFEST).write_text("[]"), "is not a manifest"),
        (lambda f: (f / MANIFEST).write_text('{"key": 1}'), "is not a manifest"),
    ],
    ids=[
        "content",
        "size",
        "missing",
        "one too many",
        "broken manifest",
        "no object",
        "half a manifest",
    ],
)
def test_a_damaged_artifact_is_set_aside_and_made_again(store, caplog, damage, said):
    folder = store.produce(RECIPE, hello, run_id="run-1").path
    damage(folder)
    with caplog.at_level(logging.WARNING):
        ref = store.produce(RECIPE, hello, run_id="run-2")
    assert said in caplog.text
    assert "set aside as" in caplog.text
    assert ref.manifest.run_id == "run-2"
    assert store.faults(ref) == []
    aside = store.leftovers()
    assert [".damaged-" in folder.name for folder in aside] == [True]
    assert [one.key for one in store.refs()] == [RECIPE.key]


def test_a_manifest_with_changed_settings_is_not_believed(store: Store):
    ref = store.produce(RECIPE, hello, run_id="run-1")
    values = json.loads((ref.path / MANIFEST).read_text())
    values["settings"]["ranker"] = "random"
    (ref.path / MANIFEST).write_text(sealed(values))
    assert store.faults(ref) == [f"{MANIFEST} tells of another artifact than {RECIPE.key[:12]}"]


def test_a_file_named_in_the_manifest_may_not_lie_outside_the_artifact(store: Store):
    ref = store.produce(RECIPE, hello, run_id="run-1")
    (ref.path.parent / "outside.txt").write_text("hello")
    values = json.loads((ref.path / MANIFEST).read_text())
    values["files"]["../outside.txt"] = values["files"]["hello.txt"]
    (ref.path / MANIFEST).write_text(sealed(values))
    assert store.faults(ref) == ["../outside.txt lies outside the artifact"]


def test_a_folder_without_a_manifest_is_no_artifact(store: Store):
    folder = store.path("heads", RECIPE.key)
    folder.mkdir(parents=True)
    (folder / "heads.parquet").write_text("half")
    assert store.find("heads", RECIPE.key) is None
    with pytest.raises(ArtifactError, match=r"is no artifact: it has no manifest\.json"):
        read_manifest(folder)
    ref = store.produce(RECIPE, hello, run_id="run-1")
    assert sorted(file.name for file in ref.path.iterdir()) == ["hello.txt", MANIFEST]


MAKER = """
import os, sys, time
from pathlib import Path
from p2d_core.store import Recipe, Store

def build(making):
    with open(sys.argv[2], "a") as told:
        told.write(f"{os.getpid()}\\n")
    (making.folder / "file").write_text("half")
    time.sleep(float(sys.argv[3]))

Store(Path(sys.argv[1])).produce(Recipe("heads", "1"), build, run_id="r")
"""


def maker(store: Store, told: Path, seconds: float) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", MAKER, str(store.root), str(told), str(seconds)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()})


def test_of_two_processes_one_makes_it_and_the_other_waits(store: Store, tmp_path: Path):
    told = tmp_path / "told"
    both = [maker(store, told, 0.3) for _ in range(2)]
    assert [process.wait(30) for process in both] == [0, 0]
    assert len(told.read_text().splitlines()) == 1


def test_the_lock_of_a_killed_process_is_gone(store: Store, tmp_path: Path):
    told = tmp_path / "told"
    killed = maker(store, told, 60)
    end = time.monotonic() + 20
    while not told.exists() and time.monotonic() < end:
        time.sleep(0.02)
    key = Recipe("heads", "1").key
    assert store.in_use("heads", key)
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    assert not store.in_use("heads", key)
    assert [".staging-" in folder.name for folder in store.leftovers()] == [True]
    ref = store.produce(Recipe("heads", "1"), hello, run_id="r")
    assert store.faults(ref) == []


def test_lineage_walks_back_to_the_samples(store: Store):
    refs = fill(store)
    stages = [ref.stage for ref in store.lineage(refs["model"])]
    assert stages[0] == "model"
    assert sorted(stages) == sorted(
        ["model", "heads", "subset", "proxy", "scores", "samples", "measurements"]
    )


def test_an_artifact_is_meant_by_the_beginning_of_its_key_or_by_its_folder(store: Store):
    refs = fill(store)
    heads = refs["heads"]
    assert store.resolve(heads.key[:10]) == heads
    assert store.resolve(f"heads/{heads.key[:10]}") == heads
    assert store.resolve(heads.location, stage="heads") == heads
    with pytest.raises(ArtifactError, match=r"there is no model artifact .* lists them"):
        store.resolve(heads.key, stage="model")
    with pytest.raises(ArtifactError, match="there is no artifact ''"):
        store.resolve("")


def test_a_beginning_that_fits_several_is_refused(store: Store):
    for number in range(17):
        put(store, "heads", {"f": str(number)}, number=number)
    shared = next(c for c in "0123456789abcdef" if sum(ref.key[0] == c for ref in store.refs()) > 1)
    with pytest.raises(ArtifactError, match=rf"artifacts begin with '{shared}': heads/.*Give more"):
        store.resolve(shared)
