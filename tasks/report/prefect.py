"""The report as an artifact of Prefect: what a run came to, on the page of the flow run."""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Iterable

from prefect.artifacts import create_markdown_artifact
from prefect.context import TaskRunContext

from tasks.report.markdown import as_note
from tasks.report.page import Page

log = logging.getLogger(__name__)


def tell_prefect(page: Page, links: Iterable[tuple[str, str]]) -> None:
    """Adds the report to the flow run that this is part of, if it is part of one.

    Args:
        links: (words, address relative to the MLflow server); left out where there is no server.
    """
    if TaskRunContext.get() is None:
        return
    summary = page.summary
    server = summary.mlflow.get("tracking_uri", "").rstrip("/")
    is_server = server.startswith(("http://", "https://"))
    text = as_note(page, [(words, f"{server}/{to}") for words, to in links if is_server])
    if (picture := page.pictures.get("heads")) is not None:
        data = base64.b64encode(picture).decode()
        text += f"\n![head map](data:image/png;base64,{data})\n"
    key = "report-" + (re.sub(r"[^a-z0-9]+", "-", summary.name.lower()).strip("-") or "run")
    try:
        create_markdown_artifact(text, key=key, description=f"{summary.name} on {summary.target}")
    except Exception as error:
        # the run is done and recorded: its page must not make it fail
        log.warning("Prefect did not take the report: %s", error)
