"""The main job again with a head map that is there: other data, or another budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.adapt import adapt_to, given_head_map
from flows.engine import engine_of
from flows.hub import pinned
from flows.inputs import check_inputs
from flows.launch import on_worker, ranked_bases, run_name, store_folder
from flows.settings import RunSettings, Share, SourceSettings, anchored
from p2d_core.errors import HeadMapError
from p2d_core.store import Store
from tasks.summary import Summary
from tasks.tracking.ahead import ask_ahead


def rerun_name() -> str:
    """What a run of the flow is called."""
    return run_name(" again")


@flow(
    name="rerun-from-head-map",
    flow_run_name=rerun_name,
    task_runner=ThreadPoolTaskRunner(max_workers=2),
    persist_result=False,
)
def rerun_from_head_map(
    head_map: Annotated[str, Field(min_length=4)],
    fraction: Share | None = None,
    corpus: tuple[SourceSettings, ...] = (),
    store: str | None = None,
    *,
    settings: RunSettings,
) -> Summary:
    """Selects and trains with a head map of an earlier run: no proxy run, no ranking.

    Args:
        head_map: Key of the head map, or its beginning; MLflow and `p2d artifacts ls` show it.
        fraction: Share of the corpus to train on, in place of the settings' own.
        corpus: Other sources to choose from, in place of the settings' own.
        store: Folder of the artifacts on the worker. P2D_STORE, or artifacts, if empty.
        settings: The run. Relative paths are taken from the worker's folder (P2D_HOME).
    """
    folder = store_folder(store)
    changed = pinned(anchored(with_other_budget(settings, fraction, corpus), Path.cwd()))
    inputs = check_inputs(changed, ranked_bases(Store(folder)))
    if given_head_map(Store(folder), head_map, inputs, changed.target.name) is None:
        raise HeadMapError(
            f"no head map is in use for {changed.target.name}. Run refresh-head-map first, or give "
            "the key of a head map."
        )
    ask_ahead(changed.tracking.uri, changed.tracking.experiment, folder)()
    with engine_of(changed, inputs.base), on_worker(folder) as run_id:
        return adapt_to(changed, run_id, inputs, folder, head_map)


def with_other_budget(
    settings: RunSettings, fraction: float | None, corpus: tuple[SourceSettings, ...]
) -> RunSettings:
    """The settings with what is given put in place of their own."""
    changes = {}
    if fraction is not None:
        changes["selection"] = settings.selection.model_copy(update={"fraction": fraction})
    if corpus:
        changes["corpus"] = settings.corpus.model_copy(update={"sources": corpus})
    return settings.model_copy(update=changes)
