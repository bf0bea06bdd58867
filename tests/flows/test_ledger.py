"""What a stage cost when it was made, and in this run."""

from contextlib import suppress

import pytest

from flows.ledger import Ledger
from p2d_core.aer import Reference
from p2d_core.store import ArtifactRef, Making, Recipe, Store

RECIPE = Recipe("model", "1")


def made(store: Store, run_id: str, *, seconds_before: float = 0.0) -> ArtifactRef:
    def build(making: Making) -> None:
        making.seconds_before = seconds_before
        (making.folder / "adapter").write_text("x")

    return store.produce(RECIPE, build, run_id=run_id)


def test_what_a_killed_run_had_done_is_no_cost_of_the_one_that_goes_on(tmp_path):
    """Cold it counts, or a kill would make training cheaper."""
    ledger = Ledger("second")
    with ledger.stage("model") as refs:
        refs.append(made(Store(tmp_path), "second", seconds_before=100.0))
    cold, now = ledger.aer(Reference("measured", 1000.0))
    assert cold.stages["model"] == pytest.approx(100, abs=1)
    assert 0 < now.stages["model"] < 1
    (line,) = ledger.lines()
    assert line.cold_seconds == pytest.approx(100, abs=1)
    assert line.seconds < 1


def test_what_was_reused_costs_its_look_up(tmp_path):
    store, ledger = Store(tmp_path), Ledger("second")
    made(store, "first", seconds_before=100.0)
    with ledger.stage("model") as refs:
        refs.append(made(store, "second"))
    cold, now = ledger.aer(Reference("measured", 1000.0))
    assert cold.stages["model"] == pytest.approx(100, abs=1)
    assert 0 < now.stages["model"] < 1


def test_a_stage_that_fails_is_no_entry(tmp_path):
    ledger = Ledger("first")
    with suppress(ValueError), ledger.stage("model"):
        raise ValueError
    assert ledger.lines() == []
