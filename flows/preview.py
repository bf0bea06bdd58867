"""The samples of a run as its stages will have them, read without keeping any."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from flows.inputs import Inputs
from flows.settings import RunSettings
from p2d_core.samples.read import read_samples
from p2d_core.samples.rejected import RejectedRows
from p2d_core.samples.schema import Sample
from p2d_core.samples.shards import cut_into_shards, shard_hash
from p2d_core.samples.split import CorpusCounts, TargetSplit, assemble_corpus, draw_target
from tasks.stage import ShardRef, SourceInput

DRAWN = 2048
"""Samples of the corpus that are kept to be timed: the smallest ids, which are a draw."""


@dataclass
class Preview:
    """Parts of the target, and what is known of the corpus."""

    target: TargetSplit
    evaluation: list[Sample]
    retention: list[Sample]
    corpus: int
    """Samples; estimated where `shards` is None."""
    drawn: list[Sample]
    """Of the corpus, in its order."""
    shards: list[ShardRef] | None
    """None: time ran out before the corpus was read."""
    rows_in_shard: int
    """Of the largest."""
    seconds_to_read: float
    """The corpus; scaled up where it was not read whole."""


@dataclass
class _Source:
    """Reads one source, until a time."""

    given: SourceInput
    until: float
    skip_bad_rows: int
    rows: int = 0
    expected: int = 0
    """Rows that there are, by the share of the bytes read; 0 while that is not known."""
    cut: bool = False

    def samples(self) -> Iterator[Sample]:
        rejected = RejectedRows(self.skip_bad_rows)
        for sample in read_samples(self.given.spec, on_bad_row=rejected, progress=self._told):
            if time.monotonic() > self.until and self.expected > self.rows:
                self.cut = True
                return
            self.rows += 1
            yield sample

    def _told(self, rows: int, of: int) -> None:
        self.expected = of


@dataclass
class _Shards:
    """What passes, cut into shards: their hashes and a draw of the samples, no more."""

    shards: list[ShardRef] = field(default_factory=list)
    drawn: list[tuple[str, int, Sample]] = field(default_factory=list)
    rows: int = 0
    largest: int = 0

    def take(self, samples: Iterator[Sample]) -> None:
        for index, shard in enumerate(cut_into_shards(samples)):
            self.shards.append(ShardRef("", index, shard_hash(shard)))
            placed = [(each.sample_id, self.rows + i, each) for i, each in enumerate(shard)]
            self.drawn = heapq.nsmallest(DRAWN, chain(self.drawn, placed))
            self.rows += len(shard)
            self.largest = max(self.largest, len(shard))


def preview(settings: RunSettings, inputs: Inputs, seconds: float) -> Preview:
    """Reads the target and the evaluation samples whole, and the corpus for at most ``seconds``."""

    def whole(given: SourceInput | None) -> list[Sample]:
        if given is None:
            return []
        rejected = RejectedRows(settings.skip_bad_rows)
        return list(read_samples(given.spec, on_bad_row=rejected))

    evaluation, retention = whole(inputs.evaluation), whole(inputs.retention)
    target = draw_target(
        whole(inputs.target),
        n_proxy=settings.proxy.samples,
        n_held_out=settings.proxy.held_out,
        n_evaluation=0 if evaluation else settings.evaluation.samples,
        seed=settings.seed,
    )
    kept_out = [*target.proxy, *target.held_out, *target.evaluation, *evaluation, *retention]
    start = time.monotonic()
    share = seconds / max(1, len(inputs.corpus))
    sources = [
        _Source(each, start + share * (i + 1), settings.skip_bad_rows)
        for i, each in enumerate(inputs.corpus)
    ]
    pools = [source.samples() for source in sources]
    if settings.corpus.include_target:
        pools.append(iter(target.rest))
    cut = _Shards()
    cut.take(assemble_corpus(pools, {sample.sample_id for sample in kept_out}, CorpusCounts()))
    scale = _scale(sources, len(target.rest) if settings.corpus.include_target else 0)
    return Preview(
        target=target,
        evaluation=evaluation or target.evaluation,
        retention=retention,
        corpus=round(cut.rows * scale),
        drawn=[sample for _, _, sample in sorted(cut.drawn, key=lambda each: each[1])],
        shards=None if any(source.cut for source in sources) else cut.shards,
        rows_in_shard=cut.largest,
        seconds_to_read=(time.monotonic() - start) * scale,
    )


def _scale(sources: list[_Source], of_target: int) -> float:
    """All rows over those read."""
    read = of_target + sum(source.rows for source in sources)
    rest = sum(source.expected - source.rows for source in sources if source.cut)
    return (read + rest) / max(1, read)
