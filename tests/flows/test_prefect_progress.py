"""Progress as Prefect's artifacts."""

import logging

import pytest
from prefect.artifacts import Artifact

from flows import prefect_progress
from flows.prefect_progress import told_to_prefect
from tasks.progress import progress_of


@pytest.fixture
def at_once(monkeypatch):
    """Every step is told, however quick."""
    monkeypatch.setattr(prefect_progress, "SECONDS_WORTH_TELLING", 0.0)
    monkeypatch.setattr(prefect_progress, "SECONDS_BETWEEN", 0.0)


def test_a_stage_tells_how_far_it_is_and_ends_at_what_was_done(at_once, caplog):
    caplog.set_level(logging.INFO, "flows.prefect_progress")
    with told_to_prefect(), progress_of("model (p2d)") as progress:
        progress(1, 4)
        assert Artifact.get("progress-model-p2d").data == 25.0
        progress(3, 4)
    told = Artifact.get("progress-model-p2d")
    assert told.data == 75.0
    assert told.description.startswith("model (p2d): 3 of 4 in ")
    assert "model (p2d): 1 of 4 in " in caplog.text


def test_a_quick_stage_and_one_of_unknown_length_leave_no_artifact(at_once, monkeypatch):
    with told_to_prefect(), progress_of("of unknown length") as progress:
        progress(5, 0)
    monkeypatch.setattr(prefect_progress, "SECONDS_WORTH_TELLING", 60.0)
    with told_to_prefect(), progress_of("quick") as progress:
        progress(1, 1)
    assert Artifact.get("progress-of-unknown-length") is None
    assert Artifact.get("progress-quick") is None


def test_work_goes_on_when_prefect_does_not_take_it(at_once, monkeypatch, caplog):
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", away)
    with told_to_prefect(), progress_of("work") as progress:
        progress(1, 2)
    assert "Prefect was not told how far work is: no server" in caplog.text
