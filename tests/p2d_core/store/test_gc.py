"""What recent runs need stays; leftovers and what only older runs needed goes."""

import os
from pathlib import Path

import pytest

from p2d_core.errors import ArtifactError
from p2d_core.store import Making, Recipe, Store
from p2d_core.store.gc import remove, unneeded
from p2d_core.store.in_use import FILE, InUse, put_in_use
from tests.small_store import fill, keep_run, put, summary


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def old(file: Path, days: float) -> None:
    seconds = file.stat().st_mtime - days * 24 * 3600
    os.utime(file, (seconds, seconds))


def test_what_the_newest_runs_need_stays_with_all_it_was_made_from(store: Store):
    refs = fill(store)
    needed = summary({"model": refs["model"], "heads": refs["heads"]})
    keep_run(store, needed)
    assert unneeded(store, keep_runs=1) == []


def test_what_only_older_runs_made_and_named_goes(store: Store):
    refs = fill(store, run_id="older")
    other = put(store, "heads", {"heads.png": "x" * 1000}, run_id="older", other=True)
    old(keep_run(store, summary(refs | {"heads": other}, "older")), days=1)
    keep_run(store, summary(refs, "newer"))
    assert [removal.path for removal in unneeded(store, keep_runs=2)] == []
    removals = unneeded(store, keep_runs=1)
    assert [removal.path for removal in removals] == [other.path]
    assert removals[0].bytes >= 1000
    assert removals[0].why == (
        "no part of the 1 runs to be kept, nor of a registered model or a head map in use"
    )
    assert list(remove(removals)) == removals
    assert not other.path.exists()
    assert store.find("model", refs["model"].key) is not None


def test_a_shared_ancestor_stays_for_the_run_that_still_needs_it(store: Store):
    refs = fill(store, run_id="older")
    old(keep_run(store, summary(refs, "older")), days=1)
    keep_run(store, summary({"heads": refs["heads"]}, "newer"))
    gone = {removal.path.parent.name for removal in unneeded(store, keep_runs=1)}
    assert gone == {"measurements", "scores", "subset", "model", "evaluation"}


def test_what_a_run_that_has_not_ended_made_stays_for_a_day(store: Store):
    keep_run(store, summary(fill(store), "run-1"))
    running = put(store, "heads", {"f": "x"}, run_id="running", other=True)
    assert unneeded(store) == []
    old(running.path, days=2)
    assert [removal.path for removal in unneeded(store)] == [running.path]


def test_without_any_run_no_whole_artifact_goes(store: Store):
    fill(store)
    assert unneeded(store, keep_runs=0) == []


def test_leftovers_go_and_nothing_is_touched_before_remove(store: Store):
    refs = fill(store)
    damaged = refs["heads"].path / "heads.png"
    damaged.write_text("other")
    store.find("heads", refs["heads"].key)
    staged = store.root / "model" / f"{'b' * 64}.staging-12345678"
    staged.mkdir()
    removals = unneeded(store)
    assert [removal.path.exists() for removal in removals] == [True, True]
    assert len(list(remove(removals))) == 2
    assert store.leftovers() == []


def test_what_a_process_is_making_now_is_no_leftover(store: Store):
    def build(making: Making) -> None:
        (making.scratch / "checkpoint").write_text("x")
        assert len(store.leftovers()) == 1
        assert unneeded(store) == []

    store.produce(Recipe("model", "1"), build, run_id="r")


def test_checkpoints_of_a_killed_stage_stay_for_a_week(store: Store):
    ref = put(store, "model", {"f": "x"})
    scratch = store.root / ".scratch"
    killed, finished = scratch / f"model-{'c' * 64}", scratch / f"model-{ref.key}"
    for folder in (killed, finished):
        folder.mkdir()
    assert [removal.path for removal in unneeded(store)] == [finished]
    old(killed, days=8)
    assert {removal.path for removal in unneeded(store)} == {killed, finished}


def test_a_broken_summary_of_a_run_to_keep_stops_it(store: Store):
    fill(store)
    keep_run(store, summary({"heads": put(store, "heads", {"f": "x"})})).write_text("{")
    with pytest.raises(ArtifactError, match=r"is not the summary of a run .* nothing was removed"):
        unneeded(store)


def test_an_artifact_whose_manifest_is_damaged_goes_and_spoils_nothing(store: Store):
    refs = fill(store)
    keep_run(store, summary(refs))
    (refs["heads"].path / "manifest.json").write_text("{")
    removals = unneeded(store)
    assert [(removal.path, removal.why) for removal in removals] == [
        (refs["heads"].path, "its manifest is damaged")
    ]


def test_what_is_registered_stays_with_all_it_was_made_from(store: Store):
    refs = fill(store, run_id="older")
    keep_run(store, summary(refs, "older"))
    registered = [refs["subset"].key, "0" * 64]
    gone = {removal.path for removal in unneeded(store, keep_runs=0, registered=registered)}
    assert gone == {refs["model"].path, refs["evaluation"].path}


def test_a_head_map_in_use_stays_with_all_it_was_made_from(store: Store):
    """Runs that ask for it come once a week, others in between."""
    refs = fill(store, run_id="older")
    keep_run(store, summary(refs, "older"))
    put_in_use(store.root, "b" * 64, "sums", InUse(refs["heads"].key, "2026-01-01", "first", 1))
    gone = {removal.path for removal in unneeded(store, keep_runs=0)}
    assert gone == {
        refs[stage].path for stage in ("measurements", "scores", "subset", "model", "evaluation")
    }
    put_in_use(store.root, "b" * 64, "sums", InUse("e" * 64, "2026-01-08", "it drifted", 2))
    assert refs["heads"].path in {removal.path for removal in unneeded(store, keep_runs=0)}


def test_a_comparison_counts_as_a_run_that_names_the_artifacts_of_its_arms(store: Store):
    refs = fill(store, run_id="older")
    old(keep_run(store, summary(refs, "older")), days=3)
    arm = {"arm": "a", "artifacts": {"subset": refs["subset"].key}}
    comparison = put(store, "comparison", {"verdict.json": "[]"}, run_id="compared", runs=[arm])
    rest = put(store, "evaluation", {"f": "x"}, run_id="compared")
    for ref in (comparison, rest):
        old(ref.path / "manifest.json", days=2)
        old(ref.path, days=2)
    gone = {removal.path for removal in unneeded(store, keep_runs=1)}
    assert gone == {refs["model"].path, refs["evaluation"].path}
    keep_run(store, summary(refs, "newer"))
    gone = {removal.path for removal in unneeded(store, keep_runs=1)}
    assert gone == {comparison.path, rest.path}


def test_when_it_cannot_be_read_which_head_maps_are_in_use_nothing_goes(store: Store):
    refs = fill(store, run_id="older")
    keep_run(store, summary(refs, "older"))
    (store.root / FILE).write_text("{")
    with pytest.raises(ArtifactError, match="which head maps are in use"):
        unneeded(store, keep_runs=0)


def test_runs_of_the_last_days_are_kept_beside_the_newest(store: Store):
    refs = fill(store, run_id="older")
    old(keep_run(store, summary(refs, "older")), days=3)
    keep_run(store, summary({"heads": put(store, "heads", {"f": "x"})}, "newer"))
    assert unneeded(store, keep_runs=1, keep_days=4) == []
    assert len(unneeded(store, keep_runs=1, keep_days=2)) == len(refs)
