"""What the model has to be run for, one shard of the corpus at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from p2d_core.affinity import Scorer, Step, Target, scorers, steps_of
from p2d_core.affinity.measuring import MEASURED, in_order_of, measure_shard
from p2d_core.affinity.scoring import SCORES, passing_ids
from p2d_core.affinity.tried import SHARES, is_tried
from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel, parameter_counts
from p2d_core.parquet import parquet_options
from p2d_core.samples.schema import Sample, to_table
from p2d_core.samples.shards import read_shard
from p2d_core.store import ArtifactRef, Making, Recipe, Store
from p2d_core.store.manifest import MANIFEST
from p2d_core.store.room import check_room
from tasks.heads import head_map_in
from tasks.progress import progress_of
from tasks.proxy import slices_in
from tasks.room import of_measurements
from tasks.samples import target_part
from tasks.stage import BaseModel, NotMade, Plugin, Runtime, ShardRef, is_transient, stage
from tasks.together import shared

NO_TARGET = Target((), ())


@dataclass(frozen=True)
class Passing:
    """Which samples of a shard are measured, of those that passed the steps before."""

    sha: str
    """Over the ids of all that passed."""
    share: float = 1.0
    """Of them, see `p2d_core.affinity.tried`."""

    @property
    def identity(self) -> str:
        """As it stands in keys."""
        return self.sha if self.share == 1 else f"{self.sha}, {self.share:g} of it"


def _room(shard: ShardRef, **looked_at: Any) -> int:
    rows = pq.ParquetFile(shard.file).metadata.num_rows
    return of_measurements(rows, _bytes_a_sample(**looked_at))


def _bytes_a_sample(
    base: BaseModel, scorer: Plugin, step: int, heads: ArtifactRef | None, **_: Any
) -> int:
    counts = parameter_counts(Path(base.folder))
    return scorer_step(scorer, step).scorer.bytes_a_sample(counts, head_map_of(heads))


def _sent(
    making: Making,
    scorer: Plugin,
    step: int,
    shard: ShardRef,
    passing: Passing | None,
    previous: ArtifactRef | None,
    **others: Any,
) -> Mapping[str, Any] | None:
    """A worker gets the shard's samples that passed, not the scores of the whole corpus."""
    if not scorer_step(scorer, step).scorer.runs_model:
        return None
    if previous is not None:
        passed = making.scratch / "passed.parquet"
        pq.write_table(to_table(_passed(shard, passing, previous)), passed)
        shard = replace(shard, file=str(passed))
    given = {"shard": shard, "passing": passing, "previous": None}
    return {"scorer": scorer, "step": step, **given, **others}


@stage(
    "measurements",
    outside_key=("scorer", "step", "heads", "previous", "before", "known"),
    room=_room,
    sent=_sent,
)
def measure(
    making: Making,
    runtime: Runtime,
    base: BaseModel,
    measurer: Plugin,
    scorer: Plugin,
    step: int,
    shard: ShardRef,
    passing: Passing | None,
    task_heads: tuple[tuple[int, int], ...],
    head_proxy: ArtifactRef | None,
    target: ArtifactRef | None,
    heads: ArtifactRef | None,
    previous: ArtifactRef | None,
    before: ArtifactRef | None,
    known: ArtifactRef | None,
) -> None:
    """Measures the samples of a shard that passed the steps before, or a share of them.

    In the key stands what measure() reads and no more: of the scorer ``measurer``, of the head map
    the task heads, of the steps before which samples of this shard they let pass (``passing``),
    the target only if the scorer measures it. Another target, or another ranking that ends in the
    same heads, measures nothing again; nor does a larger share what is ``known`` of a smaller one,
    or a step what the one ``before`` measured of the shard.
    """
    one = scorer_step(scorer, step).scorer
    model = model_for(base, runtime, head_proxy)
    samples = _passed(shard, passing, previous)
    smaller = pq.read_table(known.path / MEASURED) if known is not None else None
    there = set(smaller["sample_id"].to_pylist()) if smaller is not None else set()
    new = [sample for sample in samples if sample.sample_id not in there]
    of_target = target_of(target) if target is not None else NO_TARGET
    state = one.prepare(model, head_map_of(heads), of_target)
    of_before = pq.read_table(before.path / MEASURED) if before is not None else None
    measured = measure_shard(one, model, state, new, of_before)
    making.samples = len(new)
    making.tokens = sum(measured["n_tokens"].to_pylist())
    if smaller is not None:
        measured = in_order_of(samples, [measured, smaller])
    pq.write_table(measured, making.folder / MEASURED, **parquet_options(measured.schema))


shared("measurements", measure.fn)


def _passed(shard: ShardRef, passing: Passing | None, previous: ArtifactRef | None) -> list[Sample]:
    """The samples of a shard that are measured; all of it at the first step."""
    samples = read_shard(Path(shard.file))
    if previous is None or passing is None:
        return samples
    passed = passing_ids(previous.path / SCORES, shard.index)
    share = passing.share
    return [s for s in samples if s.sample_id in passed and is_tried(s.sample_id, share)]


def known_of(
    runtime: Runtime, of_shard: Mapping[str, Any], measured_with: Mapping[str, Any]
) -> ArtifactRef | None:
    """What is measured already of the largest smaller share of what passed."""
    passing: Passing | None = of_shard["passing"]
    if passing is None:
        return None
    store = Store(Path(runtime.store))
    for share in sorted(SHARES, reverse=True):
        if share < passing.share:
            recipe = _recipe(of_shard["shard"], replace(passing, share=share), measured_with)
            if (found := store.find(recipe.stage, recipe.key)) is not None:
                return found
    return None


def _recipe(shard: ShardRef, passing: Passing | None, measured_with: Mapping[str, Any]) -> Recipe:
    recipe: Recipe = measure.cache_policy.recipe_of(
        {"shard": shard, "passing": passing, **measured_with}
    )
    return recipe


def with_known(runtime: Runtime, measured: ArtifactRef) -> list[ArtifactRef]:
    """A measurement, and before it those of smaller shares that it took over: what it cost."""
    if isinstance(measured, NotMade):
        return [measured]
    refs, store = [measured], Store(Path(runtime.store))
    while key := refs[0].manifest.beside.get("known"):
        known = store.find("measurements", key)
        if known is None:
            break
        refs.insert(0, known)
    return refs


def check_room_for(
    runtime: Runtime,
    shards: Sequence[tuple[ShardRef, Passing | None]],
    measured_with: Mapping[str, Any],
) -> None:
    """That what is not measured yet of all shards has room: before the first, not at the last.

    Raises:
        StorageError: it has not.
    """
    store = Store(Path(runtime.store))
    rows = 0
    for shard, passed in shards:
        recipe = _recipe(shard, passed, measured_with)
        if not (store.path(recipe.stage, recipe.key) / MANIFEST).exists():
            rows += pq.ParquetFile(shard.file).metadata.num_rows
    if rows:
        needed = of_measurements(rows, _bytes_a_sample(**measured_with))
        check_room(store.root, needed, f"measuring {rows:,} samples")


@task(
    name="measurements",
    retries=2,
    retry_delay_seconds=[1, 5],
    retry_condition_fn=is_transient,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def measure_together(
    runtime: Runtime, shards: list[dict[str, Any]], measured_with: Mapping[str, Any]
) -> list[ArtifactRef]:
    """`measure` for every shard in one task, for scorers that run no model: with a thousand shards
    a task each would take longer than their work. The artifacts are the same."""
    made: list[ArtifactRef] = []
    with progress_of("measurements (shards)") as progress:
        for of_shard in shards:
            made.append(measure.fn(runtime, **of_shard, **measured_with))
            progress(len(made), len(shards))
    return made


def scorer_step(scorer: Plugin, step: int) -> Step:
    """One step of a scorer; a scorer that is no chain has one."""
    return steps_of(scorers.make(scorer.name, scorer.options))[step]


def measurer_of(scorer: Scorer) -> Plugin:
    """What of a scorer its measurements depend on."""
    read = tuple((name, getattr(scorer, name)) for name in scorer.measured_by)
    return Plugin(scorers.name_of(type(scorer)), scorer.version, read)


def n_steps(scorer: Plugin) -> int:
    """How many steps a scorer has."""
    return len(steps_of(scorers.make(scorer.name, scorer.options)))


def model_for(base: BaseModel, runtime: Runtime, head_proxy: ArtifactRef | None) -> CapturedModel:
    """The base, with the task heads' tuned slices at hand if there are any."""
    model = base.captured(runtime)
    return model.with_tuned(slices_in(head_proxy)) if head_proxy is not None else model


def head_map_of(heads: ArtifactRef | None) -> HeadMap | None:
    """The head map, None for scorers that look at no heads."""
    return head_map_in(heads) if heads is not None else None


def target_of(ref: ArtifactRef) -> Target:
    """What scorers may know of the target."""
    return Target(target_part(ref, "proxy"), target_part(ref, "held_out"))
