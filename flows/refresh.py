"""Whether the head map in use still holds: it is held against rankings on fresh proxy sets."""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from flows.hub import base_name, pinned
from flows.inputs import Inputs, check_inputs, make_runtime
from flows.launch import ranked_bases, run_name, run_of, started, store_folder
from flows.ledger import Ledger
from flows.settings import RunSettings
from flows.stages import Run, find_heads, rank_on, read_target, use_from_now_on
from p2d_core.heads.drift import Drift, drift
from p2d_core.heads.head_map import HeadPick
from p2d_core.store import ArtifactRef, Store
from p2d_core.store.in_use import head_map_in_use, put_in_use
from tasks.heads import average_heads, head_map_in
from tasks.record import record_drift
from tasks.samples import redraw_target
from tasks.stage import BaseModel, Plugin

log = logging.getLogger(__name__)

Margin = Annotated[float, Field(gt=0, lt=1)]
Draws = Annotated[int, Field(ge=2, le=10)]


@dataclass(frozen=True)
class Refresh:
    """What came of a look at the head map in use."""

    name: str
    target: str
    in_use: str
    """Key of the head map that is in use now."""
    before: str | None
    """Key of the one that was; None at the first look."""
    number: int
    """Looks so far, this one included."""
    drift: Drift | None
    """None where there was no map to look at: the first look, it is damaged or gone, or the
    settings rank or pick heads in another way."""
    ranker_before: str | None = None
    """That the map in use was ranked by, and how many heads it took, where the settings say
    otherwise now."""

    @property
    def sentence(self) -> str:
        """For a person."""
        if self.drift is None:
            if self.before is None:
                return f"No head map was in use for {self.target}: {self.in_use[:12]} is now."
            if self.ranker_before is not None:
                return (
                    f"The head map {self.before[:12]} that was in use for {self.target} was ranked "
                    f"by {self.ranker_before}, as the settings no longer say: {self.in_use[:12]} "
                    "takes its place."
                )
            gone = f"The head map {self.before[:12]} that was in use for {self.target}"
            return f"{gone} is damaged or gone: {self.in_use[:12]} was ranked in its place."
        kept = f"{self.in_use[:12]} stays in use."
        if self.before != self.in_use:
            kept = f"{self.in_use[:12]}, the mean of today's draws, takes its place."
        return f"{self.drift.sentence} {kept}"

    def as_json(self) -> dict[str, Any]:
        """Plain values; the keys are the fields' names."""
        return asdict(self)


def refresh_name() -> str:
    """What a run of the flow is called."""
    return run_name(" head map")


def run_refresh(
    settings: RunSettings, *, store: Path, margin: float = 0.1, draws: int = 2
) -> Refresh:
    """Checks all input, then runs the flow.

    Raises:
        InputError: before anything was started.
    """
    settings = pinned(settings)
    inputs = checked(settings, store)

    def run() -> Refresh:
        return refresh_head_map(settings, margin, draws, store=str(store.resolve()))

    return started(settings, inputs.base, inputs, store, run)


@flow(name="refresh-head-map", flow_run_name=refresh_name, persist_result=False)
def refresh_head_map(
    settings: RunSettings, margin: Margin = 0.1, draws: Draws = 2, store: str | None = None
) -> Refresh:
    """Ranks the heads on fresh proxy sets and says whether the head map in use still holds.

    The first look puts a head map to use; runs take it with head_map: in-use.

    Args:
        settings: The run. Relative paths are taken from the worker's folder (P2D_HOME).
        margin: By how much both rank correlation and overlap of the task heads have to lie below
            those between today's own draws for the map to be replaced.
        draws: Fresh proxy sets to rank on; each costs a proxy run where the ranker needs one.
        store: Folder of the artifacts on the worker. P2D_STORE, or artifacts, if empty.
    """
    folder = store_folder(store)

    def check(given: RunSettings) -> tuple[Inputs, BaseModel]:
        inputs = checked(given, folder)
        return inputs, inputs.base

    with run_of(settings, folder, check) as begun:
        done = look(begun.settings, begun.run_id, begun.checked, folder, margin, draws)
        told(begun.settings, begun.checked, folder, done)
        begun.finished.append(done)
        return done


def checked(settings: RunSettings, store: Path) -> Inputs:
    """Everything a refresh needs, further draws of the proxy set among it."""
    several = settings.heads.model_copy(update={"average_over": 2})
    return check_inputs(settings.model_copy(update={"heads": several}), ranked_bases(Store(store)))


def look(
    settings: RunSettings, run_id: str, inputs: Inputs, store: Path, margin: float, draws: int
) -> Refresh:
    """The work, within a flow."""
    run = Run(settings, inputs, make_runtime(settings, store, run_id), Ledger(run_id))
    name = settings.target.name
    with run.ledger.stage("samples") as made:
        target, _ = read_target(run, [])
        made.append(target)
    used = head_map_in_use(store, inputs.base.sha256, name)
    number = used.refreshes + 1 if used is not None else 1
    kept = Store(store).find("heads", used.key) if used is not None else None
    if used is None or kept is None:
        heads = find_heads(run, target)
        use_from_now_on(run, heads, "the first look", number)
        before = used.key if used is not None else None
        return Refresh(settings.name, name, heads.key, before, number, None)
    before, now = ranked_by(kept), in_words(inputs.ranker, inputs.pick)
    if before != now:
        heads = find_heads(run, target)
        use_from_now_on(run, heads, f"{used.key[:12]} is of other settings", number)
        return Refresh(settings.name, name, heads.key, used.key, number, None, before)
    maps = fresh_maps(run, target, number, draws)
    found = drift(head_map_in(kept), [head_map_in(one) for one in maps], margin=margin)
    if found.has_drifted:
        heads = average_heads(
            run.runtime, inputs.base, draws=maps, ranker=inputs.ranker, pick=inputs.pick
        )
        use_from_now_on(run, heads, f"{used.key[:12]} had drifted", number)
        return Refresh(settings.name, name, heads.key, used.key, number, found)
    put_in_use(store, inputs.base.sha256, name, replace(used, refreshes=number))
    return Refresh(settings.name, name, used.key, used.key, number, found)


def ranked_by(heads: ArtifactRef) -> str:
    """What a head map was ranked by and how its task heads were picked, in words."""
    settings = heads.manifest.settings
    return in_words(Plugin(**settings["ranker"]), HeadPick(**settings["pick"]))


def in_words(ranker: Plugin, pick: HeadPick) -> str:
    """Such as spad (support values, temperature 1.0), 10% of the heads, at most 2 a layer."""
    options = ", ".join(f"{option} {value}" for option, value in ranker.settings)
    words = [f"{ranker.name} ({options})" if options else ranker.name]
    words.append(f"{100 * pick.fraction:g}% of the heads")
    if pick.max_per_layer is not None:
        words.append(f"at most {pick.max_per_layer} a layer")
    if pick.one_per_kv_group:
        words.append("one of a KV group")
    return ", ".join(words)


def told(settings: RunSettings, inputs: Inputs, store: Path, done: Refresh) -> None:
    """What came of a look, in MLflow as a point of a series and in Prefect as an artifact."""
    replaced = done.before not in (None, done.in_use) and done.ranker_before is None
    figures = {"drift/replaced": float(replaced)}
    if (found := done.drift) is not None:
        figures |= {
            "drift/spearman": found.spearman,
            "drift/overlap": found.overlap,
            "drift/floor_spearman": found.floor_spearman,
            "drift/floor_overlap": found.floor_overlap,
            "drift/margin": found.margin,
        }
    record_drift(
        series=f"{inputs.base.sha256[:16]} {re.sub(r'[^A-Za-z0-9_.-]', '_', done.target)}",
        target=done.target,
        step=done.number,
        figures=figures,
        note=done.sentence,
        tags={"target": done.target, "base_model": base_name(settings.base), "heads": done.in_use},
        tracking=settings.tracking.model_dump(mode="json"),
        store=str(store),
    )
    log.info(done.sentence)
    try:
        create_markdown_artifact(done.sentence, key="head-map-drift", description=done.target)
    except Exception as error:
        # the work is done: a page about it must not make it fail
        log.warning("Prefect did not take what came of it: %s", error)


def fresh_maps(run: Run, target: ArtifactRef, number: int, draws: int) -> list[ArtifactRef]:
    """Head maps ranked on proxy sets that no look before this one has drawn."""
    first = 1000 * number
    with run.ledger.stage("samples") as made:
        made += [redraw_target(run.runtime, target=target, draw=first + i) for i in range(draws)]
    return [rank_on(run, each, run.inputs.ranker) for each in made]
