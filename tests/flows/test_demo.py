"""The demo keeps what the README promises of it."""

import json
import re
import subprocess
import sys
import time

import pytest

from tests.demo_run import command, demo

DEMO_SECONDS, AGAIN_SECONDS = 240, 20
IMPORTED = "import mlflow, prefect.server.api.server, torch, transformers.trainer"
"""What a run cannot do without; 9 to 10 s of the 20 on a machine that does nothing else."""
pytestmark = pytest.mark.timeout(600)


def test_p2d_beats_random_data_and_full_fine_tuning_on_everything():
    quality = demo().summary["quality"]
    assert quality["metric"] == "exact_match"
    assert quality["base"] <= 0.05
    assert quality["p2d"] >= quality["random"] + 0.3
    assert quality["p2d"] >= quality["full"]
    assert quality["retention"]["base"] >= 0.95
    assert quality["retention"]["p2d"] >= 0.8


def test_it_takes_four_minutes_at_most():
    assert demo().run.seconds <= DEMO_SECONDS


def test_a_tenth_of_the_corpus_is_chosen_and_hardly_any_wrong_answer():
    selection = demo().summary["selection"]
    assert (selection["corpus"], selection["selected"]) == (3000, 300)
    assert sum(selection["by_source"].values()) == 300
    chosen = selection["by_label"]
    assert chosen["clean"] >= 0.9 * 180
    assert chosen.get("wrong", 0) <= 10


def test_the_screen_tells_a_newcomer_what_happened_and_what_to_do_next():
    shown = " ".join(demo().run.shown.split())
    for text in (
        "computed", "layer 0", "heads.png", "ledgers", "base model", "random subset",
        "full fine-tuning", "AER", "speedup", "this run", "p2d ui", "p2d config", "p2d adapt",
    ):  # fmt: skip
        assert text in shown, text


def test_the_summary_has_the_keys_that_machines_rely_on():
    summary = demo().summary
    assert {
        "run_id", "name", "status", "heads", "selection", "trainable", "quality", "aer", "reused",
        "artifacts", "mlflow",
    } <= set(summary)  # fmt: skip
    assert summary["heads"]["total"] == 32
    assert summary["heads"]["selected"] == len(summary["heads"]["ids"]) == 4
    assert summary["trainable"]["share_of_model"] == pytest.approx(
        summary["trainable"]["parameters"] / 614_784, rel=1e-3
    )
    aer = summary["aer"]
    assert aer["reference"] == "measured"
    assert aer["cold"] == pytest.approx(sum(aer["stages"].values()) / aer["full_seconds"])
    assert aer["speedup"] == pytest.approx(1 / aer["cold"])
    for folder in summary["artifacts"].values():
        assert (demo().folder / folder / "manifest.json").exists()


def test_a_second_run_reuses_everything_in_twenty_seconds():
    again = command(demo().folder, "demo", "--summary", "again.json")
    assert again.code == 0, again.errors
    summary = json.loads((demo().folder / "again.json").read_text())
    assert [line["name"] for line in summary["stages"] if not line["reused"]] == []
    assert summary["aer"]["this_run"] < 0.1 * summary["aer"]["cold"]
    assert summary["quality"] == demo().summary["quality"]
    assert summary["seconds"] <= 5
    if again.seconds > AGAIN_SECONDS:
        # on a machine that does other work beside, both take longer
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTED], check=True)
        assert again.seconds <= 2 * (time.perf_counter() - start)


def test_every_artifact_verifies():
    verified = command(demo().folder, "artifacts", "verify")
    assert verified.code == 0, verified.shown + verified.errors


def test_nothing_that_was_kept_is_a_pickle():
    stages = [p for p in (demo().folder / "artifacts").iterdir() if p.name != "prefect"]
    suffixes = {file.suffix for stage in stages for file in stage.rglob("*") if file.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"}


def test_mlflow_has_the_run_with_numbers_pictures_and_adapter():
    from mlflow import MlflowClient

    summary = demo().summary
    client = MlflowClient(tracking_uri=summary["mlflow"]["tracking_uri"])
    run = client.get_run(summary["mlflow"]["run_id"])
    assert run.data.metrics["quality/p2d"] == pytest.approx(summary["quality"]["p2d"])
    assert run.data.params["heads.ranker"] == summary["heads"]["ranker"]
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert any("heads" in name for name in names)
    assert any(re.search("affinit|score", name) for name in names)
    models = client.search_logged_models(experiment_ids=[run.info.experiment_id])
    (model,) = [model for model in models if model.source_run_id == run.info.run_id]
    assert model.model_type == "peft-adapter"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_holds_over_three_seeds(seed):
    quality = demo(seed).summary["quality"]
    assert quality["p2d"] >= quality["random"] + 0.3
    assert quality["p2d"] >= quality["full"]
    assert quality["retention"]["p2d"] >= 0.8
