"""`p2d explain` over the artifacts of a small real run, and over stores that lack some of them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from flows.explain import explain
from p2d_core.heads.head_map import read_head_map
from p2d_core.store import Store
from p2d_core.store.manifest import Manifest, read_manifest, sealed
from p2d_core.store.recipe import hash_file
from tests.faults.small_job import SmallJob

SUM = {"parts": {"head-activation": 1.0, "loss-shift": 0.5, "head-influence": 0.25, "bm25": 0.5}}


GATES = ("domain", "consistency", "shift")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> SmallJob:
    """With two subsets: by a sum of scorers, then, by the newest run, by the default filter."""
    job = SmallJob(tmp_path_factory.mktemp("job"))
    job.store = job.folder / "artifacts"
    job.by_sum = job.here(
        job.store,
        scoring={"scorer": "sum", "options": SUM},
        selection={"fraction": 0.1, "pool": 2.0, "where": "n_tokens < 20"},
    )
    job.by_filter = job.here(job.store)
    return job


@pytest.fixture
def p2d(job, monkeypatch, command):
    """Runs a command over the store; gives its exit code and what it said."""
    monkeypatch.setenv("P2D_STORE", str(job.store))
    monkeypatch.setenv("COLUMNS", "100")
    return command


@pytest.fixture
def as_json(p2d):
    def call(*words: str) -> dict:
        code, out, err = p2d("explain", *words, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def copied(job, p2d, tmp_path, monkeypatch) -> Store:
    """The store, for a test to spoil."""
    shutil.copytree(job.store, tmp_path / "copied", ignore=shutil.ignore_patterns("mlflow"))
    monkeypatch.setenv("P2D_STORE", str(tmp_path / "copied"))
    return Store(tmp_path / "copied")


def scores_of(summary) -> dict[str, dict]:
    rows = pq.read_table(Path(summary.artifacts["scores"]) / "scores.parquet").to_pylist()
    return {row["sample_id"]: row for row in rows}


def subset_of(summary) -> dict[str, dict]:
    rows = pq.read_table(Path(summary.artifacts["subset"]) / "subset.parquet").to_pylist()
    return {row["sample_id"]: row for row in rows}


def gates_of(summary) -> dict[str, float]:
    gates = read_manifest(Path(summary.artifacts["scores"])).facts["gates"]
    return {name: gate["threshold"] for name, gate in gates.items()}


def test_the_best_that_were_chosen_with_every_number_as_it_stands_in_the_scores(job, as_json):
    found = as_json("3")
    chosen, scores = subset_of(job.by_filter), scores_of(job.by_filter)
    assert found["run_id"] == job.by_filter.run_id
    assert found["subset"] == Path(job.by_filter.artifacts["subset"]).name
    assert (found["scorer"], found["corpus"], found["chosen"]) == ("head-filter", 400, 40)
    best = sorted(chosen.values(), key=lambda row: -row["affinity"])[:3]
    assert [one["sample"]["sample_id"] for one in found["samples"]] == [
        row["sample_id"] for row in best
    ]
    for one, row in zip(found["samples"], best, strict=True):
        assert one["sample"] == {
            name: row[name]
            for name in ("sample_id", "source", "prompt", "response", "row", "extra")
        }
        assert one["reason"]["chosen"]
        assert one["reason"]["why"] == "drawn"
        values = {part["name"]: part["standing"]["value"] for part in one["parts"]}
        assert values == {n: row[n] for n in ("affinity", *GATES)}
        for part in one["parts"]:
            others = [s[part["name"]] for s in scores.values() if s[part["name"]] is not None]
            standing = part["standing"]
            assert standing["rank"] == 1 + sum(v > standing["value"] for v in others)
            assert standing["of"] == len(others)
            assert standing["lower"] == pytest.approx(np.mean(np.array(others) < standing["value"]))
        cut_offs = {part["name"]: part["cut_off"] for part in one["parts"]}
        lowest = min(row["affinity"] for row in chosen.values())
        assert cut_offs == {"affinity": pytest.approx(lowest)} | gates_of(job.by_filter)
        in_source = [s["affinity"] for s in scores.values() if s["source"] == row["source"]]
        assert one["in_source"]["of"] == len(in_source) == 200
        assert one["in_source"]["rank"] == 1 + sum(v > row["affinity"] for v in in_source)


def test_each_step_says_what_it_wanted_and_the_least_margin_is_the_affinity(job, as_json):
    scores = scores_of(job.by_filter)
    gates = gates_of(job.by_filter)
    for stops, row in {row["gates_passed"]: row for row in scores.values()}.items():
        (one,) = as_json(row["sample_id"])["samples"]
        by_scorer = ["head-activation", "head-proxy-loss", "loss-shift"]
        assert [step["scorer"] for step in one["steps"]] == by_scorer
        for number, (name, step) in enumerate(zip(GATES, one["steps"], strict=True)):
            assert step["threshold"] == gates[name]
            assert step["passed"] == (None if stops < number else stops > number)
            assert (step["affinity"] is None) == (stops < number)
        margins = [step["margin"] for step in one["steps"] if step["margin"] is not None]
        assert min(margins) == pytest.approx(row["affinity"])
        stopped_at = [*GATES, None][stops]
        assert one["reason"]["stopped_at"] == stopped_at
        if stopped_at is not None:
            assert (one["reason"]["chosen"], one["reason"]["why"]) == (False, "stopped")
        assert 0 <= one["steps"][0]["target_lower"] <= 1
    assert {row["gates_passed"] for row in scores.values()} == {0, 1, 2, 3}


def test_heads_add_up_to_the_affinity_in_the_scores(job, as_json):
    scores = scores_of(job.by_filter)
    head_map = read_head_map(Path(job.by_filter.artifacts["heads"]) / "heads.parquet")
    for one in as_json("40")["samples"]:
        domain, consistency, *_ = one["looks"]
        in_scores = scores[one["sample"]["sample_id"]]["domain"]
        assert sum(head["adds"] for head in domain["heads"]) == pytest.approx(in_scores, abs=1e-9)
        assert abs(domain["left_over"]) < 1e-9
        ids = {(head["layer"], head["head"]): head["rank"] for head in domain["heads"]}
        assert ids == {head: rank for rank, head in enumerate(head_map.task_heads, start=1)}
        assert consistency["heads"] is None
        # the loss that the affinity is minus of
        assert consistency["measured"] == {"tuned_loss": pytest.approx(-consistency["affinity"])}


def test_the_nearest_proxy_samples_are_of_the_proxy_set_and_average_to_the_affinity(job, as_json):
    targets = [
        ref for ref in Store(job.store).refs("samples") if (ref.path / "proxy.parquet").exists()
    ]
    proxies = {row["sample_id"]: row for ref in targets
               for row in pq.read_table(ref.path / "proxy.parquet").to_pylist()}  # fmt: skip
    for one in as_json("5")["samples"]:
        near = one["looks"][0]["proxies"]
        assert len(near) == 5  # as many as head-activation averages over
        assert np.mean([each["cosine"] for each in near]) == pytest.approx(
            one["looks"][0]["affinity"]
        )
        assert [each["cosine"] for each in near] == sorted(
            (each["cosine"] for each in near), reverse=True
        )
        for each in near:
            assert each["sample"] == proxies[each["sample"]["sample_id"]]


def test_the_screen_teaches_why(job, p2d):
    code, out, err = p2d("explain", "1")
    assert (code, err) == (0, "")
    assert f"run {job.by_filter.run_id}" in out
    assert "Chosen\n" in out
    assert "samples passed every gate, for 40 places" in out.replace("\n  ", " ")
    assert "Task heads (domain: head-activation" in out
    assert "add up to" in out
    assert "nothing is left over" in out
    assert "Nearest proxy samples (domain: head-activation)" in out
    assert "with the task heads tuned on the proxy set" in out
    best = max(subset_of(job.by_filter).values(), key=lambda row: row["affinity"])
    assert best["sample_id"] in out
    assert best["prompt"][:50] in out
    assert f"row {best['row'] + 1} of {best['source']}" in out
    stopped = next(r for r in scores_of(job.by_filter).values() if r["gates_passed"] == 0)
    out = p2d("explain", stopped["sample_id"][:12].upper())[1]
    assert stopped["sample_id"] in out
    assert "Not chosen\n  Stopped at domain, gate 1 of 3." in out
    assert "not reached" in out
    assert "What passed more gates comes first." in out


def test_the_parts_of_a_sum_with_their_weights_add_up(job, as_json, p2d):
    key = Path(job.by_sum.artifacts["subset"]).name
    found = as_json("4", "--subset", key[:10])
    assert (found["run_id"], found["subset"]) == (None, key)
    heads_seen = 0
    for one in found["samples"]:
        affinity, *parts = one["parts"]
        assert affinity["name"] == "affinity"
        added = {p["name"]: p["weight"] * p["standing"]["value"] for p in parts}
        assert sum(added.values()) == pytest.approx(affinity["standing"]["value"])
        assert set(added) == {"head_activation", "loss_shift", "head_influence", "bm25"}
        looks = {look["scorer"]: look for look in one["looks"]}
        assert abs(looks["head-activation"]["left_over"]) < 1e-9
        heads_seen += len(looks["head-activation"]["heads"])
        losses = looks["loss-shift"]["measured"]
        assert looks["loss-shift"]["affinity"] == pytest.approx(
            losses["base_loss"] - losses["tuned_loss"]
        )
        assert any("by head-influence is no sum over heads" in note for note in one["notes"])
        assert not any("bm25" in note for note in one["notes"])
        assert (
            "best samples that meet selection.where are the pool, for 40 places"
            in one["reason"]["words"]
        )
    assert heads_seen == 4 * len(job.by_sum.heads.ids)
    out = p2d("explain", "1", "--subset", key)[1]
    assert "weight" in out
    assert "loss of the response under the base model, nats a token" in out


def test_a_condition_that_left_a_sample_out_is_named(job, as_json):
    scores = scores_of(job.by_sum)
    long = [row["sample_id"] for row in scores.values() if row["n_tokens"] >= 20]
    (one,) = as_json(long[0], "--subset", job.by_sum.artifacts["subset"])["samples"]
    assert one["reason"]["words"] == "It does not meet selection.where: (n_tokens < 20)."


def test_what_is_no_sample_is_refused_with_the_place_and_a_cure(job, p2d):
    wrong = {
        "zebra": "'zebra' is neither a number of samples nor the beginning of a sample's id",
        "": "'' is neither a number",
        "2000": "ask for 1,000 at most",
        "f" * 64: "begins with 'ffffffff",
        "f" * 65: "is neither a number of samples",
        "-3": "No such option: -3",
    }
    for asked, told in wrong.items():
        code, out, err = p2d("explain", asked)
        assert (code, out) == (2, "")
        assert told in err
        assert "Traceback" not in err
    assert '`p2d sql "SELECT DISTINCT sample_id, prompt' in p2d("explain", "f" * 64)[2]


def test_an_ambiguous_beginning_names_some_that_are_meant(job, p2d):
    code, _, err = p2d("explain", "a")
    assert code == 2
    meant = sorted(i for i in scores_of(job.by_filter) if i.startswith("a"))[:5]
    assert f"begin with 'a': {', '.join(i[:16] for i in meant)}, ... Give more of the id." in err


def test_a_sample_of_the_target_is_told_from_one_that_is_nowhere(job, p2d):
    target = next(
        r for r in Store(job.store).refs("samples") if (r.path / "proxy.parquet").exists()
    )
    proxy, held_out = (
        pq.read_table(target.path / f"{part}.parquet")["sample_id"][0].as_py()
        for part in ("proxy", "held_out")
    )
    assert "is in the target's proxy set: it is kept out of the corpus" in p2d("explain", proxy)[2]
    assert "is held out of the target, to gauge by" in p2d("explain", held_out[:20])[2]


def test_stores_that_are_not_there_or_empty(p2d, tmp_path):
    code, _, err = p2d("explain", "1", "--store", str(tmp_path / "nowhere"))
    assert (code, "there is no store at" in err) == (2, True)
    code, _, err = p2d("explain", "1", "--store", str(tmp_path))
    assert code == 2
    assert "no run of `p2d adapt` or `p2d demo` has ended" in err
    assert "--subset KEY" in err
    code, _, err = p2d("explain", "1", "--subset", "beef", "--store", str(tmp_path))
    assert (code, "there is no subset artifact 'beef'" in err) == (2, True)


@pytest.mark.parametrize("stage", ["subset", "scores", "samples"])
def test_what_is_gone_is_named_with_the_cure(job, copied, p2d, stage):
    gone = Path(job.by_filter.artifacts[stage]).name
    shutil.rmtree(copied.path(stage, gone))
    code, _, err = p2d("explain", "1")
    assert code == 1
    assert f"the {stage} {gone[:12]} of" in err
    assert f"is gone from {copied.root}. `p2d adapt` with the same settings makes it again" in err


def test_damage_is_named_and_nothing_of_the_store_is_touched(job, copied, p2d):
    key = Path(job.by_filter.artifacts["scores"]).name
    file = copied.path("scores", key) / "scores.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    before = sorted(copied.root.rglob("*"))
    code, _, err = p2d("explain", "1")
    assert code == 1
    assert f"{file} is not as it was made. `p2d artifacts verify {key[:12]}` says more" in err
    assert sorted(copied.root.rglob("*")) == before


def test_a_damaged_summary_of_the_newest_run_names_the_way_out(copied, p2d):
    newest = max((copied.root / "runs").glob("*.json"), key=lambda file: file.stat().st_mtime)
    newest.write_text("{}")
    newest.with_suffix(".sha256").unlink()
    os.utime(newest, (2**31, 2**31))
    code, _, err = p2d("explain", "1")
    assert code == 1
    assert f"{newest} does not say which subset its run chose" in err
    assert "--subset KEY" in err


def test_without_its_measurement_a_sample_has_its_numbers_and_says_what_needs_the_model(
    copied, as_json
):
    for ref in list(copied.refs("measurements")):
        shutil.rmtree(ref.path)
    (one,) = as_json("1")["samples"]
    assert one["looks"] == []
    assert one["steps"][0]["margin"] is not None  # what was fitted to the corpus is kept
    assert [note.split(":")[0] for note in one["notes"]] == [*GATES]
    assert all("would need the model again. `p2d adapt` with" in note for note in one["notes"])


def test_scores_kept_without_what_was_fitted_are_fitted_again(job, copied, as_json):
    """As earlier versions kept them; with the measurements gone too, that is said."""
    before = as_json("1")["samples"]
    last = copied.resolve(Path(job.by_filter.artifacts["scores"]).name)
    first = last
    while "previous" in first.manifest.inputs:
        first = copied.resolve(first.manifest.inputs["previous"])
    state = load_file(first.path / "state.safetensors")
    assert {"mean", "matrix"} <= set(state)
    save_file({name: state[name] for name in ("heads", "proxy")}, first.path / "state.safetensors")
    reseal(first)
    after = as_json("1")["samples"]
    heads = [one[0]["looks"][0]["heads"] for one in (before, after)]
    assert [h["adds"] for h in heads[1]] == pytest.approx([h["adds"] for h in heads[0]])
    for key in first.manifest.inputs["measurements"]:
        shutil.rmtree(copied.path("measurements", key))
    (one,) = as_json("1")["samples"]
    assert "would need the model again" in one["notes"][0]
    assert one["steps"][0]["threshold"] is not None
    assert one["steps"][0]["margin"] is None


def test_scores_of_another_version_of_their_scorer_are_not_explained_by_this_one(copied, as_json):
    for ref in copied.refs("scores"):
        reseal(ref, scorer=ref.manifest.settings["scorer"] | {"version": "0"})
    (one,) = as_json("1")["samples"]
    assert one["looks"] == []
    assert (
        "the scores are of version 0 of head-filter, and here is version 2-1-1-1" in one["notes"][0]
    )
    assert one["reason"]["chosen"]


def reseal(ref, **settings) -> None:
    """Writes the manifest anew over what now lies in the folder."""
    manifest: Manifest = ref.manifest
    values = {**manifest.__dict__, "settings": {**manifest.settings, **settings}}
    values["files"] = {
        name: {"size": (ref.path / name).stat().st_size, "sha256": hash_file(ref.path / name)}
        for name in manifest.files
    }
    (ref.path / "manifest.json").write_text(sealed(values))


def test_proxies_and_head_map_that_are_gone_leave_gaps_and_no_more(job, copied, as_json, p2d):
    shutil.rmtree(copied.path("heads", Path(job.by_filter.artifacts["heads"]).name))
    for ref in list(copied.refs("samples")):
        if (ref.path / "proxy.parquet").exists():
            shutil.rmtree(ref.path)
    (one,) = as_json("1")["samples"]
    assert {head["rank"] for head in one["looks"][0]["heads"]} == {None}
    assert [near["sample"] for near in one["looks"][0]["proxies"]] == [None] * 5
    assert "(gone)" in p2d("explain", "1")[1]


def test_long_texts_are_shortened_and_control_characters_stay_off_the_screen(job, p2d):
    from dataclasses import replace

    from rich.console import Console

    from flows.cli.explain import show

    found = explain(Store(job.store), "1")
    sample = found.samples[0].sample
    hostile = replace(sample, prompt="\x1b[31m" + "word " * 400, source="so\x1burce")
    changed = replace(found, samples=[replace(found.samples[0], sample=hostile)])
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(changed, console)
    text = console.export_text()
    assert "\x1b" not in text
    assert "\\x1b[31mword word" in text
    assert "characters more)" in text
    assert len(text) < 6000


def test_help_teaches_with_an_example(p2d):
    code, out, _ = p2d("explain", "--help")
    assert code == 0
    assert "Example: p2d explain 3 explains the three best samples" in out
    assert "p2d explain 3fa9c21b" in out
