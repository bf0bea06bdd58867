"""What a run leaves behind: its stages, report, registered adapter and figures."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from flows.adapt import run_adapt
from flows.presets import PRESETS
from flows.settings import load_settings, parse_settings
from p2d_core.aer import machine_name
from p2d_core.store import Store
from p2d_core.synthetic.world import BASE_FOLDER
from tasks.verdict import verdict
from tests.flows.adapt.seen import MADE_FROM_SCRATCH, SUM, computed


def test_the_first_run_computes_every_stage(job):
    assert computed(job.first) == MADE_FROM_SCRATCH
    assert job.first.selection.selected == 120
    assert job.first.aer.cold == pytest.approx(
        sum(job.first.aer.stages.values()) / job.first.aer.full_seconds
    )


def test_the_report_is_an_artifact_of_the_flow_run(job):
    from prefect.artifacts import Artifact

    report = Artifact.get("report-small")
    assert report.type == "markdown"
    assert report.flow_run_id is not None
    for words in (
        "**AER ",
        "layer 0",
        "](data:image/png;base64,",
        job.first.artifacts["subset"][-64:][:12],
    ):
        assert words in report.data


def test_the_settings_that_a_run_keeps_run_it_again(job):
    file = job.store / "runs" / f"{job.first.run_id}.yaml"
    # the store is not below the folder that the tests run in
    assert job.first.command == f"p2d adapt {file.resolve()} --store {job.store.resolve()}"
    assert load_settings(file) == parse_settings(job.values, job.folder / "run.yaml")
    assert computed(run_adapt(load_settings(file), store=job.store)) == []


def test_the_adapter_is_registered_once_and_the_report_of_each_run_is_kept(job):
    again = job.run()
    first = job.first.registered
    assert (first.name, first.version, first.reused) == ("small", "1", False)
    assert (again.registered.version, again.registered.reused) == ("1", True)
    for done in (job.first, again):
        assert done.run_id in (job.store / "reports" / f"{done.run_id}.html").read_text()


def test_an_aer_of_several_machines_says_so(job, monkeypatch):
    assert job.first.aer.machines == [machine_name()]
    assert job.first.aer.caveat == ""
    monkeypatch.setattr("p2d_core.aer.machine_name", lambda: "Abacus 3000")
    again = job.run(training={"epochs": 2}, arms={"full": "calibrated"})
    assert again.aer.machines == sorted(["Abacus 3000", machine_name()])
    assert "of several machines (" in again.aer.caveat
    assert "Abacus 3000" in again.aer.caveat


def test_every_arm_is_trained_on_the_proxy_samples_too_unless_told_not_to(job):
    arms = {"random": True, "full": "measured"}
    told, without = (job.run(training={"with_proxy": so}, arms=arms) for so in (True, False))
    store = Store(job.store)
    for arm, chosen in (("model", 120), ("model_random", 120), ("model_full", 1200)):
        seen = [store.resolve(each.artifacts[arm]).manifest for each in (told, without)]
        assert [manifest.cost["samples"] for manifest in seen] == [chosen + 20, chosen]
        assert [manifest.facts["proxy_samples"] for manifest in seen] == [20, 0]
    assert [each.trainable.proxy_samples for each in (told, without)] == [20, 0]
    words = [" ".join(sentence for sentence, _ in verdict(each)) for each in (told, without)]
    assert ["saw the 20 proxy samples too" in said for said in words] == [True, False]
    assert without.selection.selected == told.selection.selected == 120


def test_the_random_subset_is_as_large_as_one_whose_quotas_leave_places_open(job):
    quotas = {"ledgers": 0.1, "drills": 0.2}
    done = job.run(selection={"quotas": quotas}, arms={"random": True, "full": "calibrated"})
    assert done.selection.selected == 12 + 24
    random = Store(job.store).resolve(done.artifacts["model_random"]).manifest
    assert random.cost["samples"] == 36 + 20
    assert done.quality.random is not None


def test_full_fine_tuning_is_reckoned_with_the_proxy_samples_too(job):
    def n_more(summary):
        return Store(job.store).resolve(summary.artifacts["reference"]).manifest.settings["n_more"]

    assert n_more(job.first) == 20
    assert n_more(job.run(training={"with_proxy": False})) == 0


@pytest.mark.parametrize(
    ("scorer", "options"),
    [
        ("rds-plus", {}),
        ("bm25", {}),
        ("sum", SUM),
    ],
)
def test_the_whole_job_runs_with_another_scorer(job, scorer, options):
    summary = job.run(scoring={"scorer": scorer, "options": options})
    assert summary.selection.scorer == scorer
    assert summary.selection.selected == 120
    assert summary.selection.by_source["ledgers"] > 1.5 * 120 / 4  # a quarter of the corpus
    scores = pq.read_table(Path(summary.artifacts["scores"]) / "scores.parquet")
    assert np.isfinite(scores["affinity"]).all()
    assert np.ptp(scores["affinity"]) > 0


def test_the_scorer_of_the_papers_runs_the_whole_job(job):
    """It is blind here: the base does not learn in context."""
    summary = job.run(scoring=PRESETS["paper"]["scoring"])
    assert (summary.selection.scorer, summary.selection.selected) == ("icl-attention", 120)
    scores = pq.read_table(Path(summary.artifacts["scores"]) / "scores.parquet")
    assert np.ptp(scores["affinity"]) > 0


def test_lineage_reaches_from_the_model_to_the_files_stages(job):
    store = Store(job.store)
    stages = {ref.stage for ref in store.lineage(store.resolve(job.first.artifacts["model"]))}
    assert {"model", "subset", "scores", "measurements", "heads", "proxy", "samples"} <= stages


def test_retention_samples_are_kept_out_of_the_corpus(job):
    lines = (job.folder / "corpus/drills.jsonl").read_text().splitlines(keepends=True)
    (job.folder / "old.jsonl").write_text("".join(lines[:25]))
    whole = job.first.selection.corpus
    held = job.run(evaluation={"retention": {"path": "old.jsonl"}})
    assert held.selection.corpus == whole - 25
    assert set(held.quality.retention) >= {"base", "p2d"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_only_the_task_heads_slices_differ_from_the_base(job, precision):
    """Bit for bit: what the adapter does not name is the base's own weight."""
    import torch
    from safetensors.torch import load_file

    from p2d_core.adaptation.adaptations import SLICES, adapted
    from p2d_core.adaptation.slices import TunedSlices
    from p2d_core.attention.layout import attention_layers, slices_of
    from p2d_core.heads.frobenius import Frobenius
    from p2d_core.heads.head_map import read_head_map
    from p2d_core.heads.ranking import RankingEvidence
    from p2d_core.models import load_model

    done = job.first
    if precision != "float32":
        done = job.run(precision=precision, training={"gradient_checkpointing": True})
    model = Path(done.artifacts["model"])
    curve = json.loads((model / "loss.json").read_text())
    assert [point["step"] for point in curve] == list(range(1, (120 + 20) // 8 + 2))
    # of batches that differ, one epoch's losses show nothing: what was learnt shows here
    assert done.quality.p2d < done.quality.base
    kept = load_file(model / "adapter/adapter_model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float32}

    # heads are ranked by what the proxy run moved in float32, not by what of it bfloat16 keeps
    whole = load_model(BASE_FOLDER, "float32", torch.device("cpu"))
    proxy = TunedSlices.load(Path(done.artifacts["proxy"]) / SLICES)
    expected = Frobenius().rank(RankingEvidence(whole, attention_layers(whole), proxy, ()))
    ranked = read_head_map(Path(done.artifacts["heads"]) / "heads.parquet").scores
    torch.testing.assert_close(ranked, expected, rtol=1e-6, atol=0)

    base = load_model(BASE_FOLDER, precision, torch.device("cpu"))
    tuned = load_model(BASE_FOLDER, precision, torch.device("cpu"))
    tuned = adapted(tuned, model).merge_and_unload()
    allowed = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in base.named_parameters()}
    for piece in slices_of(attention_layers(base), done.heads.ids):
        allowed[f"{piece.module}.weight"].narrow(
            piece.dim, piece.start, piece.stop - piece.start
        ).fill_(True)
    moved = 0
    for (name, before), (_, after) in zip(
        base.named_parameters(), tuned.named_parameters(), strict=True
    ):
        assert torch.equal(before[~allowed[name]], after[~allowed[name]]), name
        moved += int((before != after).sum())
    assert 0 < moved <= done.trainable.parameters
