"""MLflow's own pages in a real browser: experiment, run, report, arms, model version, comparison.

The server is the one that `p2d ui` starts; the run is recorded through it, as a team's would be.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from flows.cli.ui import HOST, any_free_port, start_server, stop_server, wait_until_up
from p2d_core.comparison.arms import Arm, ArmRun
from p2d_core.store import ArtifactRef, Store
from tasks.comparison import compare_arms
from tasks.record import record_comparison, record_drift
from tasks.stage import Runtime
from tasks.summary import Summary
from tasks.tracking.database import prepare_tracking
from tasks.tracking.views import (
    ARMS,
    COMPARED,
    DRIFT,
    TABLE,
    address,
    run_address,
    version_address,
)
from tests.job import Job
from tests.pages.browser import chromium, page_at

pytestmark = pytest.mark.timeout(600)
SCREEN = (1900, 1200)
CUT_OFF = """
[...document.querySelectorAll("[row-index='0'] [role=gridcell][col-id]")]
  .filter(one => /^(tags|metrics|attributes.`User)/.test(one.getAttribute('col-id')))
  .filter(one => [...one.querySelectorAll('span')].some(it => it.scrollWidth > it.clientWidth))
  .map(one => one.innerText)
"""
"""Cells of ours that MLflow ends with an ellipsis."""


@dataclass
class Recorded:
    """What the pages show, and where."""

    server: str
    done: Summary
    comparison: dict[str, str]
    folder: Path
    """For screenshots."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("mlflow-pages")
    job = Job(folder / "job")
    prepare_tracking(job.store)
    port = any_free_port()
    server = start_server(job.store / "mlflow", port)
    try:
        wait_until_up(server, port, job.store / "mlflow")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"http://{HOST}:{port}")
            patch.setenv("NO_PROXY", HOST)
            done = job.run(arms={"random": True}, registry={"name": "ledgers", "margin": 0.01})
            tracking = {"experiment": "p2d", "uri": None, "tags": {}}
            made = comparison_in(Store(job.store))
            comparison = record_comparison.fn(made, "run-1", tracking, str(job.store))
            for look, value in ((1, 0.9), (2, 0.7)):
                figures = {"drift/spearman": value, "drift/floor_spearman": 0.95}
                record_drift.fn("b t", "t", look, figures, "holds", {}, tracking, str(job.store))
        yield Recorded(f"http://{HOST}:{port}/", done, comparison, folder)
    finally:
        stop_server(server)


def comparison_in(store: Store) -> ArtifactRef:
    """Of two arms over two seeds, with figures instead of training."""
    arms = [Arm("head-filter", "frobenius", "heads", 0.1), Arm("random", "frobenius", "heads", 0.1)]
    runs = [
        ArmRun(
            arm, seed, quality=quality, values={"a": quality, "b": quality}, aer=0.2 + n / 10,
            seconds={"model": 1.0}, full_seconds=5.0, parameters=1000,
        )
        for n, (arm, quality) in enumerate(zip(arms, (0.9, 0.4), strict=True))
        for seed in (0, 1)
    ]  # fmt: skip
    runtime = Runtime(store=str(store.root), run_id="run-1")
    return compare_arms.fn(runtime, runs, "exact_match", True, "two arms")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def see(page: Page, *texts: str) -> None:
    """Waits until each is on the page, in sight of a reader who clicks nothing."""
    for text in texts:
        page.get_by_text(text).locator("visible=true").first.wait_for()


def in_sight(page: Page, text: str) -> bool:
    """Whether a text lies within the window."""
    box = page.get_by_text(text).locator("visible=true").first.bounding_box()
    size = page.viewport_size
    assert box is not None
    assert size is not None
    return box["x"] + box["width"] <= size["width"] and box["y"] + box["height"] <= size["height"]


def test_the_experiment_shows_every_adaptation_in_a_table(recorded, browser):
    done = recorded.done
    place = recorded.server + address("1", TABLE)
    with page_at(browser, place, *SCREEN) as page:
        see(page, f"small {done.run_id}", "P2D: adaptations", "Their arms side by side")
        shown = {
            cell.get_attribute("col-id"): cell.inner_text()
            for cell in page.locator("[role=row][row-index='0'] [role=gridcell][col-id]").all()
        }
        headers = page.locator("[role=columnheader][col-id]").all_inner_texts()
        for name in ("quality before", "quality gain", "AER parts", "parameters", "reused"):
            assert name in headers
            assert in_sight(page, name), name
        assert page.evaluate(CUT_OFF) == []
        page.screenshot(path=recorded.folder / "experiment.png")
    assert shown["tags.`target`"] == "target"
    assert shown["tags.`base_model`"] == "base"
    assert shown["tags.`heads`"] == "4/32 (12.5%)"
    assert shown["tags.`data`"] == "120/1,200 (10.0%)"
    assert float(shown["metrics.`quality before`"]) == pytest.approx(done.quality.base, rel=1e-3)
    assert float(shown["metrics.`quality`"]) == pytest.approx(done.quality.p2d, rel=1e-3)
    assert float(shown["metrics.`quality gain`"]) == pytest.approx(
        done.quality.base - done.quality.p2d, rel=1e-3
    )
    assert float(shown["metrics.`AER`"]) == round(done.aer.cold, 3)
    assert len(shown["tags.`AER parts`"]) == 16
    assert shown["tags.`reused`"] == "nothing"
    assert shown["metrics.`parameters`"] == str(done.trainable.parameters)
    assert shown["attributes.`User`"]
    assert "ago" in shown["runDateAndNestInfo"]


def test_an_experiment_that_mlflow_opens_as_one_of_chats_leads_to_the_table(recorded, browser):
    """So it does in a browser that has never been there, whatever the experiment says it is."""
    with page_at(browser, f"{recorded.server}#/experiments/1", *SCREEN) as page:
        # by its tag: MLflow lays a dialog over the page, which takes roles from what is below
        link = page.locator("a", has_text="Adaptations")
        link.wait_for()
        assert in_sight(page, "Adaptations")
        assert link.get_attribute("href").endswith(address("1", TABLE))


def test_the_arms_stand_side_by_side_with_the_parts_of_the_aer_as_stacked_bars(recorded, browser):
    with page_at(browser, recorded.server + address("1", ARMS), 1900, 2400) as page:
        see(page, "Quality of the arms", "Cost of the arms", "training loss")
        see(page, "base model, small", "random subset, small", "proxy set alone, small")
        page.locator(".js-plotly-plot .bars .point").first.wait_for()
        pictures = page.locator("img[src*='get-artifact'], img[src^='blob:']")
        pictures.first.wait_for()
        page.screenshot(path=recorded.folder / "arms.png")
        assert page.locator(".js-plotly-plot").count() >= 6
        assert pictures.count() >= 2


def test_the_run_opens_on_what_came_of_it(recorded, browser):
    done = recorded.done
    place = recorded.server + run_address("1", done.mlflow["run_id"])
    with page_at(browser, place, *SCREEN) as page:
        before, after = f"{done.quality.base:.3f}", f"{done.quality.p2d:.3f}"
        see(page, f"loss {before} → {after}", f"AER {done.aer.cold:.3f}", "Whole report")
        see(page, f"ledgers, version {done.registered.version}")
        page.screenshot(path=recorded.folder / "run.png")
        page.get_by_test_id("show-comment-toggle").first.click()
        see(
            page, "layer 0", "Highest affinity among the chosen", "Lowest affinity among the chosen"
        )
        see(page, "head ranking", "Lineage", done.command, "drills")
        for stage in ("heads", "scores", "subset", "model"):
            see(page, Path(done.artifacts[stage]).name[:12])
        loaded = "[...document.images].filter(one => one.src.includes('get-artifact'))"
        page.wait_for_function(f"{loaded}.filter(one => one.naturalWidth > 100).length === 4")
        page.set_viewport_size({"width": SCREEN[0], "height": 5000})
        page.screenshot(path=recorded.folder / "run-note.png")


def test_the_report_opens_within_mlflow(recorded, browser):
    place = recorded.server + run_address("1", recorded.done.mlflow["run_id"], "report.html")
    with page_at(browser, place, *SCREEN) as page:
        report = page.frame_locator("iframe").first
        report.get_by_text("Alignment Efficiency Ratio").wait_for()
        assert report.locator("img").count() == 4
        page.screenshot(path=recorded.folder / "report.png")


def test_the_model_version_says_what_made_it_and_why_it_is_champion(recorded, browser):
    done = recorded.done
    version = done.registered
    place = recorded.server + version_address(version.name, version.version)
    with page_at(browser, place, *SCREEN) as page:
        see(page, "@ challenger", f": {version.why}", "Became champion" if version.champion else "")
        see(page, Path(done.artifacts["heads"]).name, Path(done.artifacts["subset"]).name)
        page.screenshot(path=recorded.folder / "model.png")
    assert version.champion == ("there was no champion" in version.why)


def test_the_drift_of_a_head_map_is_a_line_over_its_looks(recorded, browser):
    with page_at(browser, recorded.server + address("1", DRIFT), 1900, 1000) as page:
        see(page, "Head map in use against today's draws", "drift/spearman", "head map drift: t")
        page.locator(".js-plotly-plot .lines, .js-plotly-plot .scatterlayer").first.wait_for()
        page.screenshot(path=recorded.folder / "drift.png")


def test_the_arms_of_a_comparison_are_charted(recorded, browser):
    with page_at(browser, recorded.server + address("1", COMPARED), 1900, 1500) as page:
        see(
            page,
            "Arms of comparisons",
            "head-filter, frobenius, heads, 10%",
            "gain over random data",
        )
        page.locator(".js-plotly-plot .bars .point").first.wait_for()
        page.screenshot(path=recorded.folder / "comparison.png")
    place = recorded.server + run_address("1", recorded.comparison["run_id"])
    with page_at(browser, place, *SCREEN) as page:
        see(page, "2 arms", "Does head-filter choose better data than random?")
        page.screenshot(path=recorded.folder / "comparison-run.png")
