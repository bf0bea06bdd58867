"""A run stands in MLflow with its numbers, curves, pictures and adapter; nothing is pickled."""

import json
import os
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from sqlalchemy.exc import IntegrityError, OperationalError

from p2d_core.errors import P2DError, TransientError
from p2d_core.selection.picture import draw_affinities
from p2d_core.store import ArtifactRef, Store
from tasks.record import record, record_run
from tasks.summary import Summary
from tasks.tracking.database import mlflow_uri, prepare_tracking
from tasks.tracking.run import _safe, bar, flat
from tasks.tracking.views import COLUMNS, TABLE, VIEW, preset
from tests.small_store import fill, summary

SETTINGS = {
    "name": "sums",
    "heads": {"ranker": "spad", "options": {"support": "values"}},
    "corpus": {"sources": [{"path": "a.jsonl", "limit": None}]},
    "tracking": {"experiment": "tracked", "uri": None, "tags": {"team": "blue"}},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("recorded") / "artifacts")
    prepare_tracking(store.root)
    return store


@pytest.fixture(scope="module")
def refs(store: Store) -> dict[str, ArtifactRef]:
    return fill(store)


@pytest.fixture(scope="module")
def recorded(store: Store, refs: dict[str, ArtifactRef]) -> dict[str, str]:
    return record_run(summary(refs), SETTINGS, store=store.root, refs=refs, tags={"team": "red"})


@pytest.fixture(scope="module")
def client(store: Store) -> MlflowClient:
    return MlflowClient(tracking_uri=mlflow_uri(store.root))


def test_what_mlflow_puts_aside_lies_where_the_next_run_finds_it_after_a_kill(
    tmp_path, monkeypatch
):
    store = Store(tmp_path / "artifacts")
    prepare_tracking(store.root)
    usual = Path(tempfile.gettempdir())
    logged, seen = MlflowClient.log_image, set()

    def log_image(client, run_id, *given, **named):
        seen.add(Path(tempfile.gettempdir()))
        assert [folder.parent for folder in seen] == [store.root / ".scratch"]
        return logged(client, run_id, *given, **named)

    monkeypatch.setattr(MlflowClient, "log_image", log_image)
    refs = fill(store)
    done = summary(refs)
    record_run(done, SETTINGS, store=store.root, refs=refs)
    assert [folder.name.startswith(f"record-{done.run_id}-") for folder in seen] == [True]
    assert not list((store.root / ".scratch").glob("record-*"))
    assert Path(tempfile.gettempdir()) == usual


def test_parameters_and_numbers_of_every_arm_are_there(recorded, client):
    run = client.get_run(recorded["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "name": "sums",
        "heads.ranker": "spad",
        "heads.options.support": "values",
        "corpus.sources.0.path": "a.jsonl",
        "tracking.experiment": "tracked",
        "tracking.tags.team": "blue",
    }
    metrics = run.data.metrics
    assert [metrics[f"quality/{arm}"] for arm in ("base", "p2d", "random", "full")] == [
        0.05,
        0.75,
        0.2,
        0.5,
    ]
    assert metrics["aer/cold"] == 0.21
    assert metrics["aer_seconds_cold/scores"] == 3.0
    assert metrics["selected_by_source/talk"] == 1
    assert metrics["trainable/parameters"] == 6144


def test_loss_curves_are_stepped(recorded, client):
    points = client.get_metric_history(recorded["run_id"], "loss/model")
    assert [point.step for point in points] == list(range(1, 21))
    assert points[3].value == 0.5
    held_out = client.get_metric_history(recorded["run_id"], "held_out_loss/proxy")
    assert [point.step for point in held_out] == [20]


def test_tags_let_a_team_filter(recorded, client, refs):
    experiment = client.get_experiment_by_name("p2d").experiment_id
    query = f"tags.base_model = 'tiny' and tags.`key.heads` = '{refs['heads'].key}'"
    found = client.search_runs([experiment], f"{query} and tags.team = 'red'")
    assert [run.info.run_id for run in found] == [recorded["run_id"]]


def test_report_pictures_settings_and_summary_are_attached(recorded, client, store):
    files = {file.path for file in client.list_artifacts(recorded["run_id"])}
    pictures = {f"{name}.png" for name in ("heads", "affinities", "sources", "aer", "quality")}
    others = {"loss.png", "summary.json", "settings.yaml", "report.html", "images"}
    assert files == pictures | others
    kept = store.root / "mlflow" / "artifacts" / recorded["run_id"] / "artifacts"
    assert Summary.model_validate_json((kept / "summary.json").read_text()).name == "sums"
    for name in ("affinities", "loss"):
        assert (kept / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_lies_in_the_store_as_it_does_in_mlflow(recorded, store):
    there = store.root / "mlflow" / "artifacts" / recorded["run_id"] / "artifacts/report.html"
    kept = store.root / "reports/run-1.html"
    assert kept.read_text() == there.read_text()
    assert recorded["run_id"] in kept.read_text()


def test_the_adapter_is_a_logged_model_and_nothing_is_pickled(recorded, client, store, refs):
    outputs = client.get_run(recorded["run_id"]).outputs
    model = client.get_logged_model(outputs.model_outputs[0].model_id)
    assert (model.status, model.tags["key"]) == ("READY", refs["model"].key)
    files = [file for file in (store.root / "mlflow" / "artifacts").rglob("*") if file.is_file()]
    plain = {".png", ".webp", ".json", ".yaml", ".html", ".safetensors"}
    assert {file.suffix for file in files} == plain


def test_every_arm_is_a_sibling_of_the_same_group(recorded, client, refs):
    main = client.get_run(recorded["run_id"])
    experiment = main.info.experiment_id
    group = f"tags.`p2d.group` = '{main.data.tags['p2d.group']}'"
    runs = client.search_runs([experiment], group)
    by_arm = {run.data.tags["arm"]: run for run in runs}
    assert {arm: run.data.metrics["quality"] for arm, run in by_arm.items()} == {
        "P2D": 0.75,
        "base model": 0.05,
        "random subset": 0.2,
        "full fine-tuning": 0.5,
    }
    assert not any("mlflow.parentRunId" in run.data.tags for run in runs)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert by_arm["random subset"].data.metrics["retention"] == 0.8


def test_the_table_has_a_cell_for_all_that_a_reader_asks(recorded, client):
    run = client.get_run(recorded["run_id"])
    tags, metrics = run.data.tags, run.data.metrics
    assert (tags["target"], tags["base_model"], tags["reused"]) == ("sums", "tiny", "proxy")
    assert (tags["heads"], tags["data"]) == ("1/4 (25.0%)", "4/40 (10.0%)")
    assert metrics["quality gain"] == pytest.approx(0.7)
    # 2, 1, 3, 0.5 and 4 seconds of 50 end at 0.64, 0.96, 1.92, 2.08 and 3.36 characters of 16
    assert tags["AER parts"] == "░▓█" + "·" * 13
    for column, _ in COLUMNS:
        kind, name = column.split(".", 1)
        there = {"tags": tags, "metrics": metrics, "attributes": {"User"}}[kind]
        assert name.strip("`") in there


def test_the_bar_of_the_stages_is_never_longer_than_its_cell():
    assert bar({"proxy": 5.0, "model": 5.0}, 20.0) == "░" * 4 + "█" * 4 + "·" * 8
    assert bar({"proxy": 30.0, "model": 10.0}, 20.0) == "░" * 12 + "█" * 4
    assert bar({"proxy": 0.0}, 0.0) == ""


def test_the_views_are_set_once_and_again_when_someone_spoilt_them(recorded, client):
    def views():
        tags = client.get_experiment_by_name("p2d").tags
        return {key: value for key, value in tags.items() if key.startswith(VIEW)}

    before = views()
    assert {json.loads(value)["name"] for value in before.values()} == {
        "P2D: adaptations", "P2D: arms of adaptations", "P2D: arms of comparisons",
        "P2D: head map drift",
    }  # fmt: skip
    experiment = client.get_experiment_by_name("p2d")
    client.set_experiment_tag(experiment.experiment_id, VIEW + TABLE, "spoilt")
    client.set_experiment_tag(experiment.experiment_id, "mlflow.note.content", "ours")
    preset(client, client.get_experiment_by_name("p2d"))
    assert views() == before
    assert client.get_experiment_by_name("p2d").tags["mlflow.note.content"] == "ours"


def test_the_note_says_what_came_of_it(recorded, client):
    note = client.get_run(recorded["run_id"]).data.tags["mlflow.note.content"]
    first = note.splitlines()[0]
    for words in ("exact match 0.050 → 0.750", "AER 0.210", "4.8x", "1 of 4 heads", "10.0% of"):
        assert words in first, first
    assert f"/runs/{recorded['run_id']}/artifacts/report.html" in note
    assert f"get-artifact?path=heads.png&run_uuid={recorded['run_id']}" in note
    assert "the consistency gate was relaxed" in note


def test_the_server_that_the_environment_names_is_taken(store, refs, tmp_path, monkeypatch):
    """So a worker records where its team looks; settings that name another come first."""
    elsewhere = f"sqlite:///{tmp_path / 'other.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    monkeypatch.chdir(tmp_path)
    done = record_run(summary(refs, "run-9"), {}, store=store.root)
    assert done["tracking_uri"] == elsewhere
    assert MlflowClient(elsewhere).get_run(done["run_id"]).data.metrics["AER"] == 0.21
    given = mlflow_uri(store.root)
    assert record_run(summary(refs), {}, store=store.root, uri=given)["tracking_uri"] == given


def test_the_settings_are_kept_without_a_password(store, refs, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    secret = {"uri": "http://me:secret@127.0.0.1:9", "experiment": "p2d", "tags": {}}
    with pytest.raises(P2DError) as told:
        record.fn(summary(refs, "run-10"), {"tracking": secret}, store=str(store.root))
    assert "secret" not in str(told.value)
    for folder in ("runs", "reports"):
        for file in (store.root / folder).glob("run-10.*"):
            assert "secret" not in file.read_text()
    assert "http://127.0.0.1:9" in (store.root / "runs/run-10.yaml").read_text()


def test_the_git_commit_is_a_tag_only_in_a_repository(store, refs, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    run_id = record_run(summary(refs), {}, store=store.root)["run_id"]
    assert "git_commit" not in client.get_run(run_id).data.tags


def test_the_task_keeps_the_summary_where_the_store_looks_for_runs(store, refs, client):
    done = record.fn(summary(refs, "run-7"), SETTINGS, store=str(store.root))
    assert done.mlflow["experiment"] == "tracked"
    kept = json.loads((store.root / "runs" / "run-7.json").read_text())
    assert kept["mlflow"] == done.mlflow
    assert client.get_run(done.mlflow["run_id"]).data.tags["team"] == "blue"


def test_a_server_that_is_away_is_named_and_the_run_is_kept(store, refs, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = {"tracking": {"uri": "http://127.0.0.1:9", "experiment": "p2d", "tags": {}}}
    with pytest.raises(P2DError, match=r"MLflow at http://127\.0\.0\.1:9 did not take its record"):
        record.fn(summary(refs, "run-8"), settings, store=str(store.root))
    assert (store.root / "runs" / "run-8.json").exists()
    assert "exact match" in (store.root / "reports" / "run-8.html").read_text()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (OperationalError, "database is locked"),
        # two runs gave the champion's alias away at once
        (IntegrityError, "UNIQUE constraint failed: registered_model_aliases.alias"),
    ],
)
def test_a_database_that_another_run_writes_to_is_worth_another_try(
    store, refs, monkeypatch, kind, says
):
    def refused(*args: object) -> str:
        raise kind("INSERT", {}, Exception(says))

    monkeypatch.setattr("tasks.record._write", refused)
    with pytest.raises(TransientError, match=says):
        record_run(summary(refs), {}, store=store.root)


def test_a_run_without_curves_scores_and_adapter_is_recorded_too(store, refs, client):
    few = {"heads": refs["heads"]}
    run_id = record_run(summary(refs), {}, store=store.root, refs=few)["run_id"]
    files = {file.path for file in client.list_artifacts(run_id)}
    assert "loss.png" not in files
    assert "aer.png" in files


def test_a_database_that_is_there_is_left_alone(store):
    before = (store.root / "mlflow" / "mlflow.db").stat().st_mtime_ns
    prepare_tracking(store.root)
    assert (store.root / "mlflow" / "mlflow.db").stat().st_mtime_ns == before
    assert [f for f in os.listdir(store.root / "mlflow") if f.startswith(".")] == []


def test_settings_become_one_level_of_keys():
    nested = {"a": {"b": 1, "c": None}, "d": [{"e": "x"}, {"e": "y"}], "f": [1, 2], "g": []}
    assert flat(nested) == {"a.b": "1", "d.0.e": "x", "d.1.e": "y", "f": "[1, 2]"}
    # a source may have any name; MLflow refuses parameters with most
    assert flat({"quotas": {"train (1)": 0.3}}) == {"quotas.train _1_": "0.3"}


@pytest.mark.parametrize("name", [".", "..", "a/b", "C#", "", "x" * 300])
def test_whatever_a_source_or_label_is_called_mlflow_takes_it(client, recorded, name):
    client.log_metric(recorded["run_id"], f"selected_by_label/{_safe(name)}", 1.0)


def test_labels_that_become_one_name_are_counted_together(store, refs, client):
    done = summary(refs, "run-labels", selection__by_label={"C#": 2, "C+": 3})
    run_id = record_run(done, SETTINGS, store=store.root, refs=refs)["run_id"]
    assert client.get_run(run_id).data.metrics["selected_by_label/C_"] == 5


@pytest.mark.parametrize("affinity", [[1.0] * 40, [float("nan")] * 40, [float("-inf")] * 40])
def test_affinities_that_are_all_alike_or_no_numbers_can_be_drawn(refs, tmp_path: Path, affinity):
    table = pq.read_table(refs["scores"].path / "scores.parquet")
    scores = tmp_path / "scores.parquet"
    pq.write_table(table.set_column(2, "affinity", [affinity]), scores)
    picture = tmp_path / "picture.png"
    draw_affinities(scores, refs["subset"].path / "subset.parquet", picture, cut_off=1.0)
    assert picture.read_bytes().startswith(b"\x89PNG")
