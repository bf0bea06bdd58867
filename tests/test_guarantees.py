"""The page of guarantees names every family of faults, and its figures are those that were made."""

import json
from pathlib import Path

from tests.faults.page import FIGURES, PAGE, RESULTS, filled

ROOT = Path(__file__).parent.parent
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_last_make_faults():
    """`python -m tests.faults.page` puts them in."""
    assert [name for _, name, _ in FIGURES.findall(TEXT)] == ["results", "load"]
    assert filled(TEXT) == TEXT


def test_all_that_was_tried_held_and_it_was_much():
    counts = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert all(family["held"] == family["tried"] for family in counts.values())
    least = {"kills": 200, "corruption": 200, "hostile_input": 1000, "sql": 60}
    assert {name: counts[name]["tried"] >= n for name, n in least.items()} == dict.fromkeys(
        least, True
    )


def test_no_figure_of_trials_time_or_memory_stands_outside_the_tables():
    prose = FIGURES.sub("", TEXT)
    assert not any(unit in prose for unit in (" seconds", " MB", " trials", " of 1"))


def test_every_family_of_faults_is_named():
    for file in (ROOT / "tests/faults").glob("test_*.py"):
        assert f"`{file.relative_to(ROOT)}`" in TEXT, file.name


def test_the_readme_leads_to_the_page():
    assert "(docs/guarantees.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
