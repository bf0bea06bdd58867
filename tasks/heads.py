"""Ranks the query heads and keeps the head map with its picture."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow.parquet as pq

from p2d_core.attention.layout import attention_layers
from p2d_core.heads.draws import mean_of_draws
from p2d_core.heads.drift import agreement_of
from p2d_core.heads.head_map import HEADS, HeadMap, HeadPick, read_head_map
from p2d_core.heads.picture import draw
from p2d_core.heads.ranking import RankingEvidence, rankers
from p2d_core.models import load_model
from p2d_core.store import ArtifactRef, Making
from tasks.elsewhere import as_it_is
from tasks.progress import progress_of
from tasks.proxy import slices_in
from tasks.samples import target_part
from tasks.stage import BaseModel, Plugin, Runtime, stage

PICTURE = "heads.png"


@stage("heads", sent=as_it_is)
def rank_heads(
    making: Making,
    runtime: Runtime,
    base: BaseModel,
    proxy: ArtifactRef | None,
    target: ArtifactRef,
    ranker: Plugin,
    pick: HeadPick,
) -> None:
    """Every query head with its score; the best are the task heads."""
    captured = base.captured(runtime)
    made = rankers.make(ranker.name, ranker.options)
    if proxy is None or made.runs_model or base.precision == "float32":
        model = captured.model
    else:
        # as the proxy run had it: a lower precision would round away some of what that moved
        model = load_model(captured.folder, "float32", captured.device)
    layers = attention_layers(model)
    with progress_of("heads") as progress:
        evidence = RankingEvidence(
            model=model,
            layers=layers,
            proxy=slices_in(proxy) if proxy is not None else None,
            samples=captured.encode(target_part(target, "proxy")),
            pad_id=captured.pad_id,
            progress=progress,
        )
        scores = made.rank(evidence)
    _keep(making, pick.of(scores, layers[0].n_kv_groups), ranker)
    making.samples = len(evidence.samples)


@stage("heads")
def average_heads(
    making: Making,
    runtime: Runtime,
    base: BaseModel,
    draws: list[ArtifactRef],
    ranker: Plugin,
    pick: HeadPick,
) -> None:
    """One head map of several, each ranked on another draw of the proxy set."""
    maps = [head_map_in(ref) for ref in draws]
    scores = mean_of_draws([each.scores for each in maps])
    _keep(making, pick.of(scores, maps[0].n_kv_groups), ranker)
    making.facts |= {"draws": len(maps), "agreement": asdict(agreement_of(maps))}


def _keep(making: Making, head_map: HeadMap, ranker: Plugin) -> None:
    pq.write_table(head_map.to_table(), making.folder / HEADS)
    draw(head_map, making.folder / PICTURE, ranker.name)
    making.facts |= {
        "ranker": ranker.name,
        "total": head_map.scores.numel(),
        "task_heads": [list(head) for head in head_map.task_heads],
    }


def head_map_in(ref: ArtifactRef) -> HeadMap:
    """The head map of a `heads` artifact."""
    return read_head_map(ref.path / HEADS)
