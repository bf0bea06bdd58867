"""The HTML report in a real browser: on a desktop, on a phone, and on paper."""

from pathlib import Path

import pytest

from p2d_core.store import Store
from tasks.report.html import as_html
from tests.pages.browser import chromium, page_at, pages_printed
from tests.tasks.report.test_report import HOSTILE, many, page_of

pytestmark = pytest.mark.timeout(300)
LONG = "wordwithoutanyspace" * 12
WIDER_THAN_ITS_BOX = """
[...document.querySelectorAll('.figures div')]
  .filter(one => one.scrollWidth > one.clientWidth).map(one => one.innerText)
"""
BROKEN_WORDS = """
[...document.querySelectorAll('.lineage td:first-child')]
  .filter(one => {
    const text = document.createRange(); text.selectNodeContents(one);
    return text.getClientRects().length > 1;
  }).map(one => one.innerText)
"""
"""Names of artifacts that do not stand in one line."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A usual report, and one in which everything is as long or as many as it can be."""
    folder = tmp_path_factory.mktemp("pages")
    usual = page_of(Store(folder / "a"), folder / "usual-drawn", many(100, "a sample, number"))
    names = [f"{LONG}-{n}" for n in range(60)]
    large = page_of(
        Store(folder / "b"),
        folder / "large-drawn",
        many(100, f"{HOSTILE} {LONG}"),
        name=LONG,
        base=LONG,
        target=LONG,
        command=f"p2d adapt {LONG}.yaml",
        quality__base=123456.789,
        quality__p2d=123456.788,
        selection__by_source=dict.fromkeys(names, 5),
        selection__corpus_by_source=dict.fromkeys(names, 50),
        selection__notes=[f"note {n}: {HOSTILE}" for n in range(30)],
    )
    files = {}
    for name, page in (("usual", usual), ("large", large)):
        files[name] = folder / f"{name}.html"
        files[name].write_text(as_html(page), encoding="utf-8")
    return files


@pytest.mark.parametrize("name", ["usual", "large"])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen_and_every_picture_is_there(reports, name, width):
    asked: list[str] = []
    with chromium() as browser, page_at(browser, "about:blank", width, 844) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(reports[name].as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(WIDER_THAN_ITS_BOX) == []
        assert page.evaluate(BROKEN_WORDS) == []
        assert page.evaluate("[...document.images].every(one => one.naturalWidth > 100)")
        assert page.evaluate("document.images.length") == 4
        page.screenshot(path=reports[name].with_suffix(f".{width}.png"), full_page=True)
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("name", ["usual", "large"])
def test_it_prints_to_two_pages_of_a4(reports, name):
    with chromium() as browser, page_at(browser, reports[name].as_uri(), 1200, 900) as page:
        assert pages_printed(page, reports[name].with_suffix(".pdf")) <= 2


def test_hostile_text_runs_no_script_and_shows_as_it_is(reports):
    with chromium() as browser, page_at(browser, reports["large"].as_uri(), 1200, 900) as page:
        spoken: list[str] = []
        page.on("dialog", lambda dialog: (spoken.append(dialog.message), dialog.dismiss()))
        page.reload()
        assert "<script>alert(1)</script>" in page.inner_text("body")
        assert spoken == []
