"""What is made again, and what is not: the flow's promises about its artifacts."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from p2d_core.store import Store
from tests.flows.adapt.seen import SUM, computed, measured_now
from tests.job import Job


def test_a_second_run_reuses_everything(job):
    again = job.run()
    assert computed(again) == []
    assert again.quality == job.first.quality
    assert again.aer.cold == pytest.approx(job.first.aer.cold)
    assert again.aer.this_run < job.first.aer.this_run


def test_other_evaluation_samples_leave_the_target_as_it_is(job):
    """They have a source of their own; of the corpus they are left out, which is made anew."""
    lines = (job.folder / "evaluation.jsonl").read_text().splitlines(keepends=True)
    (job.folder / "fewer.jsonl").write_text("".join(lines[:-2]))
    source = {"path": "fewer.jsonl", "name": "evaluation"}
    again = job.run(evaluation={"source": source, "samples": 7})
    assert {"proxy", "heads", "head_proxy", "measurements"} <= set(again.reused)
    assert "evaluation" in computed(again)


def test_another_budget_recomputes_from_the_subset_on(job):
    assert computed(job.run(selection={"fraction": 0.07})) == ["subset", "model", "evaluation"]


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


def test_a_gate_moved_measures_nothing_of_the_first_step_again(job):
    moved = job.run(scoring={"options": {"domain_quantile": 0.06, "neighbours": 4}})
    before = {ref.key for ref in Store(job.store).refs("measurements")}
    assert moved.selection.selected == job.first.selection.selected
    alone = job.run(scoring={"scorer": "head-activation", "options": {"neighbours": 3}})
    assert measured_now(job, alone) == 0
    assert {ref.key for ref in Store(job.store).refs("measurements")} == before


def test_other_weights_of_a_sum_measure_nothing_again(job):
    job.run(scoring={"scorer": "sum", "options": SUM})
    weights = {"bm25": 0.1, "head-activation": 2.0, "loss-shift": 0.5}
    other = job.run(scoring={"scorer": "sum", "options": {"parts": weights}})
    assert measured_now(job, other) == 0
    scores = pq.read_table(Path(other.artifacts["scores"]) / "scores.parquet")
    assert {"head_activation", "loss_shift", "bm25"} <= {*scores.column_names}


def test_a_damaged_artifact_is_set_aside_and_made_again(job, caplog):
    scores = Path(job.first.artifacts["scores"]) / "scores.parquet"
    whole = scores.read_bytes()
    scores.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    again = job.run()
    assert computed(again) == ["scores"]
    assert scores.read_bytes() == whole
    assert "is damaged (scores.parquet has other content" in caplog.text
    assert list(job.store.glob("scores/*.damaged-*"))


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
