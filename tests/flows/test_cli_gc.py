"""`p2d artifacts gc` beside a real MLflow database: what a registered model needs stays."""

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from flows.cli.main import app
from flows.killed import noted
from p2d_core.errors import ArtifactError, ServiceError
from p2d_core.store import ArtifactRef, Store
from tasks.tracking.database import mlflow_uri, prepare_tracking
from tests.small_store import fill, keep_run, put, summary

DAY = 24 * 3600


@pytest.fixture(scope="module")
def made_database(tmp_path_factory) -> Path:
    """An MLflow database as a run makes it; seconds, so once for all."""
    folder = tmp_path_factory.mktemp("mlflow")
    prepare_tracking(folder)
    return folder / "mlflow/mlflow.db"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


@pytest.fixture
def client(store, made_database) -> MlflowClient:
    """The store's own MLflow."""
    (store.root / "mlflow").mkdir(parents=True)
    shutil.copy(made_database, store.root / "mlflow/mlflow.db")
    uri = mlflow_uri(store.root)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def old(store) -> dict[str, ArtifactRef]:
    """What a run of forty days ago made; a newer run needs none of it."""
    refs = fill(store, run_id="old")
    age(keep_run(store, summary(refs, "old")), 40)
    newer = put(store, "heads", {"heads.png": "x"}, run_id="newer", other=True)
    keep_run(store, summary({"heads": newer}, "newer"))
    return refs


def mlflow_at(file: Path, made_database: Path, run: str = "") -> str:
    """Another MLflow, with a run of that id in it if one is given."""
    shutil.copy(made_database, file)
    if run:
        with sqlite3.connect(file) as database:
            database.execute(
                "INSERT INTO runs (run_uuid, experiment_id, status, lifecycle_stage, start_time, "
                "source_type, user_id) VALUES (?, 0, 'FINISHED', 'active', 0, 'LOCAL', 'me')",
                (run,),
            )
    return f"sqlite:///{file}"


def age(file: Path, days: float) -> None:
    then = file.stat().st_mtime - days * DAY
    os.utime(file, (then, then))


def gc(store: Store, *words: str, environment: dict[str, str] | None = None):
    done = CliRunner().invoke(
        app, ["artifacts", "gc", "--store", str(store.root), *words], env=environment
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def stages_left(refs: dict[str, ArtifactRef]) -> set[str]:
    return {name for name, ref in refs.items() if ref.path.exists()}


def register(client: MlflowClient, name: str, **tags: str) -> None:
    client.create_registered_model(name)
    client.create_model_version(name, source="mlflow-artifacts:/x", tags=tags)


def test_without_a_registered_model_what_only_the_old_run_needs_goes(store, client, old):
    gc(store, "--keep", "1")
    assert stages_left(old) == set()


def test_a_registered_version_keeps_its_artifacts_and_all_they_were_made_from(store, client, old):
    register(client, "ledger", **{"key.model": old["model"].key})
    client.set_registered_model_alias("ledger", "champion", "1")
    gc(store, "--keep", "0")
    assert stages_left(old) == {
        "samples", "proxy", "heads", "measurements", "scores", "subset", "model"
    }  # fmt: skip


def test_every_tag_that_names_an_artifact_counts(store, client, old):
    register(client, "ledger", **{"key.heads": old["heads"].key, "key.subset": "f" * 64, "by": "x"})
    gc(store, "--keep", "0")
    assert stages_left(old) == {"samples", "proxy", "heads"}


def test_an_old_version_without_alias_keeps_as_much_as_the_champion(store, client, old):
    register(client, "ledger", **{"key.heads": old["heads"].key})
    client.create_model_version("ledger", source="x", tags={"key.model": "e" * 64})
    client.set_registered_model_alias("ledger", "champion", "2")
    gc(store, "--keep", "0")
    assert "heads" in stages_left(old)


def test_a_version_registered_by_hand_keeps_what_its_logged_model_names(
    store, client, old, monkeypatch
):
    # MLflow looks for a version's logged model where the environment says
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri(store.root))
    experiment = client.create_experiment("p2d", (store.root / "mlflow/artifacts").as_uri())
    logged = client.create_logged_model(experiment, tags={"key": old["model"].key})
    client.log_model_artifacts(logged.model_id, str(old["model"].path / "adapter"))
    client.finalize_logged_model(logged.model_id, "READY")
    mlflow.register_model(f"models:/{logged.model_id}", "by-hand")
    gc(store, "--keep", "0")
    assert "model" in stages_left(old)
    client.delete_logged_model(logged.model_id)
    gc(store, "--keep", "1")
    assert stages_left(old) == set()


def test_a_deleted_version_keeps_nothing(store, client, old):
    register(client, "ledger", **{"key.model": old["model"].key})
    client.delete_model_version("ledger", "1")
    gc(store, "--keep", "1")
    assert stages_left(old) == set()


def test_more_versions_than_fit_on_a_page_are_all_asked_for(store, client, old, monkeypatch):
    monkeypatch.setattr("flows.registered.PAGE", 2)
    maps = {str(i): put(store, "heads", {"f": "x"}, run_id="old", other=i) for i in range(5)}
    client.create_registered_model("ledger")
    for ref in maps.values():
        client.create_model_version("ledger", source="x", tags={"key.heads": ref.key})
    gc(store, "--keep", "0")
    assert stages_left(maps) == set(maps)


def test_models_at_the_server_of_the_environment_count_beside_the_stores_own(
    store, client, old, tmp_path, made_database
):
    other = tmp_path / "team.db"
    shutil.copy(made_database, other)
    uri = f"sqlite:///{other}"
    register(MlflowClient(uri, uri), "team", **{"key.heads": old["heads"].key})
    register(client, "own", **{"key.subset": old["subset"].key})
    gc(store, "--keep", "0", environment={"MLFLOW_TRACKING_URI": uri})
    assert stages_left(old) == {"samples", "proxy", "heads", "measurements", "scores", "subset"}
    gc(store, "--keep", "0", "--mlflow", uri)
    assert "heads" in stages_left(old)


def test_runs_of_the_last_days_are_kept_however_many(store, old):
    gc(store, "--keep", "0", "--keep-days", "41")
    assert stages_left(old) == set(old)
    gc(store, "--keep", "0", "--keep-days", "39")
    assert stages_left(old) == set()


def damaged(store: Store, tmp_path: Path) -> list[str]:
    (store.root / "mlflow/mlflow.db").write_bytes(b"no database" * 500)
    return []


def half_gone(store: Store, tmp_path: Path) -> list[str]:
    with sqlite3.connect(store.root / "mlflow/mlflow.db") as database:
        database.execute("DROP TABLE model_versions")
    return []


def missing(store: Store, tmp_path: Path) -> list[str]:
    return ["--mlflow", f"sqlite:///{tmp_path}/none.db"]


def silent(store: Store, tmp_path: Path) -> list[str]:
    return ["--mlflow", "http://127.0.0.1:9"]


@pytest.mark.parametrize("away", [damaged, half_gone, missing, silent])
def test_when_mlflow_does_not_answer_nothing_is_removed_and_the_error_says_why(
    store, client, old, tmp_path, monkeypatch, away: Callable[[Store, Path], list[str]]
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    leftover = store.root / "model" / f"{'b' * 64}.staging-12345678"
    leftover.mkdir()
    with pytest.raises(ServiceError, match=r"does not say which .*\. .* nothing was removed"):
        gc(store, "--keep", "0", *away(store, tmp_path))
    assert stages_left(old) == set(old)
    assert leftover.exists()
    assert not (tmp_path / "none.db").exists()


def test_a_server_that_refuses_counts_as_one_that_does_not_answer(store, old):
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ServiceError, match=r"401.*nothing was removed"):
            gc(store, "--keep", "0", "--mlflow", address)
    finally:
        server.shutdown()
        server.server_close()
    assert stages_left(old) == set(old)


def test_a_server_that_runs_were_recorded_at_has_to_be_named(store, old, made_database, tmp_path):
    """Otherwise a forgotten MLFLOW_TRACKING_URI would cost the champion."""
    at_server = {"tracking_uri": "http://mlflow:5000", "experiment": "p2d", "run_id": "1" * 32}
    age(keep_run(store, summary(old, "old", mlflow=at_server)), 40)
    with pytest.raises(ServiceError, match=r"at http://mlflow:5000, .*nothing was removed.*--mlf"):
        gc(store, "--keep", "1")
    assert stages_left(old) == set(old)
    new = mlflow_at(tmp_path / "new.db", made_database)
    with pytest.raises(ServiceError, match=r"at http://mlflow:5000, .*it is known by these runs"):
        gc(store, "--keep", "1", "--mlflow", new)  # one that is not the old one under another name
    now_here = mlflow_at(tmp_path / "now-here.db", made_database, run="1" * 32)
    gc(store, "--keep", "1", "--mlflow", now_here)
    assert stages_left(old) == set()


def test_another_database_on_this_machine_is_asked_unnamed(store, client, old, made_database):
    """A run whose settings named it; the champion may stand there."""
    uri = mlflow_at(store.root.parent / "other.db", made_database)
    in_other = {"tracking_uri": uri, "experiment": "p2d", "run_id": "1" * 32}
    age(keep_run(store, summary(old, "old", mlflow=in_other)), 40)
    register(MlflowClient(uri, uri), "team", **{"key.heads": old["heads"].key})
    gc(store, "--keep", "0")
    assert stages_left(old) == {"samples", "proxy", "heads"}


def test_of_two_servers_that_runs_were_recorded_at_both_have_to_be_named(
    store, old, made_database, tmp_path
):
    for name, run in (("one", "1" * 32), ("two", "2" * 32)):
        mlflow_at(tmp_path / f"{name}.db", made_database, run=run)
        at_server = {"tracking_uri": f"http://{name}:5000/", "experiment": "p2d", "run_id": run}
        age(keep_run(store, summary(old, f"run {name}", mlflow=at_server)), 40)
    one, two = (f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "two"))
    with pytest.raises(ServiceError, match=r"at http://two:5000, which.*--mlflow"):
        gc(store, "--keep", "1", "--mlflow", one)
    assert stages_left(old) == set(old)
    gc(store, "--keep", "1", "--mlflow", one, "--mlflow", two)


def test_a_store_whose_own_database_is_gone_loses_nothing(store, client, old):
    own = {"tracking_uri": mlflow_uri(store.root), "experiment": "p2d", "run_id": "1"}
    age(keep_run(store, summary(old, "old", mlflow=own)), 40)
    (store.root / "mlflow/mlflow.db").unlink()
    with pytest.raises(ServiceError, match=r"recorded in MLflow at sqlite.*nothing was removed"):
        gc(store, "--keep", "1")
    assert stages_left(old) == set(old)


def test_while_a_run_is_in_progress_nothing_is_removed(store, old):
    """It may be using what only an old run names."""
    with (
        noted(store.root, "running"),
        pytest.raises(ArtifactError, match=r"run running is in progress.*try again after it"),
    ):
        gc(store, "--keep", "1")
    assert stages_left(old) == set(old)
    gc(store, "--keep", "1")
    assert stages_left(old) == set()
