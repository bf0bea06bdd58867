"""The main job: from base, target and corpus to an adapted model and its AER."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.hub import pinned
from flows.inputs import Inputs, check_inputs, make_runtime
from flows.launch import base_of, ranked_bases, run_name, run_of, started, store_folder
from flows.ledger import Ledger
from flows.planned import kept_plan
from flows.report import make_summary, rerun_command
from flows.scoring import score_corpus
from flows.settings import RunSettings
from flows.stages import (
    IN_USE,
    Run,
    benchmark,
    choose,
    cost_of_full,
    evaluate,
    heads_for,
    other_arms,
    read_data,
    train,
    use_from_now_on,
)
from p2d_core.errors import HeadMapError
from p2d_core.models import layers_of
from p2d_core.store import ArtifactRef, Store
from p2d_core.store.in_use import head_map_in_use
from tasks.heads import head_map_in
from tasks.record import record
from tasks.stage import BaseModel
from tasks.summary import Summary


def run_adapt(settings: RunSettings, *, store: Path, head_map: str | None = None) -> Summary:
    """Checks all input, then runs the flow.

    Args:
        head_map: key or folder of a `heads` artifact, or in-use; skips proxy and ranking.

    Raises:
        InputError: before anything was started.
        ArtifactError: there is no such head map.
        ServiceError: Prefect's server was away from the start.
    """
    settings = pinned(settings)
    inputs = check_inputs(settings, ranked_bases(Store(store)))
    if head_map is not None:
        given_head_map(Store(store), head_map, inputs, settings.target.name)
    # seconds that would otherwise come after those in which Prefect's server starts
    threading.Thread(target=import_module, args=("mlflow.tracking",), daemon=True).start()

    def run() -> Summary:
        return adapt(settings, store=str(store.resolve()), head_map=head_map)

    return started(settings, inputs.base, inputs, store, run)


@flow(
    name="adapt",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=2),
    persist_result=False,
)
def adapt(settings: RunSettings, store: str | None = None, head_map: str | None = None) -> Summary:
    """Adapts a base model to a target by its task heads, and says what it cost.

    Args:
        settings: The run. Relative paths are taken from the worker's folder (P2D_HOME).
        store: Folder of the artifacts on the worker. P2D_STORE, or artifacts, if empty.
        head_map: Key of a head map to take instead of a proxy run and ranking; in-use takes the
            one that refresh-head-map keeps (and puts the first one to use).
    """
    folder = store_folder(store)

    def check(given: RunSettings) -> tuple[Inputs, BaseModel]:
        inputs = check_inputs(given, ranked_bases(Store(folder)))
        return inputs, inputs.base

    with run_of(settings, folder, check) as begun:
        done = adapt_to(begun.settings, begun.run_id, begun.checked, folder, head_map)
        begun.finished.append(done)
        return done


def adapt_to(
    settings: RunSettings, run_id: str, inputs: Inputs, store: Path, head_map: str | None
) -> Summary:
    """Every stage, in order; within a flow."""
    start = time.perf_counter()
    run = Run(settings, inputs, make_runtime(settings, store, run_id), Ledger(run_id))

    data = read_data(run)
    given = given_head_map(Store(store), head_map, inputs, settings.target.name)
    heads = heads_for(run, data, given)
    if heads is not None and given is None and head_map == IN_USE:
        use_from_now_on(run, heads, "the first run that asked for one")
    scores = score_corpus(run, data, heads, inputs.scorer)
    subset = choose(run, data, scores)
    models: dict[str, ArtifactRef | None] = {"base": None, "p2d": train(run, data, heads, subset)}
    models |= other_arms(run, data, heads, scores, subset)
    if head_proxy := run.ledger.last("head_proxy"):
        models["proxy"] = head_proxy
    reference = cost_of_full(run, data, models.get("full"))
    evaluations = {arm: evaluate(run, data, arm, model) for arm, model in models.items()}
    benchmarks = benchmark(run, models)

    summary = make_summary(
        settings,
        run.ledger,
        reference,
        data.sources,
        data.corpus,
        heads,
        subset,
        models,
        evaluations,
        benchmarks,
    )
    if given is not None:
        summary.selection.notes += not_looked_at(inputs, given)
    summary.command = rerun_command(store, run_id, given)
    summary.planned = kept_plan(store, settings, inputs, given.key if given else None)
    summary.seconds = time.perf_counter() - start
    return record(summary, settings.model_dump(mode="json"), store=str(store))


def not_looked_at(inputs: Inputs, heads: ArtifactRef) -> list[str]:
    """What a given head map was made with, where the settings say otherwise; or that none is
    looked at."""
    if not inputs.needs_heads:
        return [
            f"the head map that was given was not looked at: neither {inputs.scorer.name} nor "
            f"{inputs.adaptation.name} looks at heads"
        ]
    ranker, pick = heads.manifest.facts["ranker"], heads.manifest.settings["pick"]
    if (ranker, pick) == (inputs.ranker.name, asdict(inputs.pick)):
        return []
    return [
        "heads.* of the settings was not looked at: the head map that was given is by "
        f"{ranker}, with heads.fraction {pick['fraction']}"
    ]


def given_head_map(
    store: Store, head_map: str | None, inputs: Inputs, target: str
) -> ArtifactRef | None:
    """The head map that the user named, if it is of this base model; None: rank anew.

    Raises:
        HeadMapError: it is damaged, or of another base model.
    """
    if head_map == IN_USE:
        used = head_map_in_use(store.root, inputs.base.sha256, target)
        head_map = used.key if used is not None and store.find("heads", used.key) else None
    if head_map is None:
        return None
    ref = store.resolve(head_map, stage="heads")
    if store.find("heads", ref.key) is None:
        raise HeadMapError(
            f"head map {ref.key[:12]} is damaged and was set aside. "
            "Leave --head-map out to rank anew."
        )
    proxy = ref.manifest.inputs.get("proxy")
    if proxy and store.path("proxy", proxy).exists() and store.find("proxy", proxy) is None:
        raise HeadMapError(
            f"the proxy run {proxy[:12]} of head map {ref.key[:12]} is damaged and was set aside. "
            "Leave --head-map out to make it again."
        )
    made_for = base_of(ref)
    if made_for != inputs.base.sha256:
        raise HeadMapError(
            f"head map {ref.key[:12]} was made for another base model ({made_for[:12]!r}) than "
            f"{inputs.base.folder} ({inputs.base.sha256[:12]}). Leave --head-map out to rank anew."
        )
    head_map_in(ref).check_fits(layers_of(Path(inputs.base.folder)))
    return ref
