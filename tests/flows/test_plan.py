"""What `p2d plan` says: what a run would reuse and take, without making anything."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.environment import NEW_BOOKS
from flows.inputs import check_inputs
from flows.plan import run_plan
from flows.planned import plan_key
from p2d_core.store import Store
from tasks.planned import Plan
from tests.flows.adapt.seen import MADE_FROM_SCRATCH, computed
from tests.job import Job

SUBSET_ON = ["subset", "model", "evaluation"]
ROWS = {
    "target.jsonl": 60, "evaluation.jsonl": 12, "corpus/ledgers.jsonl": 150,
    "corpus/drills.jsonl": 450,
}  # fmt: skip


class Planned(Job):
    """The small job, planned as it is run."""

    def plan(self, head_map: str | None = None, seconds: float = 8, **changes: Any) -> Plan:
        settings = self.settings(**changes)
        return run_plan(settings, store=self.store, head_map=head_map, seconds=seconds)

    def files(self) -> set[Path]:
        return {file.relative_to(self.store) for file in self.store.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Planned:
    """Planned in an empty store, then run."""
    job = Planned(tmp_path_factory.mktemp("plan"), ROWS)
    job.before = job.plan()
    job.files_before = job.files()
    job.first = job.run()
    return job


def states(plan: Plan) -> dict[str, str]:
    return {stage.name: stage.state for stage in plan.stages}


def not_reused(plan: Plan) -> list[str]:
    return [name for name, state in states(plan).items() if state != "reused"]


def test_in_an_empty_store_everything_is_new(job):
    assert set(states(job.before)) == set(MADE_FROM_SCRATCH)
    assert set(states(job.before).values()) == {"new"}
    for stage in job.before.stages:
        assert stage.seconds == stage.cold_seconds > 0, stage.name
    assert job.before.seconds == pytest.approx(sum(s.seconds for s in job.before.stages))
    assert job.before.corpus == job.first.selection.corpus
    assert not job.before.corpus_is_estimated


def test_the_plan_file_is_all_that_is_written(job):
    settings = job.settings()
    key = plan_key(settings, check_inputs(settings), None)
    assert job.files_before == {Path("runs/plans") / f"{key}.json"}


def test_the_plan_has_the_aer_of_its_own_stages(job):
    cold = {stage.name: stage.cold_seconds for stage in job.before.stages}
    counted = sum(
        cold[name]
        for name in ("proxy", "heads", "head_proxy", "measurements", "scores", "subset", "model")
    )
    aer = job.before.aer
    assert aer.cold == pytest.approx(counted / aer.full_seconds)
    assert aer.this_run == aer.cold
    assert aer.speedup == pytest.approx(1 / aer.cold)


def test_the_plan_is_of_the_size_of_what_the_run_took(job):
    """No more than that: the machine of a test is busy with others."""
    took = sum(line.cold_seconds for line in job.first.stages)
    assert took / 10 < job.before.seconds < took * 10
    full = job.first.aer.full_seconds
    assert full / 10 < job.before.aer.full_seconds < full * 10
    refs = [ref for ref in Store(job.store).refs() if ref.stage != "reference"]
    peak = max(ref.manifest.cost["peak_memory_bytes"] for ref in refs)
    assert peak / 2 < job.before.memory_bytes < peak * 2
    kept = sum(file.stat().st_size for file in job.store.rglob("*") if file.is_file())
    assert kept < job.before.disk_bytes < kept * 3 + NEW_BOOKS


def test_the_run_says_what_was_planned_of_it(job):
    assert job.first.planned == job.before
    kept = json.loads(job.first.to_json())["planned"]
    assert [stage["name"] for stage in kept["stages"]] == [s.name for s in job.before.stages]


def test_a_run_with_other_settings_has_not_that_plan(job):
    assert job.run(selection={"fraction": 0.05}).planned is None


def test_after_the_run_everything_is_reused(job):
    plan = job.plan()
    assert not_reused(plan) == []
    assert set(states(plan)) == {line.name for line in job.first.stages}
    assert plan.aer.cold == pytest.approx(job.first.aer.cold)
    assert plan.aer.this_run == 0
    for stage in plan.stages:
        (line,) = [line for line in job.first.stages if line.name == stage.name]
        assert stage.cold_seconds == pytest.approx(line.cold_seconds)
    assert plan.starting_seconds is not None
    assert plan.seconds == pytest.approx(plan.starting_seconds)


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"selection": {"fraction": 0.07}}, SUBSET_ON),
        ({"training": {"learning_rate": 2e-3}}, ["model", "evaluation"]),
        ({"evaluation": {"metric": "exact_match"}}, ["evaluation"]),
        ({"scoring": {"tokens_per_batch": 512}}, []),
        ({"arms": {"random": True}}, ["subset_random", "model_random", "evaluation"]),
        ({"arms": {"full": "measured"}}, ["model_full", "evaluation"]),
        ({"scoring": {"options": {"domain_quantile": 0.06}}}, ["scores", "measurements"]),
    ],
    ids=str,
)
def test_what_changes_is_planned_anew_and_no_more(job, changes, new):
    plan = job.plan(seconds=1, **changes)
    assert set(not_reused(plan)) >= set(new)
    if "scoring" not in changes or not new:
        assert set(not_reused(plan)) == set(new)
    for stage in plan.stages:
        assert (stage.seconds > 0) == (stage.state != "reused"), stage.name


def test_the_run_computes_just_what_the_plan_said(job):
    changes = {"selection": {"fraction": 0.08}}
    planned = not_reused(job.plan(seconds=1, **changes))
    assert computed(job.run(**changes)) == planned == SUBSET_ON


def test_what_waits_for_a_head_map_is_said_to(job):
    plan = job.plan(seconds=1, proxy={"samples": 21})
    said = states(plan)
    assert said["proxy"] == said["heads"] == "new"
    for stage in ("head_proxy", "measurements", "scores", "subset", "model"):
        assert said[stage] == "unknown until heads is made"
    assert said["evaluation"] == "unknown until heads is made"
    assert said["samples"] == "new"  # the proxy set is another


def test_another_target_with_a_head_map_measures_nothing_anew(job):
    lines = (job.folder / "whole/target.jsonl").read_text().splitlines(keepends=True)
    (job.folder / "another.jsonl").write_text("".join(lines[100:160]))
    only = {"scoring": {"scorer": "head-activation"}, "target": {"path": "another.jsonl"}}
    job.run(scoring={"scorer": "head-activation"})
    said = states(job.plan(seconds=1, head_map=job.first.artifacts["heads"], **only))
    assert said["measurements"] == said["proxy"] == said["heads"] == "reused"
    assert said["scores"] == said["subset"] == "new"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {
                "heads": {"average_over": 2},
                "arms": {"random": True, "full": "measured"},
                "training": {"adaptation": "lora", "group_by_length": True},
            },
            marks=pytest.mark.slow,
        ),
        {
            "scoring": {"scorer": "less", "options": {"epochs": 1, "dimensions": 256}},
            "evaluation": {"retention": {"path": "kept.jsonl"}},
        },
    ],
    ids=str,
)
def test_plan_and_run_agree_on_every_stage(job, changes):
    """Both walk the same recipes: what a run made, the plan finds."""
    lines = (job.folder / "corpus/drills.jsonl").read_text().splitlines(keepends=True)
    (job.folder / "kept.jsonl").write_text("".join(lines[:25]))
    before = job.plan(seconds=2, **changes)
    done = job.run(**changes)
    assert {s.name for s in before.stages} == {line.name for line in done.stages}
    assert done.planned == before
    after = job.plan(**changes)
    assert not_reused(after) == []
    assert after.aer.cold == pytest.approx(done.aer.cold)


def test_the_time_for_planning_is_kept(job):
    start = time.monotonic()
    plan = job.plan(seconds=4, proxy={"samples": 22, "epochs": 500}, training={"epochs": 5000})
    assert time.monotonic() - start < 30
    assert plan.seconds > 100


def test_less_time_leaves_the_plan_less_sure(job):
    changes = {"training": {"epochs": 700}}
    sure, unsure = (
        next(s for s in job.plan(seconds=seconds, **changes).stages if s.name == "model")
        for seconds in (20, 0.01)
    )
    assert unsure.spread_seconds / unsure.seconds > sure.spread_seconds / sure.seconds


@pytest.fixture
def p2d(job, command):
    """A command over the job's store; gives its exit code and what it said, in one line."""

    def call(*words: str) -> tuple[int, str, str]:
        code, out, err = command(*words, "--store", str(job.store))
        return code, " ".join(out.split()), " ".join(err.split())

    return call


def test_the_command_says_it_and_writes_it(job, p2d, tmp_path):
    file, written = job.folder / "run.yaml", tmp_path / "plan.json"
    file.write_text(yaml.safe_dump(job.values | {"selection": {"fraction": 0.09}}))
    code, shown, _ = p2d("plan", str(file), "--seconds", "3", "--json", str(written))
    assert code == 0
    assert "proxy 0.0 reused" in shown
    assert "nothing was made" in shown
    plan = Plan.model_validate_json(written.read_text())
    assert not_reused(plan) == SUBSET_ON
    assert f"whole run {plan.seconds:,.1f}" in shown


def test_wrong_input_is_refused_as_by_adapt(job, p2d):
    file = job.folder / "wrong.yaml"
    file.write_text(yaml.safe_dump(job.values | {"target": {"path": "nowhere.jsonl"}}))
    refused = [p2d(command, str(file)) for command in ("plan", "adapt")]
    assert refused[0] == refused[1]
    assert refused[0][0] == 2
    assert "nowhere.jsonl" in refused[0][2]


@pytest.mark.parametrize("words", [["plan"], ["plan", "my.yaml", "--demo"]])
def test_a_file_or_the_demo_is_planned(p2d, words):
    code, _, said = p2d(*words)
    assert code == 2
    assert "takes a settings file, or --demo" in said
