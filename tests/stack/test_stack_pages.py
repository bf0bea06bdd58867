"""What Prefect's pages show, looked at in a real browser: form, flow run, report.

Leaves screenshots in the tests' temporary folder.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator

import pytest
from PIL import Image
from playwright.sync_api import Page

from tests.needs import CHROMIUM, do_without
from tests.pages.browser import chromium
from tests.stack.test_stack import create, ended, parameters_of, runs_of

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def look(stack, tmp_path_factory) -> Iterator[Callable[..., Page]]:
    """Opens a page, waits for a text on it (and a graph), and takes a screenshot."""
    if CHROMIUM is None:
        do_without("Chromium", "chromium")
    shots = tmp_path_factory.mktemp("prefect-pages")
    password = base64.b64encode(f"admin:{stack.password}".encode()).decode()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.add_init_script(f"localStorage.setItem('prefect-password', '{password}')")

        def look(path: str, awaited: str, drawn: bool = False) -> Page:
            page.goto(stack.prefect_url.removesuffix("/api") + path)
            page.get_by_text(awaited).first.wait_for(timeout=60_000)
            if drawn:
                until_drawn(page)
            page.wait_for_load_state("networkidle")
            page.screenshot(path=shots / f"{path.strip('/').replace('/', '-')}.png")
            return page

        yield look


def until_drawn(page: Page) -> None:
    """Until the graph of a flow run has the green bars of tasks that went well."""
    end = time.monotonic() + 120
    while True:
        graph = Image.open(io.BytesIO(page.locator("canvas").first.screenshot())).convert("RGB")
        colours = graph.getcolors(graph.width * graph.height)
        if sum(n for n, (red, green, blue) in colours if green > 80 + max(red, blue)) > 200:
            return
        assert time.monotonic() < end, "no graph was drawn"
        page.wait_for_timeout(500)


@pytest.fixture(scope="module")
def run(stack, deployed) -> str:
    """Id of a completed run of the main job that reused what there was."""
    nightly = deployed["adapt-nightly"]
    done = runs_of(stack, nightly, "Completed")
    if len(done) > 1:
        return str(done[1]["id"])
    made = create(stack, nightly, **parameters_of(stack, nightly)).raise_for_status().json()["id"]
    assert ended(stack, made)["state"]["name"] == "Completed"
    return str(made)


def test_the_form_asks_for_the_head_map_first_and_explains_every_setting(look, deployed):
    page = look(f"/deployments/deployment/{deployed['rerun-from-head-map']}/run", "Parameters")
    text = page.inner_text("body")
    wanted = [
        "head_map", "Key of the head map", "fraction", "Share of the corpus to train on",
        "settings", "What the run is called.", "Base", "Target", "Corpus", "Selection",
        "From affinities to the subset.", "Share of the corpus that training sees.",
    ]  # fmt: skip
    places = [text.find(words) for words in wanted]
    assert -1 not in places, dict(zip(wanted, places, strict=True))
    assert places[:4] == sorted(places[:4])
    assert text.index("head_map") < text.index("settings")


def test_the_flow_run_says_target_and_day_and_shows_what_was_cached(look, stack, run):
    name = f"my-domain on target, {_day(stack, run)}"
    page = look(f"/runs/flow-run/{run}", name, drawn=True)
    text = page.inner_text("body")
    for words in ("Completed", "adapt-nightly", "p2d", "Finished in state Cached"):
        assert words in text


def test_the_report_is_an_artifact_with_summary_aer_head_map_and_links(look, stack, run):
    with stack.prefect as api:
        wanted = {"artifacts": {"flow_run_id": {"any_": [run]}, "key": {"like_": "report%"}}}
        (report,) = api.post("/artifacts/filter", json=wanted).raise_for_status().json()
    assert report["type"] == "markdown"
    page = look(f"/artifacts/artifact/{report['id']}", "AER")
    text = page.inner_text("body")
    assert page.locator("img[alt='head map']").evaluate("one => one.naturalWidth") > 100
    for words in ("base model", "Head map", "AER", "MLflow", "layer 0", "my-domain, version"):
        assert words in text, words


def _day(stack, run: str) -> str:
    with stack.prefect as api:
        return str(api.get(f"/flow_runs/{run}").json()["start_time"])[:10]
