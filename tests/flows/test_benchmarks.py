"""Further metrics and tasks of lm-eval, from the settings to MLflow and the report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flows.inputs import check_inputs
from flows.plan import run_plan
from p2d_core.store import Store
from tasks.summary import Summary
from tasks.tracking.registry import samples_hash
from tests.job import Job, quick_job
from tests.tiny_task import write_task

ALSO = ["perplexity", "rouge_l"]


def with_options(rows: list[dict]) -> list[dict]:
    """Each with two wrong answers: its own words reversed, and another row's."""
    return [
        row | {"options": [row["response"], " ".join(row["response"].split()[::-1]), other]}
        for i, row in enumerate(rows)
        for other in [rows[i - 1]["response"]]
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    job = quick_job(tmp_path_factory.mktemp("benchmarks"))
    file = job.folder / "evaluation.jsonl"
    rows = with_options([json.loads(line) for line in file.read_text().splitlines()])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(job.folder / "tasks", "choices", rows)
    write_task(job.folder / "tasks", "answers", rows)
    job.values["evaluation"] |= {
        "metric": "accuracy",
        "choices": "options",
        "also": ALSO,
        "harness": {
            "tasks": ["words_choices", "words_answers"],
            "include_path": "tasks",
            "batch_size": 4,
            "arms": ["base", "p2d", "full"],
        },
    }
    job.plan = run_plan(job.settings(), store=job.store, seconds=1)
    job.first = job.run()
    return job


def computed(summary: Summary) -> list[str]:
    return [line.name for line in summary.stages if not line.reused]


def test_lm_evals_accuracy_is_ours(job):
    quality, lines = job.first.quality, {line.metric: line for line in job.first.harness}
    assert (quality.metric, quality.higher_is_better) == ("accuracy", True)
    assert lines["acc"].value == {"base": quality.base, "p2d": quality.p2d}
    assert lines["acc"].samples == quality.samples == 6
    assert set(lines) == {"acc", "acc_bytes", "exact_match"}
    assert all(stderr is not None for stderr in lines["acc"].stderr.values())


def test_every_number_is_in_mlflow_under_its_arm(job):
    from mlflow import MlflowClient

    quality = job.first.quality
    assert set(quality.also) == set(ALSO)
    client = MlflowClient(job.first.mlflow["tracking_uri"])
    experiment = client.get_experiment_by_name(job.first.mlflow["experiment"])
    runs = client.search_runs([experiment.experiment_id])
    by_arm = {run.data.tags["arm"]: run.data.metrics for run in runs}
    acc = next(line for line in job.first.harness if line.metric == "acc")
    for arm, name in (("base", "base model"), ("p2d", "P2D")):
        metrics = by_arm[name]
        assert metrics["harness/words_choices/acc"] == acc.value[arm]
        assert metrics["harness/words_choices/acc_stderr"] == acc.stderr[arm]
        for further in ALSO:
            assert metrics[f"quality/{further}"] == pytest.approx(quality.also[further][arm])
    assert by_arm["P2D"]["quality/rouge_l/base"] == pytest.approx(quality.also["rouge_l"]["base"])


def test_the_report_has_a_table_of_each(job):
    html = Path(job.first.report).read_text(encoding="utf-8")
    line = next(line for line in job.first.harness if line.metric == "acc")
    for words in ("further metrics", "rouge l", "lm-eval, ± standard error", "words_choices acc",
                  line.text("p2d")):  # fmt: skip
        assert words in html


def test_the_results_are_an_artifact_with_its_lineage(job):
    store = Store(job.store)
    ref = store.resolve(Path(job.first.artifacts["harness_p2d"]).name)
    assert ref.manifest.facts["results"] == json.loads((ref.path / "results.json").read_text())
    assert "model" in {each.stage for each in store.lineage(ref)}


def test_a_plan_foresees_it(job):
    (stage,) = [stage for stage in job.plan.stages if stage.name == "harness"]
    assert stage.seconds > 0


def test_only_what_can_change_the_results_runs_the_tasks_again(job):
    shutil.copytree(job.folder / "tasks", job.folder / "moved")
    harness = job.values["evaluation"]["harness"]
    same = harness | {"include_path": "moved", "batch_size": 1, "arms": ["p2d"]}
    again = job.run(evaluation={"harness": same})
    assert computed(again) == []
    assert [line.value for line in again.harness] == [
        {"p2d": line.value["p2d"]} for line in job.first.harness
    ]
    fewer = job.run(evaluation={"harness": same | {"limit": 2}, "also": ["rouge_l"]})
    assert computed(fewer) == ["evaluation", "harness"]
    assert {line.samples for line in fewer.harness} == {2}
    # the champion is judged by the metric alone
    hashes = {
        samples_hash(Store(job.store).resolve(Path(done.artifacts["evaluation_p2d_target"]).name))
        for done in (job.first, fewer)
    }
    assert len(hashes) == 1
    assert hashes != {""}


def test_examples_before_questions_reach_the_tasks(job):
    harness = job.values["evaluation"]["harness"] | {"num_fewshot": 2}
    plain = check_inputs(job.settings())
    taught = check_inputs(job.settings(evaluation={"harness": harness}), like=None)
    assert taught.harness.num_fewshot == 2
    assert replace(plain, harness=taught.harness) == taught
