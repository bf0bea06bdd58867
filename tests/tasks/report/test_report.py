"""The report says the same as markdown and as HTML, fits, and shows hostile text as text."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest

from p2d_core.samples.schema import Sample, sample_id_of, to_table
from p2d_core.store import Store
from tasks.report.html import as_html
from tasks.report.markdown import LONGEST_NOTE, as_note, escaped
from tasks.report.page import Page, gather, one_line
from tests.small_store import fill, put, summary

HOSTILE = "<script>alert(1)</script> | **b** [x](javascript:1) `c` ![i](http://e.org/i.png)\n# h"


def page_of(store: Store, folder: Path, samples: list[Sample] | None = None, **changes) -> Page:
    refs = fill(store)
    if samples is not None:
        table = to_table(samples).append_column(
            "affinity", pa.array([1.0 - n / 100 for n in range(len(samples))])
        )
        chosen_by = pa.array(["affinity"] * len(samples))
        files = {"subset.parquet": table.append_column("chosen_by", chosen_by)}
        inputs = {"scores": refs["scores"].key}
        refs["subset"] = put(store, "subset", files, inputs=inputs, facts={"cut_off": 0.5})
    folder.mkdir()
    changes = {"command": "p2d adapt artifacts/runs/run-1.yaml"} | changes
    return gather(summary(refs, **changes), refs, folder)


def many(n: int, text: str) -> list[Sample]:
    return [
        Sample(sample_id_of(f"{text} {i}", "answer"), "pool", f"{text} {i}", "answer", i)
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("report")
    return page_of(Store(folder / "artifacts"), folder / "drawn", many(100, "sample number"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("hostile")
    return page_of(
        Store(folder / "artifacts"),
        folder / "drawn",
        many(60, HOSTILE * 20),
        name=HOSTILE,
        target=HOSTILE,
        base=HOSTILE,
        selection__by_source={HOSTILE: 3},
        selection__corpus_by_source={HOSTILE: 30},
        selection__notes=[HOSTILE],
    )


class Tags(HTMLParser):
    """Every tag, and every attribute that could lead out of the file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.leads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        ways = ("src", "href", "srcset", "action", "data", "poster")
        self.leads += [value or "" for name, value in attrs if name in ways]


def test_it_shows_the_twenty_highest_and_the_twenty_lowest_of_the_chosen(page):
    assert [one.affinity for one in page.highest] == [1.0 - n / 100 for n in range(20)]
    assert [one.affinity for one in page.lowest] == [1.0 - n / 100 for n in range(80, 100)]
    note, html = as_note(page), as_html(page)
    for number in (0, 19, 80, 99):
        assert f"sample number {number} → answer" in note
        assert f"sample number {number} → answer" in html
    for number in (20, 79):
        assert f"sample number {number} → answer" not in note + html


def test_a_small_subset_shows_no_sample_twice(tmp_path):
    page = page_of(Store(tmp_path / "artifacts"), tmp_path / "drawn", many(25, "one of few"))
    assert (len(page.highest), len(page.lowest)) == (20, 5)
    shown = [one.text for one in (*page.highest, *page.lowest)]
    assert len(set(shown)) == 25


@pytest.mark.parametrize("render", [as_note, as_html])
def test_both_say_what_came_of_it(page, render):
    text = re.sub(r"\s+", " ", render(page))
    for words in (
        "0.050", "0.750", "0.210", "4.8x", "1 of 4", "4 of 40", "6,144 parameters",
        "P2D is better than the base model by 0.700", "random subset", "head ranking",
        "the consistency gate was relaxed", "layer 0", "head-filter", "reused",
        "p2d adapt artifacts/runs/run-1.yaml",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize("render", [as_note, as_html])
def test_the_key_of_every_artifact_is_there(page, render):
    text = render(page)
    assert len(page.lineage) == 8
    for made in page.lineage:
        assert made.key[:12] in text, made.name


def test_every_artifact_says_what_it_was_made_from_and_whether_it_was_reused(page):
    lines = {made.name: made for made in page.lineage}
    assert lines["model"].made_from.startswith("heads ")
    assert lines["heads"].made_from == f"proxy {lines['proxy'].key[:8]}"
    assert not any(made.reused for made in page.lineage)


def test_the_html_leads_nowhere(page):
    tags = Tags(as_html(page))
    assert tags.names.count("img") == 4
    assert all(lead.startswith("data:image/png;base64,") for lead in tags.leads)
    assert not {"script", "link", "iframe", "a", "object"} & set(tags.names)
    assert "@import" not in as_html(page)
    assert "url(" not in as_html(page)


def test_hostile_text_is_text_in_html(hostile):
    tags = Tags(as_html(hostile))
    assert not {"script", "a"} & set(tags.names)
    assert all(lead.startswith("data:image/png;base64,") for lead in tags.leads)
    assert "&lt;script&gt;" in as_html(hostile)


def test_hostile_text_is_text_in_markdown(hostile):
    note = as_note(hostile)
    assert "<script>" not in note
    assert "&lt;script&gt;" in note
    assert "](javascript" not in note.replace("\\]", "")
    assert "http://e.org" not in note
    # a row has as many cells as its head, whatever stands in it
    for block in re.findall(r"(?:^\|.*\n)+", note, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1, block


@pytest.mark.parametrize("of", ["page", "hostile"])
def test_the_note_fits_into_what_mlflow_takes(of, request):
    page = request.getfixturevalue(of)
    note = as_note(page, [("report", "#/x" * 20)], "get-artifact?path={name}.png&run_uuid=1")
    assert len(note) <= LONGEST_NOTE
    assert "Highest affinity" in note


def test_sources_and_notes_beyond_some_are_added_up(tmp_path):
    names = [f"source {n:02}" for n in range(40)]
    page = page_of(
        Store(tmp_path / "artifacts"),
        tmp_path / "drawn",
        selection__by_source={name: 40 - n for n, name in enumerate(names)},
        selection__corpus_by_source=dict.fromkeys(names, 100),
        selection__notes=[f"note {n}" for n in range(30)],
    )
    assert len(page.sources) == 12
    assert page.sources[0] == ("source 00", "40", "100", "40.0%")
    assert page.sources[-1] == ("29 others", f"{sum(range(1, 30)):,}", "2,900", "15.0%")
    assert page.notes[-1] == "23 more in the summary"


def test_a_run_without_heads_and_subset_has_a_report_too(tmp_path):
    refs = fill(Store(tmp_path / "artifacts"))
    (tmp_path / "drawn").mkdir()
    few = {"model": refs["model"]}
    page = gather(summary(refs), few, tmp_path / "drawn")
    assert (page.highest, page.head_map) == ([], "")
    assert "Chosen samples from both ends" not in as_html(page)
    assert "Highest affinity" not in as_note(page)


def test_text_is_cut_and_put_into_a_line():
    assert one_line("a\n\tb\x00c", 10) == "a b c"
    assert one_line("abcdef", 4) == "abc…"
    assert escaped("a|b <c> *d*") == "a\\|b &lt;c&gt; \\*d\\*"
