"""A server that will not take a run's record is known of before the run."""

import socket
import time

import pytest
from mlflow import MlflowClient

from p2d_core.errors import SettingsError
from tasks.tracking import ahead
from tasks.tracking.database import mlflow_uri, prepare_tracking
from tests.job import quick_job


@pytest.fixture
def server(tmp_path) -> str:
    """A team's database with an experiment that was deleted and one that was not."""
    prepare_tracking(tmp_path)
    uri = mlflow_uri(tmp_path)
    client = MlflowClient(uri)
    client.create_experiment("in use")
    client.delete_experiment(client.create_experiment("old"))
    return uri


def test_a_deleted_experiment_is_refused_before_anything_starts(server, tmp_path):
    job = quick_job(tmp_path / "job")
    with pytest.raises(
        SettingsError,
        match=r"experiment 'old' at sqlite:.*mlflow\.db is deleted.*mlflow experiments",
    ):
        job.run(tracking={"uri": server, "experiment": "old"})
    assert not list(job.store.glob("samples/*"))


@pytest.mark.parametrize("experiment", ["in use", "not there yet"])
def test_one_that_is_there_or_new_is_fine(server, experiment, caplog, tmp_path):
    ahead.ask_ahead(server, experiment, tmp_path)()
    assert not caplog.records


def test_one_that_was_deleted_in_the_stores_own_database_is_refused_too(server, tmp_path):
    """`p2d ui` has a button for it."""
    with pytest.raises(SettingsError, match=r"experiment 'old' at sqlite:.* is deleted"):
        ahead.ask_ahead(None, "old", tmp_path)()


def test_an_address_of_no_kind_that_mlflow_knows_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"tracking.uri .* is 'htp://nowhere:5000', of a kind"):
        ahead.ask_ahead("htp://nowhere:5000", "p2d", tmp_path)()


def test_one_that_does_not_answer_is_warned_of(caplog, tmp_path):
    ahead.ask_ahead("http://name:secret@127.0.0.1:9", "p2d", tmp_path)()
    (record,) = caplog.records
    assert "refused" in record.message
    assert "The run goes on" in record.message
    assert "tracking.uri" in record.message
    assert "secret" not in record.message


def test_one_that_takes_the_call_and_says_nothing_is_not_waited_for(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(ahead, "SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        ahead.ask_ahead(f"http://127.0.0.1:{silent.getsockname()[1]}", "p2d", tmp_path)()
    assert time.monotonic() - start < 5
    assert "The run goes on" in caplog.text


def test_a_file_that_is_not_there_is_not_made(tmp_path, caplog):
    ahead.ask_ahead(f"sqlite:///{tmp_path / 'new.db'}", "p2d", tmp_path)()
    assert not caplog.records
    assert not list(tmp_path.iterdir())
