"""The report as one HTML file without any outside reference."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from tasks.report.further import further
from tasks.report.page import Page
from tasks.verdict import TERM_NAMES, times, verdict

PICTURES = {
    "quality": "Quality of the arms",
    "heads": "Head map; task heads in red",
    "affinities": "Affinities of the corpus, the chosen samples and the cut-off",
    "loss": "Loss of the response's tokens while training",
}
"""By file name: what each shows, for those who cannot see it."""


def as_html(page: Page) -> str:
    """Pictures are data URIs; all text is escaped."""
    summary = page.summary
    return _template().render(
        page=page,
        summary=summary,
        aer=summary.aer,
        verdict=verdict(summary),
        further=further(summary),
        terms=TERM_NAMES,
        times=times,
        alt=PICTURES,
        pictures={
            name: base64.b64encode(page.pictures[name]).decode()
            for name in PICTURES
            if name in page.pictures
        },
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
