"""Data files into canonical shards; the target's parts; the corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq

from p2d_core.errors import DataError
from p2d_core.progress import counted
from p2d_core.samples.conversation import is_conversation
from p2d_core.samples.read import BadRow, read_samples
from p2d_core.samples.rejected import REJECTED, RejectedRows, too_many
from p2d_core.samples.schema import Sample, to_table
from p2d_core.samples.shards import read_shard, write_shards
from p2d_core.samples.source import content_hash
from p2d_core.samples.split import (
    CorpusCounts,
    TargetSplit,
    assemble_corpus,
    draw_target,
    redraw_proxy,
)
from p2d_core.store import ArtifactRef, Making
from tasks.progress import progress_of
from tasks.room import of_corpus, of_source, of_target
from tasks.stage import Runtime, ShardRef, SourceInput, stage

PARTS = ("proxy", "held_out", "evaluation", "rest")


@stage("samples", version="2", room=of_source)
def read_source(making: Making, runtime: Runtime, source: SourceInput) -> None:
    """One source, as it is; rows that are no samples apart, as far as they may be left out."""
    rejected = RejectedRows(runtime.skip_bad_rows)
    with progress_of(f"reading {source.spec.name} (rows)") as progress:
        samples = read_samples(source.spec, on_bad_row=rejected, progress=progress)
        shards = write_shards(_counted_chats(samples, making), making.folder)
    if not source.spec.is_on_hub and content_hash(source.spec) != source.sha256:
        raise DataError(
            f"source {source.spec.name!r}: {source.spec.path} changed after it was checked. Start "
            "the run again once it is as it should be."
        )
    rejected.write(making.folder)
    making.samples = sum(shard.rows for shard in shards)
    making.facts["source"] = source.spec.name
    making.facts["rejected"] = len(rejected.rows)
    making.facts["shards"] = [asdict(shard) for shard in shards]


@stage("samples", room=of_target)
def split_target(
    making: Making,
    runtime: Runtime,
    target: ArtifactRef,
    n_proxy: int,
    n_held_out: int,
    n_evaluation: int,
    seed: int,
) -> None:
    """The target's proxy set, held-out set, evaluation set (none if it has a source) and rest."""
    with progress_of("splitting the target (samples)") as progress:
        samples = list(counted(all_samples(target), size_of(target), progress))
    split = draw_target(
        samples, n_proxy=n_proxy, n_held_out=n_held_out, n_evaluation=n_evaluation, seed=seed
    )
    for part in PARTS:
        pq.write_table(to_table(getattr(split, part)), making.folder / f"{part}.parquet")
    making.samples = len(samples)
    making.facts |= {part: len(getattr(split, part)) for part in PARTS}


@stage("samples", room=of_target)
def redraw_target(making: Making, runtime: Runtime, target: ArtifactRef, draw: int) -> None:
    """The same target with another proxy set; ``draw`` says which."""
    split = redraw_proxy(TargetSplit(**{part: target_part(target, part) for part in PARTS}), draw)
    for part in PARTS:
        pq.write_table(to_table(getattr(split, part)), making.folder / f"{part}.parquet")
    making.samples = len(split.proxy)
    making.facts |= {part: len(getattr(split, part)) for part in PARTS} | {"draw": draw}


@stage("samples", room=of_corpus)
def assemble(
    making: Making,
    runtime: Runtime,
    sources: list[ArtifactRef],
    target: ArtifactRef,
    kept_out: list[ArtifactRef],
    include_target: bool,
) -> None:
    """The corpus: every sample once, none of what quality is measured or gauged on.

    ``kept_out`` are the evaluation and retention samples that have sources of their own.
    """
    excluded = {
        sample.sample_id
        for part in ("proxy", "held_out", "evaluation")
        for sample in target_part(target, part)
    }
    for ref in kept_out:
        excluded |= {sample.sample_id for sample in all_samples(ref)}
    pools: list[Iterable[Sample]] = [all_samples(source) for source in sources]
    total = sum(size_of(source) for source in sources)
    if include_target:
        rest = target_part(target, "rest")
        pools.append(rest)
        total += len(rest)
    counts = CorpusCounts()
    with progress_of("assembling the corpus (samples)") as progress:
        passed = counted(chain.from_iterable(pools), total, progress)
        shards = write_shards(assemble_corpus([passed], excluded, counts), making.folder)
    if not counts.total:
        raise DataError(
            f"the corpus has no samples: {counts.excluded} were left out because they belong to "
            "the proxy, held-out, evaluation or retention samples. Add files to corpus.sources."
        )
    making.samples = counts.total
    making.facts |= {
        "shards": [asdict(shard) for shard in shards],
        "kept": dict(counts.kept),
        "duplicates": counts.duplicates,
        "excluded": counts.excluded,
    }


def _counted_chats(samples: Iterable[Sample], making: Making) -> Iterator[Sample]:
    making.facts["conversations"] = 0
    for sample in samples:
        making.facts["conversations"] += is_conversation(sample)
        yield sample


def refuse_unforeseen_chats(sources: Iterable[ArtifactRef]) -> None:
    """That there are no conversations, where those that were looked at before were none.

    Raises:
        DataError: names the source.
    """
    for source in sources:
        facts = source.manifest.facts
        if facts.get("conversations"):
            raise DataError(
                f"source {facts['source']!r} has {facts['conversations']:,} conversations, the "
                "samples looked at before it were none. Set `format.template: chat`, so that all "
                "samples go through the base's chat template, or `plain`."
            )


def refuse_too_many_rejected(sources: Iterable[ArtifactRef], most: int) -> None:
    """That all sources together have no more rejected rows than may be left out.

    Each alone was held to that when it was read; one that is reused may have been read under
    another limit.

    Raises:
        DataError: names the first of them.
    """
    rows = [row for source in sources for row in rejected_rows(source)]
    if len(rows) > most:
        raise DataError(too_many(rows, most))


def rejected_rows(source: ArtifactRef) -> list[BadRow]:
    """The rows of a source that were no samples."""
    file = source.path / REJECTED
    if not source.manifest.facts.get("rejected"):
        return []
    return [
        BadRow(row["source"], row["row"], row["place"], row["reason"])
        for row in pq.read_table(file).to_pylist()
    ]


def all_samples(ref: ArtifactRef) -> Iterator[Sample]:
    """Every sample of an artifact that is made of shards, a shard at a time."""
    for shard in shards_of(ref):
        yield from read_shard(Path(shard.file))


def size_of(ref: ArtifactRef) -> int:
    """Samples in an artifact that is made of shards."""
    return sum(shard["rows"] for shard in ref.manifest.facts["shards"])


def shards_of(ref: ArtifactRef) -> list[ShardRef]:
    """The shards of a source or corpus, in order."""
    return [
        ShardRef(str(ref.path / shard["file"]), index, shard["sha"])
        for index, shard in enumerate(ref.manifest.facts["shards"])
    ]


def target_part(ref: ArtifactRef, part: str) -> list[Sample]:
    """One of `PARTS` of a split target."""
    return read_shard(ref.path / f"{part}.parquet")
