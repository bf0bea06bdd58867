"""What is made again, and what is not: the flow's promises about its artifacts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from flows.adapt import run_adapt
from flows.presets import PRESETS
from flows.settings import load_settings, parse_settings
from p2d_core.aer import machine_name
from p2d_core.errors import ArtifactError, HeadMapError
from p2d_core.store import Store
from p2d_core.synthetic.world import BASE_FOLDER
from tasks.summary import Summary
from tasks.verdict import verdict
from tests.job import Job

MADE_FROM_SCRATCH = [
    "samples", "proxy", "heads", "measurements", "scores", "head_proxy",
    "subset", "model", "reference", "evaluation",
]  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    job = Job(tmp_path_factory.mktemp("job"))
    job.first = job.run()
    return job


def computed(summary: Summary) -> list[str]:
    return [line.name for line in summary.stages if not line.reused]


def measured_now(job: Job, summary: Summary) -> int:
    refs = Store(job.store).refs("measurements")
    return sum(ref.manifest.run_id == summary.run_id for ref in refs)


def samples_measured(job: Job, summary: Summary) -> int:
    manifests = [ref.manifest for ref in Store(job.store).refs("measurements")]
    return sum(m.cost["samples"] for m in manifests if m.run_id == summary.run_id)


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


def test_a_second_run_reuses_everything(job):
    again = job.run()
    assert computed(again) == []
    assert again.quality == job.first.quality
    assert again.aer.cold == pytest.approx(job.first.aer.cold)
    assert again.aer.this_run < job.first.aer.this_run


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


def test_other_evaluation_samples_leave_the_target_as_it_is(job):
    """They have a source of their own; of the corpus they are left out, which is made anew."""
    lines = (job.folder / "evaluation.jsonl").read_text().splitlines(keepends=True)
    (job.folder / "fewer.jsonl").write_text("".join(lines[:-2]))
    source = {"path": "fewer.jsonl", "name": "evaluation"}
    again = job.run(evaluation={"source": source, "samples": 7})
    assert {"proxy", "heads", "head_proxy", "measurements"} <= set(again.reused)
    assert "evaluation" in computed(again)


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


def test_full_fine_tuning_is_reckoned_with_the_proxy_samples_too(job):
    def n_more(summary):
        return Store(job.store).resolve(summary.artifacts["reference"]).manifest.settings["n_more"]

    assert n_more(job.first) == 20
    assert n_more(job.run(training={"with_proxy": False})) == 0


def test_another_budget_recomputes_from_the_subset_on(job):
    assert computed(job.run(selection={"fraction": 0.05})) == ["subset", "model", "evaluation"]


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


def test_another_share_of_heads_keeps_the_proxy_run(job):
    changed = computed(job.run(heads={"fraction": 0.2}))
    assert "proxy" not in changed
    assert changed[0] == "heads"
    assert changed[-2:] == ["model", "evaluation"]


def test_settings_that_cannot_change_a_result_reuse_everything(job):
    training = {"checkpoint_seconds": 5, "parallel": "fsdp"}
    again = job.run(scoring={"tokens_per_batch": 512}, training=training)
    assert computed(again) == []


@pytest.mark.parametrize("saving", [{"gradient_checkpointing": True}, {"micro_batch_tokens": 64}])
def test_what_saves_memory_changes_nothing_but_what_full_fine_tuning_would_take(job, saving):
    assert computed(job.run(training=saving)) == ["reference"]


def test_one_changed_line_measures_only_its_shard_again(job, tmp_path):
    only_activation = {"scoring": {"scorer": "head-activation"}}
    job.run(**only_activation)
    assert len(list((job.store / "samples").glob("*/shard-000001.parquet"))) >= 1
    file = job.folder / "corpus/drills.jsonl"
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    row = json.loads(lines[400])
    lines[400] = json.dumps(row | {"response": row["response"] + " one"}) + "\n"
    file.write_text("".join(lines))
    try:
        after = job.run(**only_activation)
    finally:
        file.write_text(whole)
    assert measured_now(job, after) == 1
    assert "proxy" not in computed(after)


def test_another_target_with_the_same_head_map_measures_nothing(job):
    only_activation = {"scoring": {"scorer": "head-activation"}}
    first = job.run(**only_activation)
    lines = (job.folder / "whole/target.jsonl").read_text().splitlines(keepends=True)
    (job.folder / "other.jsonl").write_text("".join(lines[100:160]))
    other = job.run(
        head_map=first.artifacts["heads"], target={"path": "other.jsonl"}, **only_activation
    )
    assert measured_now(job, other) == 0
    assert "scores" in computed(other)


def test_a_given_head_map_skips_proxy_and_ranking(job):
    given = job.run(head_map=job.first.artifacts["heads"])
    assert computed(given) == []
    assert given.heads.ids == job.first.heads.ids
    other = job.run(head_map=job.first.artifacts["heads"], heads={"ranker": "ablation"})
    assert other.heads.ranker == "frobenius"
    assert given.selection.notes == job.first.selection.notes
    assert other.selection.notes[-1] == (
        "heads.* of the settings was not looked at: the head map that was given is by frobenius, "
        "with heads.fraction 0.1"
    )
    wide = job.run(head_map=job.first.artifacts["heads"], heads={"fraction": 0.5})
    assert wide.selection.notes == other.selection.notes


def test_a_given_head_map_still_has_its_price(job):
    given = job.run(head_map=job.first.artifacts["heads"])
    assert given.aer.cold == pytest.approx(job.first.aer.cold)


def test_a_head_map_whose_proxy_run_is_gone_says_that_the_aer_lacks_it(job, tmp_path):
    proxy = Path(job.first.artifacts["proxy"])
    shutil.move(proxy, tmp_path / "proxy")
    try:
        given = job.run(head_map=job.first.artifacts["heads"])
    finally:
        shutil.move(tmp_path / "proxy", proxy)
    assert given.aer.stages["proxy"] == 0
    assert f"no longer has proxy/{proxy.name[:12]}" in given.aer.caveat
    assert job.first.aer.caveat == ""


def test_a_damaged_artifact_is_set_aside_and_made_again(job, caplog):
    scores = Path(job.first.artifacts["scores"]) / "scores.parquet"
    whole = scores.read_bytes()
    scores.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    again = job.run()
    assert computed(again) == ["scores"]
    assert scores.read_bytes() == whole
    assert "is damaged (scores.parquet has other content" in caplog.text
    assert list(job.store.glob("scores/*.damaged-*"))


def test_a_damaged_head_map_is_not_used(job):
    copy = job.store / "heads"
    ref = next(Store(job.store).refs("heads"))
    file = ref.path / "heads.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(HeadMapError, match="is damaged and was set aside"):
        job.run(head_map=ref.key)
    (aside,) = copy.glob(f"{ref.key}.damaged-*")
    (aside / "heads.parquet").write_bytes(whole)
    aside.rename(ref.path)


def test_a_gate_moved_measures_nothing_of_the_first_step_again(job):
    moved = job.run(scoring={"options": {"domain_quantile": 0.06, "neighbours": 4}})
    before = {ref.key for ref in Store(job.store).refs("measurements")}
    assert moved.selection.selected == job.first.selection.selected
    alone = job.run(scoring={"scorer": "head-activation", "options": {"neighbours": 3}})
    assert measured_now(job, alone) == 0
    assert {ref.key for ref in Store(job.store).refs("measurements")} == before


SUM = {"parts": {"head-activation": 1.0, "loss-shift": 0.5, "bm25": 0.5}}


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


def test_other_weights_of_a_sum_measure_nothing_again(job):
    job.run(scoring={"scorer": "sum", "options": SUM})
    weights = {"bm25": 0.1, "head-activation": 2.0, "loss-shift": 0.5}
    other = job.run(scoring={"scorer": "sum", "options": {"parts": weights}})
    assert measured_now(job, other) == 0
    scores = pq.read_table(Path(other.artifacts["scores"]) / "scores.parquet")
    assert {"head_activation", "loss_shift", "bm25"} <= {*scores.column_names}


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


def test_a_deleted_artifact_is_computed_again(job):
    model = Store(job.store).resolve(Path(job.first.artifacts["model"]).name)
    before = {name: entry["sha256"] for name, entry in model.manifest.files.items()}
    shutil.rmtree(model.path)
    again = job.run()
    assert computed(again) == ["model"]
    after = {name: entry["sha256"] for name, entry in model.manifest.files.items()}
    weights = "adapter/adapter_model.safetensors"
    assert after[weights] == before[weights]


def test_a_store_that_moved_is_still_known(job, tmp_path):
    moved = Job.__new__(Job)
    moved.__dict__ |= job.__dict__ | {"store": tmp_path / "moved"}
    shutil.copytree(job.store, moved.store)
    assert computed(moved.run()) == []


def test_a_head_map_that_is_not_there_is_refused(job):
    with pytest.raises(ArtifactError, match="there is no heads artifact 'abc123'"):
        job.run(head_map="abc123")


def test_a_head_map_of_another_base_is_refused(job, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(BASE_FOLDER, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 99}))
    with pytest.raises(HeadMapError, match="made for another base model"):
        job.run(head_map=job.first.artifacts["heads"], base=str(other))


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
