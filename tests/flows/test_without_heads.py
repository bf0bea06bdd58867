"""A run in which neither scorer nor adaptation looks at heads: none are ranked, none are paid."""

import io
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from flows.cli.screen import show_summary
from flows.plan import run_plan
from p2d_core.store import Store
from tests.job import quick_job

LORA = {"training": {"adaptation": "lora", "options": {"rank": 2}}}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    made = quick_job(tmp_path_factory.mktemp("without"))
    made.plan = run_plan(made.settings(**LORA), store=made.store, seconds=5)
    made.first = made.run(**LORA)
    return made


def test_no_heads_are_ranked_and_the_aer_has_no_term_of_them(job):
    assert job.first.heads is None
    assert not {"proxy", "heads", "head_proxy"} & {line.name for line in job.first.stages}
    assert job.first.aer.stages["proxy"] == job.first.aer.stages["heads"] == 0
    assert not [*Store(job.store).refs("heads"), *Store(job.store).refs("proxy")]


def test_the_plan_has_the_same_stages(job):
    planned = [stage.name for stage in job.plan.stages]
    assert planned == [line.name for line in job.first.stages]


def test_who_looks_at_heads_gets_them(job):
    """The control: the task heads' own adaptation, of the same subset."""
    by_heads = job.run()
    assert by_heads.heads.selected > 0
    assert by_heads.aer.stages["proxy"] > 0
    assert by_heads.aer.stages["heads"] > 0
    assert by_heads.artifacts["subset"] == job.first.artifacts["subset"]
    given = job.run(head_map=by_heads.artifacts["heads"], **LORA)
    assert given.heads is None
    assert given.aer.cold == pytest.approx(job.first.aer.cold)
    assert given.selection.notes[-1] == (
        "the head map that was given was not looked at: neither tfidf nor lora looks at heads"
    )


def test_screen_report_and_mlflow_say_so(job):
    console = Console(width=100, record=True, file=io.StringIO())
    show_summary(job.first, None, console)
    text = " ".join(console.export_text().split())
    assert "No heads were ranked: neither it nor tfidf looks at any." in text
    report = Path(job.first.report).read_text()
    assert "none: neither tfidf nor lora looks at any" in report
    run = MlflowClient(job.first.mlflow["tracking_uri"]).get_run(job.first.mlflow["run_id"])
    assert not {"heads", "ranker"} & {*run.data.tags}
    assert "heads/selected" not in run.data.metrics
    assert run.data.metrics["AER"] == pytest.approx(job.first.aer.cold, abs=1e-3)
