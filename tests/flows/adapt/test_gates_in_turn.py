"""Gates after the first: how much of a corpus is measured for them."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from p2d_core.store import Store
from tasks.summary import Summary
from tests.flows.adapt.seen import samples_measured
from tests.job import Job


def seconds_of(job: Job, summary: Summary, at_least: int = 0) -> float:
    """That a run's own measurements took, of shards with at least so many samples in them."""
    manifests = [ref.manifest for ref in Store(job.store).refs("measurements")]
    own = [m.cost for m in manifests if m.run_id == summary.run_id]
    return sum(cost["wall_seconds"] for cost in own if cost["samples"] >= at_least)


def cold_measurements(summary: Summary) -> float:
    return sum(line.cold_seconds for line in summary.stages if line.name == "measurements")


def gates(job: Job, summary: Summary, store: Path | None = None) -> dict[str, dict[str, float]]:
    scores = Store(store or job.store).resolve(summary.artifacts["scores"])
    return dict(scores.manifest.facts["gates"])


def test_gates_after_the_first_stop_measuring_when_enough_passed(job):
    few = job.run(scoring={"enough": 1.0}, selection={"fraction": 0.05})
    whole, quarter = gates(job, job.first), gates(job, few)
    reached = whole["domain"]["passed"]
    assert whole["consistency"]["tried"] == reached
    assert 1 / 8 < quarter["consistency"]["tried"] / reached < 3 / 8
    assert quarter["shift"]["tried"] == quarter["consistency"]["passed"]
    assert samples_measured(job, few) == sum(quarter[g]["tried"] for g in ("consistency", "shift"))
    assert all(quarter[gate]["threshold"] == whole[gate]["threshold"] for gate in whole)
    assert (few.selection.selected, few.selection.notes) == (60, [])
    # paid are the first gate for all, and the others for the quarter alone
    first_gate = seconds_of(job, job.first, at_least=reached + 1)
    assert first_gate < cold_measurements(job.first) == pytest.approx(seconds_of(job, job.first))
    assert cold_measurements(few) == pytest.approx(first_gate + seconds_of(job, few))

    more = job.run(scoring={"enough": 8.0}, selection={"fraction": 0.05})
    assert more.artifacts["scores"] == job.first.artifacts["scores"]


def test_where_too_few_of_a_share_pass_the_rest_is_measured_too_and_paid_once(job):
    """Half of the target passes this gate, and an eighth would do; of the corpus a tenth does."""
    filtered = {
        "scorer": "loss-filter",
        "options": {"consistency_quantile": 0.0, "shift_quantile": 0.5},
    }
    in_turn = job.run(scoring=filtered | {"enough": 1.0}, selection={"fraction": 0.05})
    assert samples_measured(job, in_turn) == 2 * 1200  # in both steps each sample once
    parts = [ref.manifest for ref in Store(job.store).refs("measurements")]
    parts = [m for m in parts if m.run_id == in_turn.run_id]
    (line,) = [line for line in in_turn.stages if line.name == "measurements"]
    assert line.cold_seconds == pytest.approx(sum(m.cost["wall_seconds"] for m in parts))

    at_once = Job(job.folder / "elsewhere").run(scoring=filtered, selection={"fraction": 0.05})
    assert gates(job, in_turn) == gates(job, at_once, job.folder / "elsewhere/artifacts")
    one, other = (
        pq.read_table(Path(run.artifacts["scores"]) / "scores.parquet")
        for run in (in_turn, at_once)
    )
    assert one.drop_columns(["affinity", "consistency", "shift"]) == other.drop_columns(
        ["affinity", "consistency", "shift"]
    )
    np.testing.assert_allclose(one["shift"], other["shift"], rtol=1e-4, atol=1e-5)

    # the rest was measured into what measuring all at once would have made
    again = job.run(scoring=filtered, selection={"fraction": 0.05})
    assert again.artifacts["scores"] == in_turn.artifacts["scores"]


def test_a_larger_share_takes_over_what_every_later_gate_measured_of_a_smaller_one(job):
    filtered = {
        "options": {"domain_quantile": 0.0, "consistency_quantile": 0.0, "shift_quantile": 0.5}
    }
    in_turn = job.run(scoring=filtered | {"enough": 1.0}, selection={"fraction": 0.05})
    tried = {name: gate["tried"] for name, gate in gates(job, in_turn).items()}
    assert tried["consistency"] == gates(job, in_turn)["domain"]["passed"]  # all, in the end
    refs = Store(job.store).refs("measurements")
    own = [ref.manifest for ref in refs if ref.manifest.run_id == in_turn.run_id]
    assert sum("known" in manifest.beside for manifest in own) == len(own) / 2 == 4
    assert sum("before" in manifest.beside for manifest in own) == 4  # the tuned loss is there
    assert samples_measured(job, in_turn) == tried["consistency"] + tried["shift"]
    again = job.run(scoring=filtered, selection={"fraction": 0.05})
    assert again.artifacts["scores"] == in_turn.artifacts["scores"]


@pytest.mark.parametrize(
    "selection", [{"quotas": {"drills": 0.5}}, {"where": "n_tokens < 40"}], ids=["quotas", "where"]
)
def test_with_quotas_or_a_condition_every_sample_is_measured(job, selection):
    chosen = job.run(scoring={"enough": 1.0}, selection={"fraction": 0.05} | selection)
    assert chosen.artifacts["scores"] == job.first.artifacts["scores"]
