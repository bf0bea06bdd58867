"""Learning rates that the settings leave to P2D: found on the proxy set, and paid for."""

import json
from io import StringIO

import pytest
from rich.console import Console

import tasks.rate
from flows.cli.screen import show_summary
from flows.inputs import check_inputs
from flows.looking import look_up
from flows.plan import run_plan
from p2d_core.adaptation.adaptations import SLICES
from p2d_core.adaptation.rates import gentle_rate, rate_for
from p2d_core.store import Store
from tasks.rate import TRIED
from tasks.summary import ProxyRunSummary, TrainableSummary
from tests.job import Job

AUTO = {"heads": {"proxy_learning_rate": "auto"}, "training": {"learning_rate": "auto"}}
"""The defaults; the small job has numbers, which are quicker."""


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    job = Job(tmp_path_factory.mktemp("job"), **AUTO)
    job.first = job.run()
    return job


def rate_of(job, summary, stage="rate"):
    return Store(job.store).resolve(summary.artifacts[stage])


def test_the_best_on_the_held_out_proxy_samples_is_taken_for_both_trainings(job):
    found = rate_of(job, job.first)
    tried = json.loads((found.path / TRIED).read_text())
    losses = {float(rate): loss for rate, loss in tried["tried"].items()}
    untuned = losses.pop(0.0)
    assert tried["learning_rate"] == gentle_rate(losses, untuned)
    assert len(losses) >= 3
    for stage in ("head_proxy", "model"):
        made = Store(job.store).resolve(job.first.artifacts[stage]).manifest
        assert made.settings["training"]["learning_rate"] == tried["learning_rate"]
    assert job.first.trainable.learning_rate == tried["learning_rate"]
    assert job.first.trainable.rates_tried == tried["tried"]


def test_the_search_is_made_once_and_counts_as_training(job):
    store = Store(job.store)
    assert len([*store.refs("rate")]) == 1
    spent = [
        store.resolve(job.first.artifacts[stage]).manifest.cost["wall_seconds"]
        for stage in ("rate", "model")
    ]
    assert job.first.aer.stages["model"] == pytest.approx(sum(spent))


def test_each_rate_is_tried_for_thirty_steps_at_least(job):
    """20 proxy samples are 3 steps a pass: 10 passes, where the task heads are tuned for one."""
    assert check_inputs(job.settings()).rate_training.epochs == 10
    more = check_inputs(job.settings(heads={"proxy_epochs": 12, **AUTO["heads"]}))
    assert more.rate_training.epochs == more.head_proxy_training.epochs == 12
    of_each = rate_of(job, job.first).manifest.cost["tokens"]
    once = rate_of(job, job.first, "head_proxy").manifest.cost["tokens"]
    # 0 is the base as it is
    assert of_each == (len(job.first.trainable.rates_tried) - 1) * 10 * once


def test_the_search_has_tuned_the_heads_already_where_it_tries_as_they_are_to_be_tuned(job):
    """The same job with the rate that was found, given as a number, trains them itself."""
    searched = job.run(heads={"proxy_epochs": 12, **AUTO["heads"]})
    found = rate_of(job, searched).manifest.facts["learning_rate"]
    given = job.run(heads={"proxy_epochs": 12, "proxy_learning_rate": found})
    taken, trained = (rate_of(job, done, "head_proxy") for done in (searched, given))
    assert taken.key != trained.key
    assert taken.manifest.cost["tokens"] == 0 < trained.manifest.cost["tokens"]
    for name in (SLICES, "held_out.json"):
        assert (taken.path / name).read_bytes() == (trained.path / name).read_bytes()
    assert taken.manifest.facts["steps"] == trained.manifest.facts["steps"] == 36
    assert taken.manifest.facts["trainable"] == trained.manifest.facts["trainable"] > 0
    # what the chart of the arms shows is the training, not the copying
    assert taken.manifest.facts["training_seconds"] > taken.manifest.cost["wall_seconds"]
    # the small job's own heads are tuned for a pass, and rates are tried for ten
    assert rate_of(job, job.first, "head_proxy").manifest.facts["steps"] == 3


def test_it_says_what_was_tried(job):
    text = job.first.trainable.rate_text
    best = f"{job.first.trainable.learning_rate:g}"
    assert text.startswith(f"{best} (held-out proxy samples: loss ")
    assert text.count(" at ") == len(job.first.trainable.rates_tried)
    report = job.store / "reports" / f"{job.first.run_id}.html"
    assert f"<dt>learning rate</dt><dd>{text}</dd>" in report.read_text()
    console = Console(width=80, record=True, file=StringIO())
    show_summary(job.first, None, console)
    assert " ".join(console.export_text().split()).count(f"Learning rate {text}.") == 1


def test_a_rate_with_which_training_ran_away_is_named_too():
    moved = {"parameters": 1, "share_of_model": 0.1, "share_of_attention": 0.1}
    tried = {"0": 5.5, "0.001": 1.25, "0.003": None}
    trainable = TrainableSummary(**moved, learning_rate=1e-3, rate_found=1e-3, rates_tried=tried)
    assert trainable.rate_text == (
        "0.001 (held-out proxy samples: loss 5.5 at 0, 1.25 at 0.001, none at 0.003)"
    )
    longer = trainable.model_copy(update={"learning_rate": 5.5e-4})
    assert longer.rate_text.startswith("0.00055, from 0.001 for more steps (held-out")


def test_another_budget_searches_for_nothing_anew(job):
    again = job.run(selection={"fraction": 0.05})
    assert "rate" in again.reused
    assert "model" not in again.reused


def test_a_longer_training_gets_less_of_the_rate_that_was_found(job):
    """140 samples are 18 steps a pass: 4 passes are 72 where 30 were tried."""
    found = rate_of(job, job.first).manifest.facts
    done = job.run(training={"epochs": 4})
    assert found["steps"] == 30
    assert done.trainable.learning_rate == rate_for(found["learning_rate"], 30, 72)
    assert done.trainable.rates_tried == found["tried"]


def test_a_rate_that_is_given_is_not_searched_for(job):
    given = {"heads": {"proxy_learning_rate": 1e-3}, "training": {"learning_rate": 3e-3}}
    done = job.run(**given)
    assert "rate" not in {line.name for line in done.stages}
    assert (done.trainable.learning_rate, done.trainable.rate_text) == (3e-3, "0.003")


def test_it_says_what_the_proxy_run_learnt(job):
    proxy = rate_of(job, job.first, "proxy").manifest.facts
    said = job.first.heads.proxy_run
    assert said.held_out_before == proxy["held_out_loss_before"]
    assert said.held_out_after == proxy["held_out_loss_after"] < said.held_out_before
    assert said.text.startswith("Proxy run: 3 steps at 0.0001 took the loss on held-out samples")
    report = job.store / "reports" / f"{job.first.run_id}.html"
    assert said.text in report.read_text()
    console = Console(width=200, record=True, file=StringIO())
    show_summary(job.first, None, console)
    assert said.text in " ".join(console.export_text().split())


def test_a_proxy_run_that_learnt_nothing_says_what_to_set():
    worse = ProxyRunSummary(learning_rate=0.1, steps=130, held_out_before=1.25, held_out_after=7.5)
    assert worse.text == (
        "Proxy run: 130 steps at 0.1 took the loss on held-out samples from 1.25 to 7.5. Nothing "
        "was learnt to rank heads by: set a lower proxy.learning_rate."
    )


@pytest.mark.slow
def test_other_adaptations_have_searches_of_their_own_and_full_fine_tuning_is_free(job):
    done = job.run(
        training={"adaptation": "lora", "options": {"rank": 2}},
        arms={"full": "measured", "full_learning_rate": "auto"},
    )
    of = {name: rate_of(job, done, name).manifest for name in ("rate", "rate_full")}
    assert {name: manifest.facts["adaptation"] for name, manifest in of.items()} == {
        "rate": "lora",
        "rate_full": "full",
    }
    full = Store(job.store).resolve(done.artifacts["model_full"]).manifest
    # 1,220 samples are 153 steps
    rate = rate_for(of["rate_full"].facts["learning_rate"], 30, 153)
    assert full.settings["training"]["learning_rate"] == rate
    # head_proxy's search was of the heads, and is paid for too
    paid = {line.name: line.cold_seconds for line in done.stages}
    assert done.aer.stages["model"] == pytest.approx(paid["rate"] + paid["model"])


def test_a_search_that_was_stopped_does_not_try_again_what_it_tried(job, monkeypatch):
    tried = []
    measured = tasks.rate.mean_loss

    def cut_off_at_the_third(*given):
        tried.append(given)
        if len(tried) == 3:
            raise RuntimeError("the power went")
        return measured(*given)

    monkeypatch.setattr(tasks.rate, "mean_loss", cut_off_at_the_third)
    with pytest.raises(RuntimeError, match="the power went"):
        job.run(seed=5)
    done = job.run(seed=5)
    assert len(tried) == len(done.trainable.rates_tried) + 1


def test_a_plan_has_the_search_and_says_what_waits_for_it(job, tmp_path):
    as_tried = job.settings(heads={"proxy_epochs": 10, **AUTO["heads"]})
    plan = run_plan(as_tried, store=tmp_path / "empty", seconds=5)
    stages = {stage.name: stage for stage in plan.stages}
    assert stages["rate"].seconds > 0 == stages["head_proxy"].seconds, "the search has tuned them"
    again = run_plan(job.settings(), store=job.store, seconds=5)
    assert {stage.name: stage.state for stage in again.stages}["rate"] == "reused"
    settings = job.settings(proxy={"epochs": 2})
    found = look_up(settings, check_inputs(settings), job.store, None)
    assert found.state("model", found.of("model")) == "unknown until heads is made"
